"""Draws a classification: its confusion matrix and reliability diagram."""

import io
from collections.abc import Sequence

import numpy as np
from etils import epath

from gptjax.scores.scores import bin_of

_BINS = 10


def classification(
  path: epath.Path,
  labels: Sequence[str],
  confusion: Sequence[Sequence[int]],
  confidence: np.ndarray | None = None,
  correct: np.ndarray | None = None,
) -> None:
  """Draws a confusion matrix with a row per right label and, given confidence [N] and correct [N],
  the accuracy within intervals of confidence (a reliability diagram)."""
  # Imported here: it takes a second, and not every evaluation draws.
  from matplotlib.figure import Figure

  calibrated = confidence is not None
  figure = Figure(figsize=(4.5 * (1 + calibrated), 4), layout="constrained")
  axes = figure.subplots(1, 1 + calibrated, squeeze=False)[0]
  counts = np.array(confusion)
  axes[0].imshow(counts, cmap="Blues")
  ticks = range(len(labels))
  axes[0].set_xticks(ticks, labels, rotation=30, ha="right")
  axes[0].set_yticks(ticks, labels)
  axes[0].set(xlabel="predicted", ylabel="right")
  for (row, column), count in np.ndenumerate(counts):
    color = "white" if count > counts.max() / 2 else "black"
    axes[0].text(column, row, str(count), ha="center", va="center", color=color)
  if calibrated:
    number = bin_of(confidence, _BINS)
    filled = np.unique(number)
    means = [(confidence[number == b].mean(), correct[number == b].mean()) for b in filled]
    sizes = [(number == b).mean() for b in filled]
    axes[1].plot([0, 1], [0, 1], color="gray", linewidth=1, linestyle="--")
    axes[1].scatter(*zip(*means, strict=True), s=20 + 400 * np.array(sizes), alpha=0.7)
    axes[1].set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(-0.02, 1.02))
    axes[1].grid(alpha=0.3)
  buffer = io.BytesIO()
  figure.savefig(buffer, dpi=120)
  path.write_bytes(buffer.getvalue())
