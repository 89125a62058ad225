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


def short_run(spec, steps, changes):
  """A short distillation on the standard library, with the teacher and its tokenizer."""
  return config.load(
    f"configs/pretrain.py:{spec},data=stdlib,optim=muon,task=distill",
    {
      "task.teacher": TEACHER,
      "batch_size": 8,
      "sequence_length": 256,
      "total_steps": steps,
      "optim.schedule": "wsd",
      "optim.decay_percent": 40.0,
      "optim.final_fraction": 0.0,
      "eval.every_steps": steps // 4,
      "checkpoint.every_steps": steps,
      "sample.every_steps": 0,
      "log.tensorboard": False,
      **changes,
    },
  )


def base():
  shape = {"num_layers": 2, "embed_dim": 96, "num_heads": 3, "mlp_dim": 256}
  changes = {f"model.{name}": size for name, size in shape.items()}
  return short_run("model=tiny", STEPS, changes | {"tokenizer": f"{TEACHER}/tokenizer"})


def sweep():
  arms = {
    "alone": {"task.alpha": 0.0},
    "distilled": {"task.alpha": 0.5, "task.temperature": 1.0},
  }
  return cross(arms, seeds(3))
