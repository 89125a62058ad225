"""Attention: masks, grouped heads, the key-value cache.

Axes: B batch, T query positions, S key positions, D width, N query heads, K key-value heads,
G query heads of one key-value head, H head width.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gptjax.devices import sharding
from gptjax.devices.sharding import constrain
from gptjax.errors import UserError
from gptjax.model import kernels
from gptjax.model.config import ModelConfig
from gptjax.model.kernels import LANES
from gptjax.model.layers import Linear, Mix, RMSNorm, dropout, soft_cap
from gptjax.model.positions import rotate
from gptjax.model.stats import ActivationStats

# Far below any logit, and finite: a row with nothing to see becomes uniform instead of NaN.
MASKED = -1e30

# Queries whose logits are held at a time, at most, where those of a row would not fit: those that
# are only looked at, and those that are attended with.
MAX_OBSERVED, MAX_ATTENDED = 1024, 128


def visible(
  query_positions_BT: jax.Array,
  key_positions_BS: jax.Array,
  window: int | None = None,
  query_segments_BT: jax.Array | None = None,
  key_segments_BS: jax.Array | None = None,
  *,
  visibility: str = "causal",
  prefix_BS: jax.Array | None = None,
) -> jax.Array:
  """Returns which keys a query may see: bool [B, T, S].

  A query sees its own segment of a packed row only. Within it: the past and itself, no further back
  than `window` positions (its own included); all keys if `visibility` is 'bidirectional'; or the
  past and the prefix, the keys where `prefix_BS` is not 0.
  """
  distance_BTS = query_positions_BT[:, :, None] - key_positions_BS[:, None, :]
  mask_BTS = distance_BTS >= 0
  if visibility == "bidirectional":
    mask_BTS = jnp.ones_like(mask_BTS)
  elif visibility == "prefix" and prefix_BS is not None:
    mask_BTS |= prefix_BS[:, None, :] > 0
  if window is not None:
    mask_BTS &= distance_BTS < window
  if query_segments_BT is not None:
    mask_BTS &= same_segment(query_segments_BT, key_segments_BS)
  return mask_BTS


def same_segment(query_segments_BT: jax.Array, key_segments_BS: jax.Array) -> jax.Array:
  """Whether a query and a key are in the same segment: bool [B, T, S]."""
  return query_segments_BT[:, :, None] == key_segments_BS[:, None, :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
  """An attention mask in the form that its kernel takes.

  Attributes:
    kernel: 'xla', 'splash' or 'cudnn'.
    window: see `visible`.
    visibility: see `visible`.
    segment_ids_BT: for a kernel that computes the mask itself.
    visible_BTS: the mask for other kernels.
    rotates: whether the layer has the model's rotary positions.
    query_positions_BT: positions of queries, for kernels in parts and adapters with more keys.
  """

  kernel: str = dataclasses.field(metadata={"static": True})
  window: int | None = dataclasses.field(default=None, metadata={"static": True})
  visibility: str = dataclasses.field(default="causal", metadata={"static": True})
  segment_ids_BT: jax.Array | None = None
  visible_BTS: jax.Array | None = None
  rotates: bool = dataclasses.field(default=True, metadata={"static": True})
  query_positions_BT: jax.Array | None = None


class LayerCache(Protocol):
  """Keys and values of one layer for the tokens of earlier calls, whatever the way they are kept.

  length: positions of a row that there is room for, S.
  """

  @property
  def length(self) -> int: ...

  def write(
    self, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array
  ) -> tuple[Self, "KeysAndValues"]:
    """Returns the cache with new keys and values in it, and all of a row's, by position."""
    ...


class KeysAndValues(NamedTuple):
  """Keys and values of one layer, each [B, S, K, H]; as a cache, position p lives in slot p."""

  keys_BSKH: jax.Array
  values_BSKH: jax.Array

  @property
  def length(self) -> int:
    return self.keys_BSKH.shape[1]

  def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array):
    rows = jnp.arange(k_BTKH.shape[0])[:, None]
    keys_BSKH = self.keys_BSKH.at[rows, positions_BT].set(k_BTKH, mode="drop")
    values_BSKH = self.values_BSKH.at[rows, positions_BT].set(v_BTKH, mode="drop")
    written = KeysAndValues(keys_BSKH, values_BSKH)
    return written, written


def make_mask(
  kernel: str,
  query_positions_BT: jax.Array,
  key_positions_BS: jax.Array,
  window: int | None,
  segment_ids_BT: jax.Array | None,
  *,
  visibility: str = "causal",
  prefix_BS: jax.Array | None = None,
  rotates: bool = True,
) -> Mask:
  """Makes the mask for one kernel; arguments as in `visible` and `Mask`."""
  make = functools.partial(
    Mask, kernel, window, visibility, rotates=rotates, query_positions_BT=query_positions_BT
  )
  if kernel != "xla":
    return make(segment_ids_BT=segment_ids_BT)
  seen = visible(
    query_positions_BT,
    key_positions_BS,
    window,
    segment_ids_BT,
    segment_ids_BT,
    visibility=visibility,
    prefix_BS=prefix_BS,
  )
  return make(visible_BTS=seen)


