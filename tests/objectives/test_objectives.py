import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.data.batch import Batch
from gptjax.model.figures import Routing
from gptjax.objectives import objectives


class Uniform:
  """A model of 4 tokens whose logits are all 0, and which remembers what it was asked."""

  config = types.SimpleNamespace(logit_soft_cap=0.0)
  head_bias = None

  def hidden(self, tokens, *, routing=None, **kwargs):
    self.asked = kwargs | {"tokens": tokens}
    if routing is not None:
      routing |= {"balance_loss": jnp.array([1.0, 3.0]), "z_loss": jnp.array([10.0, 30.0])}
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
  sums = objectives.target_loss(model, batch, key, z_loss=0.5)
  assert float(sums.cross_entropy) == pytest.approx(2.5 * np.log(4), rel=1e-6)
  assert float(sums.total) == pytest.approx(2.5 * (np.log(4) + 0.5 * np.log(4) ** 2), rel=1e-6)
  # The model is told where the documents of a packed row begin, and draws its dropout.
  assert model.asked["tokens"] is rows
  assert model.asked["segment_ids_BT"] is batch.segment_ids
  assert model.asked["positions_BT"] is batch.positions
  assert model.asked["key"] is key


def test_the_router_losses_of_all_layers_are_minimised_and_not_reported():
  rows = np.zeros((2, 3), np.int32)
  weights = np.array([[1, 0, 1], [0.5, 0, 0]], np.float32)
  batch = Batch(rows, rows, weights, segment_ids=rows + 1, positions=rows)
  factors = {"router_balance_loss": 0.5, "router_z_loss": 0.25}
  sums = objectives.target_loss(Uniform(), batch, routing=Routing(), **factors)
  assert float(sums.cross_entropy) == pytest.approx(2.5 * np.log(4), rel=1e-6)
  # The layers' means are 2 and 20, for each token.
  added = float(sums.total - sums.cross_entropy)
  assert added == pytest.approx(2.5 * (0.5 * 2 + 0.25 * 20), rel=1e-6)
  assert objectives.target_loss(Uniform(), batch, **factors).total == sums.cross_entropy
