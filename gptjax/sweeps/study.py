"""The queue of trials that all workers share: an Optuna study, on any of its storages.

Each trial of the sweep has a key. Of all the entries of the study with this key at most one is in
force: the first that was not thrown away. An entry is thrown away (state FAIL) when it repeats one
that is in force, when its worker has given it back, or when that worker is dead. So enqueueing
what is missing may be done by anyone at any time, and every trial still runs once.
"""

import contextlib
import dataclasses
import fcntl
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gptjax.errors import UserError

try:
  import optuna
  import sqlalchemy
  from optuna.exceptions import UpdateFinishedTrialError
  from optuna.trial import FrozenTrial, TrialState
except ImportError as error:
  raise UserError('optuna is not installed: pip install "gptjax[sweep]"') from error

optuna.logging.set_verbosity(optuna.logging.WARNING)


def sample_trial() -> optuna.Trial:
  """A trial of no study, to try a search function with."""
  return optuna.create_study().ask()


def open_storage(name: str, workdir: Path) -> optuna.storages.BaseStorage:
  """The storage of --storage: '' (SQLite) and 'journal' are files in WORKDIR, else a URL.

  Raises:
    UserError: it is none of these, or cannot be opened.
  """
  if name == "journal":
    backend = optuna.storages.journal.JournalFileBackend(str(workdir / "study.journal"))
    return optuna.storages.JournalStorage(backend)
  if name and "://" not in name:
    raise UserError(f"--storage={name}: expected 'journal' or a URL such as postgresql://HOST/DB.")
  try:
    return optuna.storages.get_storage(name or f"sqlite:///{workdir / 'study.db'}?timeout=60")
  except (ValueError, ImportError, sqlalchemy.exc.SQLAlchemyError) as error:
    raise UserError(f"--storage={name}: cannot be opened: {error}") from error


@dataclasses.dataclass
class Claim:
  """A trial that this worker runs. beaten: when it last said so, by time.monotonic()."""

  key: str
  id: int
  trial: optuna.Trial
  beaten: float


