import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.model import attention
from gptjax.model.attention import Mask, attend, largest_logit, visible


def heads(shape, seed, scale=1.0):
  return scale * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def seeing(visible_BTS):
  """The mask of the kernel that is told what is visible."""
  return Mask("xla", None, visible_BTS=jnp.asarray(visible_BTS))


def test_a_query_sees_the_past_itself_and_no_more():
  positions = jnp.arange(5)[None]
  np.testing.assert_array_equal(visible(positions, positions)[0], np.tri(5, dtype=bool))


@pytest.mark.parametrize("window", [1, 2, 5, 9])
def test_a_window_is_counted_in_positions_its_own_included(window):
  positions = jnp.arange(6)[None]
  mask = np.asarray(visible(positions, positions, window))[0]
  np.testing.assert_array_equal(mask.sum(-1), np.minimum(np.arange(6) + 1, window))
  assert mask.diagonal().all()


def test_segments_do_not_see_each_other():
  segments = jnp.array([[1, 1, 2, 2, 2, 0]])
  positions = jnp.array([[0, 1, 0, 1, 2, 0]])
  mask = np.asarray(visible(positions, positions, None, segments, segments))[0]
  expected = np.zeros((6, 6), bool)
  expected[:2, :2], expected[2:5, 2:5], expected[5, 5] = np.tri(2), np.tri(3), True
  np.testing.assert_array_equal(mask, expected)


def test_one_query_against_a_longer_cache_sees_only_what_is_written():
  mask = visible(jnp.array([[3], [5]]), jnp.tile(jnp.arange(8), (2, 1)), 2)
  np.testing.assert_array_equal(np.where(mask[0, 0])[0], [2, 3])
  np.testing.assert_array_equal(np.where(mask[1, 0])[0], [4, 5])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_its_formula_with_every_group_of_heads(kv_heads):
  B, T, N, H = 2, 5, 4, 8
  q, k, v = heads((B, T, N, H), 0), heads((B, T, kv_heads, H), 1), heads((B, T, kv_heads, H), 2)
  bias = heads((B, N, T, T), 3)
  mask = np.broadcast_to(np.tri(T, dtype=bool), (B, T, T))
  out = attend(q, k, v, seeing(mask), bias_BNTS=bias)

  for head in range(N):
    group = head // (N // kv_heads)
    logits = np.einsum("bth,bsh->bts", q[:, :, head], k[:, :, group]) / np.sqrt(H) + bias[:, head]
    weights = np.where(mask, np.exp(logits - logits.max()), 0)
    expected = weights / weights.sum(-1, keepdims=True) @ v[:, :, group]
    np.testing.assert_allclose(out[:, :, head], expected, atol=1e-5)


def test_the_soft_cap_bounds_how_sharp_attention_gets():
  q, k = heads((1, 3, 1, 8), 0, 100), heads((1, 3, 1, 8), 1, 100)
  v = np.eye(3, 8, dtype=np.float32)[None, :, None]  # the output is the weights
  everything = seeing(np.ones((1, 3, 3), bool))
  free = np.asarray(attend(q, k, v, everything))[0, :, 0, :3]
  capped = np.asarray(attend(q, k, v, everything, cap=1.0))[0, :, 0, :3]
  assert free.min() < 1e-6
  ratio = capped.max(-1) / capped.min(-1)
  assert (ratio <= np.exp(2) * 1.001).all()
  np.testing.assert_allclose(ratio, np.exp(2), rtol=1e-3)  # which logits of +-100 do reach


def test_a_row_that_sees_nothing_is_finite():
  q = heads((1, 2, 1, 4), 0)
  out = attend(q, q, q, seeing(np.zeros((1, 2, 2), bool)))
  assert np.isfinite(out).all()


def test_the_softmax_of_bfloat16_queries_is_float32():
  # 64 equal keys: a bfloat16 sum of exponentials, 8 bits long, would not count to 300.
  q = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
  k = jnp.ones((1, 300, 1, 4), jnp.bfloat16)
  out = attend(q, k, k, seeing(np.ones((1, 1, 300), bool)))
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(jnp.float32), 1, rtol=2**-7)


def test_attention_dropout_drops_weights_and_keeps_their_mean():
  q = jnp.zeros((1, 2, 1, 4))
  v = jnp.ones((1, 2000, 1, 4))
  k = jnp.zeros_like(v)
  mask = seeing(np.ones((1, 2, 2000), bool))
  options = {"dropout_rate": 0.5, "key": jax.random.key(0)}
  dropped = attend(q, k, v, mask, **options)
  assert (dropped != 1).all()
  np.testing.assert_allclose(dropped, 1, atol=0.1)
  assert (dropped[0, 0] != dropped[0, 1]).all()  # another draw for each query
  np.testing.assert_allclose(attend(q, k, v, mask, dropout_rate=0.5), 1, rtol=1e-5)


@pytest.mark.parametrize("queries", [1024, 2], ids=["at once", "in parts"])
@pytest.mark.parametrize("told", [True, False], ids=["told", "segments"])
def test_the_largest_logit_is_the_largest_that_is_seen(monkeypatch, told, queries):
  monkeypatch.setattr(attention, "MAX_OBSERVED", queries)
  B, T, N, K, H, window, cap = 2, 6, 4, 2, 8, 2, 5.0
  q, k = heads((B, T, N, H), 41), heads((B, T, K, H), 42)
  segments = jnp.array([[1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 2]])
  positions = jnp.array([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4]])
  seen = visible(positions, positions, window, segments, segments)
  mask = Mask("xla", window, visible_BTS=seen)
  mask = mask if told else Mask("splash", window, segment_ids_BT=segments)
  bias = heads((B, N, T, T), 43)

  logits = np.full((B, N, T, T), -np.inf)
  for b, n, t, s in np.ndindex(B, N, T, T):
    if s <= t < s + window and segments[b, t] == segments[b, s]:
      product = q[b, t, n] @ k[b, s, n // (N // K)] / np.sqrt(H)
      logits[b, n, t, s] = cap * np.tanh(product / cap) + bias[b, n, t, s]
  found = largest_logit(q, k, mask, positions, bias_BNTS=bias, cap=cap)
  assert float(found) == pytest.approx(logits.max(), rel=1e-5)
  # Were the window, the segments or the past not heeded, there would be a larger one.
  same = segments[:, :, None] == segments[:, None, :]
  distance = np.arange(T)[:, None] - np.arange(T)
  for wrong in (
    visible(positions, positions, None, segments, segments),
    visible(np.tile(np.arange(T), (B, 1)), np.tile(np.arange(T), (B, 1)), window),
    np.asarray(same) & (distance < window),
  ):
    unlike = Mask("xla", None, visible_BTS=jnp.asarray(wrong))
    assert largest_logit(q, k, unlike, positions, bias_BNTS=bias, cap=cap) > found
