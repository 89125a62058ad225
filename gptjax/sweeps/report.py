"""The verdict of a sweep, from what its runs left on disk; and the comparison of two runs.

Arms are compared at equal steps, tokens, FLOPs and training seconds, each time by
`statistics.verdict`. A run that did not finish or diverged is listed and left out, never dropped
in silence. A running sweep may be reported on: it is only read.

What counts of a run is what it had made by then: its last validation, or with checkpoint.final=best
its best. One that stopped early (eval.patience) counts beyond its end with what it had made there.
"""

import csv
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import CONFIG_FILE, flatten
from gptjax.errors import UserError
from gptjax.objectives.task import TASKS, find_task
from gptjax.sweeps import figures, statistics
from gptjax.sweeps.page import Page
from gptjax.sweeps.statistics import Comparison, Verdict
from gptjax.training.checkpoints import lower_is_better
from gptjax.training.metrics import read_metrics
from gptjax.training.validation import History

BUDGETS = {"step": "steps", "tokens": "tokens", "flops": "FLOPs", "seconds": "training seconds"}
# What decides which tokens step i trains on; and `data.*`, but for where they are cached.
DATA_KEYS = ("seed", "tokenizer", "batch_size", "sequence_length")
_BEST_TRIALS = 10
_DRAWN_ARMS = 8
_LEAST_BLOCKS = 4
# An arm that was given less than this share of the steps or tokens of the baseline is not compared
# with it there.
_LEAST_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Run:
  """A trial. why: it is left out; empty if it counts.

  config: flat. lines: of validation. values: of the sweep's metric, of what the run had made;
  budgets: arrays of the same length, rising, by the names that every line has. exhausted: its
  patience was at its end.
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
    """Up to which amount of a budget the run counts."""
    return math.inf if self.exhausted else self.budgets[budget][-1]


@dataclasses.dataclass(frozen=True)
class Sweep:
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
  def of_tokens(self) -> bool:
    """Whether the metric is a mean over tokens, so that it depends on the tokenizer."""
    tasks = {run.config.get("task.name") for run in self.runs}
    writes = all(find_task(task).predicts_tokens for task in tasks if task in TASKS)
    return self.metric in ("val/loss", "val/perplexity") and writes

  @property
  def label(self) -> str:
    unit = " (nats a token)" if self.metric == "val/loss" and self.of_tokens else ""
    return f"validation {self.metric.removeprefix('val/').replace('_', ' ')}{unit}"

  @property
  def lower_is_better(self) -> bool:
    return lower_is_better(self.metric)

  @property
  def direction(self) -> str:
    return f"{'lower' if self.lower_is_better else 'higher'} is better"

  def arms(self) -> dict[str, dict[int, Run]]:
    """{arm: {seed: run}} of the finished ones, the baseline first."""
    arms = {self.baseline: {}} | {run.arm: {} for run in self.finished}
    for run in self.finished:
      arms[run.arm][run.seed] = run
    return arms


@dataclasses.dataclass(frozen=True)
class Table:
  """The arms at an equal amount of a budget. short: arms that end too soon for it."""

  budget: str
  amount: float
  short: Sequence[str]
  compared: Sequence[Comparison]
  verdict: Verdict


def load_sweep(workdir: str) -> Sweep:
  """Reads WORKDIR/sweep.json and all WORKDIR/trials/*/.

  Raises:
    UserError: a file is missing or not what a sweep writes; names it.
  """
  root = Path(workdir)
  about = _read_json(root / "sweep.json", "not the work directory of a sweep")
  trials = sorted(root.glob("trials/*/trial.json"))
  runs = [_load_run(path.parent, about["metric"]) for path in trials]
  fields = ("name", "question", "baseline", "metric", "search")
  return Sweep(root, *(about[field] for field in fields), runs)


def _load_run(folder: Path, metric: str) -> Run:
  trial = _read_json(folder / "trial.json", "not a trial")
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


