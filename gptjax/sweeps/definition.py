"""Reads sweep files, and checks the config of every trial before the first one starts.

A sweep file is Python: a docstring (the question), `base()`, which returns a config, and either

    def sweep():                       # yields (arm, overrides), one for each trial
      return cross({"adamw": {}, "lion": {"optim.name": "lion"}}, seeds(3))

or `search(trial)`, which takes an Optuna trial and returns overrides, with its options in `SEARCH`.
Overrides are {dotted key: value}; a value may be a mapping of further keys. BASELINE names the arm
that the others are compared with, by default the first. METRIC is any metric that the validation of
every arm reports; by default val/bits_per_byte, or checkpoint.best_metric where checkpoint.final is
'best' or the validation reports no bits per byte.

A sweep that gives the mean and deviation of a fine-tuning over seeds:

    from gptjax import config
    from gptjax.sweeps.definition import cross, seeds

    def base():
      paths = {"data.path": "PATH/train.jsonl", "data.validation_path": "PATH/validation.jsonl"}
      changes = paths | {"init_from": "hf:FOLDER", "eval.patience": 2}
      return config.load("configs/finetune.py:task=classification", changes)

    def sweep():
      rates = {f"rate {rate}": {"optim.learning_rate": rate} for rate in (3e-5, 1e-4)}
      return cross(rates, seeds(5))
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gptjax import config as config_lib
from gptjax.data.options import check_path
from gptjax.errors import UserError, did_you_mean
from gptjax.objectives.task import metrics_of
from gptjax.training import validation
from gptjax.training.resolve import resolve
from gptjax.training.setup import Setup, make_setup

Overrides = Mapping[str, Any]
Axis = Mapping[str, Overrides] | Iterable[tuple[str, Overrides]]

SEARCH_CHOICES = {"sampler": ("tpe", "random"), "pruner": ("none", "halving")}


@dataclasses.dataclass(frozen=True)
class Search:
  """Options of `SEARCH`: Optuna's TPE or random sampler, and ASHA ('halving') or no pruner."""

  sampler: str = "tpe"
  trials: int = 24
  pruner: str = "none"
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Trial:
  """One training run: its config, locked, and the flat overrides (with the seed) that made it."""

  arm: str
  seed: int
  overrides: dict[str, Any]
  config: Any

  @property
  def folder(self) -> str:
    return f"{slug(self.arm)}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A sweep file, read and checked.

  trials: {key: trial}; a key is the trial's folder, or in a search its arm, with None for a trial
  until it is suggested. plans: one for each arm; in a search one for a sample, under "search".
  """

  path: Path
  question: str
  base: Any
  baseline: str
  metric: str
  trials: dict[str, Trial | None]
  plans: dict[str, Setup]
  search: Search | None
  suggest: Callable[[Any], Overrides] | None

  @property
  def name(self) -> str:
    return self.path.resolve().parent.name

  def to_json(self) -> dict[str, Any]:
    return {
      "name": self.name,
      "question": self.question,
      "baseline": self.baseline,
      "metric": self.metric,
      "search": self.search and dataclasses.asdict(self.search),
    }

  def trial(self, key: str, optuna_trial: Any) -> Trial:
    """Returns the trial of a key; in a search, makes it as `search` suggests for `optuna_trial`.

    Raises:
      UserError: the suggested config cannot be used.
    """
    if self.suggest is None:
      return self.trials[key]
    trial = make_trial(self.base, key, self.suggest(optuna_trial))
    validation.check_metric(f"arm {key!r}: METRIC", self.metric, check(trial).task)
    return trial


def slug(arm: str) -> str:
  """Turns an arm's name into a part of a folder's name."""
  return re.sub(r"[^\w.,=+-]+", "-", arm).strip("-.") or "arm"


def seeds(which: int | Iterable[int]) -> list[tuple[str, Overrides]]:
  """Makes an axis of seeds, 0 to `which` - 1 or those given; they do not enter the arm's name."""
  return [("", {"seed": seed}) for seed in (range(which) if isinstance(which, int) else which)]


