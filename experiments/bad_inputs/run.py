"""Gives every command hundreds of bad inputs, and judges what it says and what it leaves on disk.

    python -m experiments.bad_inputs.run [--only=REGEX] [--folder=DIR] [--results=FILE]

Small runs and data are made once in --folder. Each case is a command line in a copy of them, some
damaged first, in a forked process of its own that starts as `python -m gptjax.NAME` does. A case is

    ok          one sentence, which names the file, line, key or flag, and an exit status
    traceback   Python's, instead
    unclear     a sentence that does not name it, or none, or more than three lines
    late        a sentence, after a program was compiled
    hang        nothing within a minute
    lost        a file that was there is gone or changed
    accepted    carried out: ALLOWED says for which that is right

cases.txt has the cases. The table is printed; --results keeps it, with what was accepted and what
is left to mend. The exit status is 1 if something is. Root gives up its right to read everything.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from absl import flags

from experiments.bad_inputs.files import DAMAGES, make_files, make_runs

FLAGS = flags.FLAGS
HERE = Path(__file__).parent
LIMIT_SECONDS = 60
COMMANDS = (
  *("chat", "compile", "convert", "diagnose", "evaluate"),
  *("generate", "predict", "show", "sweep", "train"),
)
VERDICTS = ("ok", "accepted", "traceback", "unclear", "late", "hang", "lost")
# What is carried out, and why that is right.
ALLOWED = {
  r"head_dim=3": "learned positions do not rotate heads, so an odd width is as good as another",
  r"rope.base=0": "not read: the positions of this model are learned",
  r"config.peft": "not read: peft.method is 'none'",
  r"sample.prompts=5": "a prompt is any text",
  r"init_from=labels": "its body fits; the report names the head that is left out",
  r"metrics.jsonl=": "a damaged line is dropped with a warning that quotes it",
  r"run/tokenizer=gone": "'bytes' is made anew from the config, and is the same",
  r"total_steps=1$": "the run has come further already, says so and ends",
  r"task.jsonl=cut": "what is left are whole lines",
  r"show.*row=9+$": "epochs follow each other without end, and the row is in one of them",
  r"labels:one.jsonl": "records to measure on need not have all labels",
  r"labels.jsonl=empty": "no texts to label give no labels",
}
# Compiling a single operation, as in placing a parameter, takes less.
LATE_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Case:
  """A command, what is damaged before it (FILE=DAMAGE), and what its sentence has to match."""

  command: str
  damages: tuple[str, ...]
  expected: str

  def __str__(self) -> str:
    return " ;; ".join(filter(None, (self.command, " ".join(self.damages))))


def read_cases() -> list[Case]:
  """The cases of cases.txt, which says how they are written."""
  short, cases = {}, []
  for line in (HERE / "cases.txt").read_text().splitlines():
    if found := re.fullmatch(r"([A-Z]+) = (.*)", line):
      short[found[1]] = found[2]
    elif line and line[0] != "#":
      text, _, expected = line.partition(" => ")
      for case in alternatives(text):
        command, _, damages = case.partition(" ;; ")
        command = re.sub(r"^[A-Z]+", lambda word: short[word[0]], command)
        last = re.findall(r"--(?:config\.)?(?:[\w.]+\.)?(\w+)", command)
        cases.append(Case(command.strip(), tuple(damages.split()), expected.strip() or last[-1]))
  return cases


def alternatives(text: str) -> Iterator[str]:
  """Yields a text with each choice of its {{a|b}}."""
  before, choice, after = re.fullmatch(r"(.*?)(?:\{\{(.*?)\}\})?((?<=\}\}).*)?", text).groups()
  if choice is None:
    yield text
    return
  for one in choice.split("|"):
    yield from alternatives(f"{before}{one}{after}")


def checksums(folder: Path) -> dict[str, str]:
  """{path: checksum} of the files that can be read; of others, what they are."""
  found = {}
  for path in sorted(folder.rglob("*")):
    if path.is_symlink() or not path.is_file() or not path.stat().st_mode & 0o400:
      found[str(path)] = oct(path.lstat().st_mode)
    elif path.name != ".trainer.lock":
      found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
  for path in folder.rglob("*"):
    if path.is_dir():
      found.pop(str(path), None)
  return found


def start(command: str, folder: Path) -> None:
  """Becomes the command, in a forked process."""
  import jax.monitoring

  os.setsid()
  os.chdir(folder)
  # Root may read everything otherwise.
  ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
  for number, name in enumerate(("/dev/null", "../stdout", "../stderr")):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
  compiled = Path("../compiled").resolve()
  compiled.write_text("")

  def count(event: str, seconds: float, **_) -> None:
    if event.endswith("compile_duration"):
      compiled.write_text(f"{compiled.read_text()} {seconds}")

  jax.monitoring.register_event_duration_secs_listener(count)
  for own in ("only", "folder", "results"):
    delattr(FLAGS, own)
  FLAGS.unparse_flags()
  name, *arguments = shlex.split(command)
  module = "gptjax" if name == "gptjax" else f"gptjax.{name}"
  for one in COMMANDS:  # They are to be run, not imported.
    sys.modules.pop(f"gptjax.{one}", None)
  sys.argv = [module, *arguments]
  status = 0
  try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
  except SystemExit as end:
    status = end.code
    if isinstance(status, str):
      print(status, file=sys.stderr)
      status = 1
  except BaseException:  # noqa: BLE001 (Python would print it too)
    traceback.print_exc()
    status = 1
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(int(status or 0))


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The result of a command; a status of None is a hang."""

  status: int | None
  said: str
  compiling_seconds: float
  lost: list[str]

  def verdict(self, expected: str) -> str:
    errors = [line for line in self.said.splitlines() if line.startswith("error:")]
    if self.status is None:
      return "hang"
    if "Traceback (most recent call last)" in self.said or self.status < 0:
      return "traceback"
    if self.status == 0:
      return "accepted"
    if self.lost:
      return "lost"
    sentence = self.said[self.said.find("error:") :]
    lines = len(sentence.strip().splitlines())
    if len(errors) != 1 or lines > 3 or not re.search(expected, sentence):
      return "unclear"
    return "late" if self.compiling_seconds > LATE_SECONDS else "ok"


