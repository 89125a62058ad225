"""GPT-2's recipe against a modern one, at equal parameters and equal tokens.

Question: how much of what changed between GPT-2 (2019) and today's recipes shows at 2.5 M
parameters and 0.8 M tokens of Python source? GPT-2 with AdamW; RoPE, RMSNorm, QK-norm and SwiGLU
with AdamW; the same with Muon.

Expectation: Muon helps most, the architecture somewhat; both by more than the noise between seeds.

Command:

    python -m gptjax.sweep --sweep=experiments/architecture/sweep.py --workdir=runs/architecture
    python -m gptjax.sweep report runs/architecture

Result and cost: README.md, with how the learning rates were chosen.
"""

from gptjax import config
from gptjax.presets.parts import models, optim
from gptjax.sweeps.definition import cross, seeds

BASELINE = "gpt2-adamw"


def base():
  return config.load(
    "configs/pretrain.py:model=tiny-gpt2,data=stdlib,optim=adamw",
    {
      "total_steps": 400,
      "batch_size": 8,
      "sequence_length": 256,
      "tokenizer": "bpe:4096",
      "model.position.max_positions": 256,
      "optim.warmup_percent": 10.0,
      "optim.schedule": "wsd",
      "optim.decay_percent": 40.0,
      "optim.final_fraction": 0.0,
      "eval.every_steps": 100,
      "checkpoint.every_steps": 200,
      "checkpoint.keep": 1,
      "sample.every_steps": 0,
      "log.tensorboard": False,
    },
  )


def sweep():
  modern = {"model": models.MODELS["tiny"]}
  arms = {
    "gpt2-adamw": {"optim.learning_rate": 3e-3},
    "modern-adamw": modern | {"optim.learning_rate": 3e-3},
    "modern-muon": modern | {"optim": optim.OPTIMIZERS["muon"]},
  }
  return cross(arms, seeds(3))
