"""Settings of the process that make a CPU a better device. They touch no accelerator."""

import ctypes

import jax

# From glibc's malloc.h: parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def prepare_cpu() -> None:
  """Call before the first computation; what has run already keeps its own setting.

  With several (simulated) CPU devices, a step that is dispatched while the one before still runs
  can take the threads that its collectives wait for, and both wait for ever. On one device
  dispatching ahead gains nothing: host and device are the same cores.
  """
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