def _read_json(path: Path, otherwise: str) -> Any:
  try:
    return json.loads(path.read_text())
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(f"{path.parent}: {otherwise} (it has no {path.name}).") from None
  except json.JSONDecodeError as error:
    raise UserError(f"{path}: {otherwise}: {error}") from None


def same_data(a: Run, b: Run) -> bool:
  """Whether two runs trained on the same tokens in the same order, by their configs."""
  keys = {key for key in {*a.config} | {*b.config} if key.startswith("data.")}
  keys = keys - {"data.cache_dir"} | {*DATA_KEYS}
  return all(a.config.get(key) == b.config.get(key) for key in keys)


def pairs_with(arm: Mapping[int, Run], baseline: Mapping[int, Run]) -> bool:
  """Whether every seed that two arms have in common gave both the same data."""
  common = {*arm} & {*baseline}
  return bool(common) and all(same_data(arm[seed], baseline[seed]) for seed in common)


def make_table(sweep: Sweep, budget: str) -> Table | str:
  """Compares the arms at the most of a budget that they all reach; says why if it cannot.

  An arm of less than `_LEAST_SHARE` of the baseline's length would pull all others down into the
  middle of their runs; it is left out instead.
  """
  arms, runs = sweep.arms(), sweep.finished
  unknown = [run for run in runs if budget not in run.budgets]
  if unknown:
    first = f"{unknown[0].arm} seed {unknown[0].seed}"
    return f"Left out: {len(unknown)} of {len(runs)} runs did not record it, {first} for one."

  def end(arm: str, budget: str) -> float:
    return min(run.reach(budget) for run in arms[arm].values())

  # An arm is short by what it was given, not because it is fast.
  given = "tokens" if budget in ("flops", "seconds") and "tokens" in runs[0].budgets else budget
  went = min(run.budgets[given][-1] for run in arms[sweep.baseline].values())
  short = [arm for arm in arms if end(arm, given) < _LEAST_SHARE * went]
  arms = {arm: of_arm for arm, of_arm in arms.items() if arm not in short}
  furthest = max(run.budgets[budget][-1] for of_arm in arms.values() for run in of_arm.values())
  amount = min(furthest, *(end(arm, budget) for arm in arms))
  if amount <= 0 or (short and len(arms) == 1):
    return "Left out: no other arm goes as far as the baseline."
  values = {
    arm: {seed: run.at(budget, amount) for seed, run in of_arm.items()}
    for arm, of_arm in arms.items()
  }
  paired = {arm: pairs_with(of_arm, arms[sweep.baseline]) for arm, of_arm in arms.items()}
  compared = statistics.compare_arms(values, sweep.baseline, paired=paired)
  lower = sweep.lower_is_better
  verdict = statistics.verdict(values, sweep.baseline, paired=paired, lower_is_better=lower)
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
      alpha = statistics.ALPHA / tests
      needed = statistics.seeds_needed(
        versus.noise, versus.difference, alpha=alpha, paired=versus.paired
      )
    found.append(
      {
        "budget": table.budget,
        "amount": table.amount,
        "arm": arm.arm,
        "n": arm.n,
        "mean": arm.mean,
        "sigma": arm.sigma,
        "difference": versus.difference,
        "low": versus.low,
        "high": versus.high,
        "test": None if versus.p is None else "paired t" if versus.paired else "Welch",
        "p": versus.p,
        "p_holm": arm.p_holm,
        "verdict": table.verdict.words[arm.arm],
        "seeds_needed": needed,
      }
    )
  return found


def first_crossing(
  x: np.ndarray, values: np.ndarray, target: float, *, lower_is_better: bool
) -> float | None:
  """Where values first come to the target, linear between points; None if they do not."""
  if not lower_is_better:
    values, target = -values, -target
  below = np.flatnonzero(values <= target)
  if not len(below) or below[0] == 0:
    return float(x[0]) if len(below) else None
  i = below[0]
  return float(np.interp(target, values[[i, i - 1]], x[[i, i - 1]]))


