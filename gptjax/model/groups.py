"""The groups of fields of a model's config; each checks what it can check by itself."""

import dataclasses
from typing import Any, ClassVar, Literal, get_args, get_origin

from gptjax.errors import UserError, check_choice, check_number

# More layers or experts than any model has; a file that asks for more would exhaust the memory.
MOST = 10_000


Activation = Literal[
  *("gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "silu"),
  *("swiglu", "geglu", "swiglu_clamped"),
]


@dataclasses.dataclass(frozen=True)
class Group:
  """Base of the groups: numbers are finite, and a field of type `Literal` is one of its values."""

  # The key of the group in `config.model`.
  key: ClassVar[str]

  def __post_init__(self):
    check_fields(self, f"model.{self.key}.")


def check_fields(config: Any, prefix: str) -> None:
  """Raises UserError, naming the key, for an unknown choice or a negative or infinite number."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if get_origin(field.type) is Literal:
      check_choice(prefix + field.name, value, get_args(field.type))
    elif isinstance(value, int | float):
      check_number(prefix + field.name, value, at_least=0)


@dataclasses.dataclass(frozen=True)
class NormConfig(Group):
  """Norms of the residual stream.

  Attributes:
    kind: 'layernorm' (Ba et al. 2016) or 'rmsnorm' (Zhang and Sennrich 2019).
    placement: 'pre' (GPT-2); 'post', without a final norm (GPT-1, BERT); 'after' a branch, on its
      output alone (OLMo 2, arXiv:2501.00656, section 3.2); or 'both' 'pre' and 'after' (Gemma 2).
    eps: constant that is added to the variance before its root is taken.
    offset: constant that is added to the scale of RMSNorm (Gemma's is 1); the scale starts at
      1 - offset.
  """

  key = "norm"

  kind: Literal["layernorm", "rmsnorm"] = "layernorm"
  placement: Literal["pre", "post", "after", "both"] = "pre"
  eps: float = 1e-5
  offset: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    if self.offset and self.kind != "rmsnorm":
      raise UserError("model.norm.offset is of model.norm.kind='rmsnorm' alone.")


@dataclasses.dataclass(frozen=True)
class AttentionConfig(Group):
  """Attention of every layer, but for its heads, which are part of the shape.

  Attributes:
    scale: factor of QK^T (T5's is 1); 0 is 1 / sqrt(head_dim).
    soft_cap: c in c * tanh(x / c) of the attention logits (Gemma 2); 0 is off.
    sinks: a learnt logit per head that takes attention from the keys (gpt-oss).
    qk_norm: RMSNorm of queries and keys (Henry et al. 2020, Dehghani et al. 2023).
    qk_norm_per_head: whether each head has its own mean square, or all share one (OLMo 2).
    qkv_bias: biases of the query, key and value projections; None is the model's `bias`.
    out_bias: bias of the output projection; None is the model's `bias`.
    kernel: 'xla' (written out), 'splash' (TPU), 'cudnn' (NVIDIA), or 'auto', the platform's own
      where it supports the model.
  """

  key = "attention"

  scale: float = 0.0
  soft_cap: float = 0.0
  sinks: bool = False
  qk_norm: bool = False
  qk_norm_per_head: bool = True
  qkv_bias: bool | None = None
  out_bias: bool | None = None
  kernel: Literal["auto", "xla", "splash", "cudnn"] = "auto"


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig(Group):
  """The feed-forward network of every layer, but for its width, which is part of the shape.

  Attributes:
    activation: 'gelu' (exact), 'gelu_tanh' and 'quick_gelu', x sigmoid(1.702 x), which approximate
      it (Hendrycks and Gimpel 2016), 'relu', 'relu2' (So et al. 2021), 'silu', or the gated
      'swiglu' and 'geglu' (Shazeer 2020); 'swiglu_clamped' is the activation of gpt-oss (OpenAI
      2025): (up + 1) gate sigmoid(1.702 gate), gate and up bounded by 7.
    bias: biases of its projections; None is the model's `bias`.
  """

  key = "mlp"

  activation: Activation = "gelu_tanh"
  bias: bool | None = None


@dataclasses.dataclass(frozen=True)
class ExpertsConfig(Group):
  """A mixture of experts in the place of every feed-forward network (Shazeer et al. 2017,
  arXiv:1701.06538); no token is dropped.

  Attributes:
    count: number of experts, each of width `mlp_dim`; 0 is a dense network.
    per_token: number of experts that each token is sent to.
    shared_dim: width of an additional expert that every token goes through (Dai et al. 2024,
      arXiv:2401.06066); 0 is none.
    router_normalize: whether the weights of a token's experts add up to 1 (Mixtral), or are its
      probabilities among all experts (Switch, Fedus et al. 2022).
    router_bias: a bias of the router's logits.
  """

  key = "experts"

  count: int = 0
  per_token: int = 0
  shared_dim: int = 0
  router_normalize: bool = True
  router_bias: bool = False

  def __post_init__(self):
    super().__post_init__()
    check_number("model.experts.count", self.count, at_least=0, at_most=MOST)
    if self.count and not 1 <= self.per_token <= self.count:
      raise UserError(
        f"model.experts.per_token={self.per_token} is not from 1 to "
        f"model.experts.count={self.count}."
      )
    for field in ("per_token", "shared_dim", "router_bias"):
      if getattr(self, field) and not self.count:
        raise UserError(f"model.experts.{field} without model.experts.count.")

  @property
  def active(self) -> float:
    """The share of the experts that a token goes through."""
    return self.per_token / self.count


@dataclasses.dataclass(frozen=True)
class PositionConfig(Group):
  """How the model knows the order of tokens.

  Attributes:
    kind: 'learned' (GPT-1 to 3), 'rope' (Su et al. 2021), 'alibi' (Press et al. 2022), 't5' (the
      learnt B in QK^T + B of Raffel et al. 2020, one table for all layers), or 'none'.
    max_positions: rows of the learned table, which bound the length of a text; in other kinds the
      length that the model was made for.
    offset: rows of the learned table before the row of position 0 (RoBERTa has 2).
    t5_buckets: number of distance buckets of 't5'.
    t5_max_distance: distance from which all keys share the last bucket of 't5'.
  """

  key = "position"

  kind: Literal["learned", "rope", "alibi", "t5", "none"] = "learned"
  max_positions: int = 1024
  offset: int = 0
  t5_buckets: int = 32
  t5_max_distance: int = 128

  @property
  def room(self) -> int:
    """The number of positions that a text may have."""
    return self.max_positions - self.offset


@dataclasses.dataclass(frozen=True)
class RopeConfig(Group):
  """Rotary positions, for position.kind='rope'.

  Attributes:
    base: the base of the wavelengths.
    local_base: the base in 'local' layers, without scaling (Gemma 3); 0 is like other layers.
    dim: how many dimensions of a head are rotated, the first ones (GPT-J); 0 is all.
    scaling: 'none', 'linear' (Chen et al. 2023), 'dynamic' (NTK-aware, by the length of each row)
      and 'yarn' (both Peng et al. 2023) or 'llama3' (Grattafiori et al. 2024).
    factor: how many times longer the context becomes by `scaling`.
    original_positions: length of the context before `scaling`.
    low_freq_factor: 'yarn' and 'llama3' interpolate dimensions with fewer turns than this over the
      original positions; 0 is the method's default.
    high_freq_factor: they keep dimensions with more turns than this; 0 is the method's default.
    truncate: whether 'yarn' rounds these bounds to whole dimensions (gpt-oss does not).
    attention_factor: the factor of rotated queries and keys in 'yarn'; 0 is the paper's.
  """

  key = "rope"

  base: float = 10_000.0
  local_base: float = 0.0
  dim: int = 0
  scaling: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none"
  factor: float = 1.0
  original_positions: int = 0
  low_freq_factor: float = 0.0
  high_freq_factor: float = 0.0
  truncate: bool = True
  attention_factor: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    if self.scaling in ("dynamic", "yarn", "llama3") and self.original_positions < 1:
      raise UserError(
        f"model.rope.scaling={self.scaling!r} needs model.rope.original_positions, the context "
        "length of the original training."
      )


@dataclasses.dataclass(frozen=True)
class EmbedConfig(Group):
  """What is done to embeddings before the first layer.

  Attributes:
    scale: factor of token embeddings (Gemma's is the root of the width).
    norm: a norm of the embeddings (BERT).
    token_types: rows of the table of token types (BERT's segments A and B); 0 is no table.
  """

  key = "embed"

  scale: float = 1.0
  norm: bool = False
  token_types: int = 0


@dataclasses.dataclass(frozen=True)
class ResidualConfig(Group):
  """How branches and layers are joined.

  Attributes:
    kind: 'sequential' is attention, then the feed-forward network. In parallel both read the same
      input, each with its own norm ('parallel', GPT-NeoX) or with one ('parallel_one_norm', GPT-J).
    scale: factor of each branch's contribution to the residual stream (Granite).
    values: a learnt mixture of each layer's values with the first layer's (Zhou et al. 2024,
      arXiv:2410.17897, learnable variant).
    embedding: each layer starts from a learnt mixture of its input with the embedding of the token
      (the skip of modded-nanogpt's records).
  """

  key = "residual"

  kind: Literal["sequential", "parallel", "parallel_one_norm"] = "sequential"
  scale: float = 1.0
  values: bool = False
  embedding: bool = False


@dataclasses.dataclass(frozen=True)
class HeadConfig(Group):
  """From the last hidden states to logits of the vocabulary, and BERT's heads beside them.

  Attributes:
    tied: the output projection is the embedding (Press and Wolf 2017).
    bias: a bias of the logits (GPT-J, BERT).
    transform: projection, activation and norm before the output projection (BERT).
    scale: factor of the final hidden states (T5's is 1 / sqrt(width), for its tied head).
    soft_cap: c in c * tanh(x / c) of the logits (Gemma 2); 0 is off.
    pooler: a projection of a row's first token, followed by an activation (BERT).
    pooler_activation: 'tanh' (BERT, RoBERTa), 'relu' (DistilBERT) or 'gelu' (ELECTRA).
    next_sentence: two scores of the pooler's output: does the second sentence follow the first
      (Devlin et al. 2019, section 3.1, task 2)?
  """

  key = "head"

  tied: bool = True
  bias: bool = False
  transform: bool = False
  scale: float = 1.0
  soft_cap: float = 0.0
  pooler: bool = False
  pooler_activation: Literal["tanh", "relu", "gelu"] = "tanh"
  next_sentence: bool = False

  def __post_init__(self):
    super().__post_init__()
    if self.next_sentence and not self.pooler:
      raise UserError("model.head.next_sentence needs model.head.pooler, which the model has not.")


@dataclasses.dataclass(frozen=True)
class LabelHeadConfig(Group):
  """A head that scores labels, in place of logits of the vocabulary.

  Attributes:
    num_labels: scores that it gives each token; 0 is a language model.
    pooling: its input: the token's hidden state ('none'), the mean over its segment ('mean'), or
      the pooler's output ('pooler', as BERT and RoBERTa classify texts).
    bias: whether the scores have a bias. Decoders of `transformers` classify texts without.
  """

  key = "label_head"

  num_labels: int = 0
  pooling: Literal["none", "mean", "pooler"] = "none"
  bias: bool = True


@dataclasses.dataclass(frozen=True)
class DropoutConfig(Group):
  """Dropout rates while training.

  Attributes:
    embed: rate of the embeddings.
    attention: rate of the attention weights.
    residual: rate of each branch's output.
    label: rate of the input of the label head.
  """

  key = "dropout"

  embed: float = 0.0
  attention: float = 0.0
  residual: float = 0.0
  label: float = 0.0

  def __post_init__(self):
    for name, rate in vars(self).items():
      check_number(f"model.dropout.{name}", rate, at_least=0, below=1)

  def __bool__(self) -> bool:
    """Whether anything is dropped."""
    return any(vars(self).values())


@dataclasses.dataclass(frozen=True)
class InitConfig(Group):
  """Initial values of the parameters.

  Attributes:
    std: standard deviation of the normal initialisation.
    residual: projections onto the residual stream start 'scaled' by 1 / sqrt(2 * num_layers)
      (Radford et al. 2019, section 2.3), or at 'zero'.
  """

  key = "init"

  std: float = 0.02
  residual: Literal["scaled", "zero"] = "scaled"


@dataclasses.dataclass(frozen=True)
class TransferConfig(Group):
  """Transfer of hyper-parameters from a small model to a large one. The optimizer's side is in
  `gptjax.optim.transfer`. Wider models have more heads, not wider ones.

  Attributes:
    parametrization: 'standard' (none); 'mup', across widths (Yang et al. 2022, arXiv:2203.03466,
      table 8); 'completep', across widths and depths (Dey et al. 2025, arXiv:2505.01618, table 1).
    base_embed_dim: width of the small model, at which all parametrizations are equal.
    base_num_layers: its depth.
  """

  key = "transfer"

  parametrization: Literal["standard", "mup", "completep"] = "standard"
  base_embed_dim: int = 0
  base_num_layers: int = 0

  def __post_init__(self):
    super().__post_init__()
    needed = {"mup": ("base_embed_dim",), "completep": ("base_embed_dim", "base_num_layers")}
    for field in needed.get(self.parametrization, ()):
      if getattr(self, field) < 1:
        raise UserError(
          f"model.transfer.parametrization={self.parametrization!r} needs model.transfer.{field}, "
          "that of the small model whose learning rate is to be used."
        )


@dataclasses.dataclass(frozen=True)
class ExecutionConfig(Group):
  """How the computation is compiled, which changes no result.

  Attributes:
    scan_layers: one compiled layer scanned over the stack, or a compiled copy of each layer. None
      chooses: copies on CPU, where a scan is slower, and a scan elsewhere.
    remat: activations that are kept for the backward pass, which recomputes the others: all
      ('none'), a layer's input ('full'), also attention's result ('save_attention'), also its
      projections ('save_qkv'), also the wide activations of the feed-forward network ('dots'; in
      the host's memory: 'offload').
  """

  key = "execution"

  scan_layers: bool | None = None
  remat: Literal["none", "full", "save_attention", "save_qkv", "dots", "offload"] = "none"
