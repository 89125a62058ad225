import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.data.batch import Batch
from gptjax.objectives.forward import token_loss


class Uniform:
  """A model of 4 tokens whose logits are all 0, and which remembers what it was asked."""

  config = types.SimpleNamespace(head=types.SimpleNamespace(soft_cap=0.0))
  head_bias = None

  def hidden(self, tokens, **kwargs):
    self.asked = kwargs | {"tokens": tokens}
    return jnp.zeros((*tokens.shape, 8)), None

  def features(self, x):
    return x

  def output_kernel(self):
    return jnp.ones((8, 4)), ("embed", "vocab")


def test_each_target_counts_by_its_weight():
  rows = np.arange(6).reshape(2, 3)
  weights = np.array([[1, 0, 1], [0.5, 0, 0]], np.float32)
  batch = Batch(rows, rows % 4, weights, segment_ids=rows + 1, positions=rows + 2)
  key = jax.random.key(0)
  model = Uniform()
  sums = token_loss(model, batch, key, z_loss=0.5)
  assert float(sums.cross_entropy) == pytest.approx(2.5 * np.log(4), rel=1e-6)
  assert float(sums.total) == pytest.approx(2.5 * (np.log(4) + 0.5 * np.log(4) ** 2), rel=1e-6)
  # The model is told where the documents of a packed row begin, and draws its dropout.
  assert model.asked["tokens"] is rows
  assert model.asked["segment_ids_BT"] is batch.segment_ids
  assert model.asked["positions_BT"] is batch.positions
  assert model.asked["key"] is key
