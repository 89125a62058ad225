"""Programs that nobody has read, run in a process of their own under limits.

What holds on every POSIX system: a new session and an empty working directory that vanishes; a
cleaned environment, stdin at its end; limits on processor time, wall time, address space, size of
a file and open files; at the end SIGKILL for the whole group. An audit hook refuses connections,
new processes, signals to others, and to change files outside of the working directory. A program
that means to can go around the hook, through `ctypes` for one.

Where Linux allows it, the kernel refuses too: a filter of system calls (seccomp) to start processes
or to leave the group that is killed, Landlock to write outside of the directory; and `unshare`
gives the program no network and process ids of its own, all of which end with it.

What this does not protect from: reading what the user may read; many files, each within the limit;
a program that looks in the runner for what tells that it passed; holes of the kernel. Programs that
are hostile, not merely wrong, belong into a virtual machine.
"""

import dataclasses
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_UNSHARE = ("--user", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
_RUNNER = Path(__file__).with_name("sandbox_runner.py")
_SHOWN_CHARACTERS = 300


@dataclasses.dataclass(frozen=True)
class Limits:
  """wall_seconds: until it is killed. cpu_seconds: of its processors, all of its threads.
  memory_bytes: of address space. file_bytes: of one file, and of what it prints."""

  wall_seconds: float = 10.0
  cpu_seconds: int = 10
  memory_bytes: int = 2**30
  file_bytes: int = 2**20


@dataclasses.dataclass(frozen=True)
class Outcome:
  """passed: the program ran to its end without an error. reason: else what stopped it, in one
  sentence. output: what it printed, errors included."""

  passed: bool
  reason: str
  output: str


def run(program: str, limits: Limits = Limits()) -> Outcome:
  """Runs a Python program to its end, or to that of its limits."""
  with (
    tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
    tempfile.TemporaryFile() as output,
    tempfile.TemporaryFile() as order,
  ):
    # A program that leaves early has not printed it.
    token = secrets.token_hex(16)
    settings = dataclasses.asdict(limits) | {"program": program, "token": token, "folder": folder}
    order.write(json.dumps(settings).encode())
    order.seek(0)
    process = subprocess.Popen(
      [*_isolation(), sys.executable, "-I", "-B", str(_RUNNER)],
      stdin=order,
      stdout=output,
      stderr=output,
      cwd=folder,
      env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
      start_new_session=True,
    )
    late = False
    try:
      process.wait(limits.wall_seconds)
    except subprocess.TimeoutExpired:
      late = True
    finally:
      # Not yet waited for, or its own: the id of the group cannot be another's.
      _kill_group(process.pid)
      process.wait()
    output.seek(0)
    text = output.read(limits.file_bytes).decode(errors="replace")
  printed, found, _ = text.rpartition(token)
  if late:
    return Outcome(False, f"It ran for more than {limits.wall_seconds:g} seconds.", text)
  if found and process.returncode == 0:
    return Outcome(True, "", printed)
  return Outcome(False, _reason(process.returncode, text, limits), text)


def _kill_group(group: int) -> None:
  try:
    os.killpg(group, signal.SIGKILL)
  except ProcessLookupError:
    return


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
def _isolation() -> tuple[str, ...]:
  """The command that takes the network away, or nothing where it may not."""
  tool = shutil.which("unshare")
  if tool is None:
    return ()
  tried = subprocess.run([tool, *_UNSHARE, "true"], capture_output=True, check=False)
  return (tool, *_UNSHARE) if tried.returncode == 0 else ()
