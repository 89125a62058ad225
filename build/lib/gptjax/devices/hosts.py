"""This process and its machine: joining other hosts, agreeing with them, caches, CPU settings."""

import ctypes
import os
import re
import socket
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptjax.errors import UserError

# From glibc's malloc.h: parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def cache_root() -> Path:
  """Where this user's machine keeps what can be made again."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptjax"


def join_hosts(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
  """Makes this process one of a job's, with the devices of all. Call before any computation.

  Without arguments JAX finds the others. jax 0.10 does so, in this order, in a job of Open MPI up
  to version 4 (by the variables of mpirun) or of Slurm (by those of srun), where each process takes
  the one device of its rank on the node; on Cloud TPU, by GKE's variables or the metadata of a TPU
  VM; and in an indexed Job or JobSet of Kubernetes, if the package `kubernetes` is installed. With
  arguments nothing is looked for, and this process takes all devices that it sees.

  Args:
    coordinator: HOST:PORT of process 0, a free port there that every host can reach.
    num_processes: of the job.
    process_id: of this process, from 0.

  Raises:
    UserError: some of the arguments are missing or cannot be right, or the others are not found.
      If process 0 does not answer for five minutes, jaxlib aborts the process instead.
  """
  flags = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
  missing = [f"--{name}" for name, value in flags.items() if value is None]
  explicit = len(missing) < len(flags)
  if explicit:
    if missing:
      raise UserError(
        "--coordinator, --num_processes and --process_id go together: "
        f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing."
      )
    port = re.fullmatch(r"\S+:(\d{1,5})", coordinator)
    if not port or not 0 < int(port[1]) < 2**16:
      raise UserError(
        f"--coordinator={coordinator}: expected HOST:PORT of process 0, such as 10.0.0.1:1234."
      )
    if num_processes < 1:
      raise UserError(f"--num_processes={num_processes}: a job has at least one process.")
    if not 0 <= process_id < num_processes:
      raise UserError(
        f"--process_id={process_id}: expected 0 to {num_processes - 1}, one for each of "
        f"--num_processes={num_processes}."
      )
  try:
    if process_id == 0:
      # jaxlib 0.10 ends with a segmentation fault where it cannot listen.
      socket.create_server(("", int(port[1]))).close()
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      cluster_detection_method="deactivate" if explicit else None,
    )
  except (ValueError, RuntimeError, OSError) as error:
    reason = str(error).split("\n")[0]
    if explicit:
      raise UserError(
        f"--coordinator={coordinator}: cannot join the other hosts there: {reason}"
      ) from error
    raise UserError(
      f"--distributed: JAX does not find the other hosts ({reason.rstrip('.')}). Pass "
      "--coordinator=HOST:PORT --num_processes=N --process_id=I on each host."
    ) from error


def from_all_hosts(value: int) -> list[int]:
  """The values of all processes (0 to 2**32 - 1), in their order, on each of them.

  Whatever decides if a process takes part in a computation has to be decided for all: the others
  would wait for it for ever. Every process makes the same calls in the same order.
  """
  return multihost_utils.process_allgather(np.uint32(value)).tolist()


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
