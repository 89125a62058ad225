"""How few tokens, FLOPs and seconds does it take to reach what nanoGPT's recipe reaches?

Question: at equal model size on English prose, which changes to the optimizer, the architecture,
the schedule, the batch and the tokenizer pay, and how much do they pay together?

Expectation: Muon and SOAP pay most; QK-norm, ReLU^2 and the residuals of modded-nanogpt's records a
little each; the composite needs half of the tokens or less.

Command:

    python -m gptjax.sweep --sweep=experiments/learning_efficiency/sweep.py --parallel=2 \\
      --workdir=runs/learning_efficiency
    python -m gptjax.sweep report runs/learning_efficiency

The baseline is nanoGPT's recipe at its laptop shape (4 layers, 4 heads, width 128, no biases, no
dropout, learning rate 1e-3, AdamW with betas 0.9 and 0.95, decay 0.1, clipping at 1, cosine to a
tenth): 512,000 tokens, 1,024 a step. Each arm changes one thing, but `speedrun` and the arms that
are named after it. Learning rates of the other optimizers are from rates.py.

Result and cost: README.md.
"""

from experiments import prose
from gptjax.config import flatten
from gptjax.presets.parts import models, optim
from gptjax.sweeps.definition import cross, seeds

SHAPE = {
  "num_layers": 4,
  "num_heads": 4,
  "embed_dim": 128,
  "mlp_dim": 512,
  "position.max_positions": 128,
}
BASELINE = "nanogpt"
TOKENS = 512_000


def base():
  return prose.short_run(
    "model=gpt2-124m,optim=adamw",
    {
      "tokenizer": "bpe:1024",
      "model.vocab_size": 0,
      **{f"model.{key}": value for key, value in SHAPE.items()},
      "optim.learning_rate": 1e-3,
      "total_tokens": TOKENS,
      "eval.every_percent": 10.0,
    },
  )


def speedrun(**changes):
  """The composite at the shape of the baseline, with keys of the config changed."""
  model = models.MODELS["speedrun"] | SHAPE | {"vocab_size": 0}
  return flatten({"model": model, "optim": optim.OPTIMIZERS["speedrun"]}) | changes


OPTIMIZERS = {
  "nanogpt": {},
  "embed-rate": {"optim.rules": (("^embed|^position", {"lr": 10.0}), *optim.DEFAULTS["rules"])},
  "lion": {"optim": optim.OPTIMIZERS["lion"] | {"learning_rate": 1e-3}},
  "adafactor": {"optim": optim.OPTIMIZERS["adafactor"] | {"learning_rate": 3e-3}},
  "muon": {"optim": optim.OPTIMIZERS["muon"] | {"learning_rate": 2e-2}},
  "soap": {"optim": optim.OPTIMIZERS["soap"] | {"learning_rate": 3e-3}},
}
ARCHITECTURE = {
  "rope": {"model.position.kind": "rope"},
  "rmsnorm": {"model.norm.kind": "rmsnorm"},
  "qk-norm": {"model.attention.qk_norm": True},
  "relu2": {"model.mlp.activation": "relu2"},
  # A gate is a third matrix: two thirds of the width are as many parameters.
  "swiglu": {"model.mlp.activation": "swiglu", "model.mlp_dim": 344},
  "value-residual": {"model.residual.values": True},
  "embed-residual": {"model.residual.embedding": True},
  "zero-init": {"model.init.residual": "zero"},
}
SCHEDULES = {
  "linear-to-zero": {"optim.schedule": "linear", "optim.final_fraction": 0.0},
  "wsd": {"optim.schedule": "wsd", "optim.final_fraction": 0.0, "optim.decay_percent": 40.0},
}
BATCHES = {"batch-512": {"batch_size": 4}, "batch-2048": {"batch_size": 16}}
TOKENIZERS = {"bpe-512": {"tokenizer": "bpe:512"}, "bpe-4096": {"tokenizer": "bpe:4096"}}
COMPOSITES = {
  "speedrun": speedrun(),
  "speedrun-half": speedrun(total_tokens=TOKENS // 2),
  "speedrun-quarter": speedrun(total_tokens=TOKENS // 4),
  # Without what did not pay by itself in the first seed.
  "speedrun-plain": speedrun(
    **{
      "model.norm.kind": "layernorm",
      "model.attention.qk_norm": False,
      "model.init.residual": "scaled",
      "model.residual.values": False,
      "model.residual.embedding": False,
    }
  ),
}


def sweep():
  arms = OPTIMIZERS | ARCHITECTURE | SCHEDULES | BATCHES | TOKENIZERS | COMPOSITES
  return cross(seeds(3), arms)
