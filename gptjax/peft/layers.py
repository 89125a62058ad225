"""Projections with adapters. Each replaces a projection and keeps its parameters' names.

A projection may be stacked over all layers: its parameters and its adapter's then have a leading
axis L, which is gone when a layer is called.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.model.feedforward import FeedForward
from gptjax.model.layers import Linear, add_vector, adopt, contract


class Adapter(nnx.Param):
  """A parameter that is trained while the others are frozen."""


def split_shape(base: Linear) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
  """Splits a kernel's shape: the stack's axis (L,) or (), the inputs, the outputs."""
  shape = base.kernel.shape
  stack = len(shape) - len(base.axes)
  inputs = stack + base.contracted_axes
  return shape[:stack], shape[stack:inputs], shape[inputs:]


class AdaptedLinear(Linear):
  """A projection [..., *in] -> [..., *out] with something added or changed."""

  def __init__(self, base: Linear):
    adopt(self, base)

  @property
  def _in_axes(self) -> tuple[str, ...]:
    return self.axes[: self.contracted_axes]

  @property
  def _out_axes(self) -> tuple[str, ...]:
    return self.axes[self.contracted_axes :]


class LoRALinear(AdaptedLinear):
  """x W + b + scale x A B (Hu et al. 2021, equation 3), A uniform and B 0 at first.

  lora_a: float32 [*in, r]. lora_b: float32 [r, *out].
  """

  def __init__(self, base: Linear, *, rank: int, scale: float, rngs: nnx.Rngs):
    super().__init__(base)
    stack, ins, outs = split_shape(base)
    bound = 1 / math.sqrt(math.prod(ins))
    self.lora_a = Adapter(
      jax.random.uniform(rngs.params(), (*stack, *ins, rank), minval=-bound, maxval=bound),
      axes=(*self._in_axes, "rank"),
      fan_in_axes=len(ins),
      role="hidden",
    )
    self.lora_b = Adapter(
      jnp.zeros((*stack, rank, *outs)),
      axes=("rank", *self._out_axes),
      fan_in_axes=1,
      role="hidden",
    )
    self.scale = scale

  def __call__(self, x: jax.Array) -> jax.Array:
    return super().__call__(x) + self._low_rank(x)

  def merged(self) -> tuple[jax.Array, jax.Array | None]:
    """The kernel and the bias of an equivalent plain projection."""
    return self.kernel[...] + self._change(), _value(self.bias)

  def unmerged(self, kernel: jax.Array, bias: jax.Array | None):
    """The inverse of `merged`, to rounding."""
    return kernel - self._change(), bias

  def _low_rank(self, x: jax.Array) -> jax.Array:
    a, b = self._inward().astype(self.dtype), self.lora_b[...].astype(self.dtype)
    h = contract(x.astype(self.dtype), a, self.contracted_axes, (*self._in_axes, "rank"))
    return contract(self.scale * h, b, 1, ("rank", *self._out_axes))

  def _change(self) -> jax.Array:
    """The change of the kernel, scale A B, in its shape."""
    stack, ins, outs = split_shape(self)
    a = self._inward().reshape(*stack, math.prod(ins), -1)
    b = self.lora_b[...].reshape(*stack, -1, math.prod(outs))
    return self.scale * (a @ b).reshape(self.kernel.shape)

  def _inward(self) -> jax.Array:
    return self.lora_a[...]


class AdaLoRALinear(LoRALinear):
  """x W + b + scale x A diag(lambda) B (Zhang et al. 2023, equation 3), A and B normal of standard
  deviation 0.02 and lambda 0 at first. Their P and Q are the transposes of B and A.

  singular_values: float32 [r], lambda.
  """

  def __init__(self, base: Linear, *, rank: int, scale: float, rngs: nnx.Rngs):
    super().__init__(base, rank=rank, scale=scale, rngs=rngs)
    for factor in (self.lora_a, self.lora_b):
      factor[...] = 0.02 * jax.random.normal(rngs.params(), factor.shape)
    stack, _, _ = split_shape(base)
    self.singular_values = Adapter(jnp.zeros((*stack, rank)), axes=("rank",), role="scalar")

  def _inward(self) -> jax.Array:
    stack, ins, _ = split_shape(self)
    values = self.singular_values[...].reshape(*stack, *(1,) * len(ins), -1)
    return self.lora_a[...] * values


class DoRALinear(LoRALinear):
  """x V m / |V| + b with V = W + scale A B, |V| the norm of each column (Liu et al. 2024, equation
  5). As in their section 4.3, |V| has no gradient.

  magnitude: float32 [*out], m; the norm of W's columns at first.
  """

  def __init__(self, base: Linear, *, rank: int, scale: float, rngs: nnx.Rngs):
    super().__init__(base, rank=rank, scale=scale, rngs=rngs)
    self.magnitude = Adapter(self._norms(), axes=self._out_axes, role="scalar")

  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.product(x) + self._low_rank(x)
    ratio = self.magnitude[...] / jax.lax.stop_gradient(self._norms())
    y = (y * _trailing(ratio, y)).astype(self.dtype)
    return y if self.bias is None else add_vector(y, self.bias[...])

  def merged(self) -> tuple[jax.Array, jax.Array | None]:
    ratio = self.magnitude[...] / self._norms()
    ratio = jnp.expand_dims(ratio, self._contracted)
    return (self.kernel[...] + self._change()) * ratio, _value(self.bias)

  @property
  def _contracted(self) -> tuple[int, ...]:
    first = len(split_shape(self)[0])
    return tuple(range(first, first + self.contracted_axes))

  def _norms(self) -> jax.Array:
    return jnp.sqrt(jnp.square(self.kernel[...] + self._change()).sum(self._contracted))


class IA3Linear(AdaptedLinear):
  """(x W + b) * scale, or (x * scale) W + b (Liu et al. 2022, section 3.3), scale 1 at first.

  ia3_scale: float32 [*out] or [*in].
  """

  def __init__(self, base: Linear, *, scale_input: bool):
    super().__init__(base)
    stack, ins, outs = split_shape(base)
    shape, axes = (ins, self._in_axes) if scale_input else (outs, self._out_axes)
    self.ia3_scale = Adapter(jnp.ones((*stack, *shape)), axes=axes, role="scalar")
    self.scale_input = scale_input

  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.ia3_scale[...]
    if self.scale_input:
      return super().__call__((x * _trailing(scale, x)).astype(self.dtype))
    y = super().__call__(x)
    return (y * _trailing(scale, y)).astype(self.dtype)

  def merged(self) -> tuple[jax.Array, jax.Array | None]:
    kernel, bias = self.kernel[...] * self._factors(), _value(self.bias)
    return kernel, bias if self.scale_input or bias is None else bias * self.ia3_scale[...]

  def unmerged(self, kernel: jax.Array, bias: jax.Array | None):
    kernel = kernel / self._factors()
    return kernel, bias if self.scale_input or bias is None else bias / self.ia3_scale[...]

  def _factors(self) -> jax.Array:
    """Factors of the kernel's elements, to be broadcast."""
    stack, ins, outs = split_shape(self)
    ones_in, ones_out = (1,) * len(ins), (1,) * len(outs)
    shape = (*ins, *ones_out) if self.scale_input else (*ones_in, *outs)
    return self.ia3_scale[...].reshape(*stack, *shape)


