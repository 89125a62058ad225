"""The model's step over a paged cache, compiled once for each shape.

Axes: B rows, T positions, C scored positions, I pages of a row, V vocabulary; for `copy_page` as in
`pages`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptjax.inference.form import Form
from gptjax.inference.pages import PagedCache, Pools, empty_pools
from gptjax.inference.sampling import compilations
from gptjax.model.config import ModelConfig
from gptjax.model.stack import Encoded


@functools.partial(
  jax.jit, static_argnames=("form", "length", "rows_axis"), donate_argnames=("pools",)
)
def forward(
  form: Form,
  arrays: list[jax.Array],
  pools: Pools,
  tokens_BT: np.ndarray,
  positions_BT: np.ndarray,
  tables_BI: np.ndarray,
  scored_BC: np.ndarray,
  *,
  length: int,
  rows_axis: str | None = None,
  prefix_B: np.ndarray | None = None,
  adapters_B: np.ndarray | None = None,
  encoded: Encoded | None = None,
  encoded_B: np.ndarray | None = None,
) -> tuple[jax.Array, Pools]:
  """Reads tokens, whose rows may be prompts, parts of them or single new tokens.

  Args:
    tokens_BT: int32 ids.
    positions_BT: int32, in steps of 1; -1 is padding after the last one.
    tables_BI: int32, pages of each row.
    scored_BC: int32, the columns of T whose logits are wanted.
    length: positions that a row may have.
    rows_axis: see `PagedCache`.
    prefix_B: int32, how many tokens from the start are the prefix, for visibility 'prefix'.
    adapters_B: int32, the adapter of each row, -1 for none, in a model that has several: one
      whose projections have `adapters` and a method `choose`.
    encoded: an encoder's output for all of its rows, and, in `encoded_B`, the row to read.

  Returns:
    float32 logits [B, C, V] of the tokens after the scored ones, and the written pools.
  """
  compilations["forward"] += 1
  model = form.model(arrays)
  if adapters_B is not None:
    for _, module in nnx.iter_modules(model):
      if hasattr(module, "adapters"):
        module.choose(adapters_B)
  prefix_BS = None
  if prefix_B is not None:
    prefix_BS = (jnp.arange(length)[None] < prefix_B[:, None]).astype(jnp.int32)
  if encoded is not None:
    encoded = jax.tree.map(lambda x: x[encoded_B], encoded)
  x_BTD, cache = model.hidden(
    tokens_BT,
    positions_BT=positions_BT,
    prefix_BS=prefix_BS,
    encoded=encoded,
    cache=[PagedCache(pool, tables_BI, prefix_B, length, rows_axis) for pool in pools],
  )
  x_BCD = jnp.take_along_axis(x_BTD, scored_BC[..., None], axis=1)
  return model.logits(x_BCD), [layer.pool for layer in cache]


@functools.partial(jax.jit, static_argnames=("config", "pages", "joined", "cache"))
def make_pools(config: ModelConfig, pages: int, *, joined: bool, cache: str | None) -> Pools:
  """Empty pools, split over the mesh by heads."""
  compilations["make_pools"] += 1
  return empty_pools(config, pages, joined=joined, cache=cache)


@functools.partial(jax.jit, donate_argnames=("pools",))
def copy_page(pools: Pools, source: int, target: int) -> Pools:
  """Copies the keys and values of a page in each layer."""
  compilations["copy_page"] += 1
  return jax.tree.map(lambda pool_PZKH: pool_PZKH.at[target].set(pool_PZKH[source]), pools)


@functools.partial(jax.jit, static_argnames=("form",))
def encode(
  form: Form, arrays: list[jax.Array], tokens_BS: np.ndarray, lengths_B: np.ndarray
) -> Encoded:
  """Reads an encoder's texts, int32 [B, S], of which `lengths_B` positions are valid."""
  compilations["encode"] += 1
  model = form.model(arrays)
  valid_BS = jnp.arange(tokens_BS.shape[1])[None] < lengths_B[:, None]
  return model.encode(tokens_BS, segment_ids_BS=valid_BS.astype(jnp.int32), for_decoding=True)


@functools.partial(jax.jit, donate_argnames=("rows",))
def put_row(rows: Encoded, row: int, one: Encoded) -> Encoded:
  """Writes one encoded text into a row of several, behind it zeros: no position of the text."""
  compilations["put_row"] += 1

  def put(x, y):
    y = jnp.pad(y, [(0, 0), (0, x.shape[1] - y.shape[1])] + [(0, 0)] * (y.ndim - 2))
    return x.at[row].set(y[0])

  return jax.tree.map(put, rows, one)
