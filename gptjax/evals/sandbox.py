"""Runs untrusted programs under limits in a process of their own, and judges them from another.

There are two processes: the program's defines its functions and answers calls; the judge's runs the
check, which calls them by `from program import NAME`. Arguments and results are copied as values of
Python's own types (numbers, texts, lists, tuples, sets, dicts). The program has neither the check
nor a way to the process that runs it.

Each process has an empty working directory that is deleted, a cleaned environment, limits on
processor time, wall time, address space, size of a file and open files, and at the end SIGKILL. The
kernel forbids it to read and write other files, to change any file's mode, owner, times or
attributes, to start processes, and to reach other processes, networks, sockets and shared memory
(Landlock and a filter of system calls, on Linux). If available, bubblewrap is put around it, which
hides other files, processes and networks; else namespaces by `unshare`.

Isolation is not assumed: a probe tries it out once in each process that evaluates, and lists the
forbidden things that it could do in `Isolation.problems`. Neither tried nor prevented are filling
the disk with many small files, keeping processors busy, and exploits of kernel bugs.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from absl import logging

from gptjax.errors import UserError

_UNSHARE = ("--user", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
_BUBBLEWRAP = ("--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL")
_TOOLS = {"bubblewrap": "bwrap", "namespaces": "unshare", "none": None}
# Paths that Python needs to run, if they exist.
_READABLE = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/nix/store")
_SOURCES = {name: Path(__file__).with_name(f"sandbox_{name}.py") for name in ("kernel", "runner")}
_PROBE = Path(__file__).with_name("sandbox_probe.py")
_START = """\
import json, sys
order = json.load(sys.stdin)
names = {}
for name in ("kernel", "runner"):
  names[name] = {"__name__": name}
  exec(compile(order.pop(name), name + ".py", "exec"), names[name])
