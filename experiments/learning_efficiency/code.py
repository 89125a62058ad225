"""The recipes that decided the prose, on source code.

Question: does what pays on English prose (sweep.py) pay on Python source too?

Command:

    python -m gptjax.sweep --sweep=experiments/learning_efficiency/code.py --parallel=2 \\
      --workdir=runs/learning_efficiency_code
    python -m gptjax.sweep report runs/learning_efficiency_code

The corpus is the Python standard library of the machine. Nothing was chosen on it.

Result and cost: README.md.
"""

from experiments.learning_efficiency import sweep as english
from gptjax.config import override
from gptjax.presets.parts import data
from gptjax.sweeps.definition import cross, seeds

BASELINE = english.BASELINE
ARMS = ("nanogpt", "embed-rate", "muon", "soap", "speedrun", "speedrun-half", "speedrun-quarter")


def base():
  config = english.base()
  for key, value in data.DATA["stdlib"].items():
    override(config, f"data.{key}", value)
  override(config, "data.path", "")
  return config


def sweep():
  chosen = english.OPTIMIZERS | english.COMPOSITES
  return cross(seeds(3), {arm: chosen[arm] for arm in ARMS})
