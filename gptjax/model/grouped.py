"""Products of rows with the kernel of their group.

Axes: R rows sorted by group, I and O the axes that a kernel contracts and produces, E groups.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from gptjax.devices import sharding

# Mosaic works in rows of this many lanes.
LANES = 128
# Blocks of Megablox: rows, contracted columns and bytes of a row of produced ones, at most. Twice
# each, and the float32 sums, are then within the 16 MiB of on-chip memory of a kernel.
MAX_ROWS, MAX_CONTRACTED, MAX_PRODUCED_BYTES = 512, 1024, 2048
_AGAINST_COLUMNS = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_product(
  x_RI: jax.Array, kernel_EIO: jax.Array, sizes_E: jax.Array, axes: tuple[str, str, str]
) -> jax.Array:
  """[R, I] -> [R, O]: the first sizes_E[0] rows times the first kernel, the next times the second.

  Within a shard: the kernel, with the logical `axes`, is gathered where it is split over `fsdp`,
  and again in the backward pass, as in `layers.contract`. Rows beyond the last group are 0.
  """
  return _clear(_by_kernel(x_RI, _gather(kernel_EIO, axes), sizes_E, transposed=False), sizes_E)


def _forward(x_RI, kernel_EIO, sizes_E, axes):
  return grouped_product(x_RI, kernel_EIO, sizes_E, axes), (x_RI, kernel_EIO, sizes_E)


def _backward(axes, residuals, dy_RO):
  x_RI, kernel_EIO, sizes_E = residuals
  dy_RO = _clear(dy_RO, sizes_E)
  dx_RI = _by_kernel(dy_RO, _gather(kernel_EIO, axes), sizes_E, transposed=True)
  dkernel_EIO = sharding.sum_scatter(
    _outer_sums(x_RI, dy_RO, sizes_E), axes, sharding.split_names("embed")
  )
  return _clear(dx_RI, sizes_E), dkernel_EIO, None


grouped_product.defvjp(_forward, _backward)


def _by_kernel(x_RI, kernel, sizes_E, *, transposed: bool) -> jax.Array:
  """The product with a kernel [E, I, O], or [E, O, I] if `transposed`."""
  if _tiled(x_RI):
    tiling = _tiling(x_RI, kernel.shape[1 if transposed else 2])
    return gmm(
      x_RI, kernel, sizes_E, x_RI.dtype, tiling, transpose_rhs=transposed, interpret=not _on_tpu()
    )
  if transposed:
    return jax.lax.ragged_dot_general(x_RI, kernel, sizes_E, _AGAINST_COLUMNS)
  return jax.lax.ragged_dot(x_RI, kernel, sizes_E)


def _outer_sums(x_RI, y_RO, sizes_E) -> jax.Array:
  """The sum of the outer products of each group's rows: [E, I, O]."""
  if _tiled(x_RI):
    tiling = _tiling(x_RI, y_RO.shape[1])
    return tgmm(x_RI.T, y_RO, sizes_E, x_RI.dtype, tiling, interpret=not _on_tpu())
  return jax.lax.ragged_dot_general(x_RI, y_RO, sizes_E, _OVER_ROWS)


def _tiled(x_RI: jax.Array) -> bool:
  """Whether Megablox (Gale et al. 2022, arXiv:2211.15841) makes the product. XLA:TPU has a kernel
  of its own for `ragged_dot`, but not for its gradient, where it computes as many products as there
  are groups."""
  return _on_tpu() and x_RI.shape[0] % LANES == 0


def _on_tpu() -> bool:
  return sharding.platform() == "tpu"


def _tiling(x_RI: jax.Array, produced: int) -> tuple[int, int, int]:
  rows, contracted = x_RI.shape
  return (
    math.gcd(rows, MAX_ROWS),
    min(contracted, MAX_CONTRACTED),
    min(produced, MAX_PRODUCED_BYTES // x_RI.dtype.itemsize),
  )


def _gather(kernel: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  names = sharding.split_names("embed")
  if not names:
    return kernel
  return jax.lax.all_gather(kernel, names, axis=axes.index("embed"), tiled=True)


def _clear(x: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """Zeroes the rows that are in no group, which a TPU's kernel leaves uninitialised."""
  return jnp.where(jnp.arange(x.shape[0])[:, None] < sizes_E.sum(), x, jnp.zeros((), x.dtype))
