"""The parts of a model whose weights are stored in few bits.

Axes: O outputs, I inputs of a matrix, G groups, P stored numbers of an output, V vocabulary,
D width.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.model.layers import Embedding, contract
from gptjax.quantization.formats import (
  BITS,
  Format,
  Grid,
  from_codes,
  make_grid,
  nearest,
  pack,
  to_codes,
  unpack,
)

# Inputs of a kernel, a scale for each token.
_TOKENS = Format("int8")


class StoredMatrix(nnx.Module):
  """A matrix in few bits, or a stack of them.

  values: [..., O, P] as `formats.pack` makes them. scales: float32 [..., O, G]. zeros: int8
  [..., O, G], or None. form: their `Format`.
  """

  def __init__(self, values: jax.Array, scales: jax.Array, zeros: jax.Array | None, form: Format):
    self.values, self.scales = nnx.Variable(values), nnx.Variable(scales)
    self.zeros = None if zeros is None else nnx.Variable(zeros)
    self.form = form

  @property
  def inputs(self) -> int:
    """I, the inputs of the matrix."""
    return self.values.shape[-1] * 8 // BITS[self.form.name]

  @property
  def grid(self) -> Grid:
    return Grid(self.scales[...], None if self.zeros is None else self.zeros[...])

  def weights(self) -> jax.Array:
    """The matrix, float32 [..., O, I]."""
    return from_codes(unpack(self.values[...], self.form), self.grid, self.form)

  def rows(self, indices: jax.Array) -> jax.Array:
    """Rows of the matrix by their numbers, float32 [..., I]."""
    picked = [
      None if part is None else jnp.take(part, indices, axis=0, mode="clip")
      for part in (self.values[...], *self.grid)
    ]
    return from_codes(unpack(picked[0], self.form), Grid(*picked[1:]), self.form)


class StoredKernel(nnx.Module):
  """Replaces a projection's kernel by one in few bits: `kernel[...]` is what it stands for.

  matrix: the kernel as a matrix of outputs by inputs. in_shape, out_shape: the axes of the kernel,
  which are flattened there. input_scales: float32 [..., I], by which inputs are multiplied first,
  or None (AWQ, Lin et al. 2023, arXiv:2306.00978, equation 3). activations: one of
  `formats.ACTIVATIONS`; with int8 the matrix is int8 too, with one scale for an output.
  """

  def __init__(
    self,
    matrix: StoredMatrix,
    in_shape: Sequence[int],
    out_shape: Sequence[int],
    input_scales: jax.Array | None = None,
    activations: str = "none",
  ):
    self.matrix, self.activations = matrix, activations
    self.in_shape, self.out_shape = tuple(in_shape), tuple(out_shape)
    self.input_scales = None if input_scales is None else nnx.Variable(input_scales)

  def __getitem__(self, index) -> jax.Array:
    weights = self.matrix.weights()
    if self.input_scales is not None:
      weights *= self.input_scales[...][..., None, :]
    return from_matrix(weights, self.in_shape, self.out_shape)[index]

  def product(self, x: jax.Array, count: int, axes: tuple[str, ...]) -> jax.Array:
    """Multiplies as `layers.contract` does."""
    if self.activations == "none":
      return contract(x, self[...].astype(x.dtype), count, axes)
    leading = x.shape[: x.ndim - count]
    x_MI = x.reshape(math.prod(leading), -1).astype(jnp.float32)
    if self.input_scales is not None:
      x_MI *= self.input_scales[...][None]
    grid = make_grid(x_MI, _TOKENS)
    # Whole numbers, which accelerators multiply faster than others.
    y_MO = jax.lax.dot_general(
      to_codes(x_MI, grid, _TOKENS),
      self.matrix.values[...],
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.int32,
    )
    y_MO = y_MO.astype(jnp.float32) * grid.scales * self.matrix.scales[...].T
    return y_MO.reshape(*leading, *self.out_shape).astype(x.dtype)


class StoredEmbedding(Embedding):
  """A table of vectors in few bits; the rows of matrix are the vectors, [V, D]."""

  def __init__(self, matrix: StoredMatrix):
    self.matrix = matrix

  @property
  def embedding(self) -> jax.Array:
    """The table, float32 [V, D]."""
    return self.matrix.weights()

  def __call__(self, indices: jax.Array) -> jax.Array:
    return self.matrix.rows(indices)

  def scores(self, x: jax.Array) -> jax.Array:
    return jnp.einsum("...d,vd->...v", x, self.embedding.astype(x.dtype))


def round_tokens(x: jax.Array, count: int) -> jax.Array:
  """Inputs, whose last `count` axes are a token's, rounded to int8 by each token's largest."""
  tokens = x.reshape(*x.shape[: x.ndim - count], -1).astype(jnp.float32)
  return nearest(tokens, _TOKENS).reshape(x.shape).astype(x.dtype)


def round_matrix(weights: jax.Array, form: Format) -> StoredMatrix:
  """Stores a matrix [..., O, I], each number rounded to the nearest."""
  weights = weights.astype(jnp.float32)
  grid = make_grid(weights, form)
  return store_codes(to_codes(weights, grid, form), grid, form)


def store_codes(codes: jax.Array, grid: Grid, form: Format) -> StoredMatrix:
  """Stores the matrix that codes [..., O, I] of a grid stand for."""
  return StoredMatrix(pack(codes, form), *grid, form)


def as_matrix(kernel: jax.Array, inputs: int, outputs: int) -> jax.Array:
  """A kernel [..., *in, *out] with so many axes of each as a matrix [..., O, I]."""
  first = kernel.ndim - inputs - outputs
  stack, contracted = kernel.shape[:first], kernel.shape[first : first + inputs]
  return kernel.reshape(*stack, math.prod(contracted), -1).swapaxes(-1, -2)


def from_matrix(weights: jax.Array, in_shape: Sequence[int], out_shape: Sequence[int]) -> jax.Array:
  """The kernel [..., *in, *out] of a matrix [..., O, I]."""
  return weights.swapaxes(-1, -2).reshape(*weights.shape[:-2], *in_shape, *out_shape)
