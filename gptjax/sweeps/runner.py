"""A worker: runs trials of a sweep on this host, as many at once as it has slots, to the last.

WORKDIR/sweep.json says what the sweep is; WORKDIR/trials/ARM-seedN/ is the work directory of a
`gptjax.train`, with trial.json (arm, seed, overrides, config, state, error), log.txt and .lock,
which this worker and its training both hold, so that a second training never writes beside the
first, not even beside that of a dead worker.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.sweeps.definition import Sweep, Trial, changed_keys
from gptjax.sweeps.devices import Slot, on_cores
from gptjax.sweeps.study import Claim, Study
from gptjax.training.metrics import read_metrics
from gptjax.training.setup import length_without_data
from gptjax.training.validation import History

_POLL_SECONDS = 0.2
_ERROR_LINES = 10
_TABLE_ROWS = 20


def train_command(folder: Path) -> list[str]:
  config = f"--config={folder / config_lib.CONFIG_FILE}"
  return [sys.executable, "-m", "gptjax.train", config, f"--workdir={folder}"]


def write_json(path: Path, value: Any) -> None:
  """Writes the file as a whole or not at all."""
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  temporary.write_text(json.dumps(value, indent=2) + "\n")
  temporary.replace(path)


def check_unchanged(sweep: Sweep, workdir: Path) -> None:
  """Refuses to mix runs of two configs in one arm, or two metrics in one search.

  Raises:
    UserError: names the arm and the keys, or the metrics.
  """
  about = workdir / "sweep.json"
  if sweep.search and about.exists():
    metric = json.loads(about.read_text())["metric"]
    if metric != sweep.metric:
      raise UserError(
        f"{workdir}: its trials were judged by {metric}, METRIC is {sweep.metric}; give --workdir "
        "another folder."
      )
  for trial in filter(None, sweep.trials.values()):
    path = workdir / "trials" / trial.folder / "trial.json"
    if not path.exists():
      continue
    if changed := changed_keys(json.loads(path.read_text())["config"], trial.config):
      raise UserError(
        f"arm {trial.arm!r}, seed {trial.seed}, was run with another config: {'; '.join(changed)}. "
        "Give the arm another name, or --workdir another folder."
      )


@dataclasses.dataclass
class Job:
  """A trial that this worker has claimed.

  process: None while another process holds the folder. ending: why it was told to stop, 'pruned',
  'given back' or 'lost' (to another worker); None while it may go on. value: of what it has made
  until now. exhausted: its patience is at its end, so that it stops early.
  """

  claim: Claim
  trial: Trial
  folder: Path
  slot: Slot
  lock: TextIO
  total: int | None
  started: float = dataclasses.field(default_factory=time.monotonic)
  process: subprocess.Popen | None = None
  log_start: int = 0
  metrics_size: int = -1
  step: int = 0
  loss: float | None = None
  value: float | None = None
  validated: int = 0
  exhausted: bool = False
  ending: str | None = None
  state: str = "waiting"
  seconds: float = 0.0

  def stop(self, ending: str) -> None:
    if self.ending is None:
      self.ending = ending
      if self.process is not None:
        self.process.terminate()


class Worker:
  """Args: sweep, its study, WORKDIR, a slot for each trial at a time, and how to start one."""

  def __init__(
    self,
    sweep: Sweep,
    study: Study,
    workdir: Path,
    slots: list[Slot],
    *,
    command: Callable[[Path], list[str]] = train_command,
  ):
    self._sweep = sweep
    self._study = study
    self._workdir = workdir.resolve()
    self._idle = list(slots)
    self._command = command
    self._jobs: list[Job] = []
    self._ended: list[Job] = []
    self._states: dict[str, str] = {}
    self._look_at = 0.0
    # A notebook's variables make rich take a pipe for a terminal.
    live = sys.stdout.isatty()
    self._console = Console(force_terminal=live, soft_wrap=True, highlight=False, markup=False)
    self._environment = {
      "JAX_COMPILATION_CACHE_DIR": str(self._workdir / "compilation_cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

  def run(self, *, retry_failed: bool = False) -> dict[str, str]:
    """Works until every trial has ended, on any host, or a signal comes.

    Returns:
      The state of each key.
    """
    write_json(self._workdir / "sweep.json", self._sweep.to_json())
    self._study.enqueue_missing(retry_failed=retry_failed)
    if {"waiting", "running"}.isdisjoint(self._study.states().values()):
      self._console.print(f"{self._workdir}: every trial has ended, nothing is left to run")
    with self._display() as show, _signals() as signals:
      try:
        while self._work(signals):
          show()
          time.sleep(_POLL_SECONDS)
      finally:
        for job in self._jobs:
          job.stop("given back")
        for job in self._jobs:
          if job.process is not None:
            job.process.wait()
    if signals:
      self._console.print("stopped by a signal; run again to go on from there")
    return self._study.states()

  def _work(self, signals: list[int]) -> bool:
    """One round over all jobs; whether there is more to do."""
    for job in list(self._jobs):
      if signals:
        job.stop("given back")
      if len(signals) > 1 and job.process is not None:
        job.process.kill()  # Whoever asks twice does not want to wait.
      self._advance(job)
    if signals:
      return bool(self._jobs)
    if time.monotonic() >= self._look_at:
      for key in self._study.reap():
        self._console.print(f"{key}: its worker is dead; queued again")
      while self._idle and (claim := self._study.claim()):
        self._take(claim)
      self._states = self._study.states()
      self._look_at = time.monotonic() + 2
    return bool(self._jobs) or bool({"waiting", "running"} & {*self._states.values()})

  def _take(self, claim: Claim) -> None:
    try:
      trial = self._sweep.trial(claim.key, claim.trial)
    except UserError as error:
      self._console.print(f"{claim.key}: failed: {error}")
      self._study.finish(claim, "failed")
      return
    folder = self._workdir / "trials" / trial.folder
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
    length = length_without_data(trial.config)
    total = None if length is None else length.total_steps
    self._jobs.append(Job(claim, trial, folder, self._idle.pop(0), lock, total))

  def _advance(self, job: Job) -> None:
    if not self._study.beat(job.claim):
      job.stop("lost")
    if job.process is None and job.ending is None:
      try:
        fcntl.flock(job.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        return
      self._start(job)
    # Asked before the metrics are read, so that nothing can be written after that.
    ended = job.process is None or job.process.poll() is not None
    self._read(job)
    if ended:
      self._finish(job)

  def _start(self, job: Job) -> None:
    config_file = job.folder / config_lib.CONFIG_FILE
    config_file.write_text(config_lib.to_json(job.trial.config) + "\n")
    self._record(job, "running")
    with (job.folder / "log.txt").open("ab") as log, on_cores(job.slot.cores):
      job.log_start = log.tell()
      job.process = subprocess.Popen(
        self._command(job.folder),
        env=self._environment | os.environ | job.slot.environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=[job.lock.fileno()],
        start_new_session=True,  # Control-C is for this worker, which passes it on.
      )

  def _read(self, job: Job) -> None:
    """Takes in what the training has written to metrics.jsonl, and prunes it if need be."""
    path = job.folder / "metrics.jsonl"
    size = path.stat().st_size if path.exists() else -1
    if size == job.metrics_size:
      return
    try:
      lines = read_metrics(job.folder)
    except ValueError:  # A line that is just being written.
      return
    job.metrics_size = size
    metric, history = self._sweep.metric, History.start(job.trial.config)
    for line in lines:
      job.step = line["step"]
      job.loss = line.get("loss", job.loss)
      if metric not in line:
        continue
      history.add(line["step"], line)
      if line["step"] <= job.validated:
        continue
      job.validated, value = line["step"], history.result[metric]
      value = float("nan") if value is None else value
      if self._study.should_prune(job.claim, value, job.validated) and job.step != job.total:
        job.stop("pruned")
    job.value, job.exhausted = history.result.get(metric), history.exhausted

  def _finish(self, job: Job) -> None:
    code = job.process.returncode if job.process else None
    complete = code == 0 and (job.exhausted or self._is_last(job))
    error = None
    if complete and job.value is not None:
      job.state = "done"
    elif complete:
      job.state, error = "failed", f"{self._sweep.metric} is not finite in the end."
    elif job.ending is not None:
      job.state = job.ending
    else:
      job.state, error = "failed", self._last_lines(job, code)
    if job.state in ("done", "failed", "pruned"):
      self._record(job, job.state, error)
    if job.state != "lost":
      self._study.finish(job.claim, job.state, job.value if error is None else None)
    job.lock.close()
    job.seconds = time.monotonic() - job.started
    self._jobs.remove(job)
    self._ended.append(job)
    self._idle.append(job.slot)
    self._look_at = 0.0
    text = f"{job.trial.arm} seed {job.trial.seed}: {job.state} at step {job.step}"
    value = "" if job.value is None else f", {self._sweep.metric} {job.value:.4f}"
    self._console.print(f"{text}{value}, {job.seconds:.0f} s")
    if error:
      self._console.print(f"{error}\n  see {job.folder / 'log.txt'}")

  def _is_last(self, job: Job) -> bool:
    if job.total is None:
      return job.ending is None
    return job.validated == job.step == job.total

  def _last_lines(self, job: Job, code: int) -> str:
    text = (job.folder / "log.txt").read_bytes()[job.log_start :].decode(errors="replace")
    lines = text.strip().splitlines()[-_ERROR_LINES:]
    why = "it stopped before its last step" if code == 0 else f"exit status {code}"
    return "\n".join([*lines, f"({why})"])

  def _record(self, job: Job, state: str, error: str | None = None) -> None:
    trial = job.trial
    entry = {
      "arm": trial.arm,
      "seed": trial.seed,
      "overrides": trial.overrides,
      "config": json.loads(config_lib.to_json(trial.config)),
      "state": state,
      "error": error,
    }
    write_json(job.folder / "trial.json", entry)

  @contextlib.contextmanager
  def _display(self) -> Iterator[Callable[[], None]]:
    """Yields what to call now and then: it redraws the table, where there is a terminal."""
    if not self._console.is_terminal:
      yield lambda: None
      return
    with Live(console=self._console, auto_refresh=False) as live:
      yield lambda: live.update(self._table(), refresh=True)

  def _table(self) -> Table:
    counts: Mapping[str, int] = Counter(self._states.values())
    title = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    table = Table("arm", "seed", "state", "step", "loss", self._sweep.metric, "time", title=title)
    for job in [*self._ended, *self._jobs][-_TABLE_ROWS:]:
      running = job in self._jobs
      seconds = time.monotonic() - job.started if running else job.seconds
      table.add_row(
        job.trial.arm,
        str(job.trial.seed),
        ("running" if job.process else "waiting") if running else job.state,
        f"{job.step}/{job.total or '?'}",
        "" if job.loss is None else f"{job.loss:.4f}",
        "" if job.value is None else f"{job.value:.4f}",
        f"{seconds:.0f} s",
      )
    return table


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """Yields the list that SIGINT and SIGTERM are added to as they come."""
  received: list[int] = []
  numbers = (signal.SIGINT, signal.SIGTERM)
  handlers = {
    number: signal.signal(number, lambda got, _: received.append(got)) for number in numbers
  }
  try:
    yield received
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