class Study:
  """The study of a sweep, as one worker sees it.

  Args:
    storage: see `open_storage`.
    name: of the study in its storage.
    workdir: for a lock between the workers of this host, as SQLite has none for rows.
    keys: of all trials of the sweep.
    sampler: makes the sampler of a search for the number of the trial among the keys.
    pruner: of a search.
    lower_is_better: of the values of the trials.
    grace_seconds: how old a running trial's heartbeat is when its worker is held for dead.
  """

  def __init__(
    self,
    storage: str,
    name: str,
    workdir: Path,
    keys: Iterable[str],
    *,
    sampler: Any = None,
    pruner: Any = None,
    lower_is_better: bool = True,
    grace_seconds: float = 120.0,
  ):
    self._lock_file = workdir / ".lock"
    self._keys = {key: number for number, key in enumerate(keys)}
    self._sampler = sampler
    self._grace_seconds = grace_seconds
    with self._lock():
      self._storage = open_storage(storage, workdir)
      self._study = optuna.create_study(
        storage=self._storage,
        study_name=name,
        direction="minimize" if lower_is_better else "maximize",
        pruner=pruner or optuna.pruners.NopPruner(),
        load_if_exists=True,
      )
    self._study_id = self._storage.get_study_id_from_name(name)

  def in_force(self) -> dict[str, FrozenTrial]:
    """The entry of each key that counts."""
    entries: dict[str, FrozenTrial] = {}
    for entry in self._study.get_trials(deepcopy=False):
      attributes = entry.user_attrs
      key = attributes.get("key")
      if key not in self._keys:  # An arm that is no longer in the file.
        continue
      if key in entries and entries[key].number <= attributes.get("retry_of", -1):
        del entries[key]
      thrown_away = entry.state == TrialState.FAIL and "failed" not in attributes
      if not thrown_away:
        entries.setdefault(key, entry)
    return entries

  def enqueue_missing(self, *, retry_failed: bool = False) -> None:
    """Gives every key an entry, and with `retry_failed` a new one to those that failed."""
    entries = self.in_force()
    suggested = {  # A search's trial that is begun again keeps its suggestion.
      entry.user_attrs.get("key"): entry.params
      for entry in self._study.get_trials(deepcopy=False)
      if entry.params
    }
    for key in self._keys:
      entry, attributes = entries.get(key), {"key": key}
      if entry is not None:
        if not (retry_failed and entry.state == TrialState.FAIL):
          continue
        attributes["retry_of"] = entry.number
      self._study.enqueue_trial(suggested.get(key, {}), user_attrs=attributes)

  def claim(self) -> Claim | None:
    """Takes a waiting trial for this worker; None if none waits."""
    with self._lock():
      for entry in self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        key = entry.user_attrs.get("key")
        if key not in self._keys:
          continue
        trial_id = self._id(entry)
        try:
          if not self._storage.set_trial_state_values(trial_id, state=TrialState.RUNNING):
            continue
        except UpdateFinishedTrialError:
          continue
        first = self.in_force()[key].number
        if first != entry.number:
          self._storage.set_trial_user_attr(trial_id, "duplicate_of", first)
          self._storage.set_trial_state_values(trial_id, state=TrialState.FAIL)
          continue
        study = self._study
        if self._sampler is not None:
          # A study caches the trials that it has shown to a sampler; a new one sees all that ended.
          study = optuna.load_study(
            study_name=study.study_name,
            storage=self._storage,
            sampler=self._sampler(self._keys[key]),
            pruner=study.pruner,
          )
        claim = Claim(key, trial_id, optuna.Trial(study, trial_id), float("-inf"))
        if self.beat(claim):
          return claim
    return None

  def beat(self, claim: Claim) -> bool:
    """Says that this worker lives, now and then; False if the trial was taken from it."""
    if time.monotonic() - claim.beaten < self._grace_seconds / 8:
      return True
    claim.beaten = time.monotonic()
    try:
      self._storage.set_trial_user_attr(claim.id, "heartbeat", time.time())
    except UpdateFinishedTrialError:
      return False
    return True

  def should_prune(self, claim: Claim, value: float, step: int) -> bool:
    """Reports a validation of a running trial, and asks the pruner."""
    try:
      claim.trial.report(value, step)
      return claim.trial.should_prune()
    except UpdateFinishedTrialError:  # It was taken from this worker; `beat` will say so.
      return False

  def finish(self, claim: Claim, state: str, value: float | None = None) -> None:
    """Ends a trial: 'done' or 'pruned' with its value, 'failed', or 'given back' to the queue."""
    try:
      if state == "failed":
        self._storage.set_trial_user_attr(claim.id, "failed", True)
      self._storage.set_trial_state_values(
        claim.id,
        {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED}.get(state, TrialState.FAIL),
        None if value is None else [value],
      )
    except UpdateFinishedTrialError:
      pass  # It was taken from this worker, and the other one says how it ends.
    self.enqueue_missing()

  def reap(self) -> list[str]:
    """Puts the trials of dead workers back; their keys."""
    dead = []
    for key, entry in self.in_force().items():
      if entry.state != TrialState.RUNNING:
        continue
      beat = entry.user_attrs.get("heartbeat") or entry.datetime_start.timestamp()
      if time.time() - beat > self._grace_seconds:
        trial_id = self._id(entry)
        # Another worker may have been faster.
        with contextlib.suppress(UpdateFinishedTrialError):
          self._storage.set_trial_state_values(trial_id, state=TrialState.FAIL)
          dead.append(key)
    self.enqueue_missing()
    return dead

  def _id(self, entry: FrozenTrial) -> int:
    return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, entry.number)

  def states(self) -> dict[str, str]:
    """'waiting', 'running', 'done', 'pruned' or 'failed' of each key."""
    names = {TrialState.COMPLETE: "done", TrialState.FAIL: "failed"}
    entries = self.in_force()
    return {
      key: names.get(entries[key].state, entries[key].state.name.lower())
      if key in entries
      else "waiting"
      for key in self._keys
    }

  @contextlib.contextmanager
  def _lock(self) -> Iterator[None]:
    with self._lock_file.open("w") as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      yield


def make_sampler(name: str, seed: int, number: int) -> optuna.samplers.BaseSampler:
  """'tpe' or 'random', for one trial: workers that share a seed must not draw the same numbers."""
  seed = seed * 10_007 + number
  if name == "random":
    return optuna.samplers.RandomSampler(seed=seed)
  return optuna.samplers.TPESampler(seed=seed)


def make_pruner(name: str, first_step: int | str) -> optuna.pruners.BasePruner:
  """'none', or 'halving': ASHA (Li et al. 2020), whose first rung is at `first_step`."""
  if name == "none":
    return optuna.pruners.NopPruner()
  return optuna.pruners.SuccessiveHalvingPruner(min_resource=first_step)
