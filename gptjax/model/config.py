"""The configuration of a model, checked once."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from gptjax.errors import UserError, check_number, did_you_mean

CHOICES = {
  "norm": ("layernorm", "rmsnorm"),
  "norm_placement": ("pre", "post", "after", "both"),
  "residual": ("sequential", "parallel", "parallel_one_norm"),
  "visibility": ("causal", "bidirectional", "prefix"),
  "activation": (
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "relu",
    "relu2",
    "silu",
    "swiglu",
    "geglu",
    "swiglu_clamped",
  ),
  "position": ("learned", "rope", "alibi", "t5", "none"),
  "rope_scaling": ("none", "linear", "dynamic", "yarn", "llama3"),
  "residual_init": ("scaled", "zero"),
  "parametrization": ("standard", "mup", "completep"),
  "remat": ("none", "full", "save_attention", "save_qkv", "dots", "offload"),
  "attention": ("auto", "xla", "splash", "cudnn"),
  "dtype": ("float32", "bfloat16"),
  "pooler_activation": ("tanh", "relu", "gelu"),
  "label_pooling": ("none", "mean", "pooler"),
}

LAYER_KINDS = ("full", "local", "nope")
# More layers or experts than any model has; a file that asks for more would exhaust the memory.
_MOST = 10_000
DROPOUTS = ("embed_dropout", "attention_dropout", "residual_dropout", "label_dropout")

LABEL_HEAD = ("num_labels", "label_pooling", "label_bias")

# What a model is fine-tuned for, and how it is initialised, trained and executed.
NOT_ARCHITECTURE = (
  *DROPOUTS,
  *LABEL_HEAD,
  "init_std",
  "residual_init",
  "scan_layers",
  "remat",
  "attention",
  "dtype",
)


def shortest_period(kinds: tuple[str, ...]) -> tuple[str, ...]:
  """The shortest pattern that repeats to the whole."""
  return next(
    kinds[:size]
    for size in range(1, len(kinds) + 1)
    if len(kinds) % size == 0 and kinds[:size] * (len(kinds) // size) == kinds
  )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Architecture, initialisation and execution of a GPT. Every field is a key of `config.model`.

  Attributes:
    vocab_size: rows of the embedding; may exceed the tokenizer's vocabulary.
    num_layers: number of layers, L; with an encoder, of the decoder's layers.
    embed_dim: width of the residual stream, D.
    num_heads: number of query heads, N.
    mlp_dim: width of the feed-forward network, F; in a mixture of experts, of one expert.
    num_kv_heads: keys and values shared by groups of query heads (GQA, Ainslie et al. 2023);
      `num_heads` is multi-head, 1 is multi-query attention (Shazeer 2019). 0 means `num_heads`.
    head_dim: width of one head. 0 means `embed_dim / num_heads`.
    max_positions: rows of the learned position table; other schemes ignore it.
    norm: 'layernorm' (Ba et al. 2016) or 'rmsnorm' (Zhang and Sennrich 2019).
    visibility: the positions that a token attends to: its past ('causal'), all of its segment
      ('bidirectional', Devlin et al. 2019), or its past and the segment's prefix ('prefix', Raffel
      et al. 2020, figure 4).
    norm_placement: 'pre' (GPT-2); 'post', without a final norm (GPT-1, BERT); 'after' a branch, on
      its output alone (OLMo 2, arXiv:2501.00656, section 3.2); or 'both' 'pre' and 'after' (Gemma
      2).
    norm_eps: constant that is added to the variance before its root is taken.
    norm_offset: constant that is added to the scale of RMSNorm (Gemma's is 1); the scale starts at
      1 - norm_offset.
    residual: 'sequential' is attention, then the feed-forward network. In parallel both read the
      same input, each with its own norm ('parallel', GPT-NeoX) or with one ('parallel_one_norm',
      GPT-J).
    bias: biases in every projection, and in LayerNorm.
    qkv_bias: biases of the query, key and value projections; None is `bias`.
    out_bias: bias of attention's output projection; None is `bias`.
    mlp_bias: biases of the feed-forward network; None is `bias`.
    activation: 'gelu' (exact), 'gelu_tanh' and 'quick_gelu', x sigmoid(1.702 x), which approximate
      it (Hendrycks and Gimpel 2016), 'relu', 'relu2' (So et al. 2021), 'silu', or the gated
      'swiglu' and 'geglu' (Shazeer 2020); 'swiglu_clamped' is the activation of gpt-oss (OpenAI
      2025): (up + 1) gate sigmoid(1.702 gate), gate and up bounded by 7.
    position: 'learned' (GPT-1 to 3), 'rope' (Su et al. 2021), 'alibi' (Press et al. 2022), 't5'
      (the learnt B in QK^T + B of Raffel et al. 2020, one table for all layers), or 'none'.
    position_offset: rows of the learned table before the row of position 0 (RoBERTa has 2).
    rope_base: the base of the rotary wavelengths.
    rope_local_base: the base in 'local' layers, without scaling (Gemma 3); 0 is like other layers.
    rope_dim: how many dimensions of a head are rotated, the first ones (GPT-J); 0 is all.
    rope_scaling: 'none', 'linear' (Chen et al. 2023), 'dynamic' (NTK-aware, by the length of each
      row) and 'yarn' (both Peng et al. 2023) or 'llama3' (Grattafiori et al. 2024).
    rope_factor: how many times longer the context becomes by `rope_scaling`.
    rope_original_positions: length of the context before `rope_scaling`.
    rope_slow_turns: 'yarn' and 'llama3' interpolate dimensions with fewer turns than this over the
      original positions; 0 is the method's default.
    rope_fast_turns: they keep dimensions with more turns than this; 0 is the method's default.
    rope_round: whether 'yarn' rounds these bounds to whole dimensions (gpt-oss does not).
    rope_attention_factor: the factor of rotated queries and keys in 'yarn'; 0 is the paper's.
    t5_buckets: number of distance buckets of 't5'.
    t5_max_distance: distance from which all keys share the last bucket of 't5'.
    embed_norm: a norm of the embeddings (BERT).
    embed_scale: factor of token embeddings (Gemma's is the root of the width).
    residual_scale: factor of each branch's contribution to the residual stream (Granite).
    token_types: rows of the table of token types (BERT's segments A and B); 0 is no table.
    attention_scale: factor of QK^T (T5's is 1); 0 is 1 / sqrt(head_dim).
    attention_sinks: a learnt logit per head that takes attention from the keys (gpt-oss).
    qk_norm: RMSNorm of queries and keys (Henry et al. 2020, Dehghani et al. 2023).
    qk_norm_per_head: whether each head has its own mean square, or all share one (OLMo 2).
    tied_head: the output projection is the embedding (Press and Wolf 2017).
    head_bias: a bias of the logits (GPT-J, BERT).
    head_transform: projection, activation and norm before the output projection (BERT).
    pooler: a projection of a row's first token, followed by an activation (BERT).
    pooler_activation: 'tanh' (BERT, RoBERTa), 'relu' (DistilBERT) or 'gelu' (ELECTRA).
    next_sentence: two scores of the pooler's output: does the second sentence follow the first
      (Devlin et al. 2019, section 3.1, task 2)?
    logit_scale: factor of the final hidden states (T5's is 1 / sqrt(width), for its tied head).
    value_residual: a learnt mixture of each layer's values with the first layer's (Zhou et al.
      2024, arXiv:2410.17897, learnable variant).
    embed_residual: each layer starts from a learnt mixture of its input with the embedding of the
      token (the skip of modded-nanogpt's records).
    logit_soft_cap: c in c * tanh(x / c) of the output logits (Gemma 2); 0 is off.
    attention_soft_cap: c in c * tanh(x / c) of the attention logits (Gemma 2); 0 is off.
    layer_pattern: 'full' and 'local' layers, repeated to `num_layers` (GPT-3's alternation of
      dense and banded layers is ('full', 'local')), and 'nope', full layers without rotation
      (Yang et al. 2025, arXiv:2501.18795; SmolLM3).
    window: how many positions, its own included, a token of a 'local' layer sees.
    encoder_layers: layers of a bidirectional encoder, to which each layer of the decoder attends
      (Vaswani et al. 2017); 0 is a decoder alone.
    decoder_start: the token that a decoder with an encoder starts from.
    num_experts: experts in the place of every feed-forward network (Shazeer et al. 2017,
      arXiv:1701.06538); no token is dropped. 0 is a dense network.
    experts_per_token: number of experts that each token is sent to.
    router_normalize: whether the weights of a token's experts add up to 1 (Mixtral), or are its
      probabilities among all experts (Switch, Fedus et al. 2022).
    router_bias: a bias of the router's logits.
    shared_expert_dim: width of an additional expert that every token goes through (Dai et al.
      2024, arXiv:2401.06066); 0 is none.
    num_labels: scores that a head gives each token, instead of logits of the vocabulary; 0 is a
      language model.
    label_pooling: the input of that head: the token's hidden state ('none'), the mean over its
      segment ('mean'), or the pooler's output ('pooler', as BERT and RoBERTa classify texts).
    label_bias: whether the scores have a bias. Decoders of `transformers` classify texts without.
    embed_dropout: dropout rate of the embeddings.
    attention_dropout: dropout rate of the attention weights.
    residual_dropout: dropout rate of each branch's output.
    label_dropout: dropout rate of the input of the label head.
    init_std: standard deviation of the normal initialisation.
    residual_init: projections onto the residual stream start 'scaled' by 1 / sqrt(2 * num_layers)
      (Radford et al. 2019, section 2.3), or at 'zero'.
    parametrization: transfer of hyper-parameters from a small model to a large one: 'standard'
      (none); 'mup', across widths (Yang et al. 2022, arXiv:2203.03466, table 8); 'completep',
      across widths and depths (Dey et al. 2025, arXiv:2505.01618, table 1). The optimizer's side
      is in `gptjax.optim.transfer`. Wider models have more heads, not wider ones.
    base_embed_dim: width of the small model, at which all parametrizations are equal.
    base_num_layers: its depth.
    scan_layers: one compiled layer scanned over the stack, or a compiled copy of each layer.
      None chooses: copies on CPU, where a scan is slower, and a scan elsewhere.
    remat: activations that are kept for the backward pass, which recomputes the others: all
      ('none'), a layer's input ('full'), also attention's result ('save_attention'), also its
      projections ('save_qkv'), also the wide activations of the feed-forward network ('dots'; in
      the host's memory: 'offload').
    attention: the kernel: 'xla' (written out), 'splash' (TPU), 'cudnn' (NVIDIA), or 'auto', the
      platform's own where it supports the model.
    dtype: dtype of the computation. Parameters, norms, softmax and loss are always float32.
  """

  vocab_size: int = 0
  num_layers: int = 0
  embed_dim: int = 0
  num_heads: int = 0
  mlp_dim: int = 0
  num_kv_heads: int = 0
  head_dim: int = 0
  max_positions: int = 1024
  norm: str = "layernorm"
  norm_placement: str = "pre"
  norm_eps: float = 1e-5
  norm_offset: float = 0.0
  residual: str = "sequential"
  visibility: str = "causal"
  bias: bool = True
  qkv_bias: bool | None = None
  out_bias: bool | None = None
  mlp_bias: bool | None = None
  activation: str = "gelu_tanh"
  position: str = "learned"
  position_offset: int = 0
  rope_base: float = 10_000.0
  rope_local_base: float = 0.0
  rope_dim: int = 0
  rope_scaling: str = "none"
  rope_factor: float = 1.0
  rope_original_positions: int = 0
  rope_slow_turns: float = 0.0
  rope_fast_turns: float = 0.0
  rope_round: bool = True
  rope_attention_factor: float = 0.0
  t5_buckets: int = 32
  t5_max_distance: int = 128
  embed_norm: bool = False
  embed_scale: float = 1.0
  residual_scale: float = 1.0
  token_types: int = 0
  attention_scale: float = 0.0
  attention_sinks: bool = False
  qk_norm: bool = False
  qk_norm_per_head: bool = True
  tied_head: bool = True
  head_bias: bool = False
  head_transform: bool = False
  pooler: bool = False
  pooler_activation: str = "tanh"
  next_sentence: bool = False
  logit_scale: float = 1.0
  value_residual: bool = False
  embed_residual: bool = False
  logit_soft_cap: float = 0.0
  attention_soft_cap: float = 0.0
  layer_pattern: tuple[str, ...] = ("full",)
  window: int = 0
  encoder_layers: int = 0
  decoder_start: int = 0
  num_experts: int = 0
  experts_per_token: int = 0
  router_normalize: bool = True
  router_bias: bool = False
  shared_expert_dim: int = 0
  num_labels: int = 0
  label_pooling: str = "none"
  label_bias: bool = True
  embed_dropout: float = 0.0
  attention_dropout: float = 0.0
  residual_dropout: float = 0.0
  label_dropout: float = 0.0
  init_std: float = 0.02
  residual_init: str = "scaled"
  parametrization: str = "standard"
  base_embed_dim: int = 0
  base_num_layers: int = 0
  scan_layers: bool | None = None
  remat: str = "none"
  attention: str = "auto"
  dtype: str = "float32"

  def __post_init__(self):
    object.__setattr__(self, "num_kv_heads", self.num_kv_heads or self.num_heads)
    object.__setattr__(self, "layer_pattern", tuple(self.layer_pattern))
    for field, choices in CHOICES.items():
      value = getattr(self, field)
      if value not in choices:
        raise UserError(f"model.{field}: no choice {value!r}. {did_you_mean(str(value), choices)}")
    for name, value in vars(self).items():
      if isinstance(value, float):
        check_number(f"model.{name}", value)
    for field in ("vocab_size", "num_layers", "embed_dim", "num_heads", "mlp_dim"):
      check_number(f"model.{field}", getattr(self, field), at_least=1)
    for field in ("num_layers", "encoder_layers", "num_experts"):
      check_number(f"model.{field}", getattr(self, field), at_most=_MOST)
    bases = {"mup": ("base_embed_dim",), "completep": ("base_embed_dim", "base_num_layers")}
    for field in bases.get(self.parametrization, ()):
      if getattr(self, field) < 1:
        raise UserError(
          f"model.parametrization={self.parametrization!r} needs model.{field}, that of the small "
          "model whose learning rate is to be used."
        )
    if not self.head_dim:
      if self.embed_dim % self.num_heads:
        raise UserError(
          f"model.embed_dim={self.embed_dim} is not divisible by model.num_heads={self.num_heads}; "
          "change one of them or set model.head_dim."
        )
      object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)
    if self.num_heads % self.num_kv_heads:
      raise UserError(
        f"model.num_heads={self.num_heads} is not a multiple of "
        f"model.num_kv_heads={self.num_kv_heads}."
      )
    for field in ("qkv_bias", "out_bias", "mlp_bias"):
      if getattr(self, field) is None:
        object.__setattr__(self, field, self.bias)
    object.__setattr__(self, "rope_dim", self.rope_dim or self.head_dim)
    if self.position == "rope" and (self.rope_dim % 2 or self.rope_dim > self.head_dim):
      raise UserError(
        f"model.rope_dim={self.rope_dim} of model.head_dim={self.head_dim} must be even, and no "
        "more, for rotary positions."
      )
    if self.rope_scaling == "dynamic" and self.rope_dim < 4:
      raise UserError(f"model.rope_dim={self.rope_dim}: rope_scaling='dynamic' needs 4 or more.")
    if self.rope_scaling in ("dynamic", "yarn", "llama3") and self.rope_original_positions < 1:
      raise UserError(
        f"model.rope_scaling={self.rope_scaling!r} needs model.rope_original_positions, "
        "the context length of the original training."
      )
    for kind in self.layer_pattern:
      if kind not in LAYER_KINDS:
        raise UserError(f"model.layer_pattern: no kind {kind!r}. {did_you_mean(kind, LAYER_KINDS)}")
    if "nope" in self.layer_pattern and self.position != "rope":
      raise UserError(f"model.layer_pattern: 'nope' is of position='rope', not {self.position!r}.")
    if not self.layer_pattern or self.num_layers % len(self.layer_pattern):
      raise UserError(
        f"model.layer_pattern has {len(self.layer_pattern)} entries, which does not divide "
        f"model.num_layers={self.num_layers}."
      )
    if "local" in self.layer_pattern and self.window < 1:
      raise UserError(f"model.window={self.window}: a 'local' layer needs a window of at least 1.")
    self._check_architecture()
    for field in DROPOUTS:
      if not 0 <= getattr(self, field) < 1:
        raise UserError(f"model.{field}={getattr(self, field)} is not in [0, 1).")

  def _check_architecture(self) -> None:
    if self.residual != "sequential" and self.norm_placement != "pre":
      raise UserError(
        f"model.residual={self.residual!r} needs model.norm_placement='pre', "
        f"not {self.norm_placement!r}."
      )
    if self.visibility != "causal" and "local" in self.layer_pattern:
      raise UserError(f"model.visibility={self.visibility!r} has no 'local' layers.")
    if self.encoder_layers and self.visibility != "causal":
      raise UserError(
        f"model.visibility={self.visibility!r}: beside an encoder, the decoder is 'causal'."
      )
    if self.encoder_layers and self.num_experts:
      raise UserError("model.num_experts and model.encoder_layers are not known together.")
    if self.encoder_layers and self.num_labels:
      raise UserError("model.num_labels and model.encoder_layers are not known together.")
    if self.label_pooling == "pooler" and not self.pooler:
      raise UserError("model.label_pooling='pooler' needs model.pooler, which the model has not.")
    if self.next_sentence and not self.pooler:
      raise UserError("model.next_sentence needs model.pooler, which the model has not.")
    if self.norm_offset and self.norm != "rmsnorm":
      raise UserError("model.norm_offset is of model.norm='rmsnorm' alone.")
    if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
      raise UserError(
        f"model.experts_per_token={self.experts_per_token} is not from 1 to "
        f"model.num_experts={self.num_experts}."
      )
    for field in ("experts_per_token", "shared_expert_dim", "router_bias"):
      if getattr(self, field) and not self.num_experts:
        raise UserError(f"model.{field} without model.num_experts.")

  @classmethod
  def defaults(cls) -> dict[str, Any]:
    """Every key of `config.model` with its default; presets give the shape."""
    return {field.name: field.default for field in dataclasses.fields(cls)}

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> "ModelConfig":
    """Builds from `config.model`, refusing a key that no model knows."""
    known = cls.defaults()
    for key in config:
      if key not in known:
        raise UserError(f"model: no key {key!r}. {did_you_mean(key, known)}")
    return cls(**config)

  @property
  def architecture(self) -> dict[str, Any]:
    """The fields that decide what is computed in evaluation, each in one spelling."""
    values = dataclasses.asdict(self)
    for name in NOT_ARCHITECTURE:
      del values[name]
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
      *({name: getattr(one, name) for name in LABEL_HEAD} for one in (self, other))
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
    """How many times wider the model is than its base; 1 in the standard parametrization."""
    return 1.0 if self.parametrization == "standard" else self.embed_dim / self.base_embed_dim

  @property
  def depth_ratio(self) -> float:
    """How many times deeper the model is than its base; 1 unless in CompleteP."""
    return self.num_layers / self.base_num_layers if self.parametrization == "completep" else 1.0

  @property
  def hidden_std(self) -> float:
    """Initial standard deviation of the matrices inside layers."""
    return self.init_std / math.sqrt(self.width_ratio)

  @property
  def residual_std(self) -> float:
    """Initial standard deviation of projections onto the residual stream, two of them a layer."""
    if self.residual_init == "zero":
      return 0.0
    return self.hidden_std / math.sqrt(2 * self.num_layers / self.depth_ratio)

  @property
  def active_experts(self) -> float:
    """The share of the experts that a token goes through."""
    return self.experts_per_token / self.num_experts

  @property
  def has_dropout(self) -> bool:
    return any(getattr(self, field) for field in DROPOUTS)


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
  return [
    f"model.{name}={value!r}, not {theirs[name]!r}"
    for name, value in ours.items()
    if value != theirs[name]
  ]
