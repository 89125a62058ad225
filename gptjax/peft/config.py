"""The configuration of adapters, checked once."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gptjax.config import DURATION
from gptjax.errors import UserError, did_you_mean

# Methods, and the options that a rule of their `targets` may have.
METHODS: Mapping[str, tuple[str, ...]] = {
  "lora": ("rank", "alpha"),
  "adalora": ("rank", "alpha"),
  "dora": ("rank", "alpha"),
  "ia3": ("scale_input",),
  "bitfit": (),
  "houlsby": ("rank",),
  "parallel": ("rank", "alpha"),
  "prompt": (),
  "ptuning": (),
  "prefix": (),
}
# The durations of 'adalora': before the first lambdas are set to 0, with the final number of
# lambdas, and from one change to the next.
DURATIONS = ("budget_initial", "budget_final", "budget_every")
# These put virtual tokens before the text, and have no targets.
VIRTUAL_METHODS = ("prompt", "ptuning", "prefix")
BASES = ("float32", "bfloat16", "int8", "nf4")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
  """Method and targets of adapters. Every field is a key of `config.peft`.

  The methods:
    'lora': W + alpha / rank A B (Hu et al. 2021, arXiv:2106.09685).
    'adalora': W + alpha / rank A diag(lambda) B, whose least important lambdas are set to 0 (Zhang
      et al. 2023, arXiv:2303.10512), by the schedule of `gptjax.peft.adalora`.
    'dora': LoRA of the direction of each column of W, and its length (Liu et al. 2024,
      arXiv:2402.09353).
    'ia3': a factor for each output of a projection, or each input (Liu et al. 2022,
      arXiv:2205.05638).
    'bitfit': the model's biases (Zaken et al. 2022, arXiv:2106.10199).
    'houlsby': a bottleneck behind a projection (Houlsby et al. 2019, arXiv:1902.00751).
    'parallel': a bottleneck beside the feed-forward network (He et al. 2022, arXiv:2110.04366).
    'prompt': embeddings of virtual tokens (Lester et al. 2021, arXiv:2104.08691).
    'ptuning': such embeddings, computed from trained vectors by a small network (Liu et al. 2021,
      arXiv:2103.10385).
    'prefix': keys and values of virtual tokens in each layer (Li and Liang 2021,
      arXiv:2101.00190), without a network that computes them.

  `config.peft` of 'adalora' also has the durations `DURATIONS`, which depend on the run's length.

  Attributes:
    method: one of these.
    targets: rules, a pattern or (pattern, options) each, for the adapted parameters: kernels of
      projections, for 'bitfit' biases, for 'parallel' networks ('blocks/mlp'). The first pattern
      found in a name decides; a parameter without one is not adapted. Options are `rank` and
      `alpha`, instead of those below, and `scale_input` for 'ia3'.
    unfrozen: patterns of the model's own parameters that are trained whole beside the adapters, for
      instance an embedding with new tokens (`modules_to_save` and `bias` of the `peft` library).
    rank: rank of A B, or the width of a bottleneck.
    alpha: alpha / rank is the factor of A B and of a parallel bottleneck.
    rank_stabilized: the factor of A B is alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023,
      arXiv:2312.03732).
    target_rank: for 'adalora', the mean number of lambdas of a matrix that are left in the end.
    orthogonal_penalty: for 'adalora', gamma, the factor of |A^T A - I|^2 + |B B^T - I|^2.
    virtual_tokens: number of virtual tokens, which all text sees.
    base: format of the frozen layers' kernels: 'float32', 'bfloat16', or 'int8' or 'nf4' by
      `gptjax.peft.quantized`. It does not change the precision of adapters and products.
  """

  method: str
  targets: tuple[Any, ...] = ()
  unfrozen: tuple[str, ...] = ()
  rank: int = 8
  alpha: float = 16.0
  rank_stabilized: bool = False
  target_rank: int = 8
  orthogonal_penalty: float = 0.1
  virtual_tokens: int = 20
  base: str = "float32"

  def __post_init__(self):
    if self.method not in METHODS:
      raise UserError(
        f"peft.method: no method {self.method!r}. {did_you_mean(self.method, METHODS)}"
      )
    if self.base not in BASES:
      raise UserError(f"peft.base: no format {self.base!r}. {did_you_mean(self.base, BASES)}")
    if self.method in VIRTUAL_METHODS:
      if self.targets:
        raise UserError(f"peft.method={self.method!r} has no peft.targets.")
      if self.virtual_tokens < 1:
        raise UserError(f"peft.virtual_tokens={self.virtual_tokens} is below 1.")
    elif not self.targets:
      raise UserError(f"peft.method={self.method!r} needs peft.targets, what to adapt.")
    for pattern, options in self.rules:
      for key in options:
        if key not in METHODS[self.method]:
          raise UserError(
            f"peft.targets: no option {key!r} in the rule {pattern!r} of method {self.method!r} "
            f"(options: {', '.join(METHODS[self.method]) or 'none'})."
          )
      if (rank := options.get("rank", self.rank)) < 1:
        raise UserError(f"peft.targets: a rank of {rank} is below 1.")
      if self.method == "adalora" and not 1 <= self.target_rank <= rank:
        raise UserError(
          f"peft.target_rank={self.target_rank} is not between 1 and the rank {rank} of the rule "
          f"{pattern!r}, which it is what is left of."
        )

  @classmethod
  def from_config(cls, config: Mapping[str, Any] | None) -> "PeftConfig | None":
    """Reads `config.peft`; None if the whole model is trained."""
    if not config or config["method"] == "none":
      if config and config.get("base", "float32") != "float32":
        raise UserError(f"peft.base={config['base']!r} is of a frozen model: choose a peft.method.")
      return None
    known = [field.name for field in dataclasses.fields(cls)]
    fields = {key: value for key, value in config.items() if not _is_duration(key)}
    for key in fields:
      if key not in known:
        raise UserError(f"peft: no key {key!r}. {did_you_mean(key, known)}")
    return cls(**fields)

  @property
  def rules(self) -> list[tuple[str, Mapping[str, Any]]]:
    """The targets as pairs of a pattern and its options."""
    return [(rule, {}) if isinstance(rule, str) else (rule[0], rule[1]) for rule in self.targets]

  def scale(self, rank: int, alpha: float) -> float:
    """The factor of a product of this rank."""
    return alpha / (rank**0.5 if self.rank_stabilized else rank)


def _is_duration(key: str) -> bool:
  found = DURATION.fullmatch(key)
  return found is not None and found["stem"] in DURATIONS
