"""The parts of a model that multiply and attend by the kernels of this package.

Axes: M rows, D width, F outputs of a product, G groups, V vocabulary; B batch, T positions, N query
heads, K key-value heads, H head width, X distances of positions.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.cpu import kernels
from gptjax.model.attention import Attention
from gptjax.model.config import ModelConfig
from gptjax.model.feedforward import FeedForward
from gptjax.model.gpt import GPT
from gptjax.model.layers import Embedding, Linear, adopt, find
from gptjax.quantization.int8 import quantize
from gptjax.quantization.kernel import (
  StoredEmbedding,
  StoredKernel,
  StoredMatrix,
  as_matrix,
  round_tokens,
)


def use_kernels(
  model: GPT, modules: Sequence[tuple[Sequence[Any], Any]], weights: str, length: int
) -> None:
  """Replaces what decoding spends its time on.

  Activations are then float32, whatever the dtype of the weights: a CPU is no faster with others.

  Args:
    model: its layers are split, and its parameters on one CPU. It is changed.
    modules: paths and modules of its decoder.
    weights: in what the matrices are kept that are not stored in few bits.
    length: positions of a row, at most.
  """
  bias_NX = _bias_by_distance(model, length)
  for _, module in modules:
    if isinstance(getattr(module, "config", None), ModelConfig):
      module.config = module.config.replace({"dtype": "float32"})
    if isinstance(module, Attention):
      _pack_kernels([module.query, module.key, module.value], weights)
    elif isinstance(module, FeedForward) and module.gate is not None:
      _pack_kernels([module.gate, module.up], weights)
  for path, module in modules:
    if isinstance(module, Linear):
      module.dtype = "float32"
      _pack_kernels([module], weights)
    elif type(module) is Attention:
      setattr(find(model, path[:-1]), path[-1], PagedAttention(module, bias_NX))
  if model.head is None:
    table = model.embed
    if isinstance(table, StoredEmbedding):
      matrix = join([table.matrix], weights)
    else:
      matrix = pack(table.embedding[...], weights)
    model.embed = PackedEmbedding(matrix)


def _bias_by_distance(model: GPT, length: int) -> jax.Array | None:
  """The bias of attention logits by how far back a key is, float32 [N, X]; None without one."""
  positions = jnp.arange(length)[None]
  bias_1N1X = model.attention_bias(positions[:, -1:], positions[:, ::-1])
  return None if bias_1N1X is None else bias_1N1X[0, :, 0]


def _pack_kernels(projections: list[Linear], weights: str) -> None:
  """Replaces the kernels of projections of the same input, unless they are replaced already."""
  own = [one.kernel for one in projections]
  input_scales, activations = None, "none"
  if all(isinstance(kernel, StoredKernel) for kernel in own):
    matrix = join([kernel.matrix for kernel in own], weights)
    shapes = [kernel.out_shape for kernel in own]
    input_scales, activations = own[0].input_scales, own[0].activations
  elif all(isinstance(kernel, nnx.Param) for kernel in own):
    # A rounding error of the router could change its choice of experts.
    weights = "float32" if own[0].role == "router" else weights
    counts = [one.contracted_axes for one in projections]
    shapes = [kernel.shape[count:] for kernel, count in zip(own, counts, strict=True)]
    matrices = [
      as_matrix(kernel[...], count, kernel.ndim - count)
      for kernel, count in zip(own, counts, strict=True)
    ]
    matrix = pack(jnp.concatenate(matrices), weights)
  else:
    return
  first = 0
  for one, shape in zip(projections, shapes, strict=True):
    one.kernel = PackedKernel(matrix, first, shape, input_scales, activations)
    first += math.prod(shape)


class PackedMatrix(nnx.Module):
  """A matrix whose numbers have a scale each output at most.

  matrix_FD: [F, D] in the format of the weights. scales_F: float32, for int8; else None.
  """

  def __init__(self, matrix_FD: jax.Array, scales_F: jax.Array | None):
    self.matrix_FD = nnx.Variable(matrix_FD)
    self.scales_F = None if scales_F is None else nnx.Variable(scales_F)

  def product(self, x_MD: jax.Array) -> jax.Array:
    """x @ matrix.T, float32 [M, F]."""
    scales_F = None if self.scales_F is None else self.scales_F[...]
    return kernels.product(x_MD, self.matrix_FD[...], scales_F)

  def rows(self, indices: jax.Array) -> jax.Array:
    """Rows of the matrix, float32 [..., D]."""
    rows = jnp.take(self.matrix_FD[...], indices, axis=0, mode="clip").astype(jnp.float32)
    if self.scales_F is None:
      return rows
    return rows * jnp.take(self.scales_F[...], indices, mode="clip")[..., None]


class GroupedMatrix(StoredMatrix):
  """A matrix of few bits, with a scale for each group of inputs."""

  def product(self, x_MD: jax.Array) -> jax.Array:
    """x @ matrix.T, float32 [M, F]."""
    zeros_FG = None if self.zeros is None else self.zeros[...]
    return kernels.grouped_product(x_MD, self.values[...], self.scales[...], zeros_FG)


class PackedKernel(nnx.Module):
  """A projection's kernel, beside those of other projections of the same input.

  Each projection asks for the product with all of them, and takes its part. As the input is the
  same, XLA multiplies once.

  Attributes:
    matrix: of all of them, a `PackedMatrix` or a `GroupedMatrix`.
    first: the projection's first output.
    out_shape: the axes that it produces.
    input_scales: float32 [D], by which the input is multiplied first; None is 1.
    activations: what the input is rounded to, one of `formats.ACTIVATIONS`.
  """

  def __init__(
    self,
    matrix: PackedMatrix | GroupedMatrix,
    first: int,
    out_shape: Sequence[int],
    input_scales: nnx.Variable | None,
    activations: str,
  ):
    self.matrix, self.input_scales, self.activations = matrix, input_scales, activations
    self.first, self.out_shape = first, tuple(out_shape)

  def product(self, x: jax.Array, count: int, axes: tuple[str, ...]) -> jax.Array:
    """Multiplies as `layers.contract` does."""
    del axes  # One device holds all.
    leading = x.shape[: x.ndim - count]
    x_MD = x.reshape(math.prod(leading), -1)
    if self.input_scales is not None:
      x_MD *= self.input_scales[...][None]
    if self.activations == "int8":
      x_MD = round_tokens(x_MD, 1)
    y_MF = self.matrix.product(x_MD)[:, self.first : self.first + math.prod(self.out_shape)]
    return y_MF.reshape(*leading, *self.out_shape)


class PackedEmbedding(Embedding):
  """A table [V, D] that is both looked up and multiplied with: the embedding of a tied head."""

  def __init__(self, matrix: PackedMatrix | GroupedMatrix):
    self.matrix = matrix

  def __call__(self, indices: jax.Array) -> jax.Array:
    return self.matrix.rows(indices)

  def scores(self, x: jax.Array) -> jax.Array:
    return self.matrix.product(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class PagedAttention(Attention):
  """Attention that reads a paged cache where it lies."""

  in_place = True

  def __init__(self, base: Attention, bias_NX: jax.Array | None):
    adopt(self, base)
    self.bias_NX = None if bias_NX is None else nnx.Variable(bias_NX)

  def _attend_cached(
    self, q_BTNH, k_BTKH, v_BTKH, positions_BT, mask, bias_BNTS, cache: Any
  ) -> tuple[jax.Array, Any]:
    arrays, structure = jax.tree.flatten(cache.pool)
    if arrays[0].dtype == jnp.uint8:
      # Of 4 bits, which the kernel does not read.
      return super()._attend_cached(q_BTNH, k_BTKH, v_BTKH, positions_BT, mask, bias_BNTS, cache)
    # Values and scales of int8 alternate.
    step = len(arrays) // 2
    attended_BTNH, *pool = kernels.attend(
      q_BTNH,
      k_BTKH,
      v_BTKH,
      *arrays[::step],
      cache.tables_BI,
      positions_BT,
      scale=self._scale,
      cap=self.config.attention.soft_cap,
      window=mask.window,
      sinks_N=None if self.sinks is None else self.sinks[...],
      bias_NX=None if self.bias_NX is None else self.bias_NX[...],
      prefix_B=cache.prefix_B,
      scales=None if step == 1 else tuple(arrays[1::step]),
    )
    order = pool if step == 1 else [pool[0], pool[2], pool[1], pool[3]]
    return attended_BTNH, cache.with_pool(structure.unflatten(order))


def pack(matrix_FD: jax.Array, weights: str) -> PackedMatrix:
  """Rounds a matrix [F, D] to the format of the weights."""
  if weights == "int8":
    return PackedMatrix(*quantize(matrix_FD, (1,)))
  return PackedMatrix(matrix_FD.astype(weights), None)


def join(matrices: Sequence[StoredMatrix], weights: str) -> PackedMatrix | GroupedMatrix:
  """One matrix of the outputs of several with the same inputs and format: as they are stored if a
  kernel multiplies with them, else decoded, in the format of the weights."""
  form, inputs = matrices[0].form, matrices[0].inputs
  values = jnp.concatenate([one.values[...] for one in matrices])
  scales = jnp.concatenate([one.scales[...] for one in matrices])
  groups = scales.shape[-1]
  if form.name == "int8" and groups == 1 and form.symmetric:
    return PackedMatrix(values, scales[:, 0])
  if not kernels.multiplies(form.name, inputs, groups):
    return pack(jnp.concatenate([one.weights() for one in matrices]), weights)
  zeros = None if form.symmetric else jnp.concatenate([one.zeros[...] for one in matrices])
  return GroupedMatrix(values, scales, zeros, form)
