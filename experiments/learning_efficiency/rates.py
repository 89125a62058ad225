"""Which learning rate does each optimizer get in sweep.py?

Question: at half of the tokens and a seed of its own, which rate has the lowest training loss? The
validation set is not looked at, since sweep.py is judged by it.

Command:

    python -m gptjax.sweep --sweep=experiments/learning_efficiency/rates.py --parallel=2 \\
      --workdir=runs/rates
    python -m experiments.learning_efficiency.rates runs/rates

Result: README.md.
"""

import statistics
import sys

from experiments.learning_efficiency import sweep as english
from gptjax.config import override
from gptjax.presets.parts import optim
from gptjax.sweeps.definition import cross, seeds
from gptjax.sweeps.results import load_results
from gptjax.training.metrics import read_metrics

RATES = {
  "adamw": (5e-4, 1e-3, 2e-3, 3e-3, 6e-3),
  "lion": (1e-4, 3e-4, 1e-3),
  "adafactor": (3e-3, 1e-2, 3e-2),
  "muon": (5e-3, 1e-2, 2e-2, 4e-2),
  "soap": (1e-3, 3e-3, 5e-3, 1e-2),
}
LAST_LINES = 5


def base():
  config = english.base()
  override(config, "total_tokens", english.TOKENS // 2)
  override(config, "eval.every_percent", 100.0)
  return config


def sweep():
  for name, rates in RATES.items():
    preset = {"optim": optim.OPTIMIZERS[name]}
    arms = {f"{name},{rate:g}": preset | {"optim.learning_rate": rate} for rate in rates}
    yield from cross(arms, seeds((100,)))


def main(workdir: str) -> None:
  for run in load_results(workdir).finished:
    lines = read_metrics(f"{workdir}/trials/{run.arm}-seed{run.seed}")
    losses = [line["loss"] for line in lines if "loss" in line][-LAST_LINES:]
    print(f"{run.arm:<16} {statistics.mean(losses):.3f}")


if __name__ == "__main__":
  main(sys.argv[1])
