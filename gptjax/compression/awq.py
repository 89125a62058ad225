"""AWQ: scales the inputs that matter before their weights are rounded, and clips what is left (Lin
et al. 2023, arXiv:2306.00978).

Axes: O outputs, I inputs, S exponents tried, G groups of inputs, J inputs of a group.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gptjax.quantization.formats import Format, Grid, from_codes, make_grid, nearest, to_codes

# Exponents of the mean size of an input that are tried, from 0 (no scaling) to below 1.
STEPS = 20
# Parts of the range of a group's weights that are tried, beside all of it.
CLIPS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


@functools.partial(jax.jit, static_argnames=("form",))
def awq(
  matrices: Sequence[jax.Array], gram_II: jax.Array, size_I: jax.Array, form: Format
) -> jax.Array:
  """The factors of the inputs of projections that share them, float32 [I] (equations 4 and 5).

  Weights are multiplied by the factors before they are rounded, and inputs divided. The factors are
  size^a for the a whose products with the inputs that were seen change least, and their largest
  times their smallest is 1.

  Args:
    matrices: weights [O, I] of each projection, float32.
    gram_II: sum of the outer products of the inputs.
    size_I: mean absolute value of each input.
    form: how the weights will be stored.
  """

  def factors(exponent: jax.Array) -> jax.Array:
    factors_I = jnp.maximum(size_I**exponent, 1e-4)
    return factors_I / jnp.sqrt(factors_I.max() * factors_I.min())

  def error(exponent: jax.Array) -> jax.Array:
    factors_I = factors(exponent)
    total = jnp.float32(0)
    for weights_OI in matrices:
      scaled_OI = weights_OI * factors_I[None]
      change_OI = nearest(scaled_OI, form) / factors_I[None] - weights_OI
      total += jnp.vdot(change_OI @ gram_II, change_OI)
    return total

  exponents_S = jnp.arange(STEPS) / STEPS
  errors_S = jax.lax.map(error, exponents_S)
  return factors(exponents_S[errors_S.argmin()])


@functools.partial(jax.jit, static_argnames=("form",))
def clipped_grid(weights_OI: jax.Array, gram_II: jax.Array, form: Format) -> Grid:
  """A grid in which each group's range is as much smaller as changes its products least (section
  3.2): what is beyond is clipped, and the others are rounded less. Arguments as for `awq`."""
  O, I = weights_OI.shape
  G = I // (form.group or I)
  at_G = jnp.arange(G)
  gram_GJJ = gram_II.reshape(G, I // G, G, I // G)[at_G, :, at_G]
  whole = make_grid(weights_OI, form)

  def error(share: jax.Array) -> jax.Array:
    grid = whole._replace(scales=whole.scales * share)
    change_OI = from_codes(to_codes(weights_OI, grid, form), grid, form) - weights_OI
    change_OGJ = change_OI.reshape(O, G, -1)
    return jnp.einsum("ogj,gjk,ogk->og", change_OGJ, gram_GJJ, change_OGJ)

  shares_S = jnp.asarray((1.0, *CLIPS))
  errors_SOG = jax.lax.map(error, shares_S)
  return whole._replace(scales=whole.scales * shares_S[errors_SOG.argmin(0)])
