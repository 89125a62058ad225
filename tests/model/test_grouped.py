import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.model import grouped

R, I, O, E = 256, 24, 40, 4
AXES = ("experts", "embed", "mlp")
# Sums of up to 256 products: 256 roundings of 2^-24 are 1.5e-5 of the largest element.
TOLERANCE = 1.5e-5
SIZES = [
  (64, 64, 64, 64),
  (0, 100, 0, 60),  # Groups without rows, and rows without a group.
  (0, 0, 0, 256),
  (1, 127, 128, 0),
  (0, 0, 0, 0),
]


@pytest.fixture(scope="module")
def arrays():
  rng = np.random.default_rng(0)
  shapes = [(R, I), (E, I, O), (R, O)]
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def looped(x, kernel, dy, sizes):
  """The product and its gradients, group by group."""
  y, dx, dkernel = np.zeros((R, O)), np.zeros((R, I)), np.zeros((E, I, O))
  for i, size in enumerate(sizes):
    rows = slice(sum(sizes[:i]), sum(sizes[:i]) + size)
    y[rows] = x[rows] @ kernel[i]
    dx[rows], dkernel[i] = dy[rows] @ kernel[i].T, x[rows].T @ dy[rows]
  return y, dx, dkernel


@pytest.mark.parametrize("tiled", [False, True], ids=["ragged_dot", "megablox"])
def test_each_row_is_multiplied_by_the_kernel_of_its_group(monkeypatch, arrays, tiled):
  # Megablox runs in interpret mode.
  monkeypatch.setattr(grouped, "_tiled", lambda _: tiled)

  @jax.jit
  def run(x, kernel, dy, sizes):
    y, pull = jax.vjp(lambda x, kernel: grouped.grouped_product(x, kernel, sizes, AXES), x, kernel)
    return y, *pull(dy)

  for sizes in SIZES:
    actual = run(*arrays, jnp.array(sizes, jnp.int32))
    for a, b in zip(actual, looped(*arrays, sizes), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * max(1, np.abs(b).max()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_blocks_fit_the_memory_of_a_kernel(dtype):
  x = jnp.zeros((3 * 512, 8192), dtype)
  rows, contracted, produced = grouped._tiling(x, 8192)
  width = x.dtype.itemsize
  for block, (a, b) in {
    (rows, produced): ((rows, contracted), (contracted, produced)),
    (contracted, produced): ((rows, contracted), (rows, produced)),
  }.items():
    moved = 2 * width * sum(np.prod(sides) for sides in (block, a, b))
    assert moved + 4 * np.prod(block) <= 16 * 2**20
  assert x.shape[0] % rows == 0
