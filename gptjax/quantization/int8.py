"""Weights in int8 with a scale for each output, in products that XLA makes.

Axes: D width, V vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.devices import sharding
from gptjax.model.layers import Embedding, Linear


def quantize(values: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
  """Rounds to int8 with one scale for all values along `axes`, their largest over 127.

  Returns the rounded values, and the scales, float32, without those axes.
  """
  values = values.astype(jnp.float32)
  largest = jnp.abs(values).max(axes, keepdims=True)
  scales = jnp.where(largest == 0, 1, largest) / 127
  return jnp.round(values / scales).astype(jnp.int8), scales.squeeze(axes)


class Int8Kernel(nnx.Module):
  """A projection's kernel in int8: [*in_shape, *out_shape], and its scales, float32 [*out_shape].

  The kernel is converted within the product, so that only its int8 values are read from memory, and
  activations stay in the compute dtype.
  """

  def __init__(self, base: Linear):
    count = base.contracted_axes
    values, scales = quantize(base.kernel[...], tuple(range(count)))
    told = base.kernel.get_metadata()
    self.values = type(base.kernel)(values, **told)
    self.scales = nnx.Param(scales, axes=told["axes"][count:], role=told["role"])

  def product(self, x: jax.Array, count: int, axes: tuple[str, ...]) -> jax.Array:
    """Multiplies as `layers.contract` does."""
    kernel = sharding.gather(self.values[...], axes)
    y = jnp.tensordot(x, kernel.astype(x.dtype), axes=count)
    return _scale(y, self.scales[...])


class Int8Embedding(Embedding):
  """A table that is both looked up and multiplied with, in int8 [V, D], with scales [V]."""

  def __init__(self, base: Embedding):
    values, scales = quantize(base.embedding[...], (1,))
    told = base.embedding.get_metadata()
    self.embedding = nnx.Param(values, **told)
    self.scales = nnx.Param(scales, axes=told["axes"][:1], role=told["role"])

  def __call__(self, indices: jax.Array) -> jax.Array:
    rows = super().__call__(indices).astype(jnp.float32)
    return rows * jnp.take(self.scales[...], indices, mode="clip")[..., None]

  def scores(self, x: jax.Array) -> jax.Array:
    return _scale(super().scores(x), self.scales[...])


def _scale(y: jax.Array, scales: jax.Array) -> jax.Array:
  """y * scales over the last axes of y, in the dtype of y."""
  return (y * scales.reshape((1,) * (y.ndim - scales.ndim) + scales.shape)).astype(y.dtype)