def report(workdir: str) -> bool:
  """Writes WORKDIR/report.{md,html,csv}, runs.csv and pictures; prints the Markdown.

  Returns:
    Whether every trial that is there has finished.

  Raises:
    UserError: WORKDIR is no sweep, or has too little to compare; names it.
  """
  sweep = load_sweep(workdir)
  if not sweep.finished:
    whys = ", ".join(sorted({run.why for run in sweep.runs})) or "no trial has started"
    raise UserError(f"{workdir}: no run has finished ({whys}).")
  page = Page(sweep.workdir, sweep.name)
  page.text(sweep.question)
  if sweep.search:
    _report_search(sweep, page)
  else:
    _report_verdict(sweep, page)
  left_out = [[run.arm, str(run.seed), run.why] for run in sweep.runs if run.why]
  if left_out:
    page.text("Left out", "h2")
    page.table(["arm", "seed", "why"], left_out)
  metrics = sorted({name for run in sweep.runs for line in run.lines for name in line} - {*BUDGETS})
  evaluations = [
    {"arm": run.arm, "seed": run.seed, "state": run.state}
    | {name: line.get(name) for name in (*BUDGETS, *metrics) if name != "nonfinite"}
    for run in sweep.runs
    for line in run.lines
  ]
  _write_csv(sweep.workdir / "runs.csv", evaluations)
  page.write()
  return not left_out


def _report_verdict(sweep: Sweep, page: Page) -> None:
  arms = sweep.arms()
  if not arms[sweep.baseline]:
    raise UserError(f"{sweep.workdir}: the baseline, {sweep.baseline}, has no finished run yet.")
  made = {budget: make_table(sweep, budget) for budget in BUDGETS}
  tables = [table for table in made.values() if isinstance(table, Table)]
  if not tables:
    raise UserError(f"{sweep.workdir}: the runs have neither steps nor a budget in common.")
  main = min(tables, key=lambda table: len(table.short))  # The first of several.
  page.text("Verdict", "h2")
  page.text(main.verdict.sentence, "strong")
  page.text(
    f"{sweep.label[0].upper()}{sweep.label[1:]}, {sweep.direction}, at {main.amount:,.6g} "
    f"{BUDGETS[main.budget]}. Arms that share a seed's data with the baseline are tested in pairs; "
    "p is corrected by Holm over the arms, but not for looking at several budgets; intervals are "
    "each for itself. Seeds to resolve: at 80 % power, if the difference seen is the true one."
  )
  for caution in _cautions(sweep):
    page.text(caution)
  seen: dict[tuple[float, ...], str] = {}
  for budget, table in made.items():
    known = isinstance(table, Table)
    page.text(f"At equal {BUDGETS[budget]}" + (f": {table.amount:,.6g}" if known else ""), "h2")
    if not known:
      page.text(table)
      continue
    same = tuple(arm.mean for arm in table.compared)
    if same in seen:
      page.text(f"The values are those at equal {seen[same]}.")
      continue
    seen[same] = BUDGETS[budget]
    if table.short:
      page.text(f"Left out, since they end much sooner: {', '.join(table.short)}.")
    longer = [run for run in sweep.finished if run.budgets[budget][-1] > table.amount]
    if longer:
      page.text(
        f"{len(longer)} of {len(sweep.finished)} runs go on from here. Where their learning rate "
        "decays, they are in the middle of it, at a disadvantage against those that end."
      )
    if table is not main:
      page.text(table.verdict.sentence)
    _show(table, page)
  sigma, n = statistics.pooled_sigma(main.compared), min(arm.n for arm in main.compared)
  if sigma and n > 1:
    smallest = statistics.minimum_detectable_difference(n, sigma, paired=False)
    page.text(
      f"Noise: with the measured sigma between seeds of {sigma:.4f}, pooled over the arms, {n} "
      f"seeds an arm resolve a difference of {smallest:.4f} (80 % power, unpaired, one arm)."
    )
  _report_reach(sweep, page)
  page.text("Curves", "h2")
  lower = sweep.lower_is_better
  shown = [name for name in ("tokens", "seconds") if isinstance(made[name], Table)]
  ends = {arm: np.mean([run.values[-1] for run in arms[arm].values()]) for arm in arms}
  ranked = sorted(arms, key=ends.get, reverse=not lower)
  drawn = {*ranked[:_DRAWN_ARMS], sweep.baseline}
  if len(drawn) < len(arms):
    page.text(f"The {_DRAWN_ARMS} arms with the best ends, and the baseline.")
  curves = {
    arm: [(run.budgets, run.values) for run in arms[arm].values()] for arm in arms if arm in drawn
  }
  shown = shown or [main.budget]
  picture = figures.learning_curves(curves, shown, sweep.label, lower_is_better=lower)
  page.image("curves.png", sweep.label, picture)
  intervals = [
    (row["arm"], row["difference"], row["low"], row["high"], row["verdict"])
    for row in sorted(rows(main), key=lambda row: row["mean"], reverse=not lower)
    if row["low"] is not None
  ]
  if intervals:
    label = f"difference to {sweep.baseline} ({sweep.label})"
    page.image("differences.png", label, figures.differences(intervals, label))
  _write_csv(sweep.workdir / "report.csv", [row for table in tables for row in rows(table)])


