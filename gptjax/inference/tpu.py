"""Attention over a paged cache by JAX's own kernel for TPUs, which reads the pages where they lie.

Axes: B rows, T positions, R = B T, N query heads, K key-value heads, H head width, W the width of a
head in a page, P pages, Z positions of a page, I pages of a row.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from gptjax.devices import sharding
from gptjax.inference.pages import PagedCache, cells_of
from gptjax.model.attention import Attention
from gptjax.model.gpt import GPT
from gptjax.model.layers import adopt

# Keys that the kernel copies to on-chip memory at a time, and queries that it then scores: new
# tokens of a few rows, or a part of a prompt.
KEYS_PER_BLOCK, QUERIES_PER_BLOCK = 512, (8, 32)


def joins_pages(model: GPT) -> bool:
  """Whether the inference form of a model attends by the kernel on the current mesh.

  If so, a page holds keys and values joined, [Z, 2K, W] (`pages.empty_pools`). The kernel knows
  soft caps and windows, but neither sinks nor biases, and all its masks are causal.
  """
  if sharding.platform() != "tpu" or model.encoder is not None:
    return False
  config, parts = model.config, sharding.axis_parts("kv_heads")
  joined, packed = 2 * config.num_kv_heads // parts, 4 // jnp.dtype(config.dtype).itemsize
  return (
    # Adapters may have keys of their own.
    all(type(m) is Attention for _, m in nnx.iter_modules(model) if isinstance(m, Attention))
    and _fills_tiles(joined, packed)
    and config.position.kind not in ("alibi", "t5")
    and config.visibility == "causal"
    and not config.attention.sinks
  )


def _fills_tiles(heads: int, packed: int) -> bool:
  """Whether heads, of which a register packs several in a sublane, lie in whole tiles."""
  sublanes, rest = divmod(heads, packed)
  return not rest and (sublanes in (1, 2, 4) or sublanes % 8 == 0)


class RaggedAttention(Attention):
  """Attention to joined pages by `ragged_paged_attention`.

  Each device has some of the heads, and all rows or, with `PagedCache.rows_axis`, those whose pages
  it has.
  """

  in_place = True

  def __init__(self, base: Attention):
    adopt(self, base)

  def _attend_cached(
    self, q_BTNH, k_BTKH, v_BTKH, positions_BT, mask, bias_BNTS, cache: PagedCache
  ) -> tuple[jax.Array, PagedCache]:
    rows = cache.rows_axis
    heads = (rows, None, "heads", None)
    joined = (rows, None, "kv_heads", None)
    attend = functools.partial(
      _attend_joined,
      scale=self._scale,
      cap=self.config.attention.soft_cap or None,
      window=mask.window,
    )
    attended_BTNH, pool_PZJW = sharding.per_shard(
      attend, [heads, joined, joined, joined, (rows, None), (rows, None)], [heads, joined]
    )(q_BTNH, k_BTKH, v_BTKH, cache.pool, cache.tables_BI, positions_BT)
    return attended_BTNH, cache.with_pool(pool_PZJW)


def _attend_joined(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  pool_PZJW: jax.Array,
  tables_BI: jax.Array,
  positions_BT: jax.Array,
  *,
  scale: float,
  cap: float | None,
  window: int | None,
) -> tuple[jax.Array, jax.Array]:
  """Writes new keys and values in place, and attends. Returns [B, T, N, H] and the pool."""
  B, T, N, H = q_BTNH.shape
  _, Z, J, W = pool_PZJW.shape
  I = tables_BI.shape[1]

  def widen(x):
    # The kernel has no heads that are narrower than a register. Zeros add nothing to a product.
    return jnp.pad(x, [(0, 0)] * 3 + [(0, W - H)]).astype(pool_PZJW.dtype)

  # Each head's key, then its value.
  new_RJW = jnp.stack([widen(k_BTKH), widen(v_BTKH)], axis=3).reshape(B * T, J, W)
  cells_R = cells_of(tables_BI, positions_BT, pool_PZJW.shape)
  flat = pool_PZJW.reshape(-1, J, W).at[cells_R].set(new_RJW, mode="drop")
  pool_PZJW = flat.reshape(pool_PZJW.shape)
  # Padding behind a row's last token counts as more tokens: what they see, nobody reads.
  lengths_B = jnp.maximum(positions_BT[:, 0], 0) + T
  attended_RNW = ragged_paged_attention(
    widen(q_BTNH).reshape(B * T, N, W),
    pool_PZJW,
    lengths_B,
    tables_BI,
    jnp.arange(B + 1, dtype=jnp.int32) * T,
    jnp.array([B], jnp.int32),
    sm_scale=scale,
    soft_cap=cap,
    sliding_window=window,
    num_kv_pages_per_block=min(I, KEYS_PER_BLOCK // Z),
    num_queries_per_block=min(B * T, QUERIES_PER_BLOCK[T > 1]),
  )
  return attended_RNW[..., :H].reshape(q_BTNH.shape).astype(q_BTNH.dtype), pool_PZJW
