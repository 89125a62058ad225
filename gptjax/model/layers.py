"""The leaves of the model: projections, norms, dropout.

Parameters name their logical axes and their role where they are made; optimizers, muP, adapters and
quantisation, which treat parameters differently, read them through `ParameterInfo`.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.random import threefry2x32_p

from gptjax.devices import sharding

# 'embedding': a table that is looked up. 'hidden': a matrix between two widths of the network.
# 'head': a matrix above the layers, onto logits or scores. 'router': onto the experts' logits.
# 'norm': a norm's scale. 'bias'. 'scalar': a learnt factor or logit that no width multiplies.
ROLES = ("embedding", "hidden", "head", "router", "norm", "bias", "scalar")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def contract(x: jax.Array, kernel: jax.Array, count: int, axes: tuple[str, ...]) -> jax.Array:
  """Contracts the last `count` axes of x with the first of the kernel; the others of both remain.

  The kernel, with the logical `axes`, is gathered where it is split over `fsdp`, and again in the
  backward pass. Its gradient is written in the kernel's own layout: JAX's rule for `dot_general`
  makes it transposed, and on a CPU the copies cost 7 % of a training step (experiments/cpu_speed).
  Because the rule is a custom one, there is no forward-mode derivative.
  """
  return jnp.tensordot(x, sharding.gather(kernel, axes), axes=count)


def _contract_forward(x: jax.Array, kernel: jax.Array, count: int, axes: tuple[str, ...]):
  return contract(x, kernel, count, axes), (x, kernel)


def _contract_backward(count: int, axes: tuple[str, ...], residuals, dy: jax.Array):
  x, kernel = residuals
  columns = kernel.ndim - count
  dy_columns = tuple(range(dy.ndim - columns, dy.ndim))
  kernel_columns = tuple(range(count, kernel.ndim))
  whole = sharding.gather(kernel, axes)
  dx = jax.lax.dot_general(dy, whole, ((dy_columns, kernel_columns), ((), ())))
  return dx, sharding.sum_over_rows(_outer_sum, axes, x, dy)


def _outer_sum(x: jax.Array, y: jax.Array) -> jax.Array:
  """Sum of the outer products of x and y over their leading axes 'batch' and 'time'."""
  return jax.lax.dot_general(x, y, (((0, 1), (0, 1)), ((), ())))


contract.defvjp(_contract_forward, _contract_backward)


class Linear(nnx.Module):
  """x @ kernel + bias, contracting one or more trailing axes of x.

  Every matrix product with a weight goes through this class, so adapters and quantisation have
  one place to attach to.

  Shapes: [..., *in_shape] -> [..., *out_shape]; kernel [*in_shape, *out_shape], float32.

  Args:
    in_shape, out_shape: the contracted and the produced axes.
    axes: logical names of the kernel's axes, in order.
    bias: whether to add a bias of `out_shape`.
    std: standard deviation of the normal initialisation.
    dtype: dtype of the product.
    role: role of the kernel, one of `ROLES`.
  """

  def __init__(
    self,
    in_shape: Sequence[int],
    out_shape: Sequence[int],
    *,
    axes: Sequence[str],
    bias: bool,
    std: float,
    dtype: str,
    rngs: nnx.Rngs,
    role: str = "hidden",
  ):
    kernel = std * jax.random.normal(rngs.params(), (*in_shape, *out_shape))
    self.kernel = nnx.Param(kernel, axes=tuple(axes), fan_in_axes=len(in_shape), role=role)
    out_axes = tuple(axes[len(in_shape) :])
    self.bias = nnx.Param(jnp.zeros(tuple(out_shape)), axes=out_axes, role="bias") if bias else None
    self.contracted_axes = len(in_shape)
    self.axes = tuple(axes)
    self.dtype = dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.product(x)
    return y if self.bias is None else add_vector(y, self.bias[...])

  def product(self, x: jax.Array) -> jax.Array:
    """Returns x @ kernel, without the bias. A kernel in another form than a parameter multiplies
    by a method `product(x, contracted_axes, axes)` of its own."""
    x = x.astype(self.dtype)
    if isinstance(self.kernel, nnx.Param):
      return contract(x, self.kernel[...].astype(self.dtype), self.contracted_axes, self.axes)
    return self.kernel.product(x, self.contracted_axes, self.axes)


class Embedding(nnx.Module):
  """A table of vectors. Shapes: int [...] -> float32 [..., D]; embedding [rows, D], float32."""

  def __init__(self, rows: int, width: int, *, axes: Sequence[str], std: float, rngs: nnx.Rngs):
    table = std * jax.random.normal(rngs.params(), (rows, width))
    self.embedding = nnx.Param(table, axes=tuple(axes), role="embedding")

  def __call__(self, indices: jax.Array) -> jax.Array:
    return jnp.take(self.embedding[...], indices, axis=0, mode="clip")

  def scores(self, x: jax.Array) -> jax.Array:
    """The product with every vector of the table: [..., D] -> [..., rows], in the dtype of x."""
    return jnp.einsum("...d,vd->...v", x, self.embedding[...].astype(x.dtype))


class LayerNorm(nnx.Module):
  """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, in float32."""

  def __init__(self, width: int, *, eps: float, bias: bool, axis: str = "embed"):
    self.scale = nnx.Param(jnp.ones(width), axes=(axis,), role="norm")
    self.bias = nnx.Param(jnp.zeros(width), axes=(axis,), role="bias") if bias else None
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    # E[x^2] - E[x]^2, so that one pass over x makes both.
    variance = jnp.maximum(jnp.square(y).mean(-1, keepdims=True) - jnp.square(mean), 0)
    y = (y - mean) * jax.lax.rsqrt(variance + self.eps)
    y *= _as_last_axis(self.scale[...], y)
    if self.bias is not None:
      y += _as_last_axis(self.bias[...], y)
    return y.astype(x.dtype)


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + eps) * (scale + offset) over the last axis, in float32."""

  def __init__(self, width: int, *, eps: float, offset: float = 0.0, axis: str = "embed"):
    self.scale = nnx.Param(jnp.full(width, 1 - offset), axes=(axis,), role="norm")
    self.eps = eps
    self.offset = offset

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    return (y * _as_last_axis(self.scale[...] + self.offset, y)).astype(x.dtype)


