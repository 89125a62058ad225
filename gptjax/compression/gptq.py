"""GPTQ: rounds a matrix column by column, and lets the columns that are left make up for the error
(Frantar et al. 2023, arXiv:2210.17323).

Axes: O outputs, I inputs, G groups of inputs, C columns of a block.
"""

import functools

import jax
import jax.numpy as jnp

from gptjax.quantization.formats import Format, Grid, from_codes, make_grid, to_codes

# Columns, at most, whose errors reach the rest of the matrix together (section 3.3, step 2).
BLOCK = 128


@functools.partial(jax.jit, static_argnames=("form", "damping", "by_size"))
def gptq(
  weights_OI: jax.Array,
  gram_II: jax.Array,
  form: Format,
  *,
  damping: float = 0.01,
  by_size: bool = True,
) -> tuple[jax.Array, Grid]:
  """Rounds a matrix so that its products with inputs that were seen change little (algorithm 1).

  The grids of all groups are made before, of the weights as they are.

  Args:
    weights_OI: float32.
    gram_II: sum of the outer products of the inputs, float32.
    form: how the numbers are stored.
    damping: share of the mean of the gram's diagonal that is added to it.
    by_size: round the columns of the largest inputs first, while many others are left to make up
      for the error ("act-order" in the authors' code); else in their order.

  Returns:
    Codes [O, I], as of `formats.to_codes`, and their grid.
  """
  O, I = weights_OI.shape
  size_I = jnp.diagonal(gram_II)
  # An input that never occurs decides nothing.
  dead_I = size_I == 0
  gram_II = gram_II + jnp.diag(jnp.where(dead_I, 1.0, damping * size_I.mean()))
  grid = make_grid(weights_OI, form)
  order_I = jnp.argsort(-size_I) if by_size else jnp.arange(I)
  group_I = order_I // (form.group or I)
  weights_OI, gram_II = weights_OI[:, order_I], gram_II[order_I][:, order_I]
  upper_II = factor_of_inverse(gram_II)
  width = next(width for width in range(min(BLOCK, I), 0, -1) if I % width == 0)
  # The grid of one column has one scale.
  alone = Format(form.name, 0, form.symmetric)

  def round_column(i, state):
    weights_OC, errors_OC, codes_OC, upper_CC, group_C = state
    column_O1 = jax.lax.dynamic_slice_in_dim(weights_OC, i, 1, axis=1)
    of_group = Grid(*(x if x is None else jnp.take(x, group_C[i], axis=1)[:, None] for x in grid))
    codes_O1 = to_codes(column_O1, of_group, alone)
    error_O1 = (column_O1 - from_codes(codes_O1, of_group, alone)) / upper_CC[i, i]
    # The factor is 0 left of its diagonal, so that columns that are done stay as they are.
    weights_OC -= error_O1 * upper_CC[i][None]
    errors_OC = jax.lax.dynamic_update_slice(errors_OC, error_O1, (0, i))
    codes_OC = jax.lax.dynamic_update_slice(codes_OC, codes_O1, (0, i))
    return weights_OC, errors_OC, codes_OC, upper_CC, group_C

  def round_block(block, state):
    weights_OI, codes_OI = state
    start = block * width
    upper_CI = jax.lax.dynamic_slice_in_dim(upper_II, start, width, axis=0)
    state = (
      jax.lax.dynamic_slice_in_dim(weights_OI, start, width, axis=1),
      jnp.zeros((O, width)),
      jnp.zeros((O, width), codes_OI.dtype),
      jax.lax.dynamic_slice_in_dim(upper_CI, start, width, axis=1),
      jax.lax.dynamic_slice_in_dim(group_I, start, width),
    )
    _, errors_OC, codes_OC, *_ = jax.lax.fori_loop(0, width, round_column, state)
    codes_OI = jax.lax.dynamic_update_slice(codes_OI, codes_OC, (0, start))
    return weights_OI - errors_OC @ upper_CI, codes_OI

  nothing_OI = to_codes(jnp.zeros((O, I)), grid, form)
  _, codes_OI = jax.lax.fori_loop(0, I // width, round_block, (weights_OI, nothing_OI))
  return codes_OI[:, jnp.argsort(order_I)], grid


def factor_of_inverse(gram_II: jax.Array) -> jax.Array:
  """The upper triangular U with U^T U = gram^-1.

  With the rows and columns in reverse, gram = R R^T has an upper R, whose inverse is U: so the gram
  itself need not be inverted.
  """
  lower_II = jnp.linalg.cholesky(gram_II[::-1, ::-1])
  identity_II = jnp.eye(len(gram_II))
  inverse_II = jax.scipy.linalg.solve_triangular(lower_II, identity_II, lower=True)
  return inverse_II[::-1, ::-1]
