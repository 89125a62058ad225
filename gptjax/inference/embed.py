"""The vector of a text: the mean of its last hidden states, of length 1.

Axes: T positions, D width, I pages of a row.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.inference.form import Form
from gptjax.inference.pages import PAGE, PagedCache, empty_pools
from gptjax.inference.reader import Reader


def embed(reader: Reader, tokens: Sequence[int]) -> np.ndarray:
  """Returns the vector of a text that is not longer than the reader's rows, float32 [D]."""
  T = min(max(PAGE, 1 << (len(tokens) - 1).bit_length()), reader.length)
  tokens_1T, positions_1T = np.zeros((1, T), np.int32), np.full((1, T), -1, np.int32)
  tokens_1T[0, : len(tokens)], positions_1T[0, : len(tokens)] = tokens, np.arange(len(tokens))
  return np.asarray(
    _mean_hidden(reader.form, reader.arrays, tokens_1T, positions_1T, reader.joined)
  )


@functools.partial(jax.jit, static_argnames=("form", "joined"))
def _mean_hidden(
  form: Form, arrays: list[jax.Array], tokens_1T, positions_1T, joined: bool
) -> jax.Array:
  model = form.model(arrays)
  T = tokens_1T.shape[1]
  valid_1T = positions_1T >= 0
  # The inference form reads and writes a cache, here one of this text alone.
  I = -(-T // PAGE)
  is_prefix = model.config.visibility == "prefix"
  prefix_1 = valid_1T.sum(1, dtype=jnp.int32) if is_prefix else None
  pages_1I = jnp.arange(I, dtype=jnp.int32)[None]
  pools = empty_pools(model.config, I, joined=joined)
  cache = [PagedCache(pool, pages_1I, prefix_1, T) for pool in pools]
  x_1TD, _ = model.hidden(
    tokens_1T,
    positions_BT=positions_1T,
    prefix_BS=valid_1T.astype(jnp.int32) if is_prefix else None,
    cache=cache,
  )
  sum_D = jnp.where(valid_1T[..., None], x_1TD.astype(jnp.float32), 0).sum((0, 1))
  return sum_D / jnp.maximum(jnp.linalg.norm(sum_D), 1e-12)
