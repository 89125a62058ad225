"""Reads what the trials of a sweep have left on disk, and compares its arms at equal budgets.

A running sweep may be read at any time. What counts of a run is what it had made by then: its last
validation, or with checkpoint.final=best its best. One that stopped early (eval.patience) counts
beyond its end with what it had made there.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax import small_files
from gptjax.config import flatten
from gptjax.errors import UserError
from gptjax.objectives.task import TASKS, find_task
from gptjax.sweeps import statistics
from gptjax.sweeps.statistics import Comparison, Verdict
from gptjax.training.checkpoints import lower_is_better
from gptjax.training.metrics import read_metrics
from gptjax.training.validation import History

BUDGETS = {"step": "steps", "tokens": "tokens", "flops": "FLOPs", "seconds": "training seconds"}
# Keys that decide which tokens step i trains on, beside `data.*` without data.cache_dir.
DATA_KEYS = ("seed", "tokenizer", "batch_size", "sequence_length")
# An arm that was given less than this share of the steps or tokens of the baseline is not compared
# with it there.
_LEAST_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Run:
  """A trial as it was trained.

  why: it is left out; empty if it counts. config: flat. lines: of validation. values: the sweep's
  metric, of what the run had made by then; budgets: arrays of the same length, rising, by the names
  that every line has. exhausted: it stopped early, out of patience.
  """

  folder: Path
  arm: str
  seed: int
  state: str
  why: str
  overrides: Mapping[str, Any]
  config: Mapping[str, Any]
  lines: Sequence[Mapping[str, Any]]
  values: np.ndarray
  budgets: Mapping[str, np.ndarray]
  exhausted: bool

  def at(self, budget: str, amount: float) -> float:
    """The metric at an amount of a budget, linear between evaluations; the last beyond them."""
    return float(np.interp(amount, self.budgets[budget], self.values))

  def reach(self, budget: str) -> float:
    """The amount of a budget up to which the run counts."""
    return math.inf if self.exhausted else self.budgets[budget][-1]


@dataclasses.dataclass(frozen=True)
class Results:
  """A sweep's work directory, read."""

  workdir: Path
  name: str
  question: str
  baseline: str
  metric: str
  search: Mapping[str, Any] | None
  runs: Sequence[Run]

  @property
  def finished(self) -> list[Run]:
    return [run for run in self.runs if not run.why]

  @property
  def is_token_mean(self) -> bool:
    """Whether the metric is a mean over tokens, so that it depends on the tokenizer."""
    tasks = {run.config.get("task.name") for run in self.runs}
    writes = all(find_task(task).predicts_tokens for task in tasks if task in TASKS)
    return self.metric in ("val/loss", "val/perplexity") and writes

  @property
  def label(self) -> str:
    unit = " (nats a token)" if self.metric == "val/loss" and self.is_token_mean else ""
    return f"validation {self.metric.removeprefix('val/').replace('_', ' ')}{unit}"

  @property
  def lower_is_better(self) -> bool:
    return lower_is_better(self.metric)

  @property
  def direction(self) -> str:
    return f"{'lower' if self.lower_is_better else 'higher'} is better"

  def arms(self) -> dict[str, dict[int, Run]]:
    """{arm: {seed: run}} of the finished runs, the baseline first."""
    arms = {self.baseline: {}} | {run.arm: {} for run in self.finished}
    for run in self.finished:
      arms[run.arm][run.seed] = run
    return arms


@dataclasses.dataclass(frozen=True)
class Table:
  """The arms at an equal amount of a budget; short are those that end too soon for it."""

  budget: str
  amount: float
  short: Sequence[str]
  compared: Sequence[Comparison]
  verdict: Verdict


def load_results(workdir: str) -> Results:
  """Reads WORKDIR/sweep.json and all WORKDIR/trials/*/.

  Raises:
    UserError: a file is missing or not what a sweep writes; names it.
  """
  root = Path(workdir)
  about = read_json(root / "sweep.json", "not the work directory of a sweep")
  trials = sorted(root.glob("trials/*/trial.json"))
  runs = [_load_run(path.parent, about["metric"]) for path in trials]
  fields = ("name", "question", "baseline", "metric", "search")
  return Results(root, *(about[field] for field in fields), runs)


def _load_run(folder: Path, metric: str) -> Run:
  trial = read_json(folder / "trial.json", "not a trial")
  state, why, lines = trial["state"], "", []
  if state in ("done", "pruned"):  # The file of a running trial may end in half a line.
    lines = [line for line in read_metrics(folder) if metric in line]
  config = flatten(trial["config"])
  best, final = (config.get(f"checkpoint.{key}", "") for key in ("best_metric", "final"))
  history, values = History([], best, config.get("eval.patience", 0), final), []
  for line in lines:
    history.add(line["step"], line)
    values.append(history.result[metric])
  # Until it has learnt something a metric may have no value, as a correlation with a constant.
  first = next((i for i, value in enumerate(values) if value is not None), 0)
  known, values = lines[first:], values[first:]
  gone = [line["step"] for line, value in zip(known, values, strict=True) if value is None]
  if state != "done":
    why = ": ".join(filter(None, (state, trial["error"])))
  elif not lines:
    why = f"failed: no {metric} in its metrics.jsonl"
  elif gone:
    why = f"failed: diverged, {metric} is not finite at step {gone[0]}"
  # Seconds are a mean a step times the steps, which may once in a while go back by a hair.
  budgets = {
    name: np.maximum.accumulate([float(line[name]) for line in known])
    for name in BUDGETS
    if known and all(line.get(name) is not None for line in known)
  }
  about = folder, trial["arm"], trial["seed"], state, why, trial["overrides"]
  return Run(*about, config, lines, np.array(values, float), budgets, history.exhausted)


