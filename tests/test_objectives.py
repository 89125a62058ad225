import jax
import jax.numpy as jnp
import numpy as np

from gptjax import objectives
from gptjax.data.batch import Batch


def test_cross_entropy_is_minus_the_log_probability_of_the_target():
  logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]])) + 7
  losses = objectives.cross_entropy(logits, jnp.array([[1, 2]]))
  np.testing.assert_allclose(losses, -np.log([[0.25, 0.8]]), rtol=1e-5)


def test_cross_entropy_of_huge_logits_is_finite():
  losses = objectives.cross_entropy(jnp.array([[[1e5, -1e5]]]), jnp.array([[1]]))
  np.testing.assert_allclose(losses, [[2e5]])


def test_next_token_counts_each_target_by_its_weight():
  calls = {}

  def model(tokens, **kwargs):
    calls.update(kwargs, tokens=tokens)
    return jnp.zeros((*tokens.shape, 4))

  rows = np.arange(6).reshape(2, 3)
  weights = np.array([[1, 0, 1], [0.5, 0, 0]], np.float32)
  batch = Batch(rows, rows % 4, weights, segment_ids=rows + 1, positions=rows + 2)
  key = jax.random.key(0)
  losses = objectives.next_token(model, batch, key)
  np.testing.assert_allclose(losses, np.log(4) * weights, rtol=1e-6)
  # The model is told where the documents of a packed row begin, and draws its dropout.
  assert calls["tokens"] is rows
  assert calls["segment_ids_BT"] is batch.segment_ids
  assert calls["positions_BT"] is batch.positions
  assert calls["key"] is key