def cross(*axes: Axis) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields every combination of the axes, named by their labels joined with ",".

  Args:
    axes: each {label: overrides}, or pairs of them.

  Raises:
    UserError: two axes set the same key.
  """
  pairs = [axis.items() if isinstance(axis, Mapping) else axis for axis in axes]
  for combination in itertools.product(*pairs):
    arm = ",".join(label for label, _ in combination if label)
    merged: dict[str, Any] = {}
    for _, overrides in combination:
      overrides = config_lib.flatten(overrides)
      if twice := merged.keys() & overrides:
        raise UserError(f"cross: two axes of arm {arm!r} set {min(twice)!r}; only one can.")
      merged |= overrides
    yield arm or "base", merged


def load(path: str, overrides: Overrides, sample: Callable[[], Any]) -> Sweep:
  """Reads and checks a sweep file.

  Args:
    path: the file.
    overrides: applied to the base config of all arms.
    sample: makes an Optuna trial, for the one suggestion of a search that is checked.

  Raises:
    UserError: the file is not a sweep, or a trial cannot be run; names the arm and the key.
  """
  if not Path(path).is_file():
    raise UserError(f"--sweep: no file {path!r}.")
  with config_lib.user_code(path):
    module = config_lib.run_file(path)
    if not hasattr(module, "base") or hasattr(module, "sweep") == hasattr(module, "search"):
      raise UserError("a sweep file has base(), and one of sweep() and search(trial).")
    base = module.base()
    if not isinstance(base, ConfigDict):
      raise UserError(f"base() made {type(base).__name__}, not a config such as config.load makes.")
    base = base.copy_and_resolve_references()
    for key, value in overrides.items():
      config_lib.override(base, key, value)
    search, suggest, plans = None, getattr(module, "search", None), {}
    if suggest:
      search = _read_search(getattr(module, "SEARCH", {}))
      trials = dict.fromkeys(f"trial-{number:04}" for number in range(search.trials))
      plans["search"] = check(make_trial(base, "search", suggest(sample())))
      arms = list(trials)
    else:
      trials = _list_trials(base, module.sweep())
      for trial in trials.values():
        if trial.arm not in plans:
          plans[trial.arm] = check(trial)
      arms = list(plans)
    baseline = getattr(module, "BASELINE", arms[0])
    if baseline not in arms:
      raise UserError(f"BASELINE: no arm {baseline!r}. {did_you_mean(str(baseline), arms)}")
    metric = str(getattr(module, "METRIC", default_metric(next(iter(plans.values())))))
    for arm, setup in plans.items():
      validation.check_metric(f"arm {arm!r}: METRIC", metric, setup.task)
  question = (module.__doc__ or "").strip()
  return Sweep(Path(path), question, base, baseline, metric, trials, plans, search, suggest)


def default_metric(setup: Setup) -> str:
  """The metric that arms are compared by if the file has no METRIC."""
  config = setup.config
  best, usual = config.checkpoint.best_metric, "val/bits_per_byte"
  if config.checkpoint.final == "best" or usual not in metrics_of(setup.task):
    return best or "val/loss"
  return usual


def make_trial(base: Any, arm: str, overrides: Overrides) -> Trial:
  """Applies overrides to a copy of the base; UserError names the arm."""
  config = base.copy_and_resolve_references()
  flat = config_lib.flatten(overrides)
  for key, value in flat.items():
    try:
      config_lib.override(config, key, value)
    except UserError as error:
      raise UserError(f"arm {arm!r}: {error}") from None
  return Trial(arm, config.seed, flat | {"seed": config.seed}, config.lock())


def check(trial: Trial) -> Setup:
  """Sets a trial up on the devices that JAX sees here; UserError names the arm."""
  try:
    setup = make_setup(resolve(trial.config))
    setup.make_optimizer(setup.run_length)
    for part in setup.data.parts.values():
      check_path(part)
    validation.check(setup.config, setup.task)
  except UserError as error:
    raise UserError(f"arm {trial.arm!r}: {error}") from None
  return setup


def _list_trials(base: Any, pairs: Iterable[tuple[str, Overrides]]) -> dict[str, Trial]:
  trials: dict[str, Trial] = {}
  arms: dict[str, tuple[str, dict[str, Any]]] = {}
  for arm, overrides in pairs:
    trial = make_trial(base, arm, overrides)
    name, settings = slug(arm), {k: v for k, v in trial.overrides.items() if k != "seed"}
    first_arm, first_settings = arms.setdefault(name, (arm, settings))
    if first_arm != arm:
      raise UserError(f"arms {first_arm!r} and {arm!r} both make the folder {name!r}; rename one.")
    if trial.folder in trials:
      raise UserError(f"arm {arm!r} has seed {trial.seed} twice; give each trial its own seed.")
    if first_settings != settings:
      raise UserError(f"arm {arm!r} has different overrides by seed; make arms of them.")
    trials[trial.folder] = trial
  if not trials:
    raise UserError("sweep() yields no trials.")
  return trials


def _read_search(options: Mapping[str, Any]) -> Search:
  fields = {field.name: field.default for field in dataclasses.fields(Search)}
  for key, value in options.items():
    if key not in fields:
      raise UserError(f"SEARCH: no key {key!r}. {did_you_mean(key, fields)}")
    choices = SEARCH_CHOICES.get(key)
    if choices and value not in choices:
      raise UserError(f"SEARCH[{key!r}]: no {key} {value!r}. {did_you_mean(str(value), choices)}")
    least = {"trials": 1, "seed": 0}.get(key)
    if least is not None and (not isinstance(value, int) or value < least):
      raise UserError(f"SEARCH[{key!r}]={value!r} is not a whole number of at least {least}.")
  return Search(**options)


def changed_keys(before: Mapping[str, Any], config: Any) -> list[str]:
  """Says "key was A and is B" for each key in which a config differs from one saved as JSON."""
  old, new = config_lib.flatten(before), config_lib.flatten(json.loads(config_lib.to_json(config)))
  return [
    f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
    for key in sorted({*old, *new})
    if old.get(key) != new.get(key)
  ]
