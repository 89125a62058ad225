import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax.model.positions import AttentionBias, alibi_slopes, rope_frequencies, rotate, t5_bucket

# --- Rotary ------------------------------------------------------------------------------------


def rope(tiny_config, **changes):
  return tiny_config(**({"position.kind": "rope", "head_dim": 64} | changes))


def test_rotary_products_depend_on_relative_position_only(tiny_config):
  config = rope(tiny_config, head_dim=8)
  q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

  def product(query_position, key_position):
    rotated_q = rotate(q, jnp.array([[query_position]]), config)
    rotated_k = rotate(k, jnp.array([[key_position]]), config)
    return float((rotated_q * rotated_k).sum())

  assert product(7, 4) == pytest.approx(product(107, 104), abs=1e-4)
  assert product(7, 4) == pytest.approx(product(3, 0), abs=1e-4)
  assert abs(product(7, 4) - product(7, 5)) > 1e-2
  assert abs(product(7, 4) - product(4, 7)) > 1e-2
  assert product(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-5)


def test_rotary_pairs_turn_by_position_times_frequency(tiny_config):
  config = rope(tiny_config, head_dim=4, **{"rope.base": 100.0})
  x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
  y = np.asarray(rotate(x, jnp.array([[3]]), config))[0, 0, 0]
  for pair, frequency in enumerate([1.0, 100 ** (-2 / 4)]):
    turned = complex(x[0, 0, 0, pair], x[0, 0, 0, pair + 2]) * np.exp(3j * frequency)
    np.testing.assert_allclose([y[pair], y[pair + 2]], [turned.real, turned.imag], rtol=1e-5)


def test_frequencies_are_powers_of_the_base(tiny_config):
  frequencies, scale = rope_frequencies(rope(tiny_config, **{"rope.base": 500.0}))
  np.testing.assert_allclose(frequencies, [500 ** (-2 * i / 64) for i in range(32)])
  assert scale == 1


def test_linear_scaling_is_dividing_positions(tiny_config):
  config = rope(tiny_config, head_dim=8, **{"rope.scaling": "linear", "rope.factor": 4.0})
  x = np.random.default_rng(0).normal(size=(1, 1, 1, 8)).astype(np.float32)
  plain = rope(tiny_config, head_dim=8)
  np.testing.assert_allclose(
    rotate(x, jnp.array([[12]]), config), rotate(x, jnp.array([[3]]), plain), atol=1e-6
  )


def test_dynamic_scaling_grows_the_base_with_the_row_beyond_the_original_length(tiny_config):
  plain = rope(tiny_config, head_dim=8)
  changes = {"rope.scaling": "dynamic", "rope.factor": 3.0, "rope.original_positions": 10}
  config = rope(tiny_config, head_dim=8, **changes)
  x = np.random.default_rng(0).normal(size=(2, 20, 1, 8)).astype(np.float32)
  positions = jnp.stack([jnp.arange(20) % 10, jnp.arange(20)])
  grown = rope(tiny_config, head_dim=8, **{"rope.base": 10_000.0 * (3 * 2 - 2) ** (8 / 6)})
  rotated = rotate(x, positions, config)
  np.testing.assert_allclose(rotated[0], rotate(x[:1], positions[:1], plain)[0], atol=1e-6)
  np.testing.assert_allclose(rotated[1], rotate(x[1:], positions[1:], grown)[0], atol=1e-5)


