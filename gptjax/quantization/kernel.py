"""The parts of a model whose weights are stored in few bits.

Axes: O outputs, I inputs of a matrix, G groups, J inputs of a group, P stored numbers of an output,
M tokens, V vocabulary, D width.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.model.layers import Embedding
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
# Formats whose numbers have a scale for each output alone.
_BY_OUTPUT = (Format("int8"), Format("float8"))
# Tokens up to which groups are multiplied one by one, and their sums scaled; for more it pays to
# make the matrix first (experiments/compression/products.py).
_FEW = 256


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

  def product(self, x_MI: jax.Array) -> jax.Array:
    """x @ matrix.T, [M, O], in the dtype of x; of one matrix."""
    if self.form not in _BY_OUTPUT:
      return x_MI @ self.weights().T.astype(x_MI.dtype)
    # A scale for each output can wait, so that what is read is stored numbers alone.
    y_MO = _multiply(x_MI, self.values[...].astype(x_MI.dtype), jnp.float32)
    return (y_MO * self.scales[...].T).astype(x_MI.dtype)

  def rows(self, indices: jax.Array) -> jax.Array:
    """Rows of the matrix by their numbers, float32 [..., I]."""
    picked = [
      None if part is None else jnp.take(part, indices, axis=0, mode="clip")
      for part in (self.values[...], *self.grid)
    ]
    return from_codes(unpack(picked[0], self.form), Grid(*picked[1:]), self.form)


class GroupedMatrix(nnx.Module):
  """A matrix of int4 or int8 in groups as XLA multiplies it fast: see `StoredMatrix`.

  values_GJO: int4 or int8. scales_GO: float32. zeros_GO: float32, or None.
  """

  def __init__(self, stored: StoredMatrix):
    form, grid = stored.form, stored.grid
    codes_OI = unpack(stored.values[...], form)
    codes_OGJ = codes_OI.reshape(*grid.scales.shape, -1)
    dtype = jnp.int4 if form.name == "int4" else jnp.int8
    self.values_GJO = nnx.Variable(jnp.moveaxis(codes_OGJ, 0, -1).astype(dtype))
    self.scales_GO = nnx.Variable(grid.scales.T)
    self.zeros_GO = None if grid.zeros is None else nnx.Variable(grid.zeros.T.astype(jnp.float32))

  def product(self, x_MI: jax.Array) -> jax.Array:
    """As `StoredMatrix.product`."""
    values_GJO, scales_GO = self.values_GJO[...].astype(x_MI.dtype), self.scales_GO[...]
    G, J, O = values_GJO.shape
    if len(x_MI) > _FEW:
      zeros_G1O = 0 if self.zeros_GO is None else self.zeros_GO[...][:, None]
      weights_GJO = (values_GJO - zeros_G1O) * scales_GO[:, None]
      return x_MI @ weights_GJO.astype(x_MI.dtype).reshape(G * J, O)
    x_MGJ = x_MI.reshape(len(x_MI), G, J)
    parts_GMO = jnp.einsum("mgj,gjo->gmo", x_MGJ, values_GJO, preferred_element_type=jnp.float32)
    if self.zeros_GO is not None:
      sums_GM = x_MGJ.sum(-1, dtype=jnp.float32).T
      parts_GMO -= sums_GM[..., None] * self.zeros_GO[...][:, None]
    return (parts_GMO * scales_GO[:, None]).sum(0).astype(x_MI.dtype)


class DecodedMatrix(nnx.Module):
  """A matrix [O, I] of the numbers that stored ones stand for: see `StoredMatrix`."""

  def __init__(self, stored: StoredMatrix, dtype: jax.typing.DTypeLike):
    self.matrix_OI = nnx.Variable(stored.weights().astype(dtype))

  def product(self, x_MI: jax.Array) -> jax.Array:
    """As `StoredMatrix.product`."""
    return x_MI @ self.matrix_OI[...].T.astype(x_MI.dtype)

  def rows(self, indices: jax.Array) -> jax.Array:
    """As `StoredMatrix.rows`."""
    return jnp.take(self.matrix_OI[...], indices, axis=0, mode="clip").astype(jnp.float32)


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
    del axes  # What is stored in few bits is not split over devices.
    leading = x.shape[: x.ndim - count]
    x_MI = x.reshape(math.prod(leading), -1)
    if self.input_scales is not None:
      x_MI = (x_MI * self.input_scales[...][None]).astype(x.dtype)
    if self.activations == "none":
      y_MO = self.matrix.product(x_MI)
    else:
      grid = make_grid(x_MI.astype(jnp.float32), _TOKENS)
      codes_MI = to_codes(x_MI.astype(jnp.float32), grid, _TOKENS)
      # Whole numbers, which accelerators multiply faster than others.
      y_MO = _multiply(codes_MI, self.matrix.values[...], jnp.int32).astype(jnp.float32)
      y_MO *= grid.scales * self.matrix.scales[...].T
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
    scores_MV = self.matrix.product(x.reshape(-1, x.shape[-1]))
    return scores_MV.reshape(*x.shape[:-1], -1)


def _multiply(x_MI: jax.Array, matrix_OI: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """x @ matrix.T, summed in a dtype."""
  contracted = (((1,), (1,)), ((), ()))
  return jax.lax.dot_general(x_MI, matrix_OI, contracted, preferred_element_type=dtype)


def prepare_for_xla(model: nnx.Module, dtype: jax.typing.DTypeLike) -> None:
  """Brings stored matrices into what XLA multiplies fast: int4 and int8 in groups into another
  order, those of other formats, and tables in groups, into the numbers that they stand for, in a
  dtype. The model is changed; its layers are split."""
  for _, module in nnx.iter_modules(model):
    matrix = getattr(module, "matrix", None)
    if not isinstance(matrix, StoredMatrix) or matrix.form in _BY_OUTPUT or matrix.values.ndim > 2:
      continue
    in_groups = isinstance(module, StoredKernel) and matrix.form.name in ("int4", "int8")
    module.matrix = GroupedMatrix(matrix) if in_groups else DecodedMatrix(matrix, dtype)


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