def choose_kernel(config: ModelConfig, length: int, *, cached: bool, training: bool) -> str:
  """The kernel to use: `config.attention.kernel`; for 'auto', the platform's own where it can.

  Args:
    length: positions of a row, T.
    cached: whether earlier keys come from a cache, whose slots need not follow their positions.
    training: whether there is dropout.

  Raises:
    UserError: the config asks for a kernel that cannot do the job.
  """
  if cached:
    return "xla"
  common = [
    (training and config.dropout.attention > 0, "attention dropout"),
    (config.position.kind in ("alibi", "t5"), f"position.kind={config.position.kind!r}, a bias"),
    (config.attention.sinks, "attention.sinks"),
    (config.visibility == "prefix", "visibility='prefix'"),
  ]
  spans = LANES * sharding.axis_parts("time")
  obstacles = {
    "xla": [],
    "splash": [
      *common,
      (length % spans, f"a row of {length}: not a multiple of {spans}"),
    ],
    "cudnn": [
      *common,
      (config.attention.soft_cap, "attention.soft_cap"),
      (config.dtype != "bfloat16", f"dtype={config.dtype!r}: it needs bfloat16"),
      (config.head_dim % 8, f"head_dim={config.head_dim}: not a multiple of 8"),
      (length % 2, f"a row of {length}: odd"),
    ],
  }

  def obstacle(kernel: str) -> str | None:
    return next((reason for holds, reason in obstacles[kernel] if holds), None)

  if config.attention.kernel == "auto":
    own = {"tpu": "splash", "gpu": "cudnn"}.get(sharding.platform(), "xla")
    return "xla" if obstacle(own) else own
  if reason := obstacle(config.attention.kernel):
    raise UserError(
      f"model.attention.kernel={config.attention.kernel!r} cannot do {reason}. "
      "Set model.attention.kernel=xla."
    )
  return config.attention.kernel


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: Mask,
  *,
  scale: float | None = None,
  bias_BNTS: jax.Array | None = None,
  cap: float = 0.0,
  sinks_N: jax.Array | None = None,
  dropout_rate: float = 0.0,
  key: jax.Array | None = None,
) -> jax.Array:
  """softmax(scale QK^T + bias) V over visible keys (Vaswani et al. 2017, eq. 1).

  Shapes: q [B, T, N, H], k and v [B, S, K, H] with N a multiple of K -> [B, T, N, H]. The scale is
  1 / sqrt(H) if it is None. The softmax is float32; the products have the dtype of q. `sinks_N` is
  the logit of one more key per head, whose value is 0. Only the 'xla' kernel has bias, sinks and
  dropout, and 'cudnn' has no cap; `choose_kernel` sees to that.
  """
  scale = 1 / math.sqrt(q_BTNH.shape[-1]) if scale is None else scale
  options = {"window": mask.window, "causal": mask.visibility == "causal"}
  match mask.kernel:
    case "splash":
      segments = mask.segment_ids_BT
      return kernels.splash(q_BTNH * scale, k_BSKH, v_BSKH, segments, cap=cap, **options)
    case "cudnn":
      rows = (mask.query_positions_BT, mask.segment_ids_BT)
      in_parts = functools.partial(_attend_in_parts, mask, scale)
      heads = (q_BTNH, k_BSKH, v_BSKH)
      return kernels.cudnn(*heads, *rows, scale=scale, in_parts=in_parts, **options)
  q_BTNH, k_BSKH, v_BSKH = checkpoint_name((q_BTNH, k_BSKH, v_BSKH), "qkv")
  logits = _visible_logits(q_BTNH * scale, k_BSKH, mask.visible_BTS, bias_BNTS, cap)
  if sinks_N is None:
    weights = jax.nn.softmax(logits, axis=-1)
  else:
    sinks = jnp.broadcast_to(
      sinks_N.astype(jnp.float32).reshape(1, *logits.shape[1:3], 1, 1), (*logits.shape[:-1], 1)
    )
    weights = jax.nn.softmax(jnp.concatenate([logits, sinks], axis=-1), axis=-1)[..., :-1]
  weights = dropout(weights.astype(q_BTNH.dtype), dropout_rate, key, time_axes=(3, 4))
  attended = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(q_BTNH.shape)
  return checkpoint_name(attended, "attention")


