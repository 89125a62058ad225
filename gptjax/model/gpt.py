"""The model: a Transformer of any generation, by configuration.

Axes: B batch, T query positions, S key positions, D width, V vocabulary, L layers.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.devices.sharding import constrain
from gptjax.errors import UserError
from gptjax.model.attention import same_segment
from gptjax.model.block import make_norm
from gptjax.model.config import ModelConfig
from gptjax.model.feedforward import ACTIVATIONS, activate
from gptjax.model.layers import Embedding, LayerNorm, Linear, dropout, soft_cap
from gptjax.model.stack import Cache, Encoded, Stack
from gptjax.model.stats import ActivationStats, RouterStats

# The parameters that a model with a label head has and a language model has not.
LABEL_HEAD = ("label_head/kernel", "label_head/bias")
POOLER_ACTIVATIONS = ACTIVATIONS | {"tanh": jnp.tanh}


class HeadTransform(nnx.Module):
  """norm(act(x W + b)), between the last layer and the logits of BERT. [B, T, D] -> [B, T, D]."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.linear = _square(config, rngs)
    self.norm = LayerNorm(config.embed_dim, eps=config.norm.eps, bias=True)
    self.activation = config.mlp.activation

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    return self.norm(activate(self.activation, self.linear(x_BTD)))


