import dataclasses

import jax
import numpy as np
import pytest
import torch
from torch.nn import functional

from gptjax.data.batch import Batch
from gptjax.finetuning.classification import Classification, MultiLabel, Regression
from gptjax.finetuning.span import Span

K = 3


def make_batch(**fields):
  """Two rows of 6 tokens: segments of 4 and 2 tokens, and one of 3 beside padding."""
  rng = np.random.default_rng(0)
  segments = np.array([[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]], np.int32)
  weights = np.zeros((2, 6), np.float32)
  weights[0, 3], weights[0, 5], weights[1, 2] = 1.0, 0.5, 2.0
  targets = np.where(weights > 0, rng.integers(0, K, (2, 6)), 0).astype(np.int32)
  batch = Batch(segments, targets, weights, segments, segments)
  return dataclasses.replace(batch, **fields)


def divergence(task, a, b, batch):
  """The divergence of each place by its weight, summed."""
  return float((np.asarray(task.divergence(a, b, batch)) * batch.weights).sum())


def scores(columns=K, seed=1):
  return np.random.default_rng(seed).normal(size=(2, 6, columns)).astype(np.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_one_label_of_many_is_the_cross_entropy_of_torch(smoothing):
  batch, logits = make_batch(), scores()
  sums = Classification(label_smoothing=smoothing).loss_of_logits(logits, batch)
  for found, epsilon in ((sums.total, smoothing), (sums.cross_entropy, 0.0)):
    expected = functional.cross_entropy(
      torch.tensor(logits).reshape(-1, K),
      torch.tensor(batch.targets.reshape(-1), dtype=torch.long),
      reduction="none",
      label_smoothing=epsilon,
    )
    assert float(found) == pytest.approx(float(expected.numpy() @ batch.weights.reshape(-1)))


def test_many_labels_are_the_binary_cross_entropy_of_torch():
  values = np.random.default_rng(2).integers(0, 2, (2, 6, K)).astype(np.float32)
  batch, logits = make_batch(values=values), scores()
  loss = functional.binary_cross_entropy_with_logits(
    torch.tensor(logits), torch.tensor(values), reduction="none"
  )
  expected = float((loss.numpy().mean(-1) * batch.weights).sum())
  assert float(MultiLabel().loss_of_logits(logits, batch).total) == pytest.approx(expected)


def test_a_number_has_the_squared_error():
  values = scores(1, seed=3)
  batch, logits = make_batch(values=values), scores(1)
  expected = float((np.square(logits - values)[..., 0] * batch.weights).sum())
  assert float(Regression().loss_of_logits(logits, batch).total) == pytest.approx(expected)


def test_a_span_is_chosen_among_the_context_of_its_own_segment():
  segments = np.array([[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]], np.int32)
  types = np.array([[0, 1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 0, 0]], np.int32)
  ends = np.array([[0, 0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0, 0]])
  answers = ((0, [1, 2], 1, 2, 1.0), (0, [5], 5, 5, 0.5), (1, [2, 3], 3, 3, 2.0))
  values, weights = np.zeros((2, 7, 2), np.float32), np.zeros((2, 7), np.float32)
  for row, places, first, last, weight in answers:
    values[row, first, 0] = values[row, last, 1] = 1
    weights[row, places[-1] + 1] = weight
  batch = make_batch(segment_ids=segments, token_types=types, values=values, weights=weights)
  logits = np.random.default_rng(1).normal(size=(2, 7, 2)).astype(np.float32)
  expected = 0.0
  for row, places, first, last, weight in answers:
    for column, place in ((0, first), (1, last)):
      of = logits[row, places, column]
      expected += weight / 2 * (np.log(np.exp(of).sum()) - logits[row, place, column])
  loss, gradient = jax.value_and_grad(lambda x: Span().loss_of_logits(x, batch).total)(logits)
  assert float(loss) == pytest.approx(expected, rel=1e-5)
  # Nothing is learnt of what cannot be an answer.
  assert np.isfinite(gradient).all()
  assert not np.asarray(gradient)[(types == 0) | (ends == 1)].any()


def test_the_divergence_is_the_two_kullback_leibler_divergences():
  batch, a, b = make_batch(), scores(seed=4), scores(seed=5)
  log_a, log_b = (torch.log_softmax(torch.tensor(x), -1) for x in (a, b))
  both = functional.kl_div(log_a, log_b, reduction="none", log_target=True)
  both = both + functional.kl_div(log_b, log_a, reduction="none", log_target=True)
  expected = float((both.numpy().sum(-1) * batch.weights).sum())
  found = divergence(Classification(), a, b, batch)
  assert found == pytest.approx(expected, rel=1e-5)
  assert divergence(Classification(), a, a, batch) == 0


def test_the_divergence_of_many_labels_is_that_of_their_probabilities():
  batch = make_batch(values=np.zeros((2, 6, K), np.float32))
  a, b = scores(seed=4), scores(seed=5)
  p, q = (1 / (1 + np.exp(-x)) for x in (a, b))
  kl = lambda p, q: p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))  # noqa: E731
  expected = float(((kl(p, q) + kl(q, p)).mean(-1) * batch.weights).sum())
  assert divergence(MultiLabel(), a, b, batch) == pytest.approx(expected, 1e-4)


def test_two_numbers_differ_by_the_square_of_their_distance():
  """Two normal distributions of variance 1 have it as the sum of both divergences."""
  batch, a, b = make_batch(values=scores(1, seed=3)), scores(1, seed=4), scores(1, seed=5)
  expected = float((np.square(a - b)[..., 0] * batch.weights).sum())
  assert divergence(Regression(), a, b, batch) == pytest.approx(expected, rel=1e-5)
  assert expected > 0.1


def test_two_spans_differ_by_where_they_begin_and_by_where_they_end():
  types = np.array([[0, 1, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]], np.int32)
  batch = make_batch(token_types=types, values=np.zeros((2, 6, 2), np.float32))
  a, b = scores(2, seed=4), scores(2, seed=5)
  expected = 0.0
  # Row and places of each segment's context, but for its end.
  for row, places, weight in ((0, [1, 2], 1.0), (0, [], 0.5), (1, [1], 2.0)):
    for column in (0, 1) if places else ():
      p, q = (np.exp(x[row, places, column]) for x in (a, b))
      p, q = p / p.sum(), q / q.sum()
      expected += weight / 2 * ((p - q) * np.log(p / q)).sum()
  assert divergence(Span(), a, b, batch) == pytest.approx(expected, rel=1e-4)
  assert divergence(Span(), a, a, batch) == 0
