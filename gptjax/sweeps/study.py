"""The queue of trials that all workers share: an Optuna study, on any of its storages.

Every trial of the sweep has a key, which each entry of the study (Optuna's trial) names. Optuna's
heartbeats find the entries whose worker has died, and its callback queues them again with the same
suggestions. What is missing may be queued by anyone at any time: of the entries of a key only one
is current, the first that was not retried, and no other is run.
"""

import contextlib
import copy
import dataclasses
import fcntl
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import FrozenTrial, TrialState

from gptjax.errors import UserError
from gptjax.sweeps.definition import Sweep
from gptjax.training.checkpoints import lower_is_better
from gptjax.training.setup import length_without_data

optuna.logging.set_verbosity(optuna.logging.WARNING)
# Heartbeats and retries are experimental to Optuna, since version 2.8.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

_RETRY = optuna.storages.RetryHeartbeatStaleTrialCallback()
OnDead = Callable[[optuna.Study, FrozenTrial], None]


class JournalStorage(optuna.storages.JournalStorage, BaseHeartbeat):
  """Optuna's journal, with the heartbeats that Optuna itself has only for databases."""

  def __init__(self, path: Path, grace_seconds: int, on_dead: OnDead):
    super().__init__(optuna.storages.journal.JournalFileBackend(str(path)))
    self._grace_seconds, self._on_dead = grace_seconds, on_dead

  def record_heartbeat(self, trial_id: int) -> None:
    with contextlib.suppress(UpdateFinishedTrialError):
      self.set_trial_system_attr(trial_id, "heartbeat", time.time())

  def _get_stale_trial_ids(self, study_id: int) -> list[int]:
    running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
    oldest = time.time() - self._grace_seconds
    return [entry._trial_id for entry in running if entry.system_attrs.get("heartbeat", 0) < oldest]

  def get_heartbeat_interval(self) -> int:
    return self._grace_seconds

  def get_heartbeat_stale_trial_callback(self) -> OnDead:
    return self._on_dead


def open_storage(
  name: str, workdir: Path, grace_seconds: int, on_dead: OnDead
) -> optuna.storages.BaseStorage:
  """Opens the storage of --storage: '' (SQLite) and 'journal' are files in WORKDIR, else a URL.

  Raises:
    UserError: it is none of these, or cannot be opened.
  """
  if name == "journal":
    return JournalStorage(workdir / "study.journal", grace_seconds, on_dead)
  if name and "://" not in name:
    raise UserError(f"--storage={name}: expected 'journal' or a URL such as postgresql://HOST/DB.")
  try:
    database = optuna.storages.RDBStorage(
      name or f"sqlite:///{workdir / 'study.db'}?timeout=60",
      heartbeat_interval=grace_seconds,
      grace_period=grace_seconds,
      heartbeat_stale_trial_callback=on_dead,
    )
  except (ValueError, ImportError, sqlalchemy.exc.SQLAlchemyError) as error:
    place, reason = (
      f"--storage={name}" if name else workdir / "study.db",
      str(error).splitlines()[0],
    )
    raise UserError(f"{place}: cannot be opened: {reason}") from error
  return optuna.storages.get_storage(database)


def sample_trial() -> optuna.Trial:
  """Makes a trial that belongs to no sweep, to try a search function with."""
  return optuna.create_study().ask()


@dataclasses.dataclass
class Claim:
  """A trial that this worker runs.

  kills: how often its training was killed before. beaten: time.monotonic() of its last heartbeat.
  """

  key: str
  id: int
  trial: optuna.Trial
  kills: int
  beaten: float


