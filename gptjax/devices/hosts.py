"""This process and its machine: joining other hosts, agreeing with them, caches, CPU settings."""

import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptjax.errors import UserError

# After so long without a sign of life a process of a job is held for lost. The sign is given by a
# thread of its own, so that no compilation is in the way.
_HEARTBEAT_SECONDS = 30
_FAREWELL_SECONDS = 2.0

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
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
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


@contextlib.contextmanager
def leaves_at_once() -> Iterator[None]:
  """Lets one of several processes that fails end with a sentence, and without the others.

  A program that ends by itself waits for the others of its job, for five minutes, while they wait
  for it in a collective. What has to be saved is saved within this context.
  """
  try:
    yield
  except BaseException as error:
    if jax.process_count() == 1 or isinstance(error, SystemExit):  # All of them leave then.
      raise
    status = 1
    if isinstance(error, UserError):
      print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
      status = 128 + signal.SIGINT
    else:
      traceback.print_exception(error)
    _leave(status)


@contextlib.contextmanager
def without_partner() -> Iterator[None]:
  """Ends this process with a sentence when another of its job is lost.

  Nothing is saved then: the checkpoint that is being written waits for the one that is lost.
  """
  try:
    yield
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    lost = re.search(r"Gloo|NCCL|coordination|heartbeat|[Cc]onnection|[Ss]ocket closed", str(error))
    if jax.process_count() == 1 or isinstance(error, UserError) or not lost:
      raise
    reason = str(error).split("\n")[0]
    print(
      f"error: process {jax.process_index()} of {jax.process_count()} has lost another, whose own "
      f"log says why ({reason}). Run again to go on from the last checkpoint.",
      file=sys.stderr,
    )
    _leave(1)


def _leave(status: int) -> NoReturn:
  sys.stdout.flush()
  sys.stderr.flush()
  if jax.process_index() == 0:
    # jaxlib aborts the others when process 0 is gone; most have the same to say, and say it now.
    time.sleep(_FAREWELL_SECONDS)
  os._exit(status)


def from_all_hosts(value: int) -> list[int]:
  """The values of all processes (0 to 2**32 - 1), in their order, on each of them.

  Whatever decides if a process takes part in a computation has to be decided for all: the others
  would wait for it for ever. Every process makes the same calls in the same order.
  """
  return multihost_utils.process_allgather(np.uint32(value)).tolist()


def keep_compiled_programs() -> None:
  """Makes JAX keep what took it a second or more to compile in this user's cache, for the next
  start with the same shapes. JAX_COMPILATION_CACHE_DIR or JAX's own setting says another folder."""
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "compiled"))


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
