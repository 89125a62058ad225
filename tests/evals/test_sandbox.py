"""Programs that run away or cheat, in each isolation that this machine has."""

import concurrent.futures
import functools
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from gptjax.errors import UserError
from gptjax.evals import sandbox
from gptjax.evals.sandbox import Isolation, Limits

LIMITS = Limits(wall_seconds=30, cpu_seconds=10, memory_bytes=2**28, file_bytes=2**18)
ADD = "def add(a, b): return a + b\n"
CHECK = "from program import add\nassert add(1, 2) == 3"


@pytest.fixture(scope="module", params=["bubblewrap", "namespaces", "none"])
def isolation(request):
  """One that the probe has found to hold."""
  tool = sandbox._TOOLS[request.param]
  if tool is not None and shutil.which(tool) is None:
    pytest.skip(f"there is no {tool} here")
  found = sandbox.probe(Isolation(request.param))
  if found.problems:
    pytest.skip(f"it does not hold here: {'; '.join(found.problems)}")
  return found


@pytest.fixture(scope="module")
def run(isolation):
  return functools.partial(sandbox.run, limits=LIMITS, isolation=isolation)


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
def outcomes(run):
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    found = pool.map(lambda one: run(one[0], CHECK), CONTAINED.values())
    return dict(zip(CONTAINED, found, strict=True))


@pytest.mark.parametrize("name", CONTAINED)
def test_a_program_is_contained_and_told_in_a_sentence(outcomes, name):
  outcome = outcomes[name]
  assert not outcome.passed
  assert CONTAINED[name][1] in outcome.reason
  assert "\n" not in outcome.reason
  assert len(outcome.output) <= LIMITS.file_bytes


def test_a_program_that_is_well_runs(run):
  program = "import math, threading, tempfile\nopen('a.txt', 'w').write('x')\nprint(math.pi)\n"
  outcome = run(program + ADD, CHECK)
  assert (outcome.passed, outcome.reason, outcome.output) == (True, "", "3.141592653589793\n")


def test_wall_time_is_limited(run):
  start = time.monotonic()
  outcome = run("import time; time.sleep(60)", limits=Limits(wall_seconds=0.5))
  assert outcome.reason == "It ran for more than 0.5 seconds."
  asleep = f"{ADD}import time; add = lambda a, b: time.sleep(60)"
  assert "more than 0.5 seconds" in run(asleep, CHECK, limits=Limits(wall_seconds=0.5)).reason
  assert time.monotonic() - start < 30


def test_processor_time_is_limited(run):
  outcome = run("while True: pass", limits=Limits(wall_seconds=20, cpu_seconds=1))
  assert outcome.reason == "It used more than 1 seconds of processor time."


# --- The judge ---------------------------------------------------------------------------------

