"""Attention kernels of accelerators, called by `attention.attend`, which says what they compute.

Axes: B batch, T query positions, S key positions, N query heads, K key-value heads, H head width.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# `jax.nn.dot_product_attention` has no argument for the documents of a row.
from jax._src.cudnn import fused_attention_stablehlo as fused_attention
from jax._src.cudnn.fused_attention_stablehlo import MaskType
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import NamedSharding

from gptjax.devices import sharding

# Mosaic works in rows of this many lanes; a block of scores has sides that are multiples of it.
LANES = 128
# The side of a block: the largest whose scores, in float32, leave room in on-chip memory.
MAX_BLOCK = 1024
# The one-pass backward kernel writes a partial dQ for each block of keys. Beyond this many, the
# traffic costs more than computing the scores twice.
MAX_PARTIAL_GRADIENTS = 4
# Documents of a row that cuDNN has room for, and in a long row one for so many tokens.
MAX_DOCUMENTS, MEAN_DOCUMENT = 32, 128


def splash(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segment_ids_BT: jax.Array | None,
  *,
  window: int | None,
  causal: bool,
  cap: float,
) -> jax.Array:
  """Splash attention, JAX's block-sparse flash attention for TPUs; interpreted elsewhere.

  Flash attention: Dao et al. 2022 (arXiv:2205.14135). Blocks that no query may see are skipped.
  Queries are already scaled; a row is numbered from 0, T = S a multiple of 128. Heads are split by
  `sharding.RULES`; if a row is split over `context`, each device has its own queries and all keys.
  """
  _, T, N, _ = q_BTNH.shape
  kernel = _splash_kernel(
    T,
    N,
    window,
    causal,
    cap,
    head_shards=sharding.axis_parts("heads"),
    time_shards=sharding.axis_parts("time"),
    order=sharding.time_order(T),
    interpret=sharding.platform() != "tpu",
  )

  def run(kernel, q_BTNH, k_BSKH, v_BSKH, *segment_ids):
    segments = [*segment_ids, *map(sharding.gather_time, segment_ids)]
    if sharding.axis_parts("time") > 1:
      # A remat policy then keeps the device's own part, not the keys of all devices.
      k_BSKH, v_BSKH = map(sharding.gather_time, checkpoint_name((k_BSKH, v_BSKH), "qkv"))
      q_BNTH = checkpoint_name(q_BTNH.swapaxes(1, 2), "qkv")
      k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    else:
      heads_first = [x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH)]
      q_BNTH, k_BKSH, v_BKSH = checkpoint_name(heads_first, "qkv")
    pair = splash_kernel.SegmentIds(*segments) if segments else None
    attended_BNTH = jax.vmap(kernel, in_axes=(0, 0, 0, pair and 0))(q_BNTH, k_BKSH, v_BKSH, pair)
    return attended_BNTH.swapaxes(1, 2).astype(q_BTNH.dtype)

  queries, keys = ("batch", "time", "heads", None), ("batch", "time", "kv_heads", None)
  in_axes = [queries, keys, keys]
  arguments = [q_BTNH, k_BSKH, v_BSKH]
  if segment_ids_BT is not None:
    in_axes.append(("batch", "time"))
    arguments.append(segment_ids_BT)

  def kernel_spec(mesh):
    spec = sharding.partition_spec(("heads", "time"))
    return kernel.manual_sharding_spec(NamedSharding(mesh, spec))

  return sharding.per_shard(run, in_axes, queries, (kernel, kernel_spec))(*arguments)


def block_size(length: int) -> int:
  """The largest side of a block, a multiple of 128, that divides a row of `length` positions."""
  return max(side for side in range(LANES, MAX_BLOCK + 1, LANES) if length % side == 0)


def _splash_kernel(
  length, heads, window, causal, cap, *, head_shards, time_shards, order, interpret
):
  if not causal:
    mask = splash_mask.FullMask((length, length))
  elif window is None:
    mask = splash_mask.CausalMask((length, length))
  else:
    mask = splash_mask.LocalMask((length, length), (window - 1, 0), 0)
  if order is not None and causal:
    mask.q_sequence = order.astype(np.int32)
  block = block_size(length // time_shards)
  keys = block_size(length)
  fused = length // keys <= MAX_PARTIAL_GRADIENTS
  separate = {} if fused else {"block_q_dq": block, "block_kv_dq": keys}
  return splash_kernel.make_splash_mha(
    splash_mask.MultiHeadMask([mask] * heads),
    block_sizes=splash_kernel.BlockSizes(
      block_q=block,
      block_kv=keys,
      block_q_dkv=block,
      block_kv_dkv=keys,
      use_fused_bwd_kernel=fused,
      **separate,
    ),
    attn_logits_soft_cap=cap or None,
    head_shards=head_shards,
    q_seq_shards=time_shards,
    residual_checkpoint_name="attention",
    interpret=interpret,
  )


def cudnn(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  positions_BT: jax.Array,
  segment_ids_BT: jax.Array | None,
  *,
  window: int | None,
  causal: bool,
  scale: float,
  in_parts: Callable[..., jax.Array],
) -> jax.Array:
  """The fused attention of cuDNN on NVIDIA GPUs.

  The documents of a packed row, segments without gaps, are given to it as their starts and lengths.
  As an array, a bias [B, T, T], the mask would be read in every layer, and no block skipped. cuDNN
  wants a GPU of compute capability 9.0 for that, and room for the normalisers of as many documents
  a row as there might be. Where a GPU is older, a row has more than `MAX_DOCUMENTS`, or rows are
  split over `context`, the attention is made `in_parts`.

  Args:
    in_parts: the same attention, of q, k, v, and of positions and segments of queries and of keys.
  """
  keys = ("batch", None, "kv_heads", None)
  queries = ("batch", "time", "heads", None)
  rows = [x for x in (positions_BT, segment_ids_BT) if x is not None]

  def run(q_BTNH, k_BSKH, v_BSKH, *rows):
    heads = checkpoint_name((q_BTNH, k_BSKH, v_BSKH), "qkv")
    packed = segment_ids_BT is not None
    documents = find_documents(rows[-1]) if packed else None
    fused = functools.partial(_fused, documents, window=window, causal=causal, scale=scale)

    def otherwise(q_BTNH, k_BSKH, v_BSKH):
      return in_parts(q_BTNH, k_BSKH, v_BSKH, *rows)

    too_old = packed and not fused_attention.check_compute_capability("9.0")
    if too_old or sharding.axis_parts("time") > 1:
      attended = otherwise(*heads)
    elif packed:
      attended = jax.lax.cond(documents.are_all, fused, otherwise, *heads)
    else:
      attended = fused(*heads)
    return checkpoint_name(attended, "attention")

  in_axes = [queries, keys, keys]
  for _ in rows:
    in_axes += [("batch", "time"), ("batch", None)]
  arguments = [q_BTNH, k_BSKH, v_BSKH, *(x for row in rows for x in (row, row))]
  return sharding.per_shard(run, in_axes, queries)(*arguments)


class Documents(NamedTuple):
  """Offsets of the documents in each row: int32, -1 for none.

  starts: [B, M + 1], the last of them -1. lengths: [B, M]. are_all: whether no row has more than M.
  """

  starts: jax.Array
  lengths: jax.Array
  are_all: jax.Array


def find_documents(segment_ids_BT: jax.Array) -> Documents:
  """Runs of equal segment ids, padding included, since cuDNN leaves skipped rows undefined."""
  T = segment_ids_BT.shape[1]
  # Its normalisers take 4 bytes for each head, token and document that there might be.
  M = max(MAX_DOCUMENTS, T // MEAN_DOCUMENT)
  is_start_BT = segment_ids_BT != jnp.roll(segment_ids_BT, 1, axis=1)
  is_start_BT = is_start_BT.at[:, 0].set(True)
  find = functools.partial(jnp.nonzero, size=M + 1, fill_value=-1)
  starts = jax.vmap(find)(is_start_BT)[0].astype(jnp.int32)
  ends = jnp.where(starts[:, 1:] < 0, T, starts[:, 1:])
  lengths = jnp.where(starts[:, :-1] < 0, -1, ends - starts[:, :-1])
  return Documents(starts, lengths, (starts[:, -1] < 0).all())


def _fused(documents, q_BTNH, k_BSKH, v_BSKH, *, window, causal, scale) -> jax.Array:
  kind, packed = (MaskType.CAUSAL if causal else MaskType.NO_MASK), {}
  if documents is not None:
    kind = MaskType.PADDING_CAUSAL if causal else MaskType.PADDING
    # JAX counts the offsets of keys in heads of queries.
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSKH, v_BSKH = (jnp.repeat(x, groups, axis=2) for x in (k_BSKH, v_BSKH))
    packed = dict.fromkeys(("q_seqlen", "kv_seqlen"), documents.lengths)
    packed |= dict.fromkeys(("q_offsets", "kv_offsets"), documents.starts)
  return fused_attention.dot_product_attention(
    q_BTNH, k_BSKH, v_BSKH, scale=scale, mask_type=kind, sliding_window_length=window, **packed
  )