class Study:
  """The study of a sweep, as one worker sees it.

  workdir: for a lock between the workers of this host, as SQLite has none for rows. storage: see
  `open_storage`. grace_seconds: how old a running trial's heartbeat is when its worker is held for
  dead.
  """

  def __init__(self, sweep: Sweep, workdir: Path, storage: str = "", grace_seconds: int = 120):
    self._search = sweep.search
    self._lock_file = workdir / ".lock"
    self._keys = {key: number for number, key in enumerate(sweep.trials)}
    self._beat_seconds = grace_seconds / 8
    self._dead: list[str] = []
    pruner = make_pruner(sweep)
    with self._lock():
      self._storage = open_storage(storage, workdir, grace_seconds, self._retry_dead)
      self._study = optuna.create_study(
        storage=self._storage,
        study_name=workdir.name,
        direction="minimize" if lower_is_better(sweep.metric) else "maximize",
        pruner=pruner,
        load_if_exists=True,
      )

  def current(self) -> dict[str, FrozenTrial]:
    """The valid entry of each key."""
    entries = self._study.get_trials(deepcopy=False)
    retried = {number for entry in entries for number in _RETRY.retry_history(entry)}
    current: dict[str, FrozenTrial] = {}
    for entry in entries:
      key = entry.user_attrs.get("key")
      # Arms that are no longer in the file stay in the study.
      if key in self._keys and entry.number not in retried and not _is(entry, "copy"):
        current.setdefault(key, entry)
    return current

  def queue_missing(self, *, retry_failed: bool = False) -> None:
    """Queues each key without an entry or with an interrupted one; on demand, those that failed."""
    current = self.current()
    for key in self._keys:
      entry = current.get(key)
      if entry is None:
        self._study.enqueue_trial({}, user_attrs={"key": key})
      elif entry.state == TrialState.FAIL and (retry_failed or not _is(entry, "failed")):
        _RETRY(self._study, copy.deepcopy(entry))

  def queue_dead(self) -> list[str]:
    """Queues the trials of dead workers again; returns their keys."""
    self._dead = []
    optuna.storages.fail_stale_trials(self._study)
    self.queue_missing()  # A worker may have died between these two steps of Optuna's.
    return self._dead

  def _retry_dead(self, study: optuna.Study, entry: FrozenTrial) -> None:
    _RETRY(study, entry)
    self._dead.append(entry.user_attrs["key"])

  def claim(self) -> Claim | None:
    """Takes a waiting trial for this worker; None if none waits."""
    with self._lock():
      for entry in self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        key, trial_id = entry.user_attrs.get("key"), entry._trial_id
        if key not in self._keys:
          continue
        # Before it is taken, or nobody would ever miss a worker that dies in between.
        self._storage.record_heartbeat(trial_id)
        try:
          if not self._storage.set_trial_state_values(trial_id, state=TrialState.RUNNING):
            continue
        except UpdateFinishedTrialError:
          continue
        if self.current()[key].number != entry.number:
          self._storage.set_trial_user_attr(trial_id, "copy", entry.number)
          self._storage.set_trial_state_values(trial_id, state=TrialState.FAIL)
          continue
        kills = entry.user_attrs.get("kills", 0)
        return Claim(key, trial_id, self._open(key, trial_id), kills, time.monotonic())
    return None

  def _open(self, key: str, trial_id: int) -> optuna.Trial:
    """The trial, and for a search a sampler with a seed of its own, which sees all that ended."""
    study = self._study
    if self._search:
      # A study caches the trials that it has shown to a sampler, so this is a new one.
      kinds = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
      sampler = kinds[self._search.sampler](seed=self._search.seed * 10_007 + self._keys[key])
      name, pruner = study.study_name, study.pruner
      study = optuna.load_study(
        study_name=name, storage=self._storage, sampler=sampler, pruner=pruner
      )
    return optuna.Trial(study, trial_id)

  def beat(self, claim: Claim) -> bool:
    """Says that this worker lives, now and then; False if the trial was taken from it."""
    if time.monotonic() - claim.beaten < self._beat_seconds:
      return True
    claim.beaten = time.monotonic()
    self._storage.record_heartbeat(claim.id)
    return self._storage.get_trial(claim.id).state == TrialState.RUNNING

  def should_prune(self, claim: Claim, value: float, step: int) -> bool:
    """Reports a validation of a running trial, and asks the pruner."""
    try:
      claim.trial.report(value, step)
      return claim.trial.should_prune()
    except UpdateFinishedTrialError:  # It was taken from this worker; `beat` will say so.
      return False

  def finish(self, claim: Claim, state: str, value: float | None = None) -> None:
    """Ends a trial: 'done' or 'pruned' with its value, 'failed', or back in the queue.

    There it goes if it was 'given back', or if its training was 'killed'.
    """
    ends = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    # Where it was taken from this worker, the other one says how it ends.
    with contextlib.suppress(UpdateFinishedTrialError):
      if state == "failed":
        claim.trial.set_user_attr("failed", claim.trial.number)
      if state == "killed":
        claim.trial.set_user_attr("kills", claim.kills + 1)
      values = None if value is None else [value]
      self._storage.set_trial_state_values(claim.id, ends.get(state, TrialState.FAIL), values)
    self.queue_missing()

  def states(self) -> dict[str, str]:
    """'waiting', 'running', 'done', 'pruned' or 'failed' for each key."""
    states, current = dict.fromkeys(self._keys, "waiting"), self.current()
    for key, entry in current.items():
      if entry.state != TrialState.FAIL:
        states[key] = "done" if entry.state == TrialState.COMPLETE else entry.state.name.lower()
      elif _is(entry, "failed"):
        states[key] = "failed"
    return states

  @contextlib.contextmanager
  def _lock(self) -> Iterator[None]:
    with self._lock_file.open("w") as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      yield


def _is(entry: FrozenTrial, mark: str) -> bool:
  """Whether an entry bears the mark itself; a retry inherits those of its predecessor."""
  return entry.user_attrs.get(mark) == entry.number


def make_pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
  """No pruner, or 'halving': ASHA (Li et al. 2020), whose first rung is the first validation.

  Raises:
    UserError: there is no validation before the last step.
  """
  if sweep.search is None or sweep.search.pruner == "none":
    return optuna.pruners.NopPruner()
  length = length_without_data(sweep.base)
  first: Any = "auto"  # Only the data tells how many steps an epoch has.
  if length and "every_epochs" not in sweep.base.eval:
    first = length.steps(sweep.base, "eval.every")
  if not first:
    raise UserError("SEARCH['pruner']='halving' needs validations: set eval.every_steps.")
  return optuna.pruners.SuccessiveHalvingPruner(min_resource=first)
