"""Settings of the process that make a CPU a better device. They touch no accelerator."""

import ctypes
import os
import re

import jax

# From glibc's malloc.h: parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def prepare_cpu() -> None:
  """Call before the first computation; what has run already keeps its own setting.

  Of several simulated CPU devices, each holds a thread of XLA's pool while it waits for the others
  in a collective. A pool of one thread a device, which jax 0.10 makes, leaves none to the products
  that the others still have to finish, and all wait for ever: hence a larger pool, and no step
  ahead of the one that runs. On one device dispatching ahead gains nothing anyway: host and device
  are the same cores.
  """
  devices = re.search(r"force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
  if devices and int(devices[1]) > 1:
    os.environ.setdefault("NPROC", str(4 * int(devices[1])))  # XLA's name for the size of its pool.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  if jax.default_backend() == "cpu":
    keep_freed_memory()


def keep_freed_memory() -> None:
  """Makes malloc keep what is freed, for the next step to take.

  XLA:CPU frees the temporaries of a step when it ends. glibc hands blocks of that size back to the
  system, which then has to map and clear every page of them again: a quarter of a step's time
  (experiments/cpu_speed). Does nothing where malloc is not glibc's.
  """
  library = ctypes.CDLL(None)
  if hasattr(library, "mallopt"):
    library.mallopt(_M_MMAP_MAX, 0)
    library.mallopt(_M_TRIM_THRESHOLD, -1)
    library.mallopt(_M_ARENA_MAX, 1)
