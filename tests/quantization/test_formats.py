"""What a format stores, and how near it is to what it was made from."""

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.quantization.formats import (
  BITS,
  NF4,
  Format,
  from_codes,
  make_grid,
  pack,
  to_codes,
  unpack,
)

FORMS = [
  *(Format(name, group) for name in BITS for group in (0, 32)),
  *(Format(name, group, symmetric=False) for name in ("int8", "int4") for group in (0, 32)),
]


def matrix(*shape):
  weights = np.random.default_rng(0).standard_t(4, size=shape).astype(np.float32)
  weights[..., -1, :] = 0
  return weights


def numbers_of(form, grid):
  """All numbers that a group can have, [O, G, N], in plain numpy."""
  scales = np.asarray(grid.scales)[..., None]
  if form.name == "nf4":
    return np.array(NF4, np.float32) * scales
  if form.name == "float8":
    codes = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn.dtype).astype(np.float32)
    return codes[np.isfinite(codes)] * scales
  top = 2 ** (BITS[form.name] - 1)
  low = -top + (form.symmetric and form.name == "int8")
  zeros = 0 if grid.zeros is None else np.asarray(grid.zeros, np.float32)[..., None]
  return (np.arange(low, top, dtype=np.float32) - zeros) * scales


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_each_weight_becomes_the_nearest_number_of_its_group(form):
  weights = matrix(6, 64)
  grid = make_grid(weights, form)
  found = np.asarray(from_codes(to_codes(weights, grid, form), grid, form))
  numbers = numbers_of(form, grid)
  groups = weights.reshape(6, numbers.shape[1], -1)
  errors = np.abs(groups[..., None] - numbers[:, :, None, :]).min(-1)
  np.testing.assert_allclose(
    np.abs(found.reshape(groups.shape) - groups), errors, rtol=1e-4, atol=1e-6
  )
  assert (found[-1] == 0).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_largest_number_of_a_group_is_kept(form):
  weights = matrix(6, 64)
  grid = make_grid(weights, form)
  found = np.asarray(from_codes(to_codes(weights, grid, form), grid, form))
  size = form.group or 64
  for row, kept in zip(weights.reshape(-1, size), found.reshape(-1, size), strict=True):
    at = np.abs(row).argmax()
    # A zero point moves the ends by half a step at most.
    step = (row.max() - row.min()) / (15 if BITS[form.name] == 4 else 255)
    assert abs(kept[at] - row[at]) <= (1e-6 if form.symmetric else step / 2 * 1.001)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("inputs", [64, 16])
def test_what_is_packed_is_unpacked(form, inputs):
  form = Format(form.name, min(form.group, inputs), form.symmetric)
  weights = matrix(3, 5, inputs)
  codes = to_codes(weights, make_grid(weights, form), form)
  stored = pack(codes, form)
  assert stored.dtype.itemsize == 1
  assert stored.shape == (3, 5, inputs * BITS[form.name] // 8)
  np.testing.assert_array_equal(
    np.asarray(unpack(stored, form), np.float32), np.asarray(codes, np.float32)
  )


def test_groups_and_zero_points_come_nearer():
  weights = matrix(32, 512) + 0.5

  def error(*arguments):
    form = Format(*arguments)
    grid = make_grid(weights, form)
    return float(np.square(from_codes(to_codes(weights, grid, form), grid, form) - weights).mean())

  assert error("int4", 32) < 0.8 * error("int4", 128) < 0.8 * error("int4")
  assert error("int4", 32, False) < error("int4", 32)
  assert error("int8") < 0.02 * error("int4")


@pytest.mark.parametrize(
  ("make", "sentence"),
  [
    (lambda: Format("int5"), "format: no choice 'int5'"),
    (lambda: Format("int4", -1), "group=-1 is negative"),
    (lambda: Format("nf4", 32, False), "'nf4' has no zero point"),
    (lambda: Format("int4", 48).check("up", 64), "group=48 does not divide the 64 inputs of 'up'"),
    (lambda: Format("int4").check("up", 63), "63 inputs, which is odd"),
  ],
)
def test_what_cannot_be_stored_is_named(make, sentence):
  with pytest.raises(UserError) as error:
    make()
  assert sentence in str(error.value)
