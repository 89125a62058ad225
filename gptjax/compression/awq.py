"""AWQ: scales the inputs that matter before their weights are rounded (Lin et al. 2023,
arXiv:2306.00978).

Axes: O outputs, I inputs, S exponents tried.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gptjax.quantization.formats import Format, nearest

# Exponents of the mean size of an input that are tried, from 0 (no scaling) to below 1.
STEPS = 20


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