def read_json(path: Path, otherwise: str) -> Any:
  """Reads a file of a work directory; the UserError says what the folder is otherwise."""
  try:
    return small_files.read_json(path)
  except UserError as error:
    raise UserError(f"{path.parent}: {otherwise} ({error})") from None


def same_data(a: Run, b: Run) -> bool:
  """Whether two runs trained on the same tokens in the same order, by their configs."""
  keys = {key for key in {*a.config} | {*b.config} if key.startswith("data.")}
  keys = keys - {"data.cache_dir"} | {*DATA_KEYS}
  return all(a.config.get(key) == b.config.get(key) for key in keys)


def pairs_with(arm: Mapping[int, Run], baseline: Mapping[int, Run]) -> bool:
  """Whether every seed that two arms have in common gave both the same data."""
  common = {*arm} & {*baseline}
  return bool(common) and all(same_data(arm[seed], baseline[seed]) for seed in common)


def make_table(results: Results, budget: str) -> Table | str:
  """Compares the arms at the most of a budget that they all reach; says why if it cannot.

  An arm of less than `_LEAST_SHARE` of the baseline's length would pull all others down into the
  middle of their runs; it is left out instead.
  """
  arms, runs = results.arms(), results.finished
  unknown = [run for run in runs if budget not in run.budgets]
  if unknown:
    first = f"{unknown[0].arm} seed {unknown[0].seed}"
    return f"Left out: {len(unknown)} of {len(runs)} runs did not record it, {first} for one."

  def end(arm: str, budget: str) -> float:
    return min(run.reach(budget) for run in arms[arm].values())

  # An arm is short by what it was given, not because it is fast.
  given = "tokens" if budget in ("flops", "seconds") and "tokens" in runs[0].budgets else budget
  went = min(run.budgets[given][-1] for run in arms[results.baseline].values())
  short = [arm for arm in arms if end(arm, given) < _LEAST_SHARE * went]
  arms = {arm: by_seed for arm, by_seed in arms.items() if arm not in short}
  furthest = max(run.budgets[budget][-1] for by_seed in arms.values() for run in by_seed.values())
  amount = min(furthest, *(end(arm, budget) for arm in arms))
  if amount <= 0 or (short and len(arms) == 1):
    return "Left out: no other arm goes as far as the baseline."
  values = {
    arm: {seed: run.at(budget, amount) for seed, run in by_seed.items()}
    for arm, by_seed in arms.items()
  }
  paired = {arm: pairs_with(by_seed, arms[results.baseline]) for arm, by_seed in arms.items()}
  compared = statistics.compare_arms(values, results.baseline, paired=paired)
  lower = results.lower_is_better
  verdict = statistics.verdict(values, results.baseline, paired=paired, lower_is_better=lower)
  return Table(budget, float(amount), short, compared, verdict)


def rows(table: Table) -> list[dict[str, Any]]:
  """The rows of report.csv: an arm each, None where there is nothing to say."""
  tests = sum(arm.p_holm is not None for arm in table.compared)
  found = []
  for arm in table.compared:
    versus = arm.versus or statistics.Difference(None)
    needed = None
    if versus.noise and not arm.significant:
      # At the level of Holm's first step, which the smallest p of all has to pass.
      needed = statistics.seeds_needed(
        versus.noise, versus.difference, alpha=statistics.ALPHA / tests, paired=versus.paired
      )
    found.append(
      {"budget": table.budget, "amount": table.amount}
      | {name: getattr(arm, name) for name in ("arm", "n", "mean", "sigma")}
      | {name: getattr(versus, name) for name in ("difference", "low", "high")}
      | {"test": None if versus.p is None else "paired t" if versus.paired else "Welch"}
      | {"p": versus.p, "p_holm": arm.p_holm, "verdict": table.verdict.words[arm.arm]}
      | {"seeds_needed": needed}
    )
  return found


def first_crossing(
  x: np.ndarray, values: np.ndarray, target: float, *, lower_is_better: bool
) -> float | None:
  """Finds where values first come to the target, linear between points; None if they do not."""
  if not lower_is_better:
    values, target = -values, -target
  below = np.flatnonzero(values <= target)
  if not len(below) or below[0] == 0:
    return float(x[0]) if len(below) else None
  i = below[0]
  return float(np.interp(target, values[[i, i - 1]], x[[i, i - 1]]))