def test_llama3_scaling_is_the_published_piecewise_one(tiny_config):
  original, factor, base, H = 8192, 8.0, 500_000.0, 128
  config = rope(
    tiny_config,
    head_dim=H,
    **{
      "rope.base": base,
      "rope.scaling": "llama3",
      "rope.factor": factor,
      "rope.original_positions": original,
    },
  )
  scaled, _ = rope_frequencies(config)
  seen = set()
  for i in range(H // 2):
    frequency = base ** (-2 * i / H)
    wavelength = 2 * math.pi / frequency
    if wavelength < original / 4:
      expected, kind = frequency, "kept"
    elif wavelength > original / 1:
      expected, kind = frequency / factor, "divided"
    else:
      smooth = (original / wavelength - 1) / (4 - 1)
      expected, kind = (1 - smooth) * frequency / factor + smooth * frequency, "between"
    seen.add(kind)
    assert scaled[i] == pytest.approx(expected, rel=1e-9)
  assert seen == {"kept", "divided", "between"}


def test_yarn_scaling_is_the_papers_equations(tiny_config):
  original, factor, base, H = 4096, 16.0, 10_000.0, 128
  config = rope(
    tiny_config,
    head_dim=H,
    **{
      "rope.base": base,
      "rope.scaling": "yarn",
      "rope.factor": factor,
      "rope.original_positions": original,
    },
  )
  scaled, attention_scale = rope_frequencies(config)
  plain = base ** (-np.arange(0, H, 2) / H)
  turns = original * plain / (2 * math.pi)  # r(d), equation 16
  # beta = 32 turns and more: kept. alpha = 1 turn and less: interpolated.
  np.testing.assert_allclose(scaled[turns > 33], plain[turns > 33], rtol=1e-9)
  np.testing.assert_allclose(scaled[turns < 0.9], plain[turns < 0.9] / factor, rtol=1e-9)
  between = scaled[(turns < 30) & (turns > 1.1)] / plain[(turns < 30) & (turns > 1.1)]
  assert (np.diff(between) < 0).all()
  assert between.max() < 1
  assert between.min() > 1 / factor
  # sqrt(1/t) = 0.1 ln(s) + 1 on queries and on keys, equation 22.
  assert attention_scale == pytest.approx(0.1 * math.log(16) + 1)
  # The ramp of the authors' code runs linearly over the dimensions between floor and ceiling.
  low = math.floor(H * math.log(original / (32 * 2 * math.pi)) / (2 * math.log(base)))
  high = math.ceil(H * math.log(original / (1 * 2 * math.pi)) / (2 * math.log(base)))
  assert (low, high) == (20, 46)
  middle = (low + high) // 2
  assert scaled[middle] == pytest.approx(plain[middle] * (0.5 + 0.5 / factor))


def test_yarn_of_factor_1_changes_nothing(tiny_config):
  options = {"rope.scaling": "yarn", "rope.factor": 1.0, "rope.original_positions": 64}
  scaled, scale = rope_frequencies(rope(tiny_config, **options))
  np.testing.assert_allclose(scaled, rope_frequencies(rope(tiny_config))[0])
  assert scale == 1


def test_yarn_sharpens_queries_and_keys(tiny_config):
  options = {"rope.scaling": "yarn", "rope.factor": 8.0, "rope.original_positions": 64}
  x = jnp.ones((1, 1, 1, 64))
  y = rotate(x, jnp.zeros((1, 1), jnp.int32), rope(tiny_config, **options))
  np.testing.assert_allclose(y, x * (0.1 * math.log(8) + 1), rtol=1e-6)


def test_bfloat16_heads_are_rotated_in_float32(tiny_config):
  config = rope(tiny_config, head_dim=8)
  x = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
  positions = jnp.array([[1001]])  # which bfloat16 cannot tell from 1000
  y = rotate(x, positions, config)
  assert y.dtype == jnp.bfloat16
  expected = rotate(x.astype(jnp.float32), positions, config)
  np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=2**-7)


# --- ALiBi -------------------------------------------------------------------------------------


def test_slopes_of_a_power_of_two():
  np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
  np.testing.assert_allclose(alibi_slopes(16)[:3], [2**-0.5, 2**-1, 2**-1.5])
  np.testing.assert_allclose(alibi_slopes(1), [2**-8])


def test_slopes_of_12_heads_are_those_of_the_authors_code():
  # get_slopes(12) of ofirpress/attention_with_linear_biases: 8 heads, then every other of 16.
  expected = [2.0**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
  np.testing.assert_allclose(alibi_slopes(12), expected)


def test_alibi_adds_minus_slope_times_distance(tiny_config):
  bias = AttentionBias(tiny_config(num_heads=8, **{"position.kind": "alibi"}), nnx.Rngs(0))
  queries, keys = jnp.array([[5, 6]]), jnp.array([[0, 5]])
  added = bias(queries, keys)
  assert added.shape == (1, 8, 2, 2)
  np.testing.assert_allclose(added[0, 0], [[-2.5, 0], [-3, -0.5]])
  np.testing.assert_allclose(added[0, 7, 1, 0], -6 / 256)


# --- T5 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("distance", "bucket"),
  [
    (-3, 0),  # a key that is not visible
    (0, 0),
    (1, 1),
    (15, 15),
    (16, 16),  # exact until here, then log(d / 16) / log(128 / 16) * 16
    (18, 16),  # 0.906
    (19, 17),  # 1.322
    (32, 21),  # 5.333
    (63, 26),  # 10.546
    (64, 26),  # 10.667
    (127, 31),  # 15.940
    (128, 31),
    (100_000, 31),
  ],
)
def test_t5_buckets_by_hand(distance, bucket):
  assert int(t5_bucket(jnp.array(distance), 32, 128)) == bucket


def test_t5_looks_its_biases_up_by_bucket_and_head(tiny_config):
  config = tiny_config(
    **{"position.kind": "t5", "position.t5_buckets": 8, "position.t5_max_distance": 16}
  )
  bias = AttentionBias(config, nnx.Rngs(0))
  table = np.asarray(bias.relative.embedding[...])
  assert table.shape == (8, 4)
  added = np.asarray(bias(jnp.array([[20, 3]]), jnp.array([[20, 18, 1]])))
  assert added.shape == (1, 4, 2, 3)
  for head in range(4):
    np.testing.assert_array_equal(added[0, head, 0], table[[0, 2, 7], head])
    assert added[0, head, 1, 2] == table[2, head]


def test_other_schemes_add_nothing(tiny_config):
  for position in ("learned", "rope", "none"):
    bias = AttentionBias(tiny_config(**{"position.kind": position}), nnx.Rngs(0))
    assert bias(jnp.array([[0]]), jnp.array([[0]])) is None
