"""The head of labels: what it reads, and that segments do not reach it together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax.data.batch import Batch
from gptjax.errors import UserError
from gptjax.finetuning.classification import Classification
from gptjax.model.gpt import GPT, describe_parameters, model_graph
from gptjax.objectives.forward import label_logits

K = 3


@pytest.fixture(scope="module")
def make_model(tiny_config, random_params):
  def make(**changes):
    config = tiny_config(**changes, **{"label_head.num_labels": K})
    return nnx.merge(model_graph(config), random_params(config))

  return make


def test_a_model_of_labels_has_no_head_of_the_vocabulary(tiny_config):
  bert = {"head.transform": True, "head.bias": True, "head.tied": False, "head.pooler": True}
  labelled = describe_parameters(tiny_config(**bert, **{"label_head.num_labels": K}))
  plain = describe_parameters(tiny_config(**bert))
  assert set(labelled) - set(plain) == {"label_head/kernel", "label_head/bias"}
  assert {name.split("/")[0] for name in set(plain) - set(labelled)} == {
    "head",
    "head_bias",
    "head_transform",
  }
  assert labelled["label_head/kernel"].shape == (16, K)


def rows(segments):
  """Segments of random tokens, side by side."""
  rng = np.random.default_rng(0)
  texts = [rng.integers(1, 32, size) for size in segments]
  positions = np.concatenate([np.arange(size) for size in segments])
  ids = np.repeat(np.arange(1, len(segments) + 1), segments)
  return texts, *(np.asarray(x, np.int32)[None] for x in (np.concatenate(texts), positions, ids))


@pytest.mark.parametrize("visibility", ["causal", "bidirectional"])
def test_the_mean_is_that_of_the_segment_alone(make_model, visibility):
  model = make_model(visibility=visibility, **{"label_head.pooling": "mean"})
  texts, tokens, positions, ids = rows([5, 3, 6])

  @jax.jit
  def score(tokens, positions, ids):
    x_BTD, _ = model.hidden(tokens, positions_BT=positions, segment_ids_BT=ids)
    return model.label_logits(x_BTD, ids)

  packed = score(tokens, positions, ids)
  start = 0
  for text in texts:
    stop = start + len(text)
    alone, _ = model.hidden(jnp.asarray(text, jnp.int32)[None])
    expected = alone[0].mean(0) @ model.label_head.kernel[...] + model.label_head.bias[...]
    for place in range(start, stop):
      np.testing.assert_allclose(packed[0, place], expected, atol=1e-5)
    start = stop


def test_without_pooling_each_token_has_its_own_scores(make_model):
  model = make_model()
  x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 16)), jnp.float32)
  expected = x_BTD @ model.label_head.kernel[...]
  expected += model.label_head.bias[...].reshape(1, 1, K)
  np.testing.assert_allclose(model.label_logits(x_BTD), expected, atol=1e-5)


def test_the_pooler_makes_what_is_scored(make_model):
  model = make_model(
    **{"label_head.pooling": "pooler", "head.pooler": True, "label_head.bias": False}
  )
  x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 16)), jnp.float32)
  pooled_BTD = jnp.tanh(x_BTD @ model.pooler.kernel[...] + model.pooler.bias[...].reshape(1, 1, 16))
  expected = pooled_BTD @ model.label_head.kernel[...]
  np.testing.assert_allclose(model.label_logits(x_BTD), expected, atol=1e-5)
  with pytest.raises(
    UserError, match=r"model\.label_head\.pooling='pooler' needs model\.head\.pooler"
  ):
    make_model(**{"label_head.pooling": "pooler"})


def test_tokens_are_not_scored(make_model):
  with pytest.raises(UserError, match=r"scores 3 labels \(model\.label_head\.num_labels\)"):
    make_model()(jnp.zeros((1, 4), jnp.int32))


def test_the_second_text_has_its_type(make_model):
  model = make_model(visibility="bidirectional", **{"embed.token_types": 2})
  _, tokens, positions, ids = rows([6])
  batch = Batch(tokens, tokens, np.ones((1, 6), np.float32), ids, positions)
  second = Batch(**(batch.__dict__ | {"token_types": np.array([[0, 0, 0, 1, 1, 1]], np.int32)}))
  plain, typed = (label_logits(model, one) for one in (batch, second))
  assert np.abs(plain - typed).max() > 0.01


def test_two_passes_with_other_dropout_are_to_agree(make_model):
  """R-Drop: the mean of two losses, and alpha / 4 of the divergence both ways."""
  model = make_model(**{"dropout.residual": 0.3, "dropout.label": 0.2})
  _, tokens, positions, ids = rows([4, 4])
  weights = np.zeros((1, 8), np.float32)
  weights[0, [3, 7]] = 1
  batch = Batch(tokens, np.full_like(tokens, 2), weights, ids, positions)
  key = jax.random.key(0)
  a, b = (label_logits(model, batch, one) for one in jax.random.split(key))
  plain, agreeing = Classification(), Classification(r_drop=2.0)
  sums = agreeing.loss(model, batch, key)
  mean = sum(plain.loss_of_logits(one, batch).total for one in (a, b)) / 2
  assert float(sums.cross_entropy) == pytest.approx(float(mean), rel=1e-5)
  added = 0.5 * float((plain.divergence(a, b, batch) * weights).sum())
  assert added > 0.01
  assert float(sums.total) == pytest.approx(float(mean) + added, rel=1e-5)
  # There is no dropout without a key, and nothing to agree on.
  still = agreeing.loss(model, batch)
  assert float(still.total) == float(still.cross_entropy)


def test_a_model_starts_with_its_head_at_random(tiny_config):
  model = GPT(tiny_config(**{"label_head.num_labels": K}), nnx.Rngs(0))
  assert np.std(model.label_head.kernel[...]) == pytest.approx(0.02, rel=0.3)
  assert not np.any(model.label_head.bias[...])
