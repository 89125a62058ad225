"""Programs that run away. Where the kernel may isolate them, as in CI and here, it is asked to."""

import concurrent.futures
import sys
import time
from pathlib import Path

import pytest

from gptjax.evals import sandbox
from gptjax.evals.sandbox import Limits, run

LIMITS = Limits(wall_seconds=30, cpu_seconds=10, memory_bytes=2**28, file_bytes=2**18)

# A program, and the sentence that tells what happened to it.
CONTAINED = {
  "fails": ("assert 1 == 2, 'no'", "It failed: AssertionError: no"),
  "is no Python": ("def", "It failed: SyntaxError"),
  "forks": ("import os\nwhile True: os.fork()", "the sandbox starts no processes"),
  "starts a program": ("import subprocess; subprocess.run(['ls'])", "starts no processes"),
  "allocates at once": ("x = 'a' * 10**12", "It asked for more than 256 MiB"),
  "allocates on": ("x = []\nwhile True: x.append(bytearray(10**7))", "more than 256 MiB"),
  "reads stdin": ("input()", "It failed: EOFError"),
  "prints endlessly": ("while True: print('y' * 1000)", "It printed more than 256 KiB"),
  "writes a large file": ("open('a', 'w').write('x' * 10**6)", "File too large"),
  "connects": ("import socket; socket.create_connection(('127.0.0.1', 9))", "no network"),
  "leaves early": ("import sys; sys.exit(0)", "It ended before its last line"),
  "leaves at once": ("import os; os._exit(0)", "It ended before its last line"),
  "recurses": ("def f(): f()\nf()", "RecursionError"),
}


@pytest.fixture(scope="module")
def outcomes():
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    found = pool.map(lambda program: run(program, LIMITS), (one for one, _ in CONTAINED.values()))
    return dict(zip(CONTAINED, found, strict=True))


@pytest.mark.parametrize("name", CONTAINED)
def test_a_program_is_contained_and_told_in_a_sentence(outcomes, name):
  outcome = outcomes[name]
  assert not outcome.passed
  assert CONTAINED[name][1] in outcome.reason
  assert "\n" not in outcome.reason
  assert len(outcome.output) <= LIMITS.file_bytes


def test_a_program_that_is_well_runs():
  outcome = run("import math, threading, tempfile\nopen('a.txt', 'w').write('x')\nprint(math.pi)")
  assert (outcome.passed, outcome.reason, outcome.output) == (True, "", "3.141592653589793\n")


def test_wall_time_is_limited():
  start = time.monotonic()
  outcome = run("import time; time.sleep(60)", Limits(wall_seconds=0.5))
  assert outcome.reason == "It ran for more than 0.5 seconds."
  assert time.monotonic() - start < 30


def test_processor_time_is_limited():
  outcome = run("while True: pass", Limits(wall_seconds=20, cpu_seconds=1))
  assert outcome.reason == "It used more than 1 seconds of processor time."


@pytest.mark.parametrize("isolated", [True, False])
def test_nothing_is_written_outside(tmp_path, monkeypatch, isolated):
  if not isolated:
    monkeypatch.setattr(sandbox, "_isolation", tuple)
  victim = tmp_path / "victim"
  victim.write_text("whole")
  for program in (
    f"open({str(victim)!r}, 'w')",
    f"open({str(tmp_path / 'new')!r}, 'x')",
    f"import os; os.remove({str(victim)!r})",
    f"import os; open('a', 'w'); os.rename('a', {str(victim)!r})",
    f"import os; os.symlink({str(victim)!r}, 'link'); open('link', 'w')",
    f"import os; os.setxattr({str(victim)!r}, 'user.x', b'x')",
  ):
    assert "writes nothing outside" in run(program, LIMITS).reason
  assert [path.name for path in tmp_path.iterdir()] == ["victim"]
  assert victim.read_text() == "whole"


