"""The folder of a run: one that can be written, by one process at a time."""

import contextlib
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator

import jax
from etils import epath

from gptjax.devices.hosts import from_all_hosts
from gptjax.errors import UserError

_LOCK = ".trainer.lock"


def make_workdir(workdir: epath.PathLike) -> epath.Path:
  """Creates the work directory; UserError if process 0 cannot write it or others do not see it."""
  if re.match("https?:", str(workdir)):
    raise UserError(
      f"--workdir={workdir}: a web address cannot be written; name a folder or gs://."
    )
  workdir = epath.Path(workdir).expanduser()
  probe = workdir / ".writable"
  problem = None
  if jax.process_index() == 0:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      probe.write_text("")
    except (OSError, ImportError) as error:  # etils imports the libraries for gs:// on first use.
      problem = error
  if from_all_hosts(problem is not None)[0]:
    reason = getattr(problem, "strerror", None) or problem or "process 0 says why"
    raise UserError(f"--workdir={workdir}: cannot be written ({reason}).") from problem
  unseen = [process for process, seen in enumerate(from_all_hosts(probe.exists())) if not seen]
  if jax.process_index() == 0:
    probe.unlink()
  if unseen:
    raise UserError(
      f"--workdir={workdir}: process {unseen[0]} does not see what process 0 writes there; "
      "use a directory that all hosts share, on gs:// or a network file system."
    )
  return workdir


@contextlib.contextmanager
def only_trainer(workdir: epath.Path) -> Iterator[None]:
  """Keeps other processes from training in a local work directory; UserError if one does.

  The system drops the lock with the process, however that ends. Of several hosts process 0 has it.
  """
  with contextlib.ExitStack() as stack:
    holder = ""
    if jax.process_index() == 0 and "://" not in os.fspath(workdir):
      lock = stack.enter_context(open(workdir / _LOCK, "a+"))  # epath knows no "a+"
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}")
        lock.flush()
      except BlockingIOError:
        lock.seek(0)
        holder = lock.read() or "another process"
      except OSError:  # A file system that has no locks.
        pass
    if from_all_hosts(bool(holder))[0]:
      who = holder or "process 0 says which"
      raise UserError(f"--workdir={workdir}: a run trains there already ({who}); stop it first.")
    yield
