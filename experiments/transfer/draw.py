"""Draws the last losses of sweep.py against the learning rate, and says where each width is best.

    python -m experiments.transfer.draw runs/transfer

Writes rates.png and rates.csv beside itself.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.transfer.sweep import RATES, WIDTHS
from gptjax.sweeps.results import load_results

HERE = Path(__file__).parent
TITLES = {
  "standard": "standard parametrization",
  "mup": "muP, base width 64",
  "mup-init": "muP, base width 64, init_std 0.1",
}


def main(workdir: str) -> None:
  losses = {}
  for run in load_results(workdir).finished:
    kind, width, _ = run.arm.split(",")
    rate = run.config["optim.learning_rate"]
    losses.setdefault((kind, int(width.removeprefix("width-"))), {})[rate] = run.values[-1]
  with (HERE / "rates.csv").open("w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["parametrization", "width", *(f"{rate:g}" for rate in RATES)])
    for (kind, width), found in sorted(losses.items()):
      writer.writerow(
        [kind, width, *(f"{found[rate]:.4f}" if rate in found else "" for rate in RATES)]
      )
  figure = Figure(figsize=(13, 4), layout="constrained")
  for axes, kind in zip(figure.subplots(1, 3, sharey=True), TITLES, strict=True):
    for color, width in enumerate(WIDTHS):
      found = losses[kind, width]
      rates = sorted(found)
      values = np.array([found[rate] for rate in rates])
      best = values.argmin()
      axes.plot(rates, values, f"C{color}", marker="o", markersize=3, label=f"width {width}")
      axes.plot(rates[best], values[best], f"C{color}", marker="*", markersize=14)
      print(f"{kind:<9} width {width:<4} best rate {rates[best]:g}, loss {values[best]:.4f}")
    axes.set(xscale="log", xlabel="learning rate", title=TITLES[kind])
    axes.set_ylim(1.6, 3.2)
    axes.grid(alpha=0.3)
    axes.legend()
  figure.axes[0].set_ylabel("validation loss (nats a byte)")
  figure.savefig(HERE / "rates.png", dpi=120)


if __name__ == "__main__":
  main(sys.argv[1])