def run(case: Case, kept: Path, box: Path) -> Outcome:
  """Runs a command in a copy of the files, after damaging some of them."""
  if box.exists():
    subprocess.run(["chmod", "-R", "u+rwX", box], check=True)
    shutil.rmtree(box)
  shutil.copytree(kept, box / "files", symlinks=True)
  for damage in case.damages:
    path, _, kind = damage.partition("=")
    DAMAGES[kind](box / "files" / path)
  before = checksums(box / "files")
  if not (child := os.fork()):
    start(case.command, box / "files")
  status, end = None, time.monotonic() + LIMIT_SECONDS
  while time.monotonic() < end and status is None:
    pid, code = os.waitpid(child, os.WNOHANG)
    status = os.waitstatus_to_exitcode(code) if pid else time.sleep(0.02)
  if status is None:
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
  after = checksums(box / "files")
  return Outcome(
    status,
    (box / "stderr").read_text(errors="replace"),
    max(map(float, (box / "compiled").read_text().split()), default=0.0),
    [path for path, value in before.items() if after.get(path) != value],
  )


def main() -> int:
  with contextlib.ExitStack() as stack:
    folder = Path(FLAGS.folder or stack.enter_context(tempfile.TemporaryDirectory()))
    if not (kept := folder / "kept").exists():
      kept.mkdir(parents=True)
      make_files(kept)
      make_runs(kept)
    for name in COMMANDS:  # Once here, not in each process.
      importlib.import_module(f"gptjax.{name}")
    counts: dict[str, Counter] = {}
    accepted, bad = {}, []
    for case in read_cases():
      if not re.search(FLAGS.only, str(case)):
        continue
      begin = time.monotonic()
      outcome = run(case, kept, folder / "box")
      verdict = outcome.verdict(case.expected)
      counts.setdefault(case.command.split()[0], Counter())[verdict] += 1
      reason = next(
        (why for pattern, why in ALLOWED.items() if re.search(pattern, str(case))), None
      )
      if verdict == "accepted":
        accepted[str(case)] = reason
      if verdict != "ok" and not (verdict == "accepted" and reason):
        bad.append(f"{verdict}: {case}")
      print(f"{verdict:9} {time.monotonic() - begin:5.1f} s  {case}", flush=True)
      if verdict != "ok" or FLAGS.only:
        print(
          f"  expected {case.expected!r}, lost {outcome.lost}\n  {outcome.said[-1500:]}", flush=True
        )
  print(table(counts))
  if FLAGS.results:
    results = {"cases": {name: dict(found) for name, found in sorted(counts.items())}}
    results |= {"accepted": accepted, "left": bad}
    Path(FLAGS.results).write_text(json.dumps(results, indent=2) + "\n")
  return int(bool(bad))


def table(counts: Mapping[str, Mapping[str, int]]) -> str:
  """The counts by command, in Markdown."""
  rows = [("command", *VERDICTS, "all"), ("---",) * (len(VERDICTS) + 2)]
  for name, found in sorted(counts.items()):
    rows.append((name, *(found.get(verdict, 0) for verdict in VERDICTS), sum(found.values())))
  total = sum(map(Counter, counts.values()), Counter())
  rows.append(("all", *(total[verdict] for verdict in VERDICTS), total.total()))
  return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


if __name__ == "__main__":
  os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
  flags.DEFINE_string("only", "", "Cases in which this is found.")
  flags.DEFINE_string("folder", "", "Where the runs are made, and kept for the next time.")
  flags.DEFINE_string("results", "", "A file to write the counts and what was accepted to.")
  FLAGS(sys.argv)  # Not app.run, which each command is to call for the first time.
  sys.exit(main())
