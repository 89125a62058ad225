"""Is a pruned model better recovered by its original than by the text alone?

Question: the model of configs/quickstart.py without a quarter of its parameters, chosen by
importance, trained on for the same tokens with and without the original as teacher.

Expectation: with the teacher it comes nearer to the original.

Command:

    make demo
    python -m gptjax.compress shrink --checkpoint=runs/demo --to=runs/demo-shrunk --layers=3 \\
      --data=stdlib
    python -m gptjax.sweep --sweep=experiments/compression/recovery.py --parallel=2 \\
      --workdir=runs/recovery
    python -m gptjax.sweep report runs/recovery

Result and cost: README.md.
"""

from gptjax import config
from gptjax.sweeps.definition import cross, seeds

TEACHER, PRUNED = "runs/demo", "runs/demo-shrunk"
BASELINE = "plain recovery"
STEPS = 200


def base():
  return config.load(
    "configs/pretrain.py:model=init_from,data=stdlib,optim=muon,task=distill",
    {
      "init_from": PRUNED,
      "task.teacher": TEACHER,
      "batch_size": 8,
      "sequence_length": 256,
      "total_steps": STEPS,
      "optim.schedule": "wsd",
      "optim.decay_percent": 40.0,
      "optim.final_fraction": 0.0,
      "eval.every_steps": STEPS // 4,
      "checkpoint.every_steps": STEPS,
      "sample.every_steps": 0,
      "log.tensorboard": False,
    },
  )


def sweep():
  arms = {
    "plain recovery": {"task.alpha": 0.0},
    "distilled": {"task.alpha": 0.5},
  }
  return cross(arms, seeds(3))
