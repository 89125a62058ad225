"""Log probabilities of single tokens, and their gradients, are those of all logits at once."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.devices import sharding
from gptjax.objectives import head
from gptjax.objectives.log_probs import token_log_probs

B, T, D, V = 4, 8, 16, 24
TIED, UNTIED = ("vocab", "embed"), ("embed", "vocab")
ONE = dict.fromkeys(sharding.MESH_AXES, 1)


@pytest.fixture
def tokens():
  """Hidden states, a kernel [D, V], a bias, and targets."""
  rng = np.random.default_rng(0)
  return (
    rng.normal(size=(B, T, D)).astype(np.float32),
    rng.normal(size=(D, V)).astype(np.float32),
    rng.normal(size=V).astype(np.float32),
    rng.integers(0, V, (B, T)).astype(np.int32),
  )


@pytest.fixture
def small_chunks(monkeypatch):
  monkeypatch.setattr(head, "MAX_LOGIT_BYTES", 5 * V * 4)


def by_formula(x_BTD, kernel_DV, bias_V, targets_BT, cap=0.0, temperature=1.0):
  logits_BTV = jnp.matmul(x_BTD, kernel_DV, precision="highest") + bias_V[None, None]
  if cap:
    logits_BTV = cap * jnp.tanh(logits_BTV / cap)
  log_p = jax.nn.log_softmax(logits_BTV / temperature)
  targets_BT1 = jnp.asarray(targets_BT)[..., None]
  return jnp.take_along_axis(log_p, targets_BT1, -1)[..., 0], -(jnp.exp(log_p) * log_p).sum(-1)


def differentiate(function):
  """jit(...) -> the scores, and the gradients of a function of them that is not a sum."""
  weights_2BT = np.random.default_rng(1).normal(size=(2, B, T)).astype(np.float32)

  def mixed(*arguments):
    scores = function(*arguments)
    # As a ratio of probabilities would be used: each token has a cotangent of its own.
    log_prob_B = (weights_2BT[0] * scores[0]).sum(-1)
    return jnp.square(log_prob_B).sum() + (weights_2BT[1] * scores[1]).sum(), tuple(scores)

  return jax.jit(jax.value_and_grad(mixed, (0, 1, 2), has_aux=True))


def actual(axes, **options):
  def function(x_BTD, kernel_DV, bias_V, targets_BT):
    kernel = kernel_DV.T if axes == TIED else kernel_DV
    return token_log_probs(x_BTD, kernel, targets_BT, axes=axes, bias_V=bias_V, **options)

  return differentiate(function)


def assert_close(actual, expected, tolerance=4e-6):
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("axes", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize(
  "options", [{}, {"temperature": 0.6}, {"cap": 2.0, "temperature": 1.3}], ids=str
)
def test_scores_and_gradients_are_those_of_all_logits(tokens, small_chunks, axes, options):
  expected = differentiate(lambda *arguments: by_formula(*arguments, **options))(*tokens)
  assert_close(actual(axes, **options)(*tokens), expected)


@pytest.mark.parametrize("axes", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize(
  "sizes", [{"data": 2, "fsdp": 2}, {"data": 2, "context": 2}, {"fsdp": 2, "tensor": 2}], ids=str
)
def test_a_mesh_changes_nothing(tokens, small_chunks, axes, sizes):
  expected = differentiate(by_formula)(*tokens)
  with jax.set_mesh(sharding.make_mesh(ONE | sizes)):
    assert_close(actual(axes)(*tokens), expected)


def test_a_target_that_is_certain_has_no_entropy_and_finite_gradients():
  x, kernel, targets = np.array([[[1e5, -1e5]]], "f"), np.eye(2, dtype="f"), np.array([[0]])
  scores = token_log_probs(x, kernel, targets, axes=UNTIED)
  assert scores.log_prob.item() == 0
  assert scores.entropy.item() == 0
  gradient = jax.grad(lambda x: sum(token_log_probs(x, kernel, targets, axes=UNTIED)).sum())(x)
  assert (gradient == 0).all()


def test_the_logits_of_all_tokens_are_never_held(tokens, small_chunks):
  text = actual(UNTIED).lower(*tokens).compile().as_text()
  shapes = re.findall(r"[a-z]\w*\[([\d,]+)\]", text)
  assert max(math.prod(map(int, shape.split(","))) for shape in shapes) == max(B * T * D, D * V)