def _show(table: Table, page: Page) -> None:
  def cells(row: Mapping[str, Any]) -> list[str]:
    def shown(value: Any, form: str) -> str:
      return "" if value is None else format(value, form)

    interval = "" if row["low"] is None else f" [{row['low']:+.4f}, {row['high']:+.4f}]"
    return [
      row["arm"],
      str(row["n"]),
      f"{row['mean']:.4f}",
      shown(row["sigma"], ".4f"),
      shown(row["difference"], "+.4f") + interval,
      row["test"] or "",
      shown(row["p_holm"], ".2g"),
      row["verdict"],
      shown(row["seeds_needed"], ",.0f"),
    ]

  header = ["arm", "n", "mean", "sigma", "difference [95 %]", "test", "p (Holm)", "verdict"]
  page.table([*header, "seeds to resolve"], [cells(row) for row in rows(table)])


def _cautions(sweep: Sweep) -> list[str]:
  found = []
  if any(run.config.get("checkpoint.final") == "best" for run in sweep.finished):
    found.append(
      "Runs with checkpoint.final=best count with their best validation up to each point, which "
      "flatters them, the more the more often they validate."
    )
  if stopped := sum(run.exhausted for run in sweep.finished):
    found.append(
      f"{stopped} of {len(sweep.finished)} runs stopped early (eval.patience); beyond their end "
      "they count as they ended."
    )
  for arm in dict.fromkeys(run.arm for run in sweep.runs):
    of_arm = [run for run in sweep.runs if run.arm == arm]
    lost = [run for run in of_arm if run.why and run.state != "running"]
    if lost:
      rest = "Its figures are of the others, which flatters it." if lost != of_arm else ""
      found.append(f"Caution: {len(lost)} of {len(of_arm)} runs of {arm} failed. {rest}".rstrip())
  unfinished = sum(run.state == "running" for run in sweep.runs)
  if unfinished:
    found.append(f"Not final: {unfinished} of {len(sweep.runs)} runs have not finished.")
  arms = {arm: next(iter(of_arm.values())).config for arm, of_arm in sweep.arms().items()}
  reference = arms[sweep.baseline]
  for arm, config in arms.items():
    differing = [k for k in {*config} | {*reference} if config.get(k) != reference.get(k)]
    if data := sorted(k for k in differing if k.startswith("data.") and k != "data.cache_dir"):
      found.append(f"Caution: {arm} differs in {', '.join(data)}; is its validation text the same?")
    if "tokenizer" in differing and sweep.of_tokens:
      found.append(f"Caution: {arm} has another tokenizer, so {sweep.metric} is not comparable.")
  return found


