"""Can nineteen small runs foretell a larger one?

Question: fitted to runs of four budgets and six widths, how far is L(N, D) from the loss of a run
of four times the largest budget, which the fit has not seen?

Expectation: within 2 %; the exponents are not those of the paper at this size.

Command:

    python -m gptjax.sweep --sweep=experiments/scaling/sweep.py --parallel=2 --workdir=runs/scaling
    python -m gptjax.sweep scaling runs/scaling
    python -m experiments.scaling.foretell runs/scaling

Every size trains with Muon and muP at the learning rate that was best at width 128
(experiments/learning_efficiency/rates.py), and its schedule ends with it, so the last loss of each
run counts (Hoffmann et al. 2022, section 3).

Result and cost: README.md.
"""

from experiments import prose
from gptjax.sweeps.definition import make_trial
from gptjax.training.resolve import resolve
from gptjax.training.setup import make_setup

# FLOPs of a run -> widths, around the best.
WIDTHS = {
  2.5e11: (16, 32, 48, 64),
  5e11: (16, 32, 48, 64, 96),
  1e12: (16, 32, 48, 64, 96),
  2e12: (32, 48, 64, 96, 128),
}
METRIC = "val/loss"


def base():
  return prose.short_run(
    "model=tiny-gpt2,optim=muon",
    {
      "tokenizer": "bpe:1024",
      "model.position.kind": "rope",
      "model.transfer.parametrization": "mup",
      "model.transfer.base_embed_dim": 128,
      "optim.learning_rate": 2e-2,
      "optim.final_fraction": 0.0,
      "eval.every_percent": 100.0,
    },
  )


def arm(width: int, budget: float):
  """A run of a width that costs `budget` FLOPs, forward and backward, in whole steps."""
  shape = {
    "model.embed_dim": width,
    "model.mlp_dim": 4 * width,
    "model.num_heads": width // 16,
  }
  setup = make_setup(resolve(make_trial(base(), "", shape).config.copy_and_resolve_references()))
  tokens = round(budget / setup.flops_per_token)
  return f"width-{width},flops-{budget:g}", shape | {"total_tokens": tokens}


def sweep():
  for budget, widths in WIDTHS.items():
    for width in widths:
      yield arm(width, budget)