names["runner"]["main"](names["kernel"]["confine"], order)
"""
# An argument that marks the processes; Python ignores the last one.
MARK = "gptjax-sandbox"
_SHOWN_CHARACTERS = 300
# Time for a process that has ended to get a status.
_GRACE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of a run. wall_seconds: until both processes are killed. cpu_seconds: for each process,
  all threads. memory_bytes: address space. file_bytes: for a file, a message, and the output."""

  wall_seconds: float = 10.0
  cpu_seconds: int = 10
  memory_bytes: int = 2**30
  file_bytes: int = 2**20


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Outcome of a run. passed: the program and the check ran to their ends. reason: else the cause,
  in one sentence. output: everything the program printed, errors included."""

  passed: bool
  reason: str
  output: str


@dataclasses.dataclass(frozen=True)
class Isolation:
  """Isolation around the processes: 'bubblewrap', 'namespaces', or 'none' beside the kernel's
  filters. problems: forbidden things that the probe could do, or why it could not be run."""

  name: str
  problems: tuple[str, ...] = ()

  def command(self, folder: Path) -> list[str]:
    """The start of the command line for an isolated command, which may write in `folder`."""
    tool = _TOOLS[self.name] and shutil.which(_TOOLS[self.name])
    match self.name:
      case "bubblewrap":
        binds = [option for path in _readable() for option in ("--ro-bind-try", path, path)]
        own = ["--proc", "/proc", "--dev", "/dev", "--bind", str(folder), str(folder)]
        return [tool, *_BUBBLEWRAP, *binds, *own, "--chdir", str(folder), "--"]
      case "namespaces":
        return [tool, *_UNSHARE]
    return []


def require(*, accept_weak: bool) -> Isolation:
  """The isolation for programs that are judged on this machine.

  Raises:
    UserError: it does not hold, and `accept_weak` is false.
  """
  isolation = find_isolation()
  if isolation.problems and not accept_weak:
    raise UserError(
      f"generated code is not run here, because it could {'; '.join(isolation.problems)}. Install "
      "bubblewrap, evaluate in a virtual machine, or accept that by --accept_weak_isolation."
    )
  return isolation


@functools.cache
def find_isolation() -> Isolation:
  """The first isolation that holds against the probe; if none, the one with the fewest problems."""
  found = []
  for name, tool in _TOOLS.items():
    if tool is not None and shutil.which(tool) is None:
      continue
    found.append(probe(Isolation(name)))
    if not found[-1].problems:
      return found[-1]
  return min(found, key=lambda one: len(one.problems))


def probe(isolation: Isolation) -> Isolation:
  """Tries forbidden things from inside; returns the isolation with the problems found."""
  with (
    tempfile.TemporaryDirectory() as folder,
    socket.create_server(("127.0.0.1", 0)) as server,
    socket.socket(socket.AF_UNIX) as local,
  ):
    victim = Path(folder) / "victim"
    victim.write_text("whole")
    path = str(Path(folder) / "socket")
    local.bind(path)
    local.listen()
    told = {"victim": str(victim), "port": server.getsockname()[1], "socket": path}
    told |= {"pid": os.getpid()}
    program = f"told = {told!r}\n{_PROBE.read_text()}"
    outcome = run(program, limits=Limits(wall_seconds=60), isolation=isolation)
  lines = outcome.output.splitlines()
  if not outcome.passed or lines[-1:] != ["done"]:
    reason = outcome.reason or "it said nothing"
    return dataclasses.replace(isolation, problems=(f"not be tried out ({reason})",))
  return dataclasses.replace(isolation, problems=tuple(lines[:-1]))


def run(
  program: str,
  check: str = "",
  limits: Limits = Limits(),
  isolation: Isolation | None = None,
) -> Outcome:
  """Runs a Python program within limits, and then its check.

  Args:
    program: defines functions, and may do more.
    check: passes if it runs to its end; `program` is a module of those functions. Without a check,
      the program passes by running to its end, which it could claim falsely.
    limits: limits of each process.
    isolation: isolation around them; None is the result of `find_isolation`.
  """
  isolation = find_isolation() if isolation is None else isolation
  with (
    _folder() as folder,
    tempfile.TemporaryFile() as printed,
    tempfile.TemporaryFile() as written,
    contextlib.ExitStack() as ends,
  ):
    questions, answers = os.pipe(), os.pipe()
    with contextlib.ExitStack() as pipes:
      for end in (*questions, *answers):
        pipes.callback(os.close, end)
      start = functools.partial(_start, isolation, folder, limits, ends)
      served = start("program", program, (questions[0], answers[1]), printed)
      judge = start("judge", check, (answers[0], questions[1]), written)
    late = not _waited(judge, limits.wall_seconds)
    verdict = {} if late else _read_verdict(written)
    if not late and not verdict.get("passed") and not verdict.get("reason"):
      late = not _waited(served, _GRACE_SECONDS)
    # Read before killing, which changes the statuses.
    statuses = served.poll(), judge.poll()
    ends.close()
    printed.seek(0)
    text = printed.read(limits.file_bytes).decode(errors="replace")
  if late:
    return Outcome(False, f"It ran for more than {limits.wall_seconds:g} seconds.", text)
  if verdict.get("passed"):
    return Outcome(True, "", text)
  if verdict.get("reason"):
    return Outcome(False, f"It failed: {verdict['reason'][:_SHOWN_CHARACTERS]}", text)
  if not verdict and statuses[0] == 0:  # The program waited for calls until the judge was gone.
    return Outcome(False, f"Its check: {_reason(statuses[1], '', limits)}", text)
  return Outcome(False, _reason(statuses[0], text, limits), text)


def _start(
  isolation: Isolation,
  folder: Path,
  limits: Limits,
  ends: contextlib.ExitStack,
  role: str,
  code: str,
  pipes: tuple[int, int],
  output: IO[bytes],
) -> subprocess.Popen:
  """Starts one of the two processes, which is killed when `ends` is closed."""
  own = folder / role
  own.mkdir()
  order = dataclasses.asdict(limits) | {"role": role, "code": code, "folder": str(own)}
  order |= {"read": pipes[0], "write": pipes[1], "readable": _readable()}
  order |= {name: path.read_text() for name, path in _SOURCES.items()}
  with tempfile.TemporaryFile() as told:
    told.write(json.dumps(order).encode())
    told.seek(0)
    process = subprocess.Popen(
      [*isolation.command(own), sys.executable, "-I", "-B", "-c", _START, MARK],
      stdin=told,
      stdout=output,
      stderr=output if role == "program" else subprocess.DEVNULL,
      cwd=own,
      env={"PATH": os.defpath, "HOME": str(own), "TMPDIR": str(own), "LANG": "C.UTF-8"},
      start_new_session=True,
      pass_fds=pipes,
    )
  ends.callback(_kill, process)
  return process


def _waited(process: subprocess.Popen, seconds: float) -> bool:
  """Whether a process ends within so many seconds."""
  try:
    process.wait(seconds)
  except subprocess.TimeoutExpired:
    return False
  return True


def _kill(process: subprocess.Popen) -> None:
  # An ended process may have left others in its group, which keep its id from being reused.
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def _read_verdict(written: IO[bytes]) -> dict[str, Any]:
  """The last message of the judge; {} if it was stopped."""
  written.seek(0)
  try:
    return json.loads(written.read())
  except ValueError:
    return {}


def _reason(status: int, text: str, limits: Limits) -> str:
  number = -status if status < 0 else status - 128
  if number == signal.SIGXCPU:
    return f"It used more than {limits.cpu_seconds} seconds of processor time."
  if number > 0 and number in set(signal.Signals):
    return f"It was stopped by {signal.Signals(number).name}."
  if status == 0:
    return "It ended before its last line."
  if not (lines := text.strip().splitlines()):
    return f"It ended with status {status}."
  if lines[-1].startswith("MemoryError"):
    return f"It asked for more than {limits.memory_bytes >> 20} MiB of memory."
  if len(text) >= limits.file_bytes:
    return f"It printed more than {limits.file_bytes >> 10} KiB."
  return f"It failed: {lines[-1][:_SHOWN_CHARACTERS]}"


@functools.cache
def _readable() -> Sequence[str]:
  """The paths that this Python and its libraries are in."""
  python = {sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable))}
  return [*_READABLE, *sorted(python)]


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
  folder = Path(tempfile.mkdtemp(prefix=f"{MARK}-"))
  try:
    yield folder
  finally:
    try:
      _remove(folder)
    except OSError as error:
      logging.warning("%s is left behind: %s.", folder, error)


def _remove(folder: Path) -> None:
  """Removes a tree of any depth, by moving the content of its directories to the top."""
  fresh = (folder / f"{secrets.token_hex(8)}-{number}" for number in itertools.count())
  while names := os.listdir(folder):
    for path in (folder / name for name in names):
      if path.is_symlink() or not path.is_dir():
        path.unlink()
        continue
      path.chmod(0o700)
      for inner in map(path.joinpath, os.listdir(path)):
        if inner.is_dir() and not inner.is_symlink():
          inner.chmod(0o700)  # Otherwise it cannot be moved.
        inner.rename(next(fresh))
      path.rmdir()
  folder.rmdir()
