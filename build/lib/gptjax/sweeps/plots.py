"""The pictures of a sweep, in colours safe for the colour-blind."""

import io
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

# Okabe and Ito (2008), without the yellow, which is too light for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
LABELS = {
  "step": "step",
  "tokens": "training tokens",
  "flops": "training compute (FLOP)",
  "seconds": "training time, compilation and evaluation left out (s)",
}
_LOG_DECADES = 2
_MANY = 12

# Budgets (by name) and values of a run's evaluations, arrays of one length.
Curve = tuple[Mapping[str, np.ndarray], np.ndarray]


def png(figure: Figure) -> bytes:
  """The figure as a PNG file, 1,200 pixels wide."""
  buffer = io.BytesIO()
  figure.savefig(buffer, dpi=120, format="png", facecolor="white")
  return buffer.getvalue()


def learning_curves(
  arms: Mapping[str, Sequence[Curve]], budgets: Sequence[str], label: str, *, lower_is_better: bool
) -> Figure:
  """Draws the mean over seeds of each arm, a panel a budget.

  The band is one standard deviation to both sides, from the least to the greatest of two seeds, and
  none of one. The legend has the best arm on top. What lies before a quarter of the longest run
  is cut off where it is beyond what follows.

  arms: {arm: one curve a run}. budgets: keys of the curves' budgets. label: of the values.
  """
  figure = Figure(figsize=(10, 4.6), layout="constrained")
  panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
  looks = dict(zip(arms, itertools.product(STYLES, COLORS), strict=False))
  ends = {arm: np.mean([values[-1] for _, values in runs]) for arm, runs in arms.items()}
  order = sorted(arms, key=ends.get, reverse=not lower_is_better)
  for axes, budget in zip(panels, budgets, strict=True):
    longest = max(curve[budget][-1] for runs in arms.values() for curve, _ in runs)
    shown = []
    for arm in order:
      x, low, mean, high = band([(curve[budget], values) for curve, values in arms[arm]])
      style, color = looks.get(arm, ("-", "0.6"))
      axes.plot(x, mean, color=color, linestyle=style, linewidth=1.8, label=arm)
      axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
      shown += [np.interp(longest / 4, x, mean), *low[x >= longest / 4], *high[x >= longest / 4]]
    margin = 0.05 * (max(shown) - min(shown)) or 0.01
    axes.set(xlabel=LABELS[budget], ylim=(min(shown) - margin, max(shown) + margin))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
  panels[0].set_ylabel(label)
  panels[-1].legend(
    fontsize=9 if len(arms) <= _MANY else 6, title="best first", ncols=1 + len(arms) // 25
  )
  return figure


def band(runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, ...]:
  """Points, lower edge, mean and upper edge of (x, values) curves, as far as all of them reach."""
  end = min(x[-1] for x, _ in runs)
  points = np.unique(np.concatenate([x[x <= end] for x, _ in runs]))
  values = np.array([np.interp(points, x, y) for x, y in runs])
  mean = values.mean(axis=0)
  if len(runs) < 3:
    return points, values.min(axis=0), mean, values.max(axis=0)
  sigma = values.std(axis=0, ddof=1)
  return points, mean - sigma, mean, mean + sigma


def differences(rows: Sequence[Mapping[str, Any]], label: str) -> Figure:
  """Draws the arms' differences to the baseline as intervals about zero, by rows of report.csv."""
  figure = Figure(figsize=(10, 1.4 + 0.4 * len(rows)), layout="constrained")
  axes = figure.subplots()
  colors = {"winner": "#009E73", "better": "#009E73", "worse": "#D55E00"}
  for place, row in enumerate(rows):
    word, middle = row["verdict"], row["difference"]
    color = colors.get(word, "#0072B2" if word.startswith("ties") else "0.4")
    ends = [row["low"], row["high"]]
    axes.plot(ends, [place, place], color=color, linewidth=2.5, solid_capstyle="butt")
    axes.plot(middle, place, "o", color=color, markersize=7)
    above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 9}
    axes.annotate(f"{middle:+.4f}  {word}", (middle, place), **above)
  axes.axvline(0, color="black", linewidth=1)
  axes.set_yticks(range(len(rows)), [row["arm"] for row in rows])
  axes.set(xlabel=label, ylim=(len(rows) - 0.4, -0.7))
  axes.grid(axis="x", alpha=0.3)
  return figure


