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

# Seconds without a heartbeat after which a process of a job counts as lost. A thread of its own
# sends the heartbeat, so that compilation does not delay it.
_HEARTBEAT_SECONDS = 30
_FAREWELL_SECONDS = 2.0

# From glibc's malloc.h: parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def cache_root() -> Path:
  """The folder for this user's caches."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptjax"


def join_hosts(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
  """Joins this process to a job of several, which then share all devices. Call it first.

  Without arguments JAX finds the other processes. jax 0.10 does so, in this order, in a job of Open
  MPI up to version 4 (by the variables of mpirun) or Slurm (by srun's), where each process takes
  the one device of its rank on the node; on Cloud TPU, by GKE's variables or the metadata of a TPU
  VM; and in an indexed Job or JobSet of Kubernetes, if the package `kubernetes` is installed. With
  arguments nothing is looked for, and this process takes all devices that it sees.

  Args:
    coordinator: HOST:PORT of process 0, a free port there that every host can reach.
    num_processes: number of processes in the job.
    process_id: number of this process, from 0.

  Raises:
    UserError: some arguments are missing or cannot be right, or other processes are not found. If
      process 0 does not answer for five minutes, jaxlib aborts the process instead.
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
      # jaxlib 0.10 ends with a segmentation fault if it cannot listen.
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
  """Ends a failing process of several with a sentence, without waiting for the others.

  At its normal end a process waits five minutes for the others of its job, while they wait for it
  in a collective. Anything to be saved must be saved within this context.
  """
  try:
    yield
  except BaseException as error:
    if jax.process_count() == 1 or isinstance(error, SystemExit):  # All processes exit then.
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
  """Ends this process with a sentence when another process of its job is lost.

  Nothing is saved then: a checkpoint that is being written would wait for the lost process. A
  process that is just waiting for the lost one to save may be aborted by jaxlib instead, which
  says that another task died.
  """
  try:
    yield
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    # A save turns what it meets into a UserError about the folder, whatever the reason.
    cause = error.__cause__ if isinstance(error, UserError) else error
    signs = r"Gloo|NCCL|coordination|heartbeat"
    signs += r"|[Cc]onnection|[Ss]ocket closed" if cause is error else ""
    if jax.process_count() == 1 or not re.search(signs, str(cause)):
      raise
    reason = str(cause).split("\n")[0]
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
    # jaxlib aborts the others when process 0 is gone; most can still say so themselves before that.
    time.sleep(_FAREWELL_SECONDS)
  os._exit(status)


def from_all_hosts(value: int) -> list[int]:
  """Gathers a value (0 to 2**32 - 1) from each process, in their order, on all of them.

  All processes must take part in a computation or none: otherwise some would wait for ever. Every
  process makes the same calls in the same order.
  """
  return multihost_utils.process_allgather(np.uint32(value)).tolist()


def keep_compiled_programs() -> None:
  """Makes JAX cache programs that take a second or more to compile in this user's cache folder,
  unless JAX_COMPILATION_CACHE_DIR or JAX's own setting names another."""
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "compiled"))


def prepare_cpu() -> None:
  """Sets JAX up for CPUs. Call it before the first computation.

  Each of several simulated CPU devices holds a thread of XLA's pool while it waits for the others
  in a collective. In jax 0.10 the pool has one thread per device, so that none is left for the
  products that the others still have to finish, and all wait for ever: hence a larger pool, and no
  asynchronous dispatch. On one device that gains nothing anyway: host and device share the cores.
  """
  devices = re.search(r"force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
  if devices and int(devices[1]) > 1:
    os.environ.setdefault("NPROC", str(4 * int(devices[1])))  # XLA's name for the size of its pool.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  if jax.default_backend() == "cpu":
    keep_freed_memory()


def keep_freed_memory() -> None:
  """Makes malloc keep freed memory for the next step. Does nothing if malloc is not glibc's.

  XLA:CPU frees a step's temporaries at its end. glibc returns blocks of that size to the system,
  which then has to map and clear every page again: a quarter of a step's time
  (experiments/cpu_speed).
  """
  library = ctypes.CDLL(None)
  if hasattr(library, "mallopt"):
    library.mallopt(_M_MMAP_MAX, 0)
    library.mallopt(_M_TRIM_THRESHOLD, -1)
    library.mallopt(_M_ARENA_MAX, 1)
