"""The configuration of a model, checked once."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from gptjax.config import flatten
from gptjax.errors import UserError, check_choice, check_number, did_you_mean
from gptjax.model import groups

LAYER_KINDS = ("full", "local", "nope")
# What a model is fine-tuned for, and how it is initialised, trained and executed: groups and keys.
NOT_ARCHITECTURE = ("attention.kernel", "dtype", "dropout", "execution", "init", "label_head")


def shortest_period(kinds: tuple[str, ...]) -> tuple[str, ...]:
  """The shortest pattern that repeats to the whole."""
  return next(
    kinds[:size]
    for size in range(1, len(kinds) + 1)
    if len(kinds) % size == 0 and kinds[:size] * (len(kinds) // size) == kinds
  )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Architecture, initialisation and execution of a GPT. Every field is a key of `config.model`;
  those of a group are 'GROUP.FIELD'.

  Attributes:
    vocab_size: rows of the embedding; may exceed the tokenizer's vocabulary.
    num_layers: number of layers, L; with an encoder, of the decoder's layers.
    embed_dim: width of the residual stream, D.
    num_heads: number of query heads, N.
    num_kv_heads: keys and values shared by groups of query heads (GQA, Ainslie et al. 2023);
      `num_heads` is multi-head, 1 is multi-query attention (Shazeer 2019). 0 means `num_heads`.
    head_dim: width of one head. 0 means `embed_dim / num_heads`.
    mlp_dim: width of the feed-forward network, F; in a mixture of experts, of one expert.
    encoder_layers: layers of a bidirectional encoder, to which each layer of the decoder attends
      (Vaswani et al. 2017); 0 is a decoder alone.
    decoder_start: the token that a decoder with an encoder starts from.
    visibility: the positions that a token attends to: its past ('causal'), all of its segment
      ('bidirectional', Devlin et al. 2019), or its past and the segment's prefix ('prefix', Raffel
      et al. 2020, figure 4).
    layer_pattern: 'full' and 'local' layers, repeated to `num_layers` (GPT-3's alternation of
      dense and banded layers is ('full', 'local')), and 'nope', full layers without rotation
      (Yang et al. 2025, arXiv:2501.18795; SmolLM3).
    window: how many positions, its own included, a token of a 'local' layer sees.
    bias: biases in every projection, and in LayerNorm.
    dtype: dtype of the computation. Parameters, norms, softmax and loss are always float32.
  """

  vocab_size: int = 0
  num_layers: int = 0
  embed_dim: int = 0
  num_heads: int = 0
  num_kv_heads: int = 0
  head_dim: int = 0
  mlp_dim: int = 0
  encoder_layers: int = 0
  decoder_start: int = 0
  visibility: Literal["causal", "bidirectional", "prefix"] = "causal"
  layer_pattern: tuple[str, ...] = ("full",)
  window: int = 0
  bias: bool = True
  dtype: Literal["float32", "bfloat16"] = "float32"
  embed: groups.EmbedConfig = groups.EmbedConfig()
  position: groups.PositionConfig = groups.PositionConfig()
  rope: groups.RopeConfig = groups.RopeConfig()
  norm: groups.NormConfig = groups.NormConfig()
  residual: groups.ResidualConfig = groups.ResidualConfig()
  attention: groups.AttentionConfig = groups.AttentionConfig()
  mlp: groups.FeedForwardConfig = groups.FeedForwardConfig()
  experts: groups.ExpertsConfig = groups.ExpertsConfig()
  head: groups.HeadConfig = groups.HeadConfig()
  label_head: groups.LabelHeadConfig = groups.LabelHeadConfig()
  dropout: groups.DropoutConfig = groups.DropoutConfig()
  init: groups.InitConfig = groups.InitConfig()
  transfer: groups.TransferConfig = groups.TransferConfig()
  execution: groups.ExecutionConfig = groups.ExecutionConfig()

  def __post_init__(self):
    groups.check_fields(self, "model.")
    for field in ("vocab_size", "num_layers", "embed_dim", "num_heads", "mlp_dim"):
      check_number(f"model.{field}", getattr(self, field), at_least=1)
    for field in ("num_layers", "encoder_layers"):
      check_number(f"model.{field}", getattr(self, field), at_most=groups.MOST)
    self._derive(num_kv_heads=self.num_kv_heads or self.num_heads)
    self._derive(layer_pattern=tuple(self.layer_pattern))
    if not self.head_dim:
      if self.embed_dim % self.num_heads:
        raise UserError(
          f"model.embed_dim={self.embed_dim} is not divisible by model.num_heads={self.num_heads}; "
          "change one of them or set model.head_dim."
        )
      self._derive(head_dim=self.embed_dim // self.num_heads)
    if self.num_heads % self.num_kv_heads:
      raise UserError(
        f"model.num_heads={self.num_heads} is not a multiple of "
        f"model.num_kv_heads={self.num_kv_heads}."
      )
    biases = {
      name: self.bias for name in ("qkv_bias", "out_bias") if getattr(self.attention, name) is None
    }
    self._derive(attention=dataclasses.replace(self.attention, **biases))
    if self.mlp.bias is None:
      self._derive(mlp=dataclasses.replace(self.mlp, bias=self.bias))
    self._derive(rope=dataclasses.replace(self.rope, dim=self.rope.dim or self.head_dim))
    self._check_positions()
    self._check_layers()
    self._check_heads()

  def _derive(self, **fields: Any) -> None:
    for name, value in fields.items():
      object.__setattr__(self, name, value)

  def _check_positions(self) -> None:
    if self.position.kind == "rope" and (self.rope.dim % 2 or self.rope.dim > self.head_dim):
      raise UserError(
        f"model.rope.dim={self.rope.dim} of model.head_dim={self.head_dim} must be even, and no "
        "more, for rotary positions."
      )
    if self.rope.scaling == "dynamic" and self.rope.dim < 4:
      raise UserError(f"model.rope.dim={self.rope.dim}: rope.scaling='dynamic' needs 4 or more.")

  def _check_layers(self) -> None:
    for kind in self.layer_pattern:
      check_choice("model.layer_pattern", kind, LAYER_KINDS)
    if "nope" in self.layer_pattern and self.position.kind != "rope":
      raise UserError(
        f"model.layer_pattern: 'nope' is of position.kind='rope', not {self.position.kind!r}."
      )
    if not self.layer_pattern or self.num_layers % len(self.layer_pattern):
      raise UserError(
        f"model.layer_pattern has {len(self.layer_pattern)} entries, which does not divide "
        f"model.num_layers={self.num_layers}."
      )
    if "local" in self.layer_pattern and self.window < 1:
      raise UserError(f"model.window={self.window}: a 'local' layer needs a window of at least 1.")
    if self.visibility != "causal" and "local" in self.layer_pattern:
      raise UserError(f"model.visibility={self.visibility!r} has no 'local' layers.")
    if self.residual.kind != "sequential" and self.norm.placement != "pre":
      raise UserError(
        f"model.residual.kind={self.residual.kind!r} needs model.norm.placement='pre', "
        f"not {self.norm.placement!r}."
      )

  def _check_heads(self) -> None:
    if self.encoder_layers and self.visibility != "causal":
      raise UserError(
        f"model.visibility={self.visibility!r}: beside an encoder, the decoder is 'causal'."
      )
    for name, value in (
      ("experts.count", self.experts.count),
      ("label_head.num_labels", self.label_head.num_labels),
    ):
      if self.encoder_layers and value:
        raise UserError(f"model.{name} and model.encoder_layers are not known together.")
    if self.label_head.pooling == "pooler" and not self.head.pooler:
      raise UserError(
        "model.label_head.pooling='pooler' needs model.head.pooler, which the model has not."
      )

  @classmethod
  def defaults(cls) -> dict[str, Any]:
    """Every dotted key of `config.model` with its default; presets give the shape."""
    found = {field.name: field.default for field in dataclasses.fields(cls)}
    own = {name: vars(value) for name, value in found.items() if isinstance(value, groups.Group)}
    return flatten(found | own)

  @classmethod
  def kinds(cls) -> dict[str, Any]:
    """The type of each dotted key."""
    found = {}
    for field in dataclasses.fields(cls):
      if dataclasses.is_dataclass(field.type):
        own = dataclasses.fields(field.type)
        found |= {f"{field.name}.{inner.name}": inner.type for inner in own}
      else:
        found[field.name] = field.type
    return found

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> "ModelConfig":
    """Builds from nested or dotted keys, those of `config.model`.

    Raises:
      UserError: no model knows a key, or the values are no model.
    """
    return cls(**_nest(cls, config))

  def replace(self, changes: Mapping[str, Any]) -> "ModelConfig":
    """A copy with other values of some dotted keys."""
    return self.from_config(self.flat | changes)

  @property
  def flat(self) -> dict[str, Any]:
    """The value of every dotted key."""
    return flatten(dataclasses.asdict(self))

  @property
  def architecture(self) -> dict[str, Any]:
    """The dotted keys that decide what is computed in evaluation, each value in one spelling."""
    values = {
      name: value
      for name, value in self.flat.items()
      if name not in NOT_ARCHITECTURE and name.split(".")[0] not in NOT_ARCHITECTURE
    }
    kinds = self.layer_pattern * (self.num_layers // len(self.layer_pattern))
    values["layer_pattern"] = shortest_period(kinds)
    values["window"] = self.window if "local" in kinds else 0
    return values

  def differences(self, other: "ModelConfig") -> list[str]:
    """ "model.FIELD=ours, not theirs" for each field of the architecture that is not the same."""
    return _differences(self.architecture, other.architecture)

  def head_differences(self, other: "ModelConfig") -> list[str]:
    """The same for the fields of the label head."""
    return _differences(
      *(flatten({"label_head": dataclasses.asdict(one.label_head)}) for one in (self, other))
    )

  @property
  def encoder(self) -> "ModelConfig":
    """The config of the encoder's stack alone."""
    return dataclasses.replace(
      self,
      num_layers=self.encoder_layers,
      encoder_layers=0,
      visibility="bidirectional",
      layer_pattern=("full",),
    )

  @property
  def windows(self) -> tuple[int | None, ...]:
    """The window of each layer in one period of the pattern; None for full attention."""
    return tuple(self.window if kind == "local" else None for kind in self.layer_pattern)

  @property
  def width_ratio(self) -> float:
    """The width over that of the base; 1 in the standard parametrization."""
    if self.transfer.parametrization == "standard":
      return 1.0
    return self.embed_dim / self.transfer.base_embed_dim

  @property
  def depth_ratio(self) -> float:
    """The depth over that of the base; 1 unless in CompleteP."""
    if self.transfer.parametrization != "completep":
      return 1.0
    return self.num_layers / self.transfer.base_num_layers

  @property
  def hidden_std(self) -> float:
    """Initial standard deviation of the matrices inside layers."""
    return self.init.std / math.sqrt(self.width_ratio)

  @property
  def residual_std(self) -> float:
    """Initial standard deviation of projections onto the residual stream, two of them a layer."""
    if self.init.residual == "zero":
      return 0.0
    return self.hidden_std / math.sqrt(2 * self.num_layers / self.depth_ratio)


def _nest(cls: type[ModelConfig], config: Mapping[str, Any]) -> dict[str, Any]:
  """The arguments of the class: the values at the top, and a group for each first part of a key."""
  known, nested = cls.kinds(), {}
  for key, value in flatten(config).items():
    if key not in known:
      raise UserError(f"model: no key {key!r}. {did_you_mean(key, known)}")
    group, _, field = key.rpartition(".")
    (nested.setdefault(group, {}) if group else nested)[field] = value
  types = {field.name: field.type for field in dataclasses.fields(cls)}
  return {
    name: types[name](**value) if isinstance(value, dict) else value
    for name, value in nested.items()
  }


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
  return [
    f"model.{name}={value!r}, not {theirs[name]!r}"
    for name, value in ours.items()
    if value != theirs[name]
  ]
