"""Attention kernels of accelerators. `attention.attend` says what they compute and chooses one.

Axes: B batch, T query positions, S key positions, N query heads, K key-value heads, H head width.
"""

import jax
import numpy as np
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
  The queries come scaled. Positions are those of the row, T = S a multiple of 128. Heads are split
  as `sharding.RULES` says; of a row that is split over `context`, each device has its queries and
  all keys.
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
      # What a remat policy keeps is the device's own part, not the keys of all.
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
  visible_BTS: jax.Array,
  scale: float,
) -> jax.Array:
  """The fused attention of cuDNN on NVIDIA GPUs, with the mask as written."""
  keys = ("batch", None, "kv_heads", None)
  queries = ("batch", "time", "heads", None)

  def run(q_BTNH, k_BSKH, v_BSKH, visible_BTS):
    attended = jax.nn.dot_product_attention(
      *checkpoint_name((q_BTNH, k_BSKH, v_BSKH), "qkv"),
      mask=visible_BTS[:, None],
      scale=scale,
      implementation="cudnn",
    )
    return checkpoint_name(attended, "attention")

  in_axes = [queries, keys, keys, ("batch", "time", None)]
  return sharding.per_shard(run, in_axes, queries)(q_BTNH, k_BSKH, v_BSKH, visible_BTS)
