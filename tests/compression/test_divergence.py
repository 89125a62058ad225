"""The divergence of a student from its teacher, and its gradients, are those of all logits."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax.compression.divergence import DIVERGENCES, Measure, compare, diverge
from gptjax.data.batch import Batch
from gptjax.devices import sharding
from gptjax.model.gpt import model_graph
from gptjax.objectives import head

B, T, V = 8, 8, 32
ONE = dict.fromkeys(sharding.MESH_AXES, 1)
# Heads of the student: a table of embeddings, or a matrix of its own.
HEADS = {
  "tied": {"head.bias": True},
  "untied": {"head.tied": False, "head.soft_cap": 3.0},
}
TEACHER = {"embed_dim": 24, "num_layers": 1, "head.tied": False, "head.soft_cap": 4.0}


class Pair:
  """A student and a teacher of another width, hidden states of both, and targets."""

  def __init__(self, student, teacher, random_params):
    self.graphs = [model_graph(config) for config in (student, teacher)]
    self.params, self.theirs = random_params(student), random_params(teacher, 1)
    rng = np.random.default_rng(0)
    self.x, self.y = (
      rng.normal(size=(B, T, config.embed_dim)).astype(np.float32) for config in (student, teacher)
    )
    tokens = rng.integers(0, V, (2, B, T)).astype(np.int32)
    weights = rng.choice([0.0, 0.5, 1.0], (B, T)).astype(np.float32)
    self.batch = Batch(*tokens, weights, np.ones_like(tokens[0]), tokens[0])

  def model(self, params, theirs):
    model = nnx.merge(self.graphs[0], params)
    model.second = nnx.merge(self.graphs[1], theirs)
    return model

  def actual(self, measure, x, params, y, theirs):
    """(total, the others) by the code under test."""
    total, *others = compare(self.model(params, theirs), x, y, self.batch, measure)
    return total, others

  def expected(self, measure, x, params, y, theirs):
    """The same, from all logits at once."""
    model, batch = self.model(params, theirs), self.batch
    logits, other = model.logits(x), model.second.logits(y)
    log_q = jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(log_q, jnp.asarray(batch.targets)[..., None], axis=-1)[..., 0]
    p, q = (jax.nn.softmax(one / measure.temperature) for one in (other, logits))
    beta, m = measure.beta, measure.beta * p + (1 - measure.beta) * q
    apart = {
      "forward_kl": kl(p, q),
      "reverse_kl": kl(q, p),
      "js": beta * kl(p, m) + (1 - beta) * kl(q, m),
    }[measure.divergence]
    z = jnp.square(jax.scipy.special.logsumexp(logits, axis=-1))
    agrees = (logits.argmax(-1) == other.argmax(-1)).astype(jnp.float32)
    minimised = (1 - measure.alpha) * loss + measure.z_loss * z
    minimised += measure.alpha * measure.temperature**2 * apart
    total, *others = (jnp.vdot(one, batch.weights) for one in (minimised, loss, apart, agrees))
    return total, others

  def differentiated(self, function, measure):
    """jit(x, params, y, theirs) -> (the sums, gradients of the total by all four)."""

    # Twice the total, as a backward pass that ignores its cotangent would be right about one.
    def doubled(*arguments):
      total, others = function(measure, *arguments)
      return 2 * total, (total, *others)

    def run(*arguments):
      (_, sums), grads = jax.value_and_grad(doubled, (0, 1, 2, 3), has_aux=True)(*arguments)
      return sums, jax.tree.map(lambda leaf: leaf / 2, grads)

    return jax.jit(run)

  def run(self, function, measure):
    arguments = (self.x, self.params, self.y, self.theirs)
    sums, grads = self.differentiated(function, measure)(*arguments)
    return jax.device_get(sums), jax.device_get(grads)


def kl(p, q):
  return (p * jnp.log(p / q)).sum(-1)


@pytest.fixture
def make_pair(tiny_config, random_params):
  def make(head="tied", teacher=TEACHER):
    return Pair(tiny_config(**HEADS[head]), tiny_config(**teacher), random_params)

  return make


@pytest.fixture
def chunks_of(monkeypatch):
  """Returns a function that makes a chunk have this many tokens."""
  return lambda tokens: monkeypatch.setattr(head, "MAX_LOGIT_BYTES", tokens * 2 * V * 4)


def assert_close(actual, expected):
  """Within a part of the largest element: sums of 64 tokens and 32 logits in float32, some of which
  cancel."""
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-2))


MEASURES = [
  Measure(0.7, temperature, divergence, 0.3, 0.05)
  for divergence in DIVERGENCES
  for temperature in (1.0, 2.5)
]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("measure", MEASURES, ids=lambda one: f"{one.divergence}-{one.temperature}")
def test_sums_and_gradients_are_those_of_all_logits(make_pair, chunks_of, measure, head):
  pair = make_pair(head)
  chunks_of(8)
  sums, (dx, dparams, dy, dtheirs) = pair.run(pair.actual, measure)
  expected, (expected_dx, expected_dparams, _, _) = pair.run(pair.expected, measure)
  assert_close(sums, expected)
  assert_close((dx, dparams), (expected_dx, expected_dparams))
  assert np.abs(dx).max() > 0.1
  # The teacher learns nothing.
  assert all((leaf == 0).all() for leaf in jax.tree.leaves((dy, dtheirs)))


def test_a_share_of_0_is_the_cross_entropy_alone_and_of_1_the_divergence_alone(make_pair):
  pair = make_pair()
  (total, loss, _, _), _ = pair.run(pair.actual, Measure(0.0))
  assert total == loss
  (total, _, apart, _), _ = pair.run(pair.actual, Measure(1.0, 2.0))
  assert total == pytest.approx(4 * apart, rel=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_model_is_not_apart_from_itself(make_pair, divergence):
  pair = make_pair("tied", HEADS["tied"])
  pair.theirs, pair.y = pair.params, pair.x
  (total, _, apart, agrees), (dx, dparams, _, _) = pair.run(
    pair.actual, Measure(1.0, 2.0, divergence)
  )
  assert abs(total) < 1e-5
  assert abs(apart) < 1e-5
  assert agrees == pair.batch.weights.sum()
  assert all(np.abs(leaf).max() < 1e-5 for leaf in jax.tree.leaves((dx, dparams)))


@pytest.mark.parametrize(("beta", "limit"), [(1e-3, "forward_kl"), (1 - 1e-3, "reverse_kl")])
def test_the_mixture_has_the_two_directions_as_its_limits(beta, limit):
  """Agarwal et al. 2023, section 2: JSD(beta) / beta goes to KL(p, q), and that by the other
  weight, at the other end, to KL(q, p)."""
  # Not too far apart: what is left is beta times p / q.
  logits = 0.5 * np.random.default_rng(0).normal(size=(2, 16, V)).astype(np.float32)
  logp, logq = jax.nn.log_softmax(logits)
  value, gradient = diverge(logp, logq, Measure(divergence="js", beta=beta))
  expected, expected_gradient = diverge(logp, logq, Measure(divergence=limit))
  factor = min(beta, 1 - beta)
  np.testing.assert_allclose(value / factor, expected, rtol=0.02)
  scale = 0.02 * np.abs(expected_gradient).max()
  np.testing.assert_allclose(gradient / factor, expected_gradient, rtol=0, atol=scale)


def test_the_logits_of_all_tokens_are_never_held(make_pair, chunks_of):
  pair = make_pair("untied")
  arguments = (pair.x, pair.params, pair.y, pair.theirs)
  inputs = max(leaf.size for leaf in jax.tree.leaves(arguments))

  def largest_array():
    # Only what is differentiated in a run.
    run = jax.jit(jax.value_and_grad(lambda *a: pair.actual(MEASURES[-1], *a)[0], (0, 1)))
    text = run.lower(*arguments).compile().as_text()
    shapes = re.findall(r"f32\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)

  assert inputs < B * T * V
  assert largest_array() >= B * T * V
  chunks_of(2)
  assert largest_array() == inputs


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
  "sizes",
  [
    {"data": 2, "fsdp": 2},
    {"fsdp": 2, "tensor": 2},
    pytest.param({"data": 2, "context": 2}, marks=pytest.mark.slow),
    pytest.param({"tensor": 4}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_a_mesh_changes_nothing(make_pair, chunks_of, sizes, head):
  pair, measure = make_pair(head), MEASURES[-1]
  expected = pair.run(pair.actual, measure)
  chunks_of(1)
  with jax.set_mesh(sharding.make_mesh(ONE | sizes)):
    assert_close(pair.run(pair.actual, measure), expected)
