"""Is a pruned model better recovered by its original than by the text alone?

Question: the model of configs/quickstart.py without one of its four layers and a quarter of the
others' feed-forward channels, chosen by importance, 26 % of its parameters, trained on for the same
tokens with and without the original as teacher.

Expectation: with the teacher it comes nearer to the original.

Command:

    make demo
    python -m experiments.compression.quantize --model=quickstart --checkpoint=runs/demo \\
      --output=runs/quickstart
    python -m gptjax.compress shrink --checkpoint=runs/demo --to=runs/demo-shrunk --layers=3 \\
      --mlp_dim=384 --data=runs/quickstart/texts/calibration
    python -m gptjax.sweep --sweep=experiments/compression/recovery.py --parallel=2 \\
      --workdir=runs/recovery
    python -m gptjax.sweep report runs/recovery

Result and cost: README.md.
"""

from experiments.compression.student import short_run
from gptjax.sweeps.definition import cross, seeds

PRUNED = "runs/demo-shrunk"
BASELINE = "plain recovery"
STEPS = 200


def base():
  return short_run("model=init_from", STEPS, {"init_from": PRUNED})


def sweep():
  arms = {
    "plain recovery": {"task.alpha": 0.0},
    "distilled": {"task.alpha": 0.5},
  }
  return cross(arms, seeds(3))