class GPT(Stack):
  """Tokens in, logits or scores of labels out. Parameters are float32, layers stacked [L, ...]."""

  second = None  # A frozen model beside this one, where a task needs it (`Task.second_model`).

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    D, V, std = config.embed_dim, config.vocab_size, config.init.std

    def table(rows: int, axis: str) -> Embedding:
      return Embedding(rows, D, axes=(axis, "embed"), std=std, rngs=rngs)

    self.embed = table(V, "vocab")
    is_learned = config.position.kind == "learned"
    self.position = table(config.position.max_positions, "positions") if is_learned else None
    self.token_type = table(config.embed.token_types, "types") if config.embed.token_types else None
    self.embed_norm = make_norm(config) if config.embed.norm else None
    super().__init__(config, rngs)
    self.encoder = Stack(config.encoder, rngs) if config.encoder_layers else None
    K = config.label_head.num_labels

    def head(size: int, axis: str, bias: bool, dtype: str) -> Linear:
      axes = ("embed", axis)
      options = {"bias": bias, "std": std, "dtype": dtype, "role": "head"}
      return Linear((D,), (size,), axes=axes, rngs=rngs, **options)

    self.head_transform = HeadTransform(config, rngs) if config.head.transform and not K else None
    self.head = None if config.head.tied or K else head(V, "vocab", False, config.dtype)
    has_bias = config.head.bias and not K
    self.head_bias = nnx.Param(jnp.zeros(V), axes=("vocab",), role="bias") if has_bias else None
    self.pooler = _square(config, rngs) if config.head.pooler else None
    next_sentence = config.head.next_sentence and not K
    self.next_sentence = head(2, "labels", True, "float32") if next_sentence else None
    self.label_head = head(K, "labels", config.label_head.bias, "float32") if K else None

  def __call__(self, tokens_BT: jax.Array, **kwargs) -> jax.Array:
    """Logits [B, T, V], float32, of the token after each position, or of the token itself in a
    bidirectional model; arguments as for `hidden`."""
    x_BTD, _ = self.hidden(tokens_BT, **kwargs)
    return self.logits(x_BTD)

  def hidden(
    self,
    tokens_BT: jax.Array,
    *,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    prefix_BS: jax.Array | None = None,
    token_types_BT: jax.Array | None = None,
    encoded: Encoded | None = None,
    cache: Cache | None = None,
    key: jax.Array | None = None,
    stats: ActivationStats | None = None,
    router_stats: RouterStats | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Runs all but the output projection.

    Args:
      tokens_BT: int32 token ids.
      positions_BT: int32 position of each token in its segment, in steps of 1; None counts from 0.
      segment_ids_BT: int32; tokens see only tokens of an equal id. None is one segment a row.
        Experts take id 0 for padding.
      prefix_BS: int32, not 0 for keys that all see, in a 'prefix' model; None is no prefix.
      token_types_BT: int32; None is type 0.
      encoded: from `encode`, in a model with an encoder.
      cache: keys and values of earlier positions, from `empty_cache`.
      key: randomness of dropout; None for no dropout.
      stats: receives the stats of `Block`, with a leading axis L, in a call without a cache.
      router_stats: receives those of a mixture of experts, in the same way.

    Returns:
      Hidden states [B, T, D] in the compute dtype, and the cache with these tokens in it.

    Raises:
      UserError: the row or the cache is longer than the learned position table, the model has an
        encoder and `encoded` is missing, or the model sees the future and is given a cache.
    """
    config = self.config
    if (encoded is None) != (self.encoder is None):
      needs = "has no encoder" if self.encoder is None else "reads what `encode` returns"
      raise UserError(f"encoded={encoded}: the model {needs}.")
    if cache is not None and config.visibility == "bidirectional":
      raise UserError("model.visibility='bidirectional': the model cannot write token by token.")
    keys = (None, None) if key is None else jax.random.split(key)
    length = None if cache is None else cache[0].length
    x_BTD = self.embedded(tokens_BT, positions_BT, token_types_BT, keys[0], length)
    if positions_BT is None:
      positions_BT = _count(tokens_BT)
    return self.run(
      x_BTD,
      positions_BT,
      segment_ids_BT=segment_ids_BT,
      prefix_BS=prefix_BS,
      encoded=encoded,
      cache=cache,
      key=keys[1],
      stats=stats,
      router_stats=router_stats,
    )

  def encode(
    self,
    tokens_BS: jax.Array,
    *,
    positions_BS: jax.Array | None = None,
    segment_ids_BS: jax.Array | None = None,
    key: jax.Array | None = None,
    for_decoding: bool = False,
  ) -> Encoded:
    """Runs the encoder; arguments as for `hidden`. `for_decoding` also makes the keys and values of
    each layer of the decoder, which do not change from token to token."""
    keys = (None, None) if key is None else jax.random.split(key)
    x_BSD = self.embedded(tokens_BS, positions_BS, key=keys[0])
    if positions_BS is None:
      positions_BS = _count(tokens_BS)
    hidden_BSD, _ = self.encoder.run(
      x_BSD, positions_BS, segment_ids_BT=segment_ids_BS, key=keys[1]
    )
    pairs = None
    if for_decoding:
      pairs = [block.cross_attention.keys_and_values(hidden_BSD) for block in self.layers()]
    return Encoded(hidden_BSD, segment_ids_BS, pairs)

  def embedded(
    self, tokens_BT, positions_BT=None, token_types_BT=None, key=None, length=None
  ) -> jax.Array:
    """What the first layer reads, [B, T, D] in the compute dtype; arguments as for `hidden`, and
    the cache's `length`."""
    config = self.config
    if positions_BT is None:
      positions_BT = _count(tokens_BT)
    x_BTD = self.embed(tokens_BT)
    if config.embed.scale != 1:
      x_BTD = x_BTD * config.embed.scale
    if self.position is not None:
      if (length := length or tokens_BT.shape[1]) > config.position.room:
        raise UserError(
          f"{length} positions do not fit the {config.position.room} learned positions of the "
          "model: shorten the text, set model.position.max_positions and train anew, or use rope."
        )
      x_BTD += self.position(positions_BT + config.position.offset)
    if self.token_type is not None:
      types_BT = jnp.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT
      x_BTD += self.token_type(types_BT)
    if self.embed_norm is not None:
      x_BTD = self.embed_norm(x_BTD)
    x_BTD = dropout(x_BTD, config.dropout.embed, key)
    return constrain(x_BTD.astype(config.dtype), "batch", "residual_time", None)

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """Hidden states [B, T, D] -> logits [B, T, V], float32; UserError in a model of labels."""
    if self.label_head is not None:
      raise UserError(
        f"the model scores {self.config.label_head.num_labels} labels "
        "(model.label_head.num_labels) and writes no text."
      )
    x_BTD = self.features(x_BTD)
    logits_BTV = self.head(x_BTD) if self.head is not None else self.embed.scores(x_BTD)
    logits_BTV = logits_BTV.astype(jnp.float32)
    if self.head_bias is not None:
      logits_BTV += self.head_bias[...].reshape(1, 1, -1)
    return soft_cap(logits_BTV, self.config.head.soft_cap)

  def features(self, x_BTD: jax.Array) -> jax.Array:
    """Hidden states [B, T, D] -> input of the output projection [B, T, D]."""
    if self.head_transform is not None:
      x_BTD = self.head_transform(x_BTD)
    scale = self.config.head.scale / self.config.width_ratio
    return x_BTD if scale == 1 else x_BTD * scale

  def output_kernel(self) -> tuple[jax.Array, tuple[str, str]]:
    """The matrix from features to logits, float32, and its logical axes."""
    if self.head is None:
      return self.embed.embedding[...], ("vocab", "embed")
    return self.head.kernel[...], ("embed", "vocab")

  def label_logits(
    self,
    x_BTD: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """Hidden states [B, T, D] -> scores of the labels at each token [B, T, K], float32.

    With label_pooling='mean' all tokens of a segment have the scores of their mean; with 'pooler'
    the scores are computed from `pooled`. `key` is the randomness of dropout.
    """
    if self.config.label_head.pooling == "pooler":
      x_BTD = self.pooled(x_BTD)
    x_BTD = x_BTD.astype(jnp.float32)
    if self.config.label_head.pooling == "mean":
      if segment_ids_BT is None:
        segment_ids_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
      same_BTS = same_segment(segment_ids_BT, segment_ids_BT).astype(jnp.float32)
      x_BTD = (same_BTS @ x_BTD) / same_BTS.sum(-1, keepdims=True)
    # Divided like the logits: the output's side of muP.
    x_BTD = x_BTD / self.config.width_ratio
    return self.label_head(dropout(x_BTD, self.config.dropout.label, key))

  def pooled(self, x_BTD: jax.Array) -> jax.Array:
    """act(x W + b) of each token [B, T, D]; BERT reads the first (Devlin et al. 2019, sec. 4.1)."""
    return POOLER_ACTIVATIONS[self.config.head.pooler_activation](self.pooler(x_BTD))


def _square(config: ModelConfig, rngs: nnx.Rngs) -> Linear:
  D, std = config.embed_dim, config.init.std
  options = {"bias": True, "std": std, "dtype": config.dtype, "role": "head"}
  return Linear((D,), (D,), axes=("embed", None), rngs=rngs, **options)


def _count(tokens_BT: jax.Array) -> jax.Array:
  return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)


@dataclasses.dataclass(frozen=True)
class ParameterInfo:
  """Description of a parameter without its values.

  Attributes:
    role: the kind of parameter, one of `layers.ROLES`.
    axes: logical name of each axis, 'layers' first in a stack, then 'experts'.
    fan_in_axes: the axes that a projection's kernel contracts; None for other parameters.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  fan_in_axes: tuple[int, ...] | None
  role: str

  @property
  def fan_in(self) -> int:
    return math.prod(self.shape[axis] for axis in self.fan_in_axes or ())

  @property
  def fan_out_axes(self) -> tuple[int, ...]:
    inputs = self.fan_in_axes or ()
    stacks = ("layers", "experts")
    return tuple(i for i, axis in enumerate(self.axes) if axis not in stacks and i not in inputs)

  @property
  def fan_out(self) -> int:
    return math.prod(self.shape[axis] for axis in self.fan_out_axes)


def abstract_model(config: ModelConfig) -> GPT:
  """The model with shapes in the place of arrays; nothing is allocated."""
  return nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0)))


def model_graph(config: ModelConfig) -> nnx.GraphDef:
  """The static part of a model: `nnx.merge(model_graph(config), params)` is the model."""
  return nnx.graphdef(abstract_model(config))


def describe_parameters(config: ModelConfig) -> dict[str, ParameterInfo]:
  """Name, shape and axes of every parameter; nothing is allocated."""
  return describe(abstract_model(config))


def describe(model: GPT, kind: type = nnx.Param) -> dict[str, ParameterInfo]:
  """Describes the parameters of one kind (a class of variables) in a model."""
  described = {}
  for path, parameter in nnx.to_flat_state(nnx.state(model, kind)):
    shape, axes = parameter.shape, parameter.axes
    stacked = len(shape) - len(axes)
    inputs = getattr(parameter, "fan_in_axes", None)
    first = stacked + (axes[:1] == ("experts",))
    described["/".join(map(str, path))] = ParameterInfo(
      shape=shape,
      axes=("layers",) * stacked + axes,
      fan_in_axes=None if inputs is None else tuple(first + i for i in range(inputs)),
      role=parameter.role,
    )
  return described


def is_plain(model: GPT) -> bool:
  """Whether the parameters of a model are those of its config, and not those of adapters too, of
  several models, or stored in another way."""
  return set(describe(model)) == set(describe_parameters(model.config))


def count_parameters(config: ModelConfig) -> int:
  """The exact number of parameters; nothing is allocated."""
  return sum(math.prod(info.shape) for info in describe_parameters(config).values())
