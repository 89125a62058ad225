"""Quantisation of a frozen model's kernels to half of the bytes or less (QLoRA, Dettmers et al.
2023, arXiv:2305.14314).

The projections of all layers are quantised, experts included. Embeddings, norms and biases stay
float32, and so does the router of experts, whose choices a rounding error could change.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from gptjax.errors import UserError
from gptjax.model.gpt import GPT, ParameterInfo, describe
from gptjax.model.layers import contract, find
from gptjax.quantization.formats import from_nf4, to_nf4

# Values of nf4 that share a scale.
BLOCK = 64


class QuantizedKernel(nnx.Module):
  """Replaces a projection's kernel: `kernel[...]` is the dequantised kernel, float32.

  A projection calls it within its layer, so that one layer at a time is dequantised, and again in
  the backward pass. Experts keep the dequantised kernel for that, unless model.execution.remat says
  otherwise. Both variables have the leading axis L of a stack, if there is one.

  values: int8 in the kernel's shape; for nf4 uint8, two values a byte, the first in the low bits,
  along the last contracted axis. scales: float32, with the kernel's axes: of length 1 if all values
  share a scale, along the last contracted axis one per block.
  """

  def __init__(self, kernel: nnx.Param, base: str):
    shape, first = kernel.shape, len(kernel.shape) - len(kernel.axes)
    first += kernel.axes[:1] == ("experts",)
    contracted = tuple(range(first, first + kernel.fan_in_axes))
    parts = quantize(kernel[...], base, contracted)
    self.values = nnx.Variable(parts["values"])
    self.scales = nnx.Variable(parts["scales"])
    self.base = base
    # Counted from the end, so that a stack's axis makes no difference.
    self.last_contracted = contracted[-1] - len(shape)

  @property
  def shape(self) -> tuple[int, ...]:
    shape = list(self.values.shape)
    shape[self.last_contracted] *= 2 if self.base == "nf4" else 1
    return tuple(shape)

  def __getitem__(self, index) -> jax.Array:
    values = self.values[...]
    if self.base == "nf4":
      pairs = [from_nf4(values & 15), from_nf4(values >> 4)]
      values = jnp.stack(pairs, axis=values.ndim + self.last_contracted + 1)
    scales = self.scales[...]
    if (blocks := scales.shape[self.last_contracted]) > 1:
      scales = jnp.repeat(scales, self.shape[self.last_contracted] // blocks, self.last_contracted)
    return (values.reshape(self.shape) * scales)[index]

  def product(self, x: jax.Array, count: int, axes: tuple[str, ...]) -> jax.Array:
    """Multiplies as `contract` does. For the backward pass the quantised kernel is kept, not the
    dequantised one."""
    multiply = jax.checkpoint(lambda x: contract(x, self[...].astype(x.dtype), count, axes))
    return multiply(x)


def quantize(kernel: jax.Array, base: str, contracted: Sequence[int]) -> dict[str, jax.Array]:
  """Computes `values` and `scales` of a `QuantizedKernel`.

  int8: the largest value of an output column, over the axes `contracted`, becomes 127. nf4: the
  nearest value of the table, times the largest value of a block of 64 along the last of these axes,
  or of the whole axis if 64 does not divide it.
  """
  if base == "int8":
    largest = jnp.abs(kernel).max(contracted, keepdims=True)
    scales = jnp.where(largest == 0, 1, largest) / 127
    return {"values": jnp.round(kernel / scales).astype(jnp.int8), "scales": scales}
  axis, size = contracted[-1], kernel.shape[contracted[-1]]
  before, after = kernel.shape[:axis], kernel.shape[axis + 1 :]
  block = size if size % BLOCK else BLOCK
  blocks = kernel.reshape(*before, size // block, block, *after)
  scales = jnp.abs(blocks).max(axis + 1)
  blocks /= jnp.expand_dims(jnp.where(scales == 0, 1, scales), axis + 1)
  pairs = to_nf4(blocks).reshape(*before, size // 2, 2, *after)
  low, high = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
  return {"values": low | high << 4, "scales": scales}


def quantize_model(model: GPT, base: str) -> None:
  """Replaces each kernel to be quantised by a `QuantizedKernel`, or by bfloat16.

  Raises:
    UserError: as `quantize_params`.
  """
  for name in quantized_names(describe(model), base):
    *path, leaf = name.split("/")
    module = find(model, path)
    kernel = getattr(module, leaf)
    if base == "bfloat16":
      kernel.set_value(kernel[...].astype(jnp.bfloat16))
    else:
      setattr(module, leaf, QuantizedKernel(kernel, base))


def quantize_params(
  params: Mapping[str, Any], parameters: Mapping[str, ParameterInfo], base: str
) -> dict[str, Any]:
  """Quantises parameters for the model that `quantize_model` makes, with unchanged shardings.

  Each kernel is deleted once it is quantised, so that memory never holds both models.

  Args:
    params: a nested dict of arrays, or of `jax.ShapeDtypeStruct`s with shardings, like the result.
    parameters: descriptions by `describe_parameters`.
    base: format, as in `PeftConfig`.

  Raises:
    UserError: the axis along which nf4 makes pairs has an odd length.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  for name in quantized_names(parameters, base):
    kernel = flat.pop(name)
    make = functools.partial(_named_parts, name, base, parameters[name].fan_in_axes)
    shapes = jax.eval_shape(make, kernel)
    shardings = {part: _split_as(kernel.sharding, x.shape) for part, x in shapes.items()}
    if isinstance(kernel, jax.ShapeDtypeStruct):
      flat |= {
        part: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[part])
        for part, x in shapes.items()
      }
    else:
      flat |= jax.jit(make, out_shardings=shardings)(kernel)
      kernel.delete()
  return traverse_util.unflatten_dict(flat, sep="/")


def _named_parts(name: str, base: str, contracted: Sequence[int], kernel: jax.Array):
  if base == "bfloat16":
    return {name: kernel.astype(jnp.bfloat16)}
  return {f"{name}/{part}": x for part, x in quantize(kernel, base, contracted).items()}


def quantized_names(parameters: Mapping[str, ParameterInfo], base: str) -> list[str]:
  """Names of the kernels that are not kept in float32."""
  if base == "float32":
    return []
  names = [
    name for name, info in parameters.items() if info.role == "hidden" and info.axes[0] == "layers"
  ]
  for name in names:
    size = parameters[name].shape[parameters[name].fan_in_axes[-1]]
    if base == "nf4" and size % 2:
      raise UserError(
        f"peft.base='nf4' makes pairs along an axis of {name!r} whose size is {size}, which is "
        "odd: take int8."
      )
  return names


def _split_as(sharding: Sharding, shape: Sequence[int]) -> Sharding:
  """The sharding of a kernel for an array with the same but shorter axes: axes that the mesh does
  not divide stay whole."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  spec = [*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))]
  kept = []
  for names, size in zip(spec, shape, strict=True):
    several = names if isinstance(names, tuple) else () if names is None else (names,)
    parts = math.prod(sharding.mesh.shape[name] for name in several)
    kept.append(names if size % parts == 0 else None)
  return NamedSharding(sharding.mesh, P(*kept))
