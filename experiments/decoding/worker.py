"""One engine with one model, in a process of its own that waits on a pipe to be asked.

    python -m experiments.decoding.worker MODULE FORMAT FOLDER ROWS LENGTH

MODULE has a class `Engine`. Reads lines {"call": NAME, "arguments": [...]} and answers each with
{"result": ...} or {"error": ...}. Imports nothing but the module, whose interpreter may lack all
others.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Protocol

ROOT = Path(__file__).parents[2]


class Engine(Protocol):
  """What is measured. It is made with a format, a model's folder, and the most rows and the most
  tokens of a row.

  Attributes:
    version: of the library.
    setting: what it chose itself, '' if there was nothing to choose.
  """

  version: str
  setting: str

  def warm_up(self, rows: int, prompt: int, tokens: int) -> None:
    """Compiles what `measure` will run, and chooses what is fastest."""
    ...

  def measure(self, rows: int, prompt: int, tokens: int, seed: int) -> float:
    """Seconds in which each of the rows gets `tokens` more tokens, after a random prompt of so many
    and a first token."""
    ...

  def write(self, prompt: Sequence[int], tokens: int) -> list[int]:
    """The likeliest tokens after a prompt, one by one."""
    ...


class Failure(Exception):
  """An engine could not do what it was asked for."""


@dataclasses.dataclass
class Worker:
  """A worker's process, which does nothing until it is asked."""

  process: subprocess.Popen
  errors: IO[bytes]

  @classmethod
  def start(cls, python: str, module: str, *arguments: Any) -> "Worker":
    """Starts the class `Engine` of a module, in an interpreter, with the arguments of `Engine`."""
    command = [python, "-m", "experiments.decoding.worker", module, *map(str, arguments)]
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - `stop` closes it.
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
    return cls(subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes), errors)

  def ask(self, call: str, *arguments: Any, seconds: float = 600) -> Any:
    """Raises Failure if the answer is an error, or takes longer."""
    try:
      self.process.stdin.write(json.dumps({"call": call, "arguments": arguments}).encode() + b"\n")
      self.process.stdin.flush()
    except BrokenPipeError:
      raise Failure(self._last_words()) from None
    if not select.select([self.process.stdout], [], [], seconds)[0]:
      raise Failure(f"it took more than {seconds:g} s")
    if not (line := self.process.stdout.readline()):
      raise Failure(self._last_words())
    answer = json.loads(line)
    if "error" in answer:
      raise Failure(answer["error"])
    return answer["result"]

  @property
  def cpu_seconds(self) -> float:
    """Seconds of processors that it has used so far; 0 where /proc does not tell."""
    try:
      fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
      return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

  def stop(self) -> None:
    if self.process.poll() is None:
      os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()
    for file in (self.process.stdin, self.process.stdout, self.errors):
      with contextlib.suppress(BrokenPipeError):  # What it was asked when it ended.
        file.close()

  def _last_words(self) -> str:
    status = self.process.wait()
    if status < 0:
      return f"it ended by {signal.Signals(-status).name}"
    self.errors.seek(0)
    lines = self.errors.read().decode(errors="replace").strip().splitlines()
    return f"exit status {status}" + "".join(f": {line}" for line in lines[-1:])


def serve(module: str, format: str, folder: str, rows: int, length: int) -> None:
  # What libraries print must not come between the answers.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  served: Any = None
  for line in sys.stdin:
    question = json.loads(line)
    try:
      if served is None:
        served = importlib.import_module(module).Engine(format, Path(folder), rows, length)
      if question["call"] == "describe":
        result = {"version": served.version, "setting": served.setting}
      else:
        result = getattr(served, question["call"])(*question["arguments"])
      answer = {"result": result}
    except Exception as error:  # noqa: BLE001 - whatever it is, the others are measured.
      first = str(error).strip().splitlines() or [""]
      answer = {"error": f"{type(error).__name__}: {first[0]}"}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
  serve(*sys.argv[1:4], *map(int, sys.argv[4:6]))
