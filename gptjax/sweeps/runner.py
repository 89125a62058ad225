"""A worker: runs trials of a sweep on this host, as many at once as it has slots, to the last.

WORKDIR/sweep.json describes the sweep; WORKDIR/trials/ARM-seedN/ is the work directory of a
`gptjax.train`, with trial.json (arm, seed, overrides, config, state, error), log.txt and .lock,
which this worker and its training both hold, so that a second training never writes beside the
first, not even beside that of a dead worker.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
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
from gptjax.small_files import read_json, write_atomically
from gptjax.sweeps import definition, devices
from gptjax.sweeps.definition import Sweep, Trial, changed_keys
from gptjax.sweeps.devices import Slot, on_cores
from gptjax.sweeps.preview import preview
from gptjax.sweeps.study import Claim, Study, sample_trial
from gptjax.training.metrics import read_metrics
from gptjax.training.setup import length_without_data
from gptjax.training.validation import History

_POLL_SECONDS = 0.2
_IDLE_SECONDS = 1.0
_ERROR_LINES = 10
_TABLE_ROWS = 20
# A training that was killed is tried again so many times: memory may have been short for a while.
_MAX_KILLS = 2


def train_command(folder: Path) -> list[str]:
  config = f"--config={folder / config_lib.CONFIG_FILE}"
  return [sys.executable, "-m", "gptjax.train", config, f"--workdir={folder}"]


def write_json(path: Path, value: Any) -> None:
  write_atomically(path, json.dumps(value, indent=2) + "\n")


def check_unchanged(sweep: Sweep, workdir: Path) -> None:
  """Refuses to mix runs of two configs in one arm, or two metrics in one search.

  Raises:
    UserError: names the arm and the keys, or the metrics.
  """
  about = workdir / "sweep.json"
  if sweep.search and about.exists():
    metric = read_json(about)["metric"]
    if metric != sweep.metric:
      raise UserError(
        f"{workdir}: its trials were judged by {metric}, METRIC is {sweep.metric}; give --workdir "
        "another folder."
      )
  for trial in filter(None, sweep.trials.values()):
    path = workdir / "trials" / trial.folder / "trial.json"
    if not path.exists():
      continue
    if changed := changed_keys(read_json(path)["config"], trial.config):
      raise UserError(
        f"arm {trial.arm!r}, seed {trial.seed}, was run with another config: {'; '.join(changed)}. "
        "Give the arm another name, or --workdir another folder."
      )


def run(
  path: str,
  overrides: Mapping[str, str],
  *,
  workdir: str | None,
  parallel: int,
  storage: str,
  grace_seconds: int,
  retry_failed: bool,
  dry_run: bool,
) -> int:
  """Runs a sweep file, or prints what it would take; the arguments are the flags of the command.

  Returns:
    The exit status: 1 unless every trial is done or pruned.

  Raises:
    UserError: the sweep cannot be run; nothing has started.
  """
  host = devices.find_host(parallel)
  slots = devices.split(host, parallel)
  sweep = definition.load(path, overrides, sample_trial)
  folder = Path(workdir or f"runs/{sweep.name}").expanduser().resolve()
  check_unchanged(sweep, folder)
  if dry_run:
    print(preview(sweep, folder, host, parallel))
    return 0
  folder.mkdir(parents=True, exist_ok=True)
  study = Study(sweep, folder, storage, grace_seconds)
  worker = Worker(sweep, study, folder, slots)
  states = worker.run(retry_failed=retry_failed)
  counts = ", ".join(f"{count} {state}" for state, count in Counter(states.values()).items())
  print(f"{folder}: {counts} of {len(states)} trials")
  if worker.stopped_by is not None:
    return 128 + worker.stopped_by
  return int(not {"done", "pruned"}.issuperset(states.values()))


@dataclasses.dataclass
class Job:
  """A trial that this worker has claimed, and how far its training has come.

  total: its steps; None if it is given in epochs. process: None while another process holds the
  folder. ending: why it was told to stop, 'pruned', 'given back' or 'lost' to another worker.
  value: the sweep's metric, of what it has made until now. exhausted: it stops early.
  """

  claim: Claim
  trial: Trial
  folder: Path
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
  seconds: float | None = None

  @property
  def complete(self) -> bool:
    """Whether the training has ended by itself, at its last step or out of patience."""
    if self.process is None or self.process.returncode != 0:
      return False
    at_end = (
      self.ending is None if self.total is None else self.validated == self.step == self.total
    )
    return self.exhausted or at_end

  def stop(self, ending: str) -> None:
    if self.ending is None:
      self.ending = ending
      if self.process is not None:
        self.process.terminate()

  def last_lines(self) -> str:
    """The end of what the training printed, and its exit status."""
    text = (self.folder / "log.txt").read_bytes()[self.log_start :].decode(errors="replace")
    code = self.process.returncode
    why = "it stopped before its last step" if code == 0 else f"exit status {code}"
    return "\n".join([*text.strip().splitlines()[-_ERROR_LINES:], f"({why})"])


class Worker:
  """Runs the trials of a sweep in WORKDIR, in each slot one at a time and in a thread.

  command: makes the command line that trains in a folder. stopped_by: the signal that ended `run`.
  """

  stopped_by: int | None = None

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
    self._slots = slots
    self._command = command
    self._jobs: list[Job] = []
    self._states: dict[str, str] = {}
    self._signals: list[int] = []
    self._suggesting = threading.Lock()
    # A notebook's variables make rich take a pipe for a terminal, and where `!` gives its programs
    # one, it shows each table below the one before.
    live = sys.stdout.isatty() and "JPY_PARENT_PID" not in os.environ
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
    self._study.queue_missing(retry_failed=retry_failed)
    if not _is_unfinished(self._study.states()):
      self._console.print(f"{self._workdir}: every trial has ended, nothing is left to run")
    with (
      _append_signals_to(self._signals),
      self._display(),
      concurrent.futures.ThreadPoolExecutor(len(self._slots)) as pool,
    ):
      threads = [pool.submit(self._work, slot) for slot in self._slots]
      concurrent.futures.wait(threads, return_when=concurrent.futures.FIRST_EXCEPTION)
      if failed := [thread for thread in threads if thread.done() and thread.exception()]:
        self._signals.append(signal.SIGTERM)  # The other threads give their trials back.
        failed[0].result()
    if self._signals:
      self._console.print("stopped by a signal; run again to go on from there")
      self.stopped_by = self._signals[0]
    return self._study.states()

  def _work(self, slot: Slot) -> None:
    """Runs one trial after the other, while there are any."""
    while not self._signals:
      for key in self._study.queue_dead():
        self._console.print(f"{key}: its worker is dead; queued again")
      claim = self._study.claim()
      self._states = self._study.states()
      if claim:
        self._run(claim, slot)
      elif _is_unfinished(self._states):
        time.sleep(_IDLE_SECONDS)
      else:
        return

  def _run(self, claim: Claim, slot: Slot) -> None:
    try:
      with self._suggesting:  # The code of the sweep file need not be safe for threads.
        trial = self._sweep.trial(claim.key, claim.trial)
    except UserError as error:
      self._console.print(f"{claim.key}: failed: {error}")
      self._study.finish(claim, "failed")
      return
    folder = self._workdir / "trials" / trial.folder
    folder.mkdir(parents=True, exist_ok=True)
    length = length_without_data(trial.config)
    job = Job(claim, trial, folder, length and length.total_steps)
    self._jobs.append(job)
    with (folder / ".lock").open("w") as lock:
      try:
        self._train(job, slot, lock)
      except BaseException:
        job.stop("given back")
        raise
    self._finish(job)

  def _train(self, job: Job, slot: Slot, lock: TextIO) -> None:
    """Trains until the process ends, or until the job is told to stop before it has one."""
    while not _take(lock):
      self._heed(job)
      if job.ending:
        return
      time.sleep(_POLL_SECONDS)
    self._start(job, slot, lock)
    ended = False
    while not ended:
      # Asked before the metrics are read, so that nothing can be written after that.
      ended = job.process.poll() is not None
      self._read(job)
      self._heed(job)
      if not ended:
        time.sleep(_POLL_SECONDS)

  def _heed(self, job: Job) -> None:
    """Tells others that the job is alive, and stops it if it was lost or a signal came."""
    if not self._study.beat(job.claim):
      job.stop("lost")
    if self._signals:
      job.stop("given back")
    if len(self._signals) > 1 and job.process is not None:
      job.process.kill()  # Whoever asks twice does not want to wait.

  def _start(self, job: Job, slot: Slot, lock: TextIO) -> None:
    config_file = job.folder / config_lib.CONFIG_FILE
    write_atomically(config_file, config_lib.to_json(job.trial.config) + "\n")
    self._record(job, "running")
    with (job.folder / "log.txt").open("ab") as log, on_cores(slot.cores):
      job.log_start = log.tell()
      job.process = subprocess.Popen(
        self._command(job.folder),
        env=self._environment | os.environ | slot.environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=[lock.fileno()],
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
    error = None
    if job.complete and job.value is not None:
      job.state = "done"
    elif job.complete:
      job.state, error = "failed", f"{self._sweep.metric} is not finite in the end."
    elif job.ending is not None:
      job.state = job.ending
    else:
      job.state, error = "failed", job.last_lines()
      # Shells and the training itself exit with 128 + the number of a signal.
      if not 0 <= job.process.returncode <= 128 and job.claim.kills < _MAX_KILLS:
        job.state = "killed"
    if job.state in ("done", "failed", "pruned"):
      self._record(job, job.state, error)
    if job.state != "lost":
      self._study.finish(job.claim, job.state, job.value if error is None else None)
    job.seconds = time.monotonic() - job.started
    text = f"{job.trial.arm} seed {job.trial.seed}: {job.state} at step {job.step}"
    value = "" if job.value is None else f", {self._sweep.metric} {job.value:.4f}"
    self._console.print(f"{text}{value}, {job.seconds:.0f} s")
    if error:
      again = "\n  queued again" if job.state == "killed" else ""
      self._console.print(f"{error}\n  see {job.folder / 'log.txt'}{again}")

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

  def _display(self) -> contextlib.AbstractContextManager:
    """The table of trials, redrawn now and then where there is a terminal."""
    if not self._console.is_terminal:
      return contextlib.nullcontext()
    return Live(get_renderable=self._table, console=self._console, refresh_per_second=4)

  def _table(self) -> Table:
    counts = sorted(Counter(self._states.values()).items())
    title = ", ".join(f"{count} {state}" for state, count in counts)
    table = Table("arm", "seed", "state", "step", "loss", self._sweep.metric, "time", title=title)
    for job in sorted(self._jobs, key=lambda job: job.seconds is None)[-_TABLE_ROWS:]:
      running = job.seconds is None
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


def _is_unfinished(states: Mapping[str, str]) -> bool:
  return bool({"waiting", "running"} & {*states.values()})


def _take(lock: TextIO) -> bool:
  """Whether the lock of a folder could be had, as it can once no process holds it."""
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True
  except BlockingIOError:
    return False


@contextlib.contextmanager
def _append_signals_to(received: list[int]) -> Iterator[None]:
  """Takes SIGINT and SIGTERM as entries of a list."""
  numbers = (signal.SIGINT, signal.SIGTERM)
  handlers = {
    number: signal.signal(number, lambda got, _: received.append(got)) for number in numbers
  }
  try:
    yield
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