class Bottleneck(nnx.Module):
  """act(x W_down + b) W_up + b, W_up and the biases 0 at first. [..., *in] -> [..., *in].

  down, up: float32 [*in, r] and [r, *in]. down_bias, up_bias: float32 [r] and [*in].
  """

  def __init__(self, stack, shape, axes, *, rank, activation, dtype, rngs: nnx.Rngs):
    std = 1 / math.sqrt(math.prod(shape))
    self.down = Adapter(
      std * jax.random.normal(rngs.params(), (*stack, *shape, rank)),
      axes=(*axes, "rank"),
      fan_in_axes=len(shape),
      role="hidden",
    )
    self.down_bias = Adapter(jnp.zeros((*stack, rank)), axes=("rank",), role="bias")
    self.up = Adapter(
      jnp.zeros((*stack, rank, *shape)), axes=("rank", *axes), fan_in_axes=1, role="hidden"
    )
    self.up_bias = Adapter(jnp.zeros((*stack, *shape)), axes=tuple(axes), role="bias")
    self.axes = tuple(axes)
    self.activation = activation
    self.dtype = dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    down, up = self.down[...].astype(self.dtype), self.up[...].astype(self.dtype)
    h = contract(x.astype(self.dtype), down, len(self.axes), (*self.axes, "rank"))
    h = self.activation(add_vector(h, self.down_bias[...]))
    y = contract(h, up, 1, ("rank", *self.axes))
    return add_vector(y, self.up_bias[...])


class HoulsbyLinear(AdaptedLinear):
  """y + bottleneck(y) of a projection's output y (Houlsby et al. 2019, figure 2)."""

  def __init__(self, base: Linear, *, rank: int, rngs: nnx.Rngs):
    super().__init__(base)
    stack, _, outs = split_shape(base)
    self.adapter = Bottleneck(
      stack, outs, self._out_axes, rank=rank, activation=jax.nn.gelu, dtype=base.dtype, rngs=rngs
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    y = super().__call__(x)
    return y + self.adapter(y)


class ParallelFeedForward(FeedForward):
  """network(x) + scale bottleneck(x) (He et al. 2022, table 1, 'scaled parallel adapter')."""

  def __init__(self, base: FeedForward, *, rank: int, scale: float, rngs: nnx.Rngs):
    adopt(self, base)
    stack, ins, _ = split_shape(base.up)
    axes = base.up.axes[: base.up.contracted_axes]
    self.adapter = Bottleneck(
      stack, ins, axes, rank=rank, activation=jax.nn.relu, dtype=base.up.dtype, rngs=rngs
    )
    self.scale = scale

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    return super().__call__(x_BTD) + self.scale * self.adapter(x_BTD)


def _value(parameter: nnx.Param | None) -> jax.Array | None:
  return None if parameter is None else parameter[...]


def _trailing(x: jax.Array, like: jax.Array) -> jax.Array:
  return x.reshape((1,) * (like.ndim - x.ndim) + x.shape)
