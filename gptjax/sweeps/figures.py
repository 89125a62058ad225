"""The pictures of a sweep, as PNG bytes 1,200 pixels wide, in colours safe for the colour-blind."""

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
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
  buffer = io.BytesIO()
  figure.savefig(buffer, dpi=120, format="png", facecolor="white")
  return buffer.getvalue()


def learning_curves(
  arms: Mapping[str, Sequence[Curve]], budgets: Sequence[str], label: str, *, lower_is_better: bool
) -> bytes:
  """Draws the mean over seeds of each arm, a panel a budget. PNG bytes.

  The band is one standard deviation to both sides, from the least to the greatest of two seeds, and
  none of one. The legend has the best arm on top. What lies before a quarter of the longest run
  is cut off where it is beyond what follows.

  Args:
    arms: {arm: one curve a run}.
    budgets: keys of the curves' budgets.
    label: of the values.
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
  return png(figure)


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


def differences(rows: Sequence[tuple[str, float, float, float, str]], label: str) -> bytes:
  """Draws (arm, difference, low, high, verdict) as intervals, zero the baseline's. PNG bytes."""
  figure = Figure(figsize=(10, 1.4 + 0.4 * len(rows)), layout="constrained")
  axes = figure.subplots()
  colors = {"winner": "#009E73", "better": "#009E73", "worse": "#D55E00"}
  for place, (_, middle, low, high, word) in enumerate(rows):
    color = colors.get(word, "#0072B2" if word.startswith("ties") else "0.4")
    axes.plot([low, high], [place, place], color=color, linewidth=2.5, solid_capstyle="butt")
    axes.plot(middle, place, "o", color=color, markersize=7)
    axes.annotate(
      f"{middle:+.4f}  {word}",
      (middle, place),
      xytext=(0, 7),
      textcoords="offset points",
      ha="center",
      fontsize=9,
    )
  axes.axvline(0, color="black", linewidth=1)
  axes.set_yticks(range(len(rows)), [row[0] for row in rows])
  axes.set(xlabel=label, ylim=(len(rows) - 0.4, -0.7))
  axes.grid(axis="x", alpha=0.3)
  return png(figure)


def slices(
  trials: Sequence[Mapping[str, Any]],
  values: Sequence[float],
  label: str,
  *,
  lower_is_better: bool,
) -> bytes:
  """Draws the value of each trial against each key of its settings, a panel a key. PNG bytes."""
  keys = list(dict.fromkeys(key for trial in trials for key in trial))
  columns = min(len(keys), 3)
  rows = math.ceil(len(keys) / columns)
  figure = Figure(figsize=(10, 3.6 * rows), layout="constrained")
  panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
  for axes, key in itertools.zip_longest(panels.flat, keys):
    if key is None:
      axes.set_axis_off()
      continue
    has = [i for i, trial in enumerate(trials) if key in trial]
    x, ticks, log = scale([trials[i][key] for i in has])
    y = [values[i] for i in has]
    dots = axes.scatter(x, y, c=has, cmap="cividis", vmin=0, vmax=max(len(trials) - 1, 1))
    best = int(np.argmin(y) if lower_is_better else np.argmax(y))
    axes.plot(x[best], y[best], "o", ms=13, mfc="none", mec=COLORS[1], mew=2)
    axes.set_xscale("log" if log else "linear")
    if ticks:
      axes.set_xticks(*zip(*ticks, strict=True))
    axes.set_xlabel(key)
    axes.grid(alpha=0.3)
  for axes in panels[:, 0]:
    axes.set_ylabel(label)
  figure.colorbar(dots, ax=panels, label="trial (ring: the best)", shrink=0.9)
  return png(figure)


def parallel(
  trials: Sequence[Mapping[str, Any]],
  values: Sequence[float],
  label: str,
  *,
  lower_is_better: bool,
) -> bytes:
  """Draws each trial as a line through its settings, a gap where it has none. PNG bytes."""
  keys = list(dict.fromkeys(key for trial in trials for key in trial))
  figure = Figure(figsize=(10, 4.8), layout="constrained")
  axes = figure.subplots()
  heights = np.full((len(trials), len(keys)), np.nan)
  for place, key in enumerate(keys):
    has = [i for i, trial in enumerate(trials) if key in trial]
    x, ticks, log = scale([trials[i][key] for i in has])
    y = np.log(x) if log else x
    low, span = y.min(), np.ptp(y) or 1
    heights[has, place] = (y - low) / span if np.ptp(y) else 0.5
    marks = ticks or [(number, f"{number:.4g}") for number in (x.min(), x.max())]
    axes.axvline(place, color="black", linewidth=0.8)
    for number, text in marks:
      height = ((math.log(number) if log else number) - low) / span if np.ptp(y) else 0.5
      axes.annotate(
        text,
        (place, height),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        zorder=9,
        bbox={"facecolor": "white", "alpha": 0.8, "pad": 1, "linewidth": 0},
      )
  order = np.argsort(values)[:: -1 if lower_is_better else 1]  # The best is drawn last.
  lines = LineCollection(
    [np.column_stack([np.arange(len(keys)), heights[i]]) for i in order],
    array=np.asarray(values)[order],
    cmap="cividis",
    linewidths=[1.4] * (len(order) - 1) + [3.5],
  )
  axes.add_collection(lines)
  axes.set(xlim=(-0.2, len(keys) - 0.5), ylim=(-0.06, 1.06), yticks=[])
  axes.set_xticks(range(len(keys)), keys)
  figure.colorbar(lines, label=f"{label} (thick: the best)")
  return png(figure)


def scaling(N, D, L, flops, law: Callable, factor: float, budgets: Sequence[float]) -> bytes:
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
  return png(figure)


def scale(settings: Sequence[Any]) -> tuple[np.ndarray, list[tuple[int, str]], bool]:
  """Places settings on an axis: positions, (position, text) of categories, whether it is log.

  Numbers are their own positions, on a log axis if all are positive and span over two decades.
  """
  if all(isinstance(one, int | float) and not isinstance(one, bool) for one in settings):
    x = np.asarray(settings, float)
    return x, [], bool(x.min() > 0 and x.max() > 10**_LOG_DECADES * x.min())
  names = sorted({str(one) for one in settings})
  x = np.array([names.index(str(one)) for one in settings], float)
  return x, list(enumerate(names)), False
