"""The report of a sweep: its verdict, the tables behind it, and pictures.

Arms are compared at equal steps, tokens, FLOPs and training seconds, each time by
`statistics.verdict`. A run that did not finish or diverged is listed and left out, never dropped
in silence.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.sweeps import plots, statistics
from gptjax.sweeps.page import Page
from gptjax.sweeps.results import (
  BUDGETS,
  Results,
  Table,
  first_crossing,
  load_results,
  make_table,
  rows,
)

_BEST_TRIALS = 10
_DRAWN_ARMS = 8


def report(workdir: str) -> bool:
  """Writes WORKDIR/report.{md,html,csv}, runs.csv and pictures; prints the Markdown.

  Returns:
    Whether every trial that is there has finished.

  Raises:
    UserError: WORKDIR is no sweep, or has too little to compare; names it.
  """
  results = load_results(workdir)
  if not results.finished:
    whys = ", ".join(sorted({run.why for run in results.runs})) or "no trial has started"
    raise UserError(f"{workdir}: no run has finished ({whys}).")
  page = Page(results.workdir, results.name)
  page.text(results.question)
  (_add_search if results.search else _add_comparison)(page, results)
  left_out = [[run.arm, str(run.seed), run.why] for run in results.runs if run.why]
  if left_out:
    page.heading("Left out")
    page.table(["arm", "seed", "why"], left_out)
  _write_evaluations(results)
  page.write()
  return not left_out


def _add_comparison(page: Page, results: Results) -> None:
  """Adds what a sweep of arms has found."""
  if not results.arms()[results.baseline]:
    raise UserError(
      f"{results.workdir}: the baseline, {results.baseline}, has no finished run yet."
    )
  found = {budget: make_table(results, budget) for budget in BUDGETS}
  tables = {budget: table for budget, table in found.items() if isinstance(table, Table)}
  if not tables:
    raise UserError(f"{results.workdir}: the runs have neither steps nor a budget in common.")
  main = min(tables.values(), key=lambda table: len(table.short))  # The first of several.
  _add_verdict(page, results, main)
  seen: dict[tuple[float, ...], str] = {}
  for budget, table in found.items():
    known = isinstance(table, Table)
    page.heading(f"At equal {BUDGETS[budget]}" + (f": {table.amount:,.6g}" if known else ""))
    if not known:
      page.text(table)
    elif same := seen.get(means := tuple(arm.mean for arm in table.compared)):
      page.text(f"The values are those at equal {same}.")
    else:
      seen[means] = BUDGETS[budget]
      _add_table(page, results, table, is_main=table is main)
  _add_noise(page, main)
  _add_reach(page, results)
  shown = [budget for budget in ("tokens", "seconds") if budget in tables] or [main.budget]
  _add_curves(page, results, shown)
  _add_differences(page, results, main)
  _write_csv(
    results.workdir / "report.csv", [row for table in tables.values() for row in rows(table)]
  )


def _add_verdict(page: Page, results: Results, main: Table) -> None:
  page.heading("Verdict")
  page.bold(main.verdict.sentence)
  page.text(
    f"{results.label[0].upper()}{results.label[1:]}, {results.direction}, at {main.amount:,.6g} "
    f"{BUDGETS[main.budget]}. Arms that share a seed's data with the baseline are tested in pairs; "
    "p is corrected by Holm over the arms, but not for looking at several budgets; intervals are "
    "each for itself. Seeds to resolve: at 80 % power, if the difference seen is the true one."
  )
  for caution in cautions(results):
    page.text(caution)


def _add_table(page: Page, results: Results, table: Table, *, is_main: bool) -> None:
  if table.short:
    page.text(f"Left out, since they end much sooner: {', '.join(table.short)}.")
  longer = [run for run in results.finished if run.budgets[table.budget][-1] > table.amount]
  if longer:
    page.text(
      f"{len(longer)} of {len(results.finished)} runs go on from here. Where their learning rate "
      "decays, they are in the middle of it, at a disadvantage against those that end."
    )
  if not is_main:  # The verdict of that one heads the page.
    page.text(table.verdict.sentence)
  header = ["arm", "n", "mean", "sigma", "difference [95 %]", "test", "p (Holm)", "verdict"]
  page.table([*header, "seeds to resolve"], [_cells(row) for row in rows(table)])


def _cells(row: Mapping[str, Any]) -> list[str]:
  def shown(name: str, form: str) -> str:
    return "" if row[name] is None else format(row[name], form)

  interval = "" if row["low"] is None else f" [{row['low']:+.4f}, {row['high']:+.4f}]"
  return [
    row["arm"],
    str(row["n"]),
    shown("mean", ".4f"),
    shown("sigma", ".4f"),
    shown("difference", "+.4f") + interval,
    row["test"] or "",
    shown("p_holm", ".2g"),
    row["verdict"],
    shown("seeds_needed", ",.0f"),
  ]


def cautions(results: Results) -> list[str]:
  """Lists what a reader has to know before trusting the figures."""
  found, runs = [], results.runs
  if any(run.config.get("checkpoint.final") == "best" for run in results.finished):
    found.append(
      "Runs with checkpoint.final=best count with their best validation up to each point, which "
      "flatters them, the more the more often they validate."
    )
  if stopped := sum(run.exhausted for run in results.finished):
    found.append(
      f"{stopped} of {len(results.finished)} runs stopped early (eval.patience); beyond their end "
      "they count as they ended."
    )
  for arm in dict.fromkeys(run.arm for run in runs):
    mine = [run for run in runs if run.arm == arm]
    lost = [run for run in mine if run.why and run.state != "running"]
    if lost:
      rest = "Its figures are of the others, which flatters it." if lost != mine else ""
      found.append(f"Caution: {len(lost)} of {len(mine)} runs of {arm} failed. {rest}".rstrip())
  if unfinished := sum(run.state == "running" for run in runs):
    found.append(f"Not final: {unfinished} of {len(runs)} runs have not finished.")
  configs = {arm: next(iter(by_seed.values())).config for arm, by_seed in results.arms().items()}
  reference = configs[results.baseline]
  for arm, config in configs.items():
    differing = [key for key in {*config} | {*reference} if config.get(key) != reference.get(key)]
    data = sorted(key for key in differing if key.startswith("data.") and key != "data.cache_dir")
    if data:
      found.append(f"Caution: {arm} differs in {', '.join(data)}; is its validation text the same?")
    if "tokenizer" in differing and results.is_token_mean:
      found.append(f"Caution: {arm} has another tokenizer, so {results.metric} is not comparable.")
  return found


def _add_noise(page: Page, main: Table) -> None:
  sigma, n = statistics.pooled_sigma(main.compared), min(arm.n for arm in main.compared)
  if sigma and n > 1:
    smallest = statistics.minimum_detectable_difference(n, sigma, paired=False)
    page.text(
      f"Noise: with the measured sigma between seeds of {sigma:.4f}, pooled over the arms, {n} "
      f"seeds an arm resolve a difference of {smallest:.4f} (80 % power, unpaired, one arm)."
    )


def _add_reach(page: Page, results: Results) -> None:
  """Adds what each arm spends until it has the baseline's last value."""
  arms, lower = results.arms(), results.lower_is_better
  known = [name for name in BUDGETS if all(name in run.budgets for run in results.finished)]
  known = [name for name in known if name != "step"]
  if not known:
    return
  baseline = list(arms.pop(results.baseline).values())
  target = np.mean([run.values[-1] for run in baseline])
  spent = {name: np.mean([run.budgets[name][-1] for run in baseline]) for name in known}

  def cell(arm: str, name: str) -> str:
    crossings = [
      first_crossing(run.budgets[name], run.values, target, lower_is_better=lower)
      for run in arms[arm].values()
    ]
    there = [x for x in crossings if x is not None]
    if len(there) < len(crossings):
      return f"not reached ({len(there)} of {len(crossings)} seeds did)"
    return f"{np.mean(there) / spent[name]:.3f} ({np.mean(there):.4g})"

  page.heading(f"To reach the baseline's {target:.4f}")
  page.text(
    "What an arm spends until it first has the mean of the baseline's last values, as a fraction "
    "of what the baseline spent in all; the mean over seeds. A run whose learning rate still has "
    "to fall gets there later than one that ends there would."
  )
  cells = [[results.baseline, *(f"1 ({spent[name]:.4g})" for name in known)]]
  cells += [[arm, *(cell(arm, name) for name in known)] for arm in arms]
  page.table(["arm", *(BUDGETS[name] for name in known)], cells)


