"""Does a small encoder learn more of sentiment with a fine-tuned one beside it?

Question: the same student, from nothing, the same labelled sentences, with and without the
probabilities of a fine-tuned MiniLM of 22.7 M parameters.

Expectation: the teacher's doubts are worth a point of accuracy.

Command:

    python -m experiments.compression.soups --runs=runs/soups
    python -m gptjax.sweep --sweep=experiments/compression/sentiment.py --parallel=2 \\
      --workdir=runs/sentiment
    python -m gptjax.sweep report runs/sentiment

The teacher is the first fine-tuning of `soups.py`. The student has 2 layers and width 128, most of
whose 4.4 M parameters are the table of the teacher's vocabulary. Judged is the last checkpoint, by
the validation file, on which nothing is chosen. Result and cost: README.md.
"""

from experiments.datasets import fetch
from gptjax import config
from gptjax.sweeps.definition import cross, seeds

TEACHER = "runs/soups/0"
BASELINE = "alone"
METRIC = "val/accuracy"
SHAPE = {
  "model.num_layers": 2,
  "model.embed_dim": 128,
  "model.num_heads": 4,
  "model.mlp_dim": 512,
  "model.label_head.pooling": "mean",
}


def base():
  data = fetch("vader_movies")
  return config.load(
    "configs/finetune.py:task=distill_classification,model=bert-base",
    {
      **SHAPE,
      "tokenizer": f"{TEACHER}/tokenizer",
      "task.teacher": TEACHER,
      "data.path": str(data / "train.jsonl"),
      "data.validation_path": str(data / "validation.jsonl"),
      "sequence_length": 64,
      "total_epochs": 2.0,
      "optim.learning_rate": 1e-3,
      "checkpoint.final": "newest",
      "log.tensorboard": False,
    },
  )


def sweep():
  arms = {
    "alone": {"task.alpha": 0.0},
    "distilled": {"task.alpha": 0.5, "task.temperature": 2.0},
  }
  return cross(arms, seeds(3))
