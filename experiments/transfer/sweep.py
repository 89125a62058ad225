"""Does the best learning rate stay where it is when the model gets wider?

Question: with muP the learning rate that is best at width 64 should be the best at 512; in the
standard parametrization it should move. Seven rates, four widths, both parametrizations, and muP
once more from an initialisation that suits the base: 0.02 is for widths of GPT-2's, and muP keeps
what the base has, where the standard parametrization grows into it.

Expectation: a flat optimum with muP; with the standard one it falls about as 1 / width.

Command:

    python -m gptjax.sweep --sweep=experiments/transfer/sweep.py --parallel=2 \\
      --workdir=runs/transfer
    python -m experiments.transfer.draw runs/transfer

Two layers, heads of 32, bytes of English prose, 150 steps of 1,024 bytes with AdamW, no decay.

Result and cost: README.md.
"""

from experiments import prose
from gptjax.sweeps.definition import cross, seeds

WIDTHS = (64, 128, 256, 512)
RATES = tuple(5e-4 * 2**i for i in range(7))
METRIC = "val/loss"


def base():
  return prose.short_run(
    "model=tiny-gpt2,optim=adamw",
    {
      "data.validation_fraction": 0.005,
      "tokenizer": "bytes",
      "model.num_layers": 2,
      "model.position.kind": "rope",
      "model.transfer.base_embed_dim": WIDTHS[0],
      "optim.weight_decay": 0.0,
      "total_steps": 150,
      "eval.every_steps": 150,
    },
  )


def sweep():
  widths = {
    f"width-{width}": {
      "model.embed_dim": width,
      "model.mlp_dim": 4 * width,
      "model.num_heads": width // 32,
    }
    for width in WIDTHS
  }
  kinds = {
    "standard": {"model.transfer.parametrization": "standard"},
    "mup": {"model.transfer.parametrization": "mup"},
    "mup-init": {"model.transfer.parametrization": "mup", "model.init.std": 0.1},
  }
  rates = {f"rate-{rate:g}": {"optim.learning_rate": rate} for rate in RATES}
  return cross(kinds, widths, rates, seeds(1))
