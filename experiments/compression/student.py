"""Does a small model learn more from a larger one than from the text alone?

Question: the same student, the same tokens, with and without a teacher beside it, the model of
configs/quickstart.py.

Expectation: the teacher is worth a tenth of a bit per byte.

Command:

    make demo
    python -m gptjax.sweep --sweep=experiments/compression/student.py --parallel=2 \\
      --workdir=runs/student
    python -m gptjax.sweep report runs/student

The student has 2 layers and width 96, a fifth of the teacher's parameters. Both arms are one task,
`distill`; alone the teacher has no share of the loss. Result and cost: README.md.
"""

from gptjax import config
from gptjax.sweeps.definition import cross, seeds

TEACHER = "runs/demo"
BASELINE = "alone"
STEPS = 400


def base():
  return config.load(
    "configs/pretrain.py:model=tiny,data=stdlib,optim=muon,task=distill",
    {
      "task.teacher": TEACHER,
      "tokenizer": f"{TEACHER}/tokenizer",
      "model.num_layers": 2,
      "model.embed_dim": 96,
      "model.num_heads": 3,
      "model.mlp_dim": 256,
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
    "alone": {"task.alpha": 0.0},
    "distilled": {"task.alpha": 0.5, "task.temperature": 1.0},
  }
  return cross(arms, seeds(3))