class Mix(nnx.Module):
  """a x + b y with two learnt scalars. Shapes: x and y alike -> the same; weights [2], float32."""

  def __init__(self, a: float, b: float):
    self.weights = nnx.Param(jnp.array([a, b]), axes=("terms",), role="scalar")

  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    a, b = self.weights[...]
    # As in `add_vector`.
    return (a * x + b * y).astype(x.dtype)


def add_vector(x: jax.Array, vector: jax.Array) -> jax.Array:
  """x + vector over the last axes of x, in the dtype of x.

  The sum is float32 until it is rounded, and with it the gradient of the vector: added up over all
  tokens and devices in bfloat16, it would stand still once it is 256 times one of its terms.
  """
  y = x + vector.reshape((1,) * (x.ndim - vector.ndim) + vector.shape)
  return y.astype(x.dtype)


def dropout(
  x: jax.Array, rate: float, key: jax.Array | None, time_axes: Sequence[int] = (1,)
) -> jax.Array:
  """Zeroes elements with probability `rate` and rescales the rest. No key, no dropout.

  Which ones is decided by their places in the text: `time_axes` are positions, queries before keys,
  and a mesh that splits rows over `context` has them in another order.
  """
  if key is None or rate == 0:
    return x
  places = [jnp.arange(size, dtype=jnp.uint32) for size in x.shape]
  order = sharding.time_order(length := x.shape[time_axes[0]])
  for axis in () if order is None else time_axes:
    # Keys that are no positions of the row, but adapters' own, come first.
    own = x.shape[axis] - length
    places[axis] = jnp.concatenate([places[axis][:own], own + order.astype(np.uint32)])
  keep = _random_bits(key, places) >= np.uint32(rate * 2**32)
  return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))


def _random_bits(key: jax.Array, places: Sequence[jax.Array]) -> jax.Array:
  """Random uint32 for every combination of places, one vector an axis: a hash of key and places.

  `jax.random` hashes the indices of an array alone. Of the hash's two words the first counts the
  leading axes and the second the last two, since all together may be more than 2^32.
  """

  def count(total: jax.Array, axis: jax.Array) -> jax.Array:
    return jnp.add.outer(total * np.uint32(axis.size), axis)

  zero, parts = jnp.uint32(0), (places[:-2], places[-2:])
  rows, elements = (functools.reduce(count, part, zero) for part in parts)
  counters = jnp.broadcast_arrays(rows[..., None, None], elements[(None,) * rows.ndim])
  words = jax.random.key_data(key)
  first, second = threefry2x32_p.bind(words[0], words[1], *counters)
  return first ^ second


def find(module: Any, path: Iterable[str | int]) -> Any:
  """What is at a path of names and numbers below a module."""
  for name in path:
    module = module[name] if isinstance(name, int) else getattr(module, name)
  return module


def adopt(module: nnx.Module, base: nnx.Module) -> None:
  """Gives a module all attributes of another: the parameters themselves, not copies."""
  for name, value in vars(base).items():
    if not name.startswith("_"):
      setattr(module, name, value)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
  """cap * tanh(x / cap): bounded by +-cap, the identity near zero. A cap of 0 is none."""
  return cap * jnp.tanh(x / cap) if cap else x


def _as_last_axis(vector: jax.Array, like: jax.Array) -> jax.Array:
  return vector.reshape((1,) * (like.ndim - 1) + (-1,))
