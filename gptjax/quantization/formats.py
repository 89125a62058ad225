"""Formats of weights in few bits: what is stored, and the numbers that it stands for.

Axes: O outputs, I inputs of a matrix, G groups of inputs, P stored numbers of an output.
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.errors import UserError, check_choice

# Quantiles of the normal distribution, with a 0, scaled to [-1, 1] (Dettmers et al. 2023,
# arXiv:2305.14314, appendix E).
NF4 = (
  -1.0,
  -0.6961928009986877,
  -0.5250730514526367,
  -0.39491748809814453,
  -0.28444138169288635,
  -0.18477343022823334,
  -0.09105003625154495,
  0.0,
  0.07958029955625534,
  0.16093020141124725,
  0.24611230194568634,
  0.33791524171829224,
  0.44070982933044434,
  0.5626170039176941,
  0.7229568362236023,
  1.0,
)
# Bits of a stored number.
BITS = {"int8": 8, "int4": 4, "nf4": 4, "float8": 8}
# Inputs whose numbers of 4 bits are stored together: the first half of them in the low bits of as
# many bytes, the second in the high bits, so that a processor takes them apart without shuffling.
BLOCK = 32
# What inputs of kernels are rounded to: each token by its largest number, or not at all.
ACTIVATIONS = ("none", "int8")
# The largest number of float8 (e4m3fn).
_FLOAT8_MAX = 448.0


@dataclasses.dataclass(frozen=True)
class Format:
  """How the numbers of a matrix are stored.

  int8 and int4 are whole numbers times a scale; nf4 is a table of 16 numbers times a scale; float8
  is e4m3fn times a scale.

  Attributes:
    name: one of `BITS`.
    group: how many inputs of an output share a scale; 0 is all of them.
    symmetric: of int8 and int4: whether a group's numbers lie around 0. Otherwise each group has a
      zero point too, and its smallest and largest number are exact.
  """

  name: str
  group: int = 0
  symmetric: bool = True

  def __post_init__(self):
    check_choice("format", self.name, BITS)
    if self.group < 0:
      raise UserError(f"group={self.group} is negative; 0 is one scale for all inputs.")
    if not self.symmetric and self.name not in ("int8", "int4"):
      raise UserError(f"symmetric=false: format={self.name!r} has no zero point.")

  def check(self, name: str, inputs: int) -> None:
    """Raises UserError if the inputs of the parameter `name` cannot be stored so."""
    if self.group and inputs % self.group:
      raise UserError(
        f"group={self.group} does not divide the {inputs} inputs of {name!r}: take a divisor, or 0."
      )
    if BITS[self.name] == 4 and inputs % 2:
      raise UserError(
        f"format={self.name!r} stores two numbers a byte, and {name!r} has {inputs} inputs, which "
        "is odd: take int8."
      )


class Grid(NamedTuple):
  """What the stored numbers of a matrix mean: (number - zero) * scale.

  scales: float32 [..., O, G]. zeros: int8 [..., O, G]; None is no zero points.
  """

  scales: jax.Array
  zeros: jax.Array | None


def make_grid(weights: jax.Array, form: Format) -> Grid:
  """The grid of a matrix [..., O, I], float32: rounding to it moves no number out of range.

  Symmetric int8: the largest becomes +-127. Symmetric int4: the one of largest size becomes -8, so
  that all 16 numbers are used, as in ggml's q4_0. Otherwise the smallest and the largest, and 0,
  are in range. nf4 and float8: the largest becomes the largest of the table.
  """
  groups = _in_groups(weights, form)
  if form.symmetric:
    largest = jnp.abs(groups).max(-1)
    if form.name == "int4":
      at = jnp.abs(groups).argmax(-1, keepdims=True)
      largest = jnp.take_along_axis(groups, at, -1)[..., 0]
    top = {"int8": 127.0, "int4": -8.0, "nf4": 1.0, "float8": _FLOAT8_MAX}[form.name]
    return Grid(jnp.where(largest == 0, 1, largest) / top, None)
  low, high = jnp.minimum(groups.min(-1), 0), jnp.maximum(groups.max(-1), 0)
  lowest, highest = _range(form)
  scales = jnp.where(high == low, 1, high - low) / (highest - lowest)
  return Grid(scales, (lowest - jnp.round(low / scales)).astype(jnp.int8))


def to_codes(weights: jax.Array, grid: Grid, form: Format) -> jax.Array:
  """The number of the grid that is nearest to each weight: [..., O, I], int8, uint8 for nf4, or
  float8."""
  groups = _in_groups(weights, form) / grid.scales[..., None]
  if form.name == "float8":
    codes = jnp.clip(groups, -_FLOAT8_MAX, _FLOAT8_MAX).astype(jnp.float8_e4m3fn)
  elif form.name == "nf4":
    codes = to_nf4(groups)
  else:
    zeros = 0 if grid.zeros is None else grid.zeros[..., None]
    codes = jnp.clip(jnp.round(groups) + zeros, *_range(form)).astype(jnp.int8)
  return codes.reshape(weights.shape)


def from_codes(codes: jax.Array, grid: Grid, form: Format) -> jax.Array:
  """The weights that codes stand for: float32 [..., O, I]."""
  values = from_nf4(codes) if form.name == "nf4" else codes.astype(jnp.float32)
  groups = _in_groups(values, form)
  if grid.zeros is not None:
    groups -= grid.zeros[..., None].astype(jnp.float32)
  return (groups * grid.scales[..., None]).reshape(codes.shape)


def nearest(weights: jax.Array, form: Format) -> jax.Array:
  """A matrix [..., O, I], float32, each number replaced by the nearest of its grid."""
  grid = make_grid(weights, form)
  return from_codes(to_codes(weights, grid, form), grid, form)


def pack(codes: jax.Array, form: Format) -> jax.Array:
  """Codes as they are stored, [..., O, P]: two to a byte (uint8) if they have 4 bits.

  int4 is stored with 8 added, so that the bits are a number from 0 to 15.
  """
  if BITS[form.name] == 8:
    return codes
  codes = (codes + (8 if form.name == "int4" else 0)).astype(jnp.uint8)
  block = _block(codes.shape[-1])
  halves = codes.reshape(*codes.shape[:-1], -1, 2, block // 2)
  low, high = halves[..., 0, :], halves[..., 1, :]
  return (low | high << 4).reshape(*codes.shape[:-1], codes.shape[-1] // 2)


def unpack(values: jax.Array, form: Format) -> jax.Array:
  """The codes [..., O, I] of what `pack` stores."""
  if BITS[form.name] == 8:
    return values
  size = 2 * values.shape[-1]
  halves = values.reshape(*values.shape[:-1], -1, _block(size) // 2)
  codes = jnp.stack([halves & 15, halves >> 4], axis=-2).reshape(*values.shape[:-1], size)
  return codes.astype(jnp.int8) - 8 if form.name == "int4" else codes


def to_nf4(values: jax.Array) -> jax.Array:
  """The places in `NF4`, uint8, of the numbers nearest to values in [-1, 1]."""
  codes = jnp.zeros(values.shape, jnp.uint8)
  for below, above in itertools.pairwise(NF4):
    codes += (values > (below + above) / 2).astype(jnp.uint8)
  return codes


def from_nf4(codes: jax.Array) -> jax.Array:
  """NF4[codes], float32, by selections, since accelerators gather element by element."""
  values = [jnp.float32(value) for value in NF4]
  for bit in range(4):
    is_set = (codes >> bit & 1).astype(bool)
    values = [jnp.where(is_set, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
  return values[0]


def _in_groups(weights: jax.Array, form: Format) -> jax.Array:
  """[..., O, I] -> [..., O, G, I / G]."""
  return weights.reshape(*weights.shape[:-1], -1, form.group or weights.shape[-1])


def _range(form: Format) -> tuple[int, int]:
  """The smallest and the largest whole number of a format."""
  if form.name == "int4":
    return -8, 7
  return (-127, 127) if form.symmetric else (-128, 127)


def _block(inputs: int) -> int:
  return BLOCK if inputs % BLOCK == 0 else inputs