def _report_reach(sweep: Sweep, page: Page) -> None:
  """What each arm spends until the baseline's last value, in parts of what the baseline spent."""
  arms, known, lower = sweep.arms(), [*BUDGETS][1:], sweep.lower_is_better
  known = [name for name in known if all(name in run.budgets for run in sweep.finished)]
  if not known:
    return
  baseline = list(arms.pop(sweep.baseline).values())
  target = np.mean([run.values[-1] for run in baseline])
  spent = {name: np.mean([run.budgets[name][-1] for run in baseline]) for name in known}
  cells = [[sweep.baseline, *(f"1 ({spent[name]:.4g})" for name in known)]]
  for arm, of_arm in arms.items():
    cells.append([arm])
    for name in known:
      found = [
        first_crossing(run.budgets[name], run.values, target, lower_is_better=lower)
        for run in of_arm.values()
      ]
      there = [x for x in found if x is not None]
      if len(there) < len(found):
        cells[-1].append(f"not reached ({len(there)} of {len(found)} seeds did)")
      else:
        cells[-1].append(f"{np.mean(there) / spent[name]:.3f} ({np.mean(there):.4g})")
  page.text(f"To reach the baseline's {target:.4f}", "h2")
  page.text(
    "What an arm spends until it first has the mean of the baseline's last values, as a fraction "
    "of what the baseline spent in all; the mean over seeds. A run whose learning rate still has "
    "to fall gets there later than one that ends there would."
  )
  page.table(["arm", *(BUDGETS[name] for name in known)], cells)


def _report_search(sweep: Sweep, page: Page) -> None:
  lower = sweep.lower_is_better
  ranked = sorted(sweep.finished, key=lambda run: run.values[-1], reverse=not lower)
  keys = list(dict.fromkeys(key for run in ranked for key in run.overrides if key != "seed"))
  results = [
    {"trial": run.arm, "seed": run.seed, sweep.metric: float(run.values[-1])}
    | {key: run.overrides.get(key) for key in keys}
    for run in ranked
  ]
  _write_csv(sweep.workdir / "report.csv", results)
  page.text("Best trials", "h2")
  page.text(
    f"{len(ranked)} of {len(sweep.runs)} trials ran to their end. By {sweep.label}, "
    f"{sweep.direction}. The best of many is partly luck: run it as an arm, with seeds of its own."
  )
  cells = [[*map(str, result.values())] for result in results[:_BEST_TRIALS]]
  page.table([*results[0]], [[*row[:2], f"{float(row[2]):.4f}", *row[3:]] for row in cells])
  varied = [key for key in keys if len({str(run.overrides.get(key)) for run in ranked}) > 1]
  if varied:
    ranked.sort(key=lambda run: run.arm)
    settings = [{k: v for k, v in run.overrides.items() if k in varied} for run in ranked]
    values = [float(run.values[-1]) for run in ranked]
    for name, draw in (("slices", figures.slices), ("parallel", figures.parallel)):
      picture = draw(settings, values, sweep.label, lower_is_better=lower)
      page.image(f"{name}.png", name, picture)