def _add_curves(page: Page, results: Results, budgets: Sequence[str]) -> None:
  arms, lower = results.arms(), results.lower_is_better
  ends = {
    arm: np.mean([run.values[-1] for run in by_seed.values()]) for arm, by_seed in arms.items()
  }
  drawn = {*sorted(arms, key=ends.get, reverse=not lower)[:_DRAWN_ARMS], results.baseline}
  page.heading("Curves")
  if len(drawn) < len(arms):
    page.text(f"The {_DRAWN_ARMS} arms with the best ends, and the baseline.")
  curves = {
    arm: [(run.budgets, run.values) for run in by_seed.values()]
    for arm, by_seed in arms.items()
    if arm in drawn
  }
  figure = plots.learning_curves(curves, budgets, results.label, lower_is_better=lower)
  page.image("curves.png", results.label, figure)


def _add_differences(page: Page, results: Results, main: Table) -> None:
  best_first = sorted(rows(main), key=lambda row: row["mean"], reverse=not results.lower_is_better)
  intervals = [row for row in best_first if row["low"] is not None]
  if intervals:
    label = f"difference to {results.baseline} ({results.label})"
    page.image("differences.png", label, plots.differences(intervals, label))


def _add_search(page: Page, results: Results) -> None:
  """Adds the best trials of a search, and pictures of all."""
  lower = results.lower_is_better
  ranked = sorted(results.finished, key=lambda run: run.values[-1], reverse=not lower)
  keys = list(dict.fromkeys(key for run in ranked for key in run.overrides if key != "seed"))
  trials = [
    {"trial": run.arm, "seed": run.seed, results.metric: float(run.values[-1])}
    | {key: run.overrides.get(key) for key in keys}
    for run in ranked
  ]
  _write_csv(results.workdir / "report.csv", trials)
  page.heading("Best trials")
  page.text(
    f"{len(ranked)} of {len(results.runs)} trials ran to their end. By {results.label}, "
    f"{results.direction}. The best of many is partly luck: run it as an arm, with its own seeds."
  )
  best = [
    trial | {results.metric: f"{trial[results.metric]:.4f}"} for trial in trials[:_BEST_TRIALS]
  ]
  page.table([*trials[0]], [[*map(str, trial.values())] for trial in best])
  varied = [key for key in keys if len({str(run.overrides.get(key)) for run in ranked}) > 1]
  if varied:
    ranked.sort(key=lambda run: run.arm)
    settings = [{k: v for k, v in run.overrides.items() if k in varied} for run in ranked]
    values = [float(run.values[-1]) for run in ranked]
    drawn = plots.search(settings, values, results.label, lower_is_better=lower)
    for name, figure in drawn.items():
      page.image(f"{name}.png", name, figure)


def _write_evaluations(results: Results) -> None:
  """Writes runs.csv: a line for each validation of each run."""
  lines = [(run, line) for run in results.runs for line in run.lines]
  metrics = sorted({name for _, line in lines for name in line} - {*BUDGETS, "nonfinite"})
  evaluations = [
    {"arm": run.arm, "seed": run.seed, "state": run.state}
    | {name: line.get(name) for name in (*BUDGETS, *metrics)}
    for run, line in lines
  ]
  _write_csv(results.workdir / "runs.csv", evaluations)


def _write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, [*lines[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
