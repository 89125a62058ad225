"""SmoothQuant: takes large inputs into the weights, so that both can be rounded to int8 (Xiao et
al. 2022, arXiv:2211.10438).

Axes: O outputs, I inputs, M tokens.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# How much of an input's size goes into the weights (section 4: half suits most models).
STRENGTH = 0.5


def largest_inputs(x_MI: jax.Array) -> jax.Array:
  """The largest size of each input, [I]."""
  return jnp.abs(x_MI).max(0)


def smooth(matrices: Sequence[jax.Array], largest_I: jax.Array) -> jax.Array:
  """The factors of the inputs of projections that share them, float32 [I] (equation 4): weights are
  multiplied by them before they are rounded, and inputs divided.

  Args:
    matrices: weights [O, I] of each projection, float32.
    largest_I: the largest size of each input that was seen.
  """
  weights_I = jnp.max(jnp.stack([jnp.abs(one).max(0) for one in matrices]), 0)
  factors_I = largest_I**STRENGTH / weights_I ** (1 - STRENGTH)
  # An input that never occurs, or that nothing reads, stays as it is.
  return jnp.where((largest_I > 0) & (weights_I > 0), factors_I, 1.0)