def _write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, [*lines[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)


def compare(a: str, b: str, *, exact: bool) -> bool:
  """Compares two runs' metrics at the steps that both logged, and prints the finding.

  exact: every training loss and validation number is the same float; the first that is not is
  printed. Otherwise: the mean difference of the training losses, by a t-test over means of blocks,
  each five times as long as the autocorrelation time of the difference.

  Returns:
    Whether they are equal (exact), or not told apart (p >= 0.05).

  Raises:
    UserError: a directory is no run, or they have too few steps in common.
  """
  runs = [Path(a), Path(b)]
  one, other = (
    flatten(_read_json(run / CONFIG_FILE, "not the work directory of a run")) for run in runs
  )
  for key in sorted({*one} | {*other}):
    if one.get(key) != other.get(key):
      print(f"config.{key}: {one.get(key, 'not there')!r} -> {other.get(key, 'not there')!r}")
  first, second = map(_numbers, runs)
  common = [at for at in first if at in second]
  if not common:
    raise UserError(f"{a} and {b} have no step in common at which both logged a metric.")
  if not exact:
    return _compare_blocks(a, b, {at: (first[at], second[at]) for at in common})
  differing = [at for at in common if first[at] != second[at]]
  if not differing:
    print(f"Equal in all {len(common)} numbers, to step {common[-1][0]}.")
    return True
  (step, name), x, y = differing[0], first[differing[0]], second[differing[0]]
  by = f", by {y - x:+.3g}" if isinstance(x, float) and isinstance(y, float) else ""
  print(
    f"Step {step} is the first that differs: {name} is {x!r} and {y!r}{by}. "
    f"{len(differing)} of {len(common)} numbers differ."
  )
  return False


def _numbers(workdir: Path) -> dict[tuple[int, str], float | str | None]:
  """{(step, name): value} of training and validation by step; "nan" and "inf" as text."""
  lines = sorted(read_metrics(workdir), key=lambda line: line["step"])
  return {
    (line["step"], name): line.get("nonfinite", {}).get(name, value)
    for line in lines
    for name, value in line.items()
    if name == "loss" or name.startswith("val/")
  }


def autocorrelation_time(x: np.ndarray) -> float:
  """1 + 2 sum of autocorrelations, up to the first lag of 5 times that sum (Sokal 1997)."""
  x = x - x.mean()
  covariance = np.fft.irfft(np.abs(np.fft.rfft(x, 2 * len(x))) ** 2)[: len(x)]
  if covariance[0] <= 0:
    return 1.0
  times = 2 * np.cumsum(covariance / covariance[0]) - 1
  return float(max(times[np.argmax(np.arange(len(x)) >= 5 * times)], 1))


def _compare_blocks(a: str, b: str, pairs: Mapping[tuple[int, str], tuple]) -> bool:
  for (step, name), values in pairs.items():
    if any(isinstance(value, str) for value in values):
      print(f"Not comparable: {name} at step {step} is {values[0]} and {values[1]}.")
      return False
  delta = np.array([y - x for (_, name), (x, y) in pairs.items() if name == "loss"])
  if len(delta) < 4 * _LEAST_BLOCKS:
    raise UserError(
      f"{a} and {b} logged {len(delta)} training losses at the same steps; a test needs "
      f"{4 * _LEAST_BLOCKS}."
    )
  tau = autocorrelation_time(delta)
  blocks = int(np.clip(len(delta) / (5 * tau), _LEAST_BLOCKS, len(delta) // 4))
  means = {i: float(block.mean()) for i, block in enumerate(np.array_split(delta, blocks))}
  found = statistics.difference(means, dict.fromkeys(means, 0.0), paired=True)
  # Without any noise a difference is real, however small.
  p = 0.0 if found.p is None else found.p
  interval = "" if found.low is None else f" [{found.low:+.4g}, {found.high:+.4g}]"
  short = (
    " The runs are too short for such blocks, so p is too small."
    if (len(delta) < _LEAST_BLOCKS * 5 * tau)
    else ""
  )
  last = [(step, y - x) for (step, name), (x, y) in pairs.items() if name == "val/loss"][-1:]
  validation = "".join(f" Validation loss at step {step}: {by:+.4g}." for step, by in last)
  print(
    f"{'They differ' if p < statistics.ALPHA else 'Not told apart'}: the training loss of {b} less "
    f"that of {a} is {found.difference:+.4g}{interval} over {len(delta)} common steps, p = {p:.2g} "
    f"(t-test of {blocks} blocks of 5 autocorrelation times, each {tau:.1f} lines).{short}"
    f"{validation} One run of each: only a sweep over seeds can tell their recipes apart."
  )
  return p >= statistics.ALPHA
