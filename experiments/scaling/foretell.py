"""Trains a run of four times the largest budget, and holds it against what the sweep's fit says.

    python -m experiments.scaling.foretell runs/scaling

The size is the one that the fit finds best for the budget, to the next multiple of 16. The run
lives in WORKDIR/larger; it goes on if it was stopped.
"""

import sys
from pathlib import Path

import numpy as np

from experiments.scaling.sweep import WIDTHS, arm, base
from gptjax.sweeps import scaling
from gptjax.sweeps.definition import make_trial
from gptjax.sweeps.results import load_results
from gptjax.training.loop import train
from gptjax.training.metrics import read_metrics


def width_of(parameters: float) -> int:
  """The width whose model, 12 L D^2 and the head V D, has about so many parameters."""
  config = base()
  vocab = int(config.tokenizer.removeprefix("bpe:"))
  layers = 12 * config.model.num_layers
  width = (np.sqrt(vocab**2 + 4 * layers * parameters) - vocab) / (2 * layers)
  return max(round(width / 16), 1) * 16


def main(workdir: str) -> None:
  runs = scaling.read_runs(load_results(workdir))
  fit = scaling.fit_law(runs.N, runs.D, runs.L)
  budget = 4 * max(WIDTHS)
  width = width_of(fit.law.compute_optimal(budget, factor=runs.factor)[0])
  config = make_trial(base(), *arm(width, budget)).config.copy_and_resolve_references()
  larger = Path(workdir) / "larger"
  train(config.lock(), larger)
  last = [line for line in read_metrics(larger) if "val/loss" in line][-1]
  parameters = scaling.matmul_parameters(config)
  loss, low, high = fit.predict(parameters, last["tokens"])
  print(
    f"width {width}, {parameters:,} parameters, {last['tokens']:,} tokens, "
    f"{last['flops']:.3g} FLOPs: foretold {loss:.4f} [{low:.4f}, {high:.4f}], "
    f"measured {last['val/loss']:.4f}, {loss / last['val/loss'] - 1:+.2%}"
  )


if __name__ == "__main__":
  main(sys.argv[1])
