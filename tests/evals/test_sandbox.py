"""Programs that run away. Where the kernel may isolate them, as in CI and here, it is asked to."""

import concurrent.futures
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


# Out of the group that is killed: a child in a session of its own, and the program itself.
ESCAPES = {
  "child": (
    "import ctypes, time\nc = ctypes.CDLL(None)\nif c.fork() == 0:\n  c.setsid()\n"
    "  while True:\n    open('beat', 'a').write('x'); time.sleep(0.05)\n"
    "while not __import__('os').path.exists('beat'): time.sleep(0.01)\n"
  ),
  "itself": "import os, time; os.setsid(); time.sleep(300)",
}


@pytest.mark.parametrize("who", ESCAPES)
def test_processes_that_go_around_python_end_with_the_program(who):
  if not sandbox._isolation():
    pytest.skip("namespaces are not allowed here")
  before = _runners()
  run(ESCAPES[who], Limits(wall_seconds=2))
  deadline = time.monotonic() + 5
  while _runners() - before and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not _runners() - before


def _runners() -> set[str]:
  """Ids of the processes of sandboxes, on Linux."""
  found = set()
  for folder in Path("/proc").glob("[0-9]*"):
    try:
      if b"sandbox_runner" in (folder / "cmdline").read_bytes():
        found.add(folder.name)
    except OSError:
      continue
  return found


def test_the_environment_is_clean(monkeypatch):
  monkeypatch.setenv("API_KEY", "secret")
  outcome = run("import os; print(sorted(os.environ))", LIMITS)
  assert outcome.passed
  assert "API_KEY" not in outcome.output