def search(
  trials: Sequence[Mapping[str, Any]], values: Sequence[float], label: str, *, lower_is_better: bool
) -> dict[str, Figure]:
  """Draws trials as Optuna does: 'slices' has a panel a key, 'parallel' a line a trial."""
  import optuna  # It takes a second, and only searches need it.
  from optuna.visualization import matplotlib as visualization

  optuna.logging.set_verbosity(optuna.logging.WARNING)
  warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
  keys = list(dict.fromkeys(key for trial in trials for key in trial))
  axes = {key: scale([trial[key] for trial in trials if key in trial]) for key in keys}
  study = optuna.create_study(direction="minimize" if lower_is_better else "maximize")
  for trial, value in zip(trials, values, strict=True):
    numeric = {key: isinstance(axes[key], optuna.distributions.FloatDistribution) for key in trial}
    params = {key: setting if numeric[key] else str(setting) for key, setting in trial.items()}
    distributions = {key: axes[key] for key in trial}
    study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=value))
  with pyplot.rc_context({"figure.constrained_layout.use": True}):
    drawn = {
      "slices": np.ravel(visualization.plot_slice(study, target_name=label))[0].figure,
      "parallel": visualization.plot_parallel_coordinate(study, target_name=label).figure,
    }
  for figure in drawn.values():
    figure.set_size_inches(10, 4.8)
    pyplot.close(figure)  # Optuna draws by pyplot, which would keep it.
  return drawn


def scale(settings: Sequence[Any]):
  """Optuna's distribution of settings: numbers have a range, all else are categories.

  The range is logarithmic if all numbers are positive and span over two decades.
  """
  from optuna.distributions import CategoricalDistribution, FloatDistribution

  if any(isinstance(one, bool) or not isinstance(one, int | float) for one in settings):
    return CategoricalDistribution(sorted({str(one) for one in settings}))
  low, high = min(settings), max(settings)
  return FloatDistribution(low, high, log=low > 0 and high > 10**_LOG_DECADES * low)


def scaling(N, D, L, flops, law: Callable, factor: float, budgets: Sequence[float]) -> Figure:
  """Draws loss against size with the law at some budgets, and measured against predicted loss.

  Args:
    N, D, L, flops: arrays, a run each.
    law: law(N, D), the loss.
    factor: of flops = factor N D.
    budgets: of the lines, in FLOPs; if there are none, four from the least to the most.
  """
  figure = Figure(figsize=(10, 4.6), layout="constrained")
  sizes, check = figure.subplots(1, 2)
  color = {"cmap": "cividis", "norm": LogNorm(flops.min(), flops.max())}
  dots = sizes.scatter(N, L, c=flops, **color, zorder=3)
  grid = np.geomspace(N.min() / 1.5, N.max() * 1.5, 100)
  for budget in budgets or np.geomspace(flops.min(), flops.max(), 4):
    line = ScalarMappable(**color).to_rgba(budget)
    sizes.plot(grid, law(grid, budget / (factor * grid)), color=line)
  span = np.ptp(L) or 1
  sizes.set(
    xscale="log",
    xlabel="parameters that multiply, N",
    ylabel="validation loss (nats a token)",
    ylim=(L.min() - 0.15 * span, L.max() + 0.15 * span),
    title="lines: the law at equal FLOPs",
  )
  predicted = law(N, D)
  check.scatter(predicted, L, c=flops, **color, zorder=3)
  check.axline((L.min(), L.min()), slope=1, color="black", linewidth=1)
  check.set(xlabel="predicted loss (nats a token)", ylabel="measured loss (nats a token)")
  for axes in (sizes, check):
    axes.grid(alpha=0.3)
  figure.colorbar(dots, ax=check, label="training compute (FLOP)")
  return figure