def _attend_in_parts(
  mask: Mask,
  scale: float,
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  query_positions_BT: jax.Array,
  key_positions_BS: jax.Array,
  query_segments_BT: jax.Array | None = None,
  key_segments_BS: jax.Array | None = None,
) -> jax.Array:
  """Attends in plain JAX, some queries at a time; the backward pass recomputes their logits."""

  @jax.checkpoint
  def of_queries(queries):
    q_BTNH, positions_BT, segments_BT = queries
    seen = visible(
      positions_BT,
      key_positions_BS,
      mask.window,
      segments_BT,
      key_segments_BS,
      visibility=mask.visibility,
    )
    part = dataclasses.replace(mask, kernel="xla", visible_BTS=seen)
    return attend(q_BTNH, k_BSKH, v_BSKH, part, scale=scale)

  parts = _query_parts((q_BTNH, query_positions_BT, query_segments_BT), MAX_ATTENDED)
  attended = jax.lax.map(of_queries, parts)
  return attended.swapaxes(0, 1).reshape(q_BTNH.shape)


def _query_parts(queries: Any, most: int) -> Any:
  """Splits each [B, T, ...] of a tree to [parts, B, T / parts, ...], T / parts at most `most`."""
  T = jax.tree.leaves(queries)[0].shape[1]
  parts = next(n for n in range(1, T + 1) if T % n == 0 and T // n <= most)
  return jax.tree.map(
    lambda x: x.reshape(x.shape[0], parts, T // parts, *x.shape[2:]).swapaxes(0, 1), queries
  )


def _visible_logits(scaled_q_BTNH, k_BSKH, visible_BTS, bias_BNTS, cap: float) -> jax.Array:
  """Attention logits, the softmax's input: float32 [B, K, G, T, S], `MASKED` where not visible."""
  B, T, N, H = scaled_q_BTNH.shape
  K = k_BSKH.shape[2]
  q_BTKGH = scaled_q_BTNH.reshape(B, T, K, N // K, H)
  logits = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH).astype(jnp.float32)
  logits = soft_cap(logits, cap)
  if bias_BNTS is not None:
    logits += bias_BNTS.reshape(logits.shape[:3] + bias_BNTS.shape[2:])
  return jnp.where(visible_BTS[:, None, None], logits, MASKED)


def largest_logit(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  mask: Mask,
  positions_BT: jax.Array,
  *,
  scale: float | None = None,
  bias_BNTS: jax.Array | None = None,
  cap: float = 0.0,
) -> jax.Array:
  """The largest logit of a query and a visible key, for any kernel: a float32 scalar, no gradient.

  The logits are those of `attend`, computed for some queries at a time, so that rows fit which only
  a flash kernel can hold at once. Keys and queries have the same positions.
  """
  q_BTNH, k_BSKH, bias_BNTS = jax.lax.stop_gradient((q_BTNH, k_BSKH, bias_BNTS))
  scale = 1 / math.sqrt(q_BTNH.shape[-1]) if scale is None else scale

  def of_queries(queries):
    q_BTNH, q_positions_BT, q_segments_BT, visible_BTS, bias_BTNS = queries
    if visible_BTS is None:
      segments = (q_segments_BT, mask.segment_ids_BT)
      visible_BTS = visible(
        q_positions_BT, positions_BT, mask.window, *segments, visibility=mask.visibility
      )
    bias_BNTS = None if bias_BTNS is None else bias_BTNS.swapaxes(1, 2)
    return _visible_logits(q_BTNH * scale, k_BSKH, visible_BTS, bias_BNTS, cap).max()

  bias_BTNS = None if bias_BNTS is None else bias_BNTS.swapaxes(1, 2)
  queries = (q_BTNH, positions_BT, mask.segment_ids_BT, mask.visible_BTS, bias_BTNS)
  return jax.lax.map(of_queries, _query_parts(queries, MAX_OBSERVED)).max()


class Attention(nnx.Module):
  """Multi-head attention, with keys and values shared by groups of heads if configured so.

  Shapes: [B, T, D] -> [B, T, D]. Calling it is self-attention; `keys_and_values` and `cross` are
  attention to an encoder's output, without positions.
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, cross: bool = False):
    self.config = config
    D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    shared = {"dtype": config.dtype, "rngs": rngs}

    def project(heads: int, axis: str) -> Linear:
      axes = ("embed", axis, "head_dim")
      std = config.hidden_std
      return Linear((D,), (heads, H), axes=axes, bias=config.attention.qkv_bias, std=std, **shared)

    self.query = project(N, "heads")
    self.key = project(K, "kv_heads")
    self.value = project(K, "kv_heads")
    self.out = Linear(
      (N, H),
      (D,),
      axes=("heads", "head_dim", "embed"),
      bias=config.attention.out_bias,
      std=config.residual_std,
      **shared,
    )

    def norm(heads: int) -> RMSNorm | None:
      width = H if config.attention.qk_norm_per_head else heads * H
      options = {"eps": config.norm.eps, "offset": config.norm.offset, "axis": "head_dim"}
      return RMSNorm(width, **options) if config.attention.qk_norm else None

    self.query_norm, self.key_norm = norm(N), norm(K)
    self.sinks = (
      nnx.Param(jnp.zeros(N), axes=("heads",), role="scalar") if config.attention.sinks else None
    )
    self.value_mix = Mix(0.5, 0.5) if config.residual.values and not cross else None

  def __call__(
    self,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    mask: Mask,
    bias_BNTS: jax.Array | None = None,
    *,
    first_values_BTKH: jax.Array | None = None,
    cache: LayerCache | None = None,
    key: jax.Array | None = None,
    stats: ActivationStats | None = None,
  ) -> tuple[jax.Array, LayerCache | None]:
    """Returns the output and the cache with this call's keys and values written into it.

    Without a cache, x gives all the keys and S = T. `first_values_BTKH` are the first layer's
    values, for `value_residual`. Without a cache, `stats` receives `largest_logit`.
    """
    config = self.config
    x_BTD = constrain(x_BTD, "batch", "time", None)
    q_BTNH = self._queries(x_BTD)
    k_BSKH, v_BSKH = self.keys_and_values(x_BTD)
    if config.position.kind == "rope" and mask.rotates:
      local = mask.window is not None
      q_BTNH = rotate(q_BTNH, positions_BT, config, local=local)
      k_BSKH = rotate(k_BSKH, positions_BT, config, local=local)
    if self.value_mix is not None:
      v_BSKH = self.value_mix(v_BSKH, first_values_BTKH)
    if cache is not None:
      heads = (q_BTNH, k_BSKH, v_BSKH)
      attended, cache = self._attend_cached(*heads, positions_BT, mask, bias_BNTS, cache)
      return self.out(attended), cache
    if stats is not None:
      stats["largest_logit"] = largest_logit(
        q_BTNH,
        k_BSKH,
        mask,
        positions_BT,
        scale=self._scale,
        bias_BNTS=bias_BNTS,
        cap=config.attention.soft_cap,
      )
    attended = self._attend(q_BTNH, k_BSKH, v_BSKH, mask, bias_BNTS, key)
    return checkpoint_name(self.out(attended), "attention_out"), None

  def keys_and_values(self, x_BSD: jax.Array) -> KeysAndValues:
    """Keys and values of an input, each [B, S, K, H], without positions."""
    return KeysAndValues(_normed(self.key(x_BSD), self.key_norm), self.value(x_BSD))

  def cross(
    self,
    x_BTD: jax.Array,
    keys_and_values: KeysAndValues,
    mask: Mask,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """Attends to the keys and values of another input, made by `keys_and_values`."""
    q_BTNH = self._queries(constrain(x_BTD, "batch", "time", None))
    attended = self._attend(q_BTNH, *keys_and_values, mask, None, key)
    return checkpoint_name(self.out(attended), "attention_out")

  def _queries(self, x_BTD: jax.Array) -> jax.Array:
    return _normed(self.query(x_BTD), self.query_norm)

  @property
  def _scale(self) -> float:
    return self.config.attention.scale or 1 / math.sqrt(self.config.head_dim)

  def _attend_cached(
    self, q_BTNH, k_BTKH, v_BTKH, positions_BT, mask, bias_BNTS, cache: LayerCache
  ) -> tuple[jax.Array, LayerCache]:
    """Attends to the cache, with the new keys and values in it. Returns [B, T, N, H] and both."""
    cache, (k_BSKH, v_BSKH) = cache.write(k_BTKH, v_BTKH, positions_BT)
    return self._attend(q_BTNH, k_BSKH, v_BSKH, mask, bias_BNTS, None), cache

  def _attend(self, q_BTNH, k_BSKH, v_BSKH, mask, bias_BNTS, key) -> jax.Array:
    return attend(
      q_BTNH,
      k_BSKH,
      v_BSKH,
      mask,
      scale=self._scale,
      bias_BNTS=bias_BNTS,
      cap=self.config.attention.soft_cap,
      sinks_N=None if self.sinks is None else self.sinks[...],
      dropout_rate=self.config.dropout.attention,
      key=key,
    )


def _normed(x_BTNH: jax.Array, norm: RMSNorm | None) -> jax.Array:
  """Normalises each head by itself, or all heads together if the norm is as wide as all of them."""
  if norm is None:
    return x_BTNH
  return norm(x_BTNH.reshape(*x_BTNH.shape[:2], -1, norm.scale.shape[-1])).reshape(x_BTNH.shape)
