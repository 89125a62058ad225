"""Axes as in `kernels`; I pages of a row."""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.cpu import kernels
from gptjax.model import attention
from gptjax.quantization.formats import Format
from gptjax.quantization.kernel import round_matrix


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def weights(kind, F, D):
  """Weights of a kind, and the scales of int8."""
  w_FD = normal(1, F, D)
  if kind == "int8":
    return jnp.round(40 * w_FD).astype(jnp.int8), jnp.abs(normal(2, F)) + 0.1
  return w_FD.astype(kind), None


product, attend = jax.jit(kernels.product), kernels.attend
KINDS = ("float32", "bfloat16", "int8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  ("M", "D", "F"),
  [(1, 1, 7), (8, 100, 7), (9, 577, 67), (40, 2100, 67), (1, 577, 300)]
  + [(0, 3, 3), (1, 0, 3), (2, 3, 0)],
)
def test_a_product_is_that_of_float64(M, D, F, kind):
  x_MD, (w_FD, scales_F) = normal(0, M, D), weights(kind, F, D)
  y_MF = product(x_MD, w_FD, scales_F)
  expected = np.asarray(x_MD, np.float64) @ np.asarray(w_FD.astype(jnp.float32), np.float64).T
  if scales_F is not None:
    expected *= np.asarray(scales_F)
  assert y_MF.dtype == jnp.float32
  np.testing.assert_allclose(y_MF, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(initial=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("D", "F"), [(100, 67), (2100, 300)])
def test_a_row_of_a_product_does_not_depend_on_the_others(D, F, kind):
  x_MD, (w_FD, scales_F) = normal(0, 130, D), weights(kind, F, D)
  alone = jnp.concatenate([product(x_MD[m : m + 1], w_FD, scales_F) for m in range(17)])
  # As many rows as tiles of all heights, parts of several tiles, and other places.
  for M in (2, 9, 17, 130):
    np.testing.assert_array_equal(product(x_MD[:M], w_FD, scales_F)[:17], alone[:M])
  order = np.random.default_rng(0).permutation(17)
  np.testing.assert_array_equal(product(x_MD[order], w_FD, scales_F), alone[order])


def grouped(form, F, D):
  """A matrix in a format, as `grouped_product` takes it, and what it stands for."""
  matrix = round_matrix(normal(1, F, D) + 0.3, form)
  return (matrix.values[...], *matrix.grid), matrix.weights()


FORMS = [
  *(Format("int4", group, symmetric) for group in (0, 32, 64) for symmetric in (True, False)),
  *(Format("int8", 16), Format("int8", 0, False), Format("int8", 64, False)),
]
# One of each kernel; each takes long to compile.
QUICK = (Format("int4", 32), Format("int8", 64, False))


@pytest.mark.parametrize(
  "form",
  [pytest.param(one, marks=[] if one in QUICK else pytest.mark.slow) for one in FORMS],
  ids=str,
)
@pytest.mark.parametrize(("M", "D", "F"), [(1, 64, 7), (9, 192, 67), (70, 576, 300)])
def test_a_product_of_few_bits_is_that_of_float64_and_of_each_row_alone(M, D, F, form):
  x_MD, (stored, weights_FD) = normal(0, M, D), grouped(form, F, D)
  multiply = jax.jit(kernels.grouped_product)
  y_MF = multiply(x_MD, *stored)
  expected = np.asarray(x_MD, np.float64) @ np.asarray(weights_FD, np.float64).T
  np.testing.assert_allclose(y_MF, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
  for m in range(0, M, 11):
    np.testing.assert_array_equal(multiply(x_MD[m : m + 1], *stored)[0], y_MF[m])
  np.testing.assert_array_equal(multiply(x_MD[:5], *stored), y_MF[:5])


def test_groups_that_no_kernel_reads_are_known():
  assert kernels.multiplies("int4", 96, 3)
  assert kernels.multiplies("int8", 48, 3)
  assert not kernels.multiplies("int4", 96, 6)
  assert not kernels.multiplies("int8", 48, 2)
  assert not kernels.multiplies("nf4", 64, 1)
  (values, scales, _), _ = grouped(Format("int4", 32), 4, 96)
  with pytest.raises(ValueError, match="do not fit 96 inputs"):
    kernels.grouped_product(normal(0, 1, 96), values, scales[:, :2])


def test_programs_of_several_threads_run_at_once():
  x_MD, (w_FD, _) = normal(0, 4, 768), weights("float32", 400, 768)
  expected = np.asarray(product(x_MD, w_FD))

  def run(_):
    program = jax.jit(lambda x_MD: kernels.product(x_MD, w_FD))
    return all(np.array_equal(program(x_MD), expected) for _ in range(100))

  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    assert all(threads.map(run, range(4)))


def test_arguments_of_a_product_that_do_not_fit_are_named():
  x_MD, w_FD = normal(0, 2, 8), normal(1, 3, 8)
  with pytest.raises(ValueError, match=r"weights_FD has the shape \(3, 7\), where D is 8"):
    kernels.product(x_MD, w_FD[:, :7])
  with pytest.raises(ValueError, match="weights_FD is float16, not float32 or bfloat16 or int8"):
    kernels.product(x_MD, w_FD.astype(jnp.float16))
  with pytest.raises(ValueError, match=r"scales_F has the shape \(2,\), where F is 3"):
    kernels.product(x_MD, w_FD, jnp.ones(2))
  with pytest.raises(ValueError, match="x_MD has the shape"):
    kernels.product(x_MD[0], w_FD)


def pages(kind, B, I, Z, K, H, seed=5):
  """Pools with numbers in them, more pages than rows need, and tables of pages in no order."""
  P = B * I + 3
  keys_PZKH, values_PZKH = normal(seed, P, Z, K, H), normal(seed + 1, P, Z, K, H)
  tables_BI = np.random.default_rng(seed).permutation(P)[: B * I].reshape(B, I).astype(np.int32)
  return keys_PZKH.astype(kind), values_PZKH.astype(kind), tables_BI


def consecutive(starts, lengths, T):
  """Positions [B, T] from each start; -1 behind each length."""
  t = np.arange(T)[None]
  starts, lengths = np.asarray(starts)[:, None], np.asarray(lengths)[:, None]
  return np.where(t < lengths, starts + t, -1).astype(np.int32)


def plain(
  q, k, v, keys_PZKH, values_PZKH, tables_BI, positions_BT, *, scale, cap=0.0, window=None,
  sinks_N=None, bias_NX=None, prefix_B=None,
):  # fmt: skip
  """`kernels.attend` in plain JAX."""
  P, Z, K, H = keys_PZKH.shape
  B, I = tables_BI.shape
  page_BT = np.take_along_axis(tables_BI, np.maximum(positions_BT, 0) // Z, axis=1)
  cells = np.where(positions_BT < 0, P * Z, page_BT * Z + positions_BT % Z).reshape(-1)

  def put(pool, new):
    flat = pool.reshape(-1, K, H)
    new = new.reshape(-1, K, H).astype(pool.dtype)
    return flat.at[cells].set(new, mode="drop").reshape(pool.shape)

  pools = put(keys_PZKH, k), put(values_PZKH, v)
  keys_BSKH, values_BSKH = (x[tables_BI].reshape(B, I * Z, K, H).astype(jnp.float32) for x in pools)
  slots_BS = np.broadcast_to(np.arange(I * Z), (B, I * Z))
  visibility, prefix_BS = "causal", None
  if prefix_B is not None:
    visibility, prefix_BS = "prefix", jnp.asarray(slots_BS < np.asarray(prefix_B)[:, None])
  seen = attention.visible(
    positions_BT, slots_BS, window, visibility=visibility, prefix_BS=prefix_BS
  )
  bias_BNTS = None
  if bias_NX is not None:
    distance_BTS = positions_BT[:, :, None] - slots_BS[:, None]
    bias_BNTS = jnp.moveaxis(bias_NX[:, np.clip(distance_BTS, 0, bias_NX.shape[1] - 1)], 0, 1)
  attended = attention.attend(
    q, keys_BSKH, values_BSKH, attention.Mask("xla", visible_BTS=seen), scale=scale,
    bias_BNTS=bias_BNTS, cap=cap, sinks_N=sinks_N,
  )  # fmt: skip
  return jnp.where((positions_BT >= 0)[:, :, None, None], attended, 0), *pools


OPTIONS = {
  "causal": {},
  "window": {"window": 7},
  "cap": {"cap": 3.0},
  "sinks": {"sinks_N": normal(9, 6)},
  "bias": {"bias_NX": normal(10, 6, 11)},
  "prefix": {"prefix_B": np.array([5, 20, 3], np.int32)},
  "all": {
    "window": 9,
    "cap": 2.0,
    "sinks_N": normal(9, 6),
    "bias_NX": normal(10, 6, 11),
    "prefix_B": np.array([5, 20, 3], np.int32),
  },
}


@pytest.mark.parametrize(
  ("option", "K", "H", "Z", "kind"),
  [
    pytest.param(option, 6, 64, 16, "float32", marks=pytest.mark.slow)
    for option in OPTIONS
    if option != "all"
  ]
  + [
    ("all", 6, 64, 16, "float32"),
    pytest.param("window", 2, 17, 5, "bfloat16", marks=pytest.mark.slow),
  ],
)
def test_attention_is_that_of_plain_jax(option, K, H, Z, kind):
  options = OPTIONS[option]
  # A prompt, the next token of a long row, and padding alone.
  positions_BT = consecutive([0, 43, 0], [9, 1, 0], 9)
  q, k, v = normal(0, 3, 9, 6, H), normal(1, 3, 9, K, H), normal(2, 3, 9, K, H)
  arguments = (q, k, v, *pages(kind, 3, 10, Z, K, H), positions_BT)
  expected = plain(*arguments, scale=H**-0.5, **options)
  got = jax.jit(functools.partial(attend, scale=H**-0.5, **options))(*arguments)
  np.testing.assert_allclose(got[0], expected[0], rtol=1e-4, atol=1e-5)
  for pool, expected_pool in zip(got[1:], expected[1:], strict=True):
    np.testing.assert_array_equal(
      pool.astype(jnp.float32), expected_pool.astype(jnp.float32), strict=True
    )


@pytest.mark.parametrize("option", ["causal", "all"])
def test_attention_to_pages_of_int8_is_that_to_what_they_stand_for(option):
  options, form = OPTIONS[option], Format("int8")
  K, H, Z = 6, 24, 16

  def rounded(x):
    matrix = round_matrix(x, form)
    return (matrix.values[...], matrix.scales[...]), matrix.weights()

  positions_BT = consecutive([0, 43, 0], [9, 1, 0], 9)
  q, k, v = normal(0, 3, 9, 6, H), normal(1, 3, 9, K, H), normal(2, 3, 9, K, H)
  keys, values, tables_BI = pages("float32", 3, 10, Z, K, H)
  (stored_keys, keys), (stored_values, values) = rounded(keys), rounded(values)
  expected = plain(
    q, rounded(k)[1], rounded(v)[1], keys, values, tables_BI, positions_BT, scale=H**-0.5, **options
  )
  scales = stored_keys[1], stored_values[1]
  run = jax.jit(functools.partial(attend, scale=H**-0.5, **options))
  pools = stored_keys[0], stored_values[0]
  got, *written = run(q, k, v, *pools, tables_BI, positions_BT, scales=scales)
  np.testing.assert_allclose(got, expected[0], rtol=1e-4, atol=1e-5)
  for numbers, scales, pool in zip(written[:2], written[2:], expected[1:], strict=True):
    np.testing.assert_allclose(numbers * scales, pool, rtol=1e-6, atol=1e-6)
  with pytest.raises(ValueError, match="int8 has some, others have none"):
    run(q, k, v, *pools, tables_BI, positions_BT)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize(("K", "options"), [(6, {}), (2, {"window": 9, "cap": 2.0})])
def test_what_a_query_attends_to_does_not_depend_on_parts_rows_or_pages(K, options, kind):
  length, H = 37, 40
  q, k, v = normal(0, 1, length, 6, H), normal(1, 1, length, K, H), normal(2, 1, length, K, H)
  run = jax.jit(functools.partial(attend, scale=0.2, **options))

  def in_parts(size, Z, seed):
    keys, values, tables_BI = pages(kind, 1, 40 // Z, Z, K, H, seed)
    attended = []
    for start in range(0, length, size):
      positions_BT = consecutive([start], [min(size, length - start)], size)
      part = slice(start, start + size)
      new = (jnp.pad(x[:, part], ((0, 0), (0, max(0, start + size - length)), (0, 0), (0, 0)))
             for x in (q, k, v))  # fmt: skip
      out, keys, values = run(*new, keys, values, tables_BI, positions_BT)
      attended.append(out)
    return np.concatenate(attended, axis=1)[0, :length]

  whole = in_parts(length, 8, 5)
  for size, Z, seed in ((1, 8, 6), (3, 5, 7), (8, 40, 8)):
    np.testing.assert_array_equal(in_parts(size, Z, seed), whole)
  # As the second row of three, behind others' keys.
  rows = [jnp.concatenate([normal(3, *x.shape), x, normal(4, *x.shape)]) for x in (q, k, v)]
  positions_BT = consecutive([2, 0, 1], [length, length, 5], length)
  out, *_ = run(*rows, *pages(kind, 3, 5, 8, K, H, 11), positions_BT)
  np.testing.assert_array_equal(out[1], whole)


def test_positions_that_are_not_valid_are_not_read():
  keys, values, tables_BI = pages("float32", 2, 4, 8, 2, 16)
  positions_BT = consecutive([0, 9], [3, 2], 4)
  q, k, v = normal(0, 2, 4, 4, 16), normal(1, 2, 4, 2, 16), normal(2, 2, 4, 2, 16)
  run = jax.jit(functools.partial(attend, scale=0.25))
  expected, *_ = run(q, k, v, keys, values, tables_BI, positions_BT)
  valid = np.zeros(keys.shape[:2], bool)
  for b, end in enumerate((3, 11)):
    for p in range(end):
      valid[tables_BI[b, p // 8], p % 8] = True
  keys, values = (jnp.where(valid[..., None, None], x, jnp.nan) for x in (keys, values))
  got, *_ = run(q, k, v, keys, values, tables_BI, positions_BT)
  np.testing.assert_array_equal(got, expected)


def test_no_page_is_copied_if_the_caller_gives_them_away():
  keys, values, tables_BI = pages("float32", 1, 4, 8, 2, 16)
  q, k, v = normal(0, 1, 1, 4, 16), normal(1, 1, 1, 2, 16), normal(2, 1, 1, 2, 16)

  def two_layers(pools):
    x, written = q, []
    for pool in pools:
      x, *pool = attend(x, k, v, *pool, tables_BI, positions_BT, scale=0.25)
      written.append(pool)
    return x, written

  positions_BT = consecutive([5], [1], 1)
  pools = [[keys, values], [keys + 1, values + 1]]
  program = jax.jit(two_layers, donate_argnums=0).lower(pools).compile().as_text()
  assert "f32[7,8,2,16]" in program
  assert not [line for line in program.splitlines() if "copy(" in line and "[7,8,2,16]" in line]


def test_nothing_to_do_is_done():
  keys, values, tables_BI = pages("float32", 2, 4, 8, 2, 16)
  for B, T in ((0, 3), (2, 0)):
    q, k = jnp.zeros((B, T, 4, 16)), jnp.zeros((B, T, 2, 16))
    positions_BT = np.zeros((B, T), np.int32)
    out, *_ = attend(q, k, k, keys, values, tables_BI[:B], positions_BT, scale=1.0)
    assert out.shape == q.shape


def test_arguments_of_attention_that_do_not_fit_are_named():
  keys, values, tables_BI = pages("float32", 1, 4, 8, 2, 16)
  q, k, positions_BT = normal(0, 1, 1, 4, 16), normal(1, 1, 1, 2, 16), consecutive([5], [1], 1)
  run = functools.partial(attend, scale=1.0)
  with pytest.raises(ValueError, match="values_PZKH is bfloat16, not float32"):
    run(q, k, k, keys, values.astype(jnp.bfloat16), tables_BI, positions_BT)
  with pytest.raises(ValueError, match=r"keys_PZKH has the shape .* where K is 2"):
    run(q, k, k, keys[:, :, :1], values, tables_BI, positions_BT)
  with pytest.raises(ValueError, match="q_BTNH has 3 heads, no multiple of the 2 of k_BTKH"):
    run(q[:, :, :3], k, k, keys, values, tables_BI, positions_BT)
  with pytest.raises(ValueError, match=r"sinks_N has the shape \(5,\), where N is 4"):
    run(q, k, k, keys, values, tables_BI, positions_BT, sinks_N=jnp.zeros(5))