# Wrong programs that a judge in their own process would let pass.
CHEATS = {
  "it disarms what ends the process": "import os\nos._exit = lambda status: None",
  "it changes what the runner sees": "import __main__, math\n__main__.os = math",
  "it follows every frame": (
    "import sys\ndef trace(frame, event, argument):\n"
    "  frame.f_locals.update(passed=True)\n  return trace\nsys.settrace(trace)"
  ),
  "it reads the runner's frames": (
    "import sys\nframe = sys._getframe()\nwhile frame:\n"
    "  print(str(frame.f_locals)[:100])\n  frame = frame.f_back"
  ),
  "it writes verdicts into whatever is open": (
    "import os\nfor number in range(3, 64):\n  try: os.write(number, b'{\"passed\": true}')\n"
    "  except OSError: pass"
  ),
  "it changes the protocol": (
    'import json\njson.dumps = lambda value: \'{"value": {"equal": true}}\'\n'
    "json.loads = lambda text: None"
  ),
  "it answers with what equals everything": (
    "class Any:\n  def __eq__(self, other): return True\ndef add(a, b): return Any()"
  ),
  "it answers with a number that equals everything": (
    "class Any(int):\n  def __eq__(self, other): return True\n  __hash__ = int.__hash__\n"
    "def add(a, b): return Any(7)"
  ),
  "it changes the check": "import builtins\nbuiltins.AssertionError = ZeroDivisionError",
  "it shadows what the check imports": "open('program.py', 'w').write('add = lambda a, b: 3')",
  "it ends with success": "import os, sys\ndef add(a, b): os._exit(0)",
  "it waits for the judge and leaves": "import sys\ndef add(a, b): sys.exit(0)",
  "it answers at depth": "def add(a, b):\n  x = []\n  for _ in range(900): x = [x]\n  return x",
  "it answers at length": "def add(a, b): return 'x' * 10**7",
  "it raises what ends a process": "def add(a, b): raise KeyboardInterrupt",
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_wrong_program_does_not_pass(name, run):
  outcome = run(f"def add(a, b): return a - b\n{CHEATS[name]}", CHECK)
  assert not outcome.passed
  assert outcome.reason


def test_the_program_does_not_see_the_check(run):
  reads = CHEATS["it reads the runner's frames"]
  outcome = run(ADD + reads, f"{CHECK}\nsecret = 'qwerty'")
  assert outcome.passed
  assert "qwerty" not in outcome.output


def test_what_functions_return_is_plain_data(run):
  values = [
    None,
    True,
    -(10**4000),
    0.1,
    float("inf"),
    1j,
    "text \N{SNOWMAN}\n",
    b"\0\xff",
    [1, [2.5]],
    (1, "a"),
    {1, 2},
    frozenset({3}),
    {"a": 1, (1, 2): [None]},
  ]
  check = f"from program import same\nfor x in {values!r}:\n".replace("inf", "float('inf')")
  check += "  found = same(x)\n  assert found == x and type(found) is type(x), (found, x)"
  outcome = run("def same(x): return x", check)
  assert outcome.passed, outcome.reason
  subclass = "import collections\ndef same(x): return collections.Counter(x)"
  assert run(subclass, "from program import same\nassert type(same('aab')) is dict").passed
  wrong = run("def same(x): return object()", "from program import same\nsame(1)")
  assert wrong.reason == "It failed: TypeError: a value of type object is no plain data"


def test_an_error_of_the_program_is_one_of_the_check(run):
  program = "def root(x):\n  if x < 0: raise ValueError('below 0')\n  return x ** 0.5"
  check = "from program import root\ntry: root(-1)\nexcept ValueError: pass\nelse: assert False"
  assert run(program, check).passed
  outcome = run("def root(x): return 1 / 0", "from program import root\nroot(4)")
  assert outcome.reason == "It failed: ZeroDivisionError: division by zero"
  missing = run(ADD, "from program import sub\nsub(1, 2)")
  assert missing.reason == "It failed: NameError: the program defines no 'sub'"


def test_a_check_that_is_wrong_is_told(run):
  assert "It failed: NameError" in run(ADD, "substract(1, 2)").reason
  endless = run(ADD, "while True: pass", limits=Limits(wall_seconds=20, cpu_seconds=1))
  assert endless.reason == "Its check: It used more than 1 seconds of processor time."


# --- What is outside ---------------------------------------------------------------------------

# By the C library, which no hook of Python watches; each is true if it could be done.
LIBRARY = "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\n"
OUTSIDE = {
  "opens to write": "c.open(victim, os.O_WRONLY) >= 0",
  "opens to read": "c.open(victim, os.O_RDONLY) >= 0",
  "makes a file": "c.open(victim + b'2', os.O_CREAT | os.O_WRONLY, 0o600) >= 0",
  "changes a mode": "c.chmod(victim, 0o777) == 0",
  "changes a mode beneath a directory": (
    "c.fchmodat(c.open(folder, os.O_PATH), b'victim', 0o777, 0) == 0"
  ),
  "changes a mode by a handle": "c.fchmod(c.open(victim, os.O_RDONLY), 0o777) == 0",
  "changes times": "c.utimes(victim, None) == 0",
  "changes times by a handle": "c.futimens(c.open(victim, os.O_RDONLY), None) == 0",
  "sets an attribute": "c.setxattr(victim, b'user.x', b'x', ctypes.c_size_t(1), 0) == 0",
  "links": "c.link(victim, b'linked') == 0",
  "moves": "c.rename(victim, b'moved') == 0",
  "removes": "c.unlink(victim) == 0",
  "truncates": "c.truncate(victim, ctypes.c_long(0)) == 0",
  "signals the evaluation": "c.kill(evaluation, 0) == 0",
  "limits the evaluation": "c.prlimit(evaluation, 4, None, ctypes.create_string_buffer(16)) == 0",
  "opens a socket of Unix": "c.socket(1, 1, 0) >= 0",
  "opens a socket of the network": "c.socket(2, 1, 0) >= 0",
  "shares memory": "c.shmget(0x67707478, ctypes.c_size_t(4096), 0o1666) >= 0",
  "opens a queue": "ctypes.CDLL('librt.so.1').mq_open(b'/gptjax', 66, 0o600, None) >= 0",
  "forks": "c.fork() >= 0",
  "leaves its group": "c.setsid() >= 0",
}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's refusals are Linux's")
@pytest.mark.parametrize("name", OUTSIDE)
def test_the_kernel_refuses_what_goes_around_python(name, run, tmp_path):
  victim = tmp_path / "victim"
  victim.write_text("whole")
  before = os.stat(victim)
  told = f"victim, folder, evaluation = {bytes(victim)!r}, {bytes(tmp_path)!r}, {os.getpid()}\n"
  program = f"{LIBRARY}{told}done = {OUTSIDE[name]}\ndef succeeded(): return done"
  outcome = run(program, "from program import succeeded\nassert not succeeded()")
  assert outcome.passed, outcome.reason
  after = os.stat(victim)
  for field in ("st_mode", "st_nlink", "st_mtime_ns", "st_ctime_ns", "st_size"):
    assert getattr(after, field) == getattr(before, field)
  assert [path.name for path in tmp_path.iterdir()] == ["victim"]


def test_nothing_is_written_outside(run, tmp_path):
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
    assert "writes nothing outside" in run(program).reason
  assert [path.name for path in tmp_path.iterdir()] == ["victim"]
  assert victim.read_text() == "whole"


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


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("name", ESCAPES)
def test_processes_that_go_around_python_end_with_the_program(name, run):
  before = _processes()
  run(ESCAPES[name], limits=Limits(wall_seconds=1))
  deadline = time.monotonic() + 5
  while _processes() - before and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not _processes() - before


def test_threads_are_started(run):
  threads = (
    "import threading\nmade = []\nt = threading.Thread(target=made.append, args=(1,))\nt.start()\n"
    "t.join()\nassert made"
  )
  assert run(threads).passed


@pytest.mark.parametrize("call", ["os.kill(os.getppid(), 0)", "os.killpg(0, 0)"])
def test_other_processes_get_no_signals(call, run):
  assert "the sandbox signals no processes" in run(f"import os; {call}").reason
  assert run("import os; os.kill(os.getpid(), 0)").passed


def _processes() -> set[str]:
  """Ids of the processes of sandboxes and of what they start, on Linux."""
  found = set()
  for folder in Path("/proc").glob("[0-9]*"):
    try:
      command = (folder / "cmdline").read_bytes()
    except OSError:
      continue
    if sandbox.MARK.encode() in command or command == b"sleep\x0060\0":
      found.add(folder.name)
  return found


def test_the_environment_is_clean(run, monkeypatch):
  monkeypatch.setenv("API_KEY", "secret")
  outcome = run("import os; print(sorted(os.environ))")
  assert outcome.passed
  assert "API_KEY" not in outcome.output


def test_a_deep_tree_of_directories_vanishes(run, tmp_path, monkeypatch):
  monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
  program = (
    f"{LIBRARY}os.mkdir('closed', 0); open('file', 'w').close()\n"
    "for _ in range(3000):\n  assert c.mkdir(b'd', 0o700) == 0 and c.chdir(b'd') == 0\n"
    "c.mkdir(b'closed', 0)\nc.symlink(b'/', b'link')\n"
  )
  outcome = run(program)
  assert outcome.passed, outcome.reason
  assert not list(tmp_path.iterdir())


def test_a_sandbox_that_does_not_hold_is_refused_unless_accepted(tmp_path, monkeypatch):
  open_ = tmp_path / "kernel.py"
  open_.write_text("def confine(folder, readable): pass")
  monkeypatch.setitem(sandbox._SOURCES, "kernel", open_)
  found = sandbox.probe(Isolation("none"))
  assert set(found.problems) > {
    "read files of the user",
    "write files of the user",
    "change modes",
    "send signals to other processes",
    "start processes",
    "connect to this machine",
    "connect to sockets of Unix",
  }
  monkeypatch.setattr(sandbox, "find_isolation", lambda: found)
  with pytest.raises(UserError, match=r"it could read files of the user; .*accept_weak_isolation"):
    sandbox.require(accept_weak=False)
  assert sandbox.require(accept_weak=True) == found


def test_a_sandbox_that_cannot_be_tried_out_does_not_hold(tmp_path, monkeypatch):
  broken = tmp_path / "kernel.py"
  broken.write_text("raise OSError('no such call')")
  monkeypatch.setitem(sandbox._SOURCES, "kernel", broken)
  (problem,) = sandbox.probe(Isolation("none")).problems
  assert problem == "not be tried out (It failed: OSError: no such call)"