def test_the_kernel_refuses_what_goes_around_python(tmp_path):
  if not sandbox._isolation():
    pytest.skip("namespaces are not allowed here")
  # ctypes is not watched by the hook.
  new = tmp_path / "new"
  write = f"import ctypes; assert ctypes.CDLL(None).open({str(new).encode()!r}, 0o101, 0o644) < 0"
  assert run(write, LIMITS).passed
  assert not new.exists()
  interfaces = "import socket; assert [name for _, name in socket.if_nameindex()] == ['lo']"
  assert run(interfaces, LIMITS).passed


FILTERS = Path("/proc/sys/kernel/seccomp/actions_avail").exists()

# Each goes around the hook and would be out of the group that is killed, or more than its limit of
# processes; root has no such limit.
ESCAPES = {
  "a child in its own session": (
    "import ctypes, time\nc = ctypes.CDLL(None)\nif c.fork() == 0:\n  c.setsid()\n  time.sleep(60)"
  ),
  "the program in its own session": (
    "import os, time\ntry: os.setsid()\nexcept OSError: pass\ntime.sleep(60)"
  ),
  "a program that C starts": "import ctypes; ctypes.CDLL(None).system(b'sleep 60 &')",
  "more and more": (
    "import ctypes, time\nc = ctypes.CDLL(None)\nmade = [c.fork() for _ in range(4)]\n"
    "print(made)\nif max(made) >= 0: c.setsid(); time.sleep(60)"
  ),
}


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("name", ESCAPES)
def test_processes_that_go_around_python_end_with_the_program(name, isolated, monkeypatch):
  if not isolated:
    monkeypatch.setattr(sandbox, "_isolation", tuple)
  if not (sandbox._isolation() or FILTERS):
    pytest.skip("the kernel allows neither namespaces nor filters here")
  before = _processes()
  run(ESCAPES[name], Limits(wall_seconds=1))
  deadline = time.monotonic() + 5
  while _processes() - before and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not _processes() - before


def test_the_kernel_starts_no_process_but_threads():
  if not FILTERS:
    pytest.skip("filters of system calls are not allowed here")
  forks = "import ctypes, os\nif ctypes.CDLL(None).fork() >= 0: os._exit(1)"
  assert run(forks, LIMITS).passed
  spawn = (
    "import _posixsubprocess, os\nr, w = os.pipe()\n_posixsubprocess.fork_exec([b'true'], "
    "[b'/bin/true'], True, (w,), None, None, *[-1] * 6, r, w, False, False, -1, *[None] * 3, -1, "
    "None, False)"
  )
  if sys.version_info[:2] == (3, 11):  # Its arguments are those of this version.
    assert "Operation not permitted" in run(spawn, LIMITS).reason
  threads = (
    "import threading\nmade = []\nt = threading.Thread(target=made.append, args=(1,))\nt.start()\n"
    "t.join()\nassert made"
  )
  assert run(threads, LIMITS).passed


@pytest.mark.parametrize("call", ["os.kill(os.getppid(), 0)", "os.killpg(0, 0)"])
def test_other_processes_get_no_signals(call):
  assert "the sandbox signals no processes" in run(f"import os; {call}", LIMITS).reason
  assert run("import os; os.kill(os.getpid(), 0)", LIMITS).passed


def _processes() -> set[str]:
  """Ids of the processes of sandboxes and of what they start, on Linux."""
  found = set()
  for folder in Path("/proc").glob("[0-9]*"):
    try:
      command = (folder / "cmdline").read_bytes()
    except OSError:
      continue
    if b"sandbox_runner" in command or command == b"sleep\x0060\0":
      found.add(folder.name)
  return found


def test_the_environment_is_clean(monkeypatch):
  monkeypatch.setenv("API_KEY", "secret")
  outcome = run("import os; print(sorted(os.environ))", LIMITS)
  assert outcome.passed
  assert "API_KEY" not in outcome.output
