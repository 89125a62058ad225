import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.devices import sharding
from gptjax.objectives import cross_entropy as losses
from gptjax.objectives import head

B, T, D, V = 4, 8, 16, 24
TIED, UNTIED = ("vocab", "embed"), ("embed", "vocab")
ONE = dict.fromkeys(sharding.MESH_AXES, 1)


def make_tokens(scale=1.0):
  """Hidden states, a kernel [D, V], targets and weights, of which some are 0."""
  rng = np.random.default_rng(0)
  return (
    scale * rng.normal(size=(B, T, D)).astype(np.float32),
    rng.normal(size=(D, V)).astype(np.float32),
    rng.integers(0, V, (B, T)).astype(np.int32),
    rng.choice([0.0, 0.5, 1.0], (B, T)).astype(np.float32),
  )


def by_formula(x_BTD, kernel_DV, targets_BT, weights_BT, cap=0.0, z_loss=0.0):
  """(what is minimised, cross-entropy), from all logits at once."""
  logits_BTV = jnp.matmul(x_BTD, kernel_DV, precision="highest")
  if cap:
    logits_BTV = cap * jnp.tanh(logits_BTV / cap)
  log_p = jax.nn.log_softmax(logits_BTV)
  plain_BT = -jnp.take_along_axis(log_p, jnp.asarray(targets_BT)[..., None], axis=-1)[..., 0]
  z_BT = jnp.square(jax.scipy.special.logsumexp(logits_BTV, axis=-1))
  return (weights_BT * (plain_BT + z_loss * z_BT)).sum(), (weights_BT * plain_BT).sum()


def differentiate(function):
  """jit(x, kernel, ...) -> ((total, cross-entropy), gradients of total by x and the kernel)."""

  # Twice the total, as a backward pass that ignores its cotangent would be right about one.
  def doubled(*arguments):
    total, plain = function(*arguments)
    return 2 * total, (total, plain)

  def differentiated(*arguments):
    (_, values), grads = jax.value_and_grad(doubled, (0, 1), has_aux=True)(*arguments)
    return values, jax.tree.map(lambda leaf: leaf / 2, grads)

  return jax.jit(differentiated)


def expected_of(tokens, **options):
  return differentiate(lambda *arguments: by_formula(*arguments, **options))(*tokens)


def actual_of(tokens, axes=UNTIED, **options):
  """The same as `expected_of`, by the code under test; the gradient of the kernel is [D, V] too."""
  x_BTD, kernel_DV, targets_BT, weights_BT = tokens
  kernel = kernel_DV.T if axes == TIED else kernel_DV
  loss = differentiate(lambda *arguments: losses.cross_entropy(*arguments, axes=axes, **options))
  values, (dx_BTD, dkernel) = loss(x_BTD, kernel, targets_BT, weights_BT)
  return jax.device_get((values, (dx_BTD, dkernel.T if axes == TIED else dkernel)))


def assert_close(actual, expected, tolerance=2e-6):
  """Within a part of the largest element. Sums here are of at most 32 tokens or 24 logits, whose
  rounding in float32 (2^-24 = 6e-8 an operation) adds up to 32 * 6e-8 = 2e-6 if all of it errs to
  one side."""
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.fixture
def chunks_of(monkeypatch):
  """Returns a function that makes a chunk have this many tokens, of the whole vocabulary."""

  def chunks_of(tokens):
    monkeypatch.setattr(head, "MAX_LOGIT_BYTES", tokens * V * 4)

  return chunks_of


# --- Values and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("axes", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize(
  "options", [{}, {"z_loss": 0.1}, {"cap": 2.0}, {"cap": 2.0, "z_loss": 0.1}], ids=str
)
def test_the_loss_and_its_gradients_are_those_of_the_softmax(axes, options):
  tokens = make_tokens()
  assert (tokens[3] == 0).any()
  assert_close(actual_of(tokens, axes, **options), expected_of(tokens, **options))


def test_the_cross_entropy_leaves_out_the_z_loss():
  tokens = make_tokens()
  total, plain = losses.cross_entropy(*tokens, axes=UNTIED, z_loss=0.1)
  assert float(total) > float(plain) + 1
  assert_close(plain, losses.cross_entropy(*tokens, axes=UNTIED).total)


def test_the_loss_is_minus_the_log_probability_of_the_target():
  x = np.log([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]).astype(np.float32) + 7
  one = np.ones((1, 2), np.float32)
  sums = losses.cross_entropy(x, np.eye(3, dtype=np.float32), np.array([[1, 2]]), one, axes=UNTIED)
  assert float(sums.total) == pytest.approx(-np.log(0.25 * 0.8), rel=1e-5)


def test_huge_logits_have_a_finite_loss_and_gradients():
  x, kernel = np.array([[[1e5, -1e5]]], np.float32), np.eye(2, dtype=np.float32)
  tokens = (x, kernel, np.array([[1]]), np.ones((1, 1), np.float32))
  (total, _), (dx, _) = actual_of(tokens)
  assert float(total) == 2e5
  np.testing.assert_array_equal(dx, [[[1, -1]]])


def test_a_token_of_weight_0_has_no_influence():
  x, kernel, targets, weights = make_tokens()
  _, (dx, dkernel) = actual_of((x, kernel, targets, weights), z_loss=0.1)
  ignored = weights == 0
  assert (dx[ignored] == 0).all()
  others = np.where(ignored[..., None], 9.0, x), kernel, np.where(ignored, 0, targets), weights
  assert_close(actual_of(others, z_loss=0.1)[1][1], dkernel)


def test_bfloat16_hidden_states_make_bfloat16_products_and_float32_sums():
  x, kernel, targets, weights = make_tokens()
  # Nothing is lost where these are rounded, so the logits are those of float32.
  x, kernel = jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16).astype(jnp.float32)
  values, (dx, dkernel) = actual_of((x, kernel, targets, weights))
  assert {leaf.dtype for leaf in (*values, dkernel)} == {jnp.dtype("float32")}
  assert dx.dtype == jnp.bfloat16
  wide = x.astype(jnp.float32)
  expected, (expected_dx, expected_dkernel) = expected_of((wide, kernel, targets, weights))
  assert_close(values, expected)
  # The gradient of the logits is rounded to 8 bits, half a unit of which is 2^-9, and so is what is
  # made of it. Of a token it is at most its weight, and adds up to at most twice that.
  of_kernel = jnp.abs(kernel).max()
  bound = 2**-9 * (2 * of_kernel + jnp.abs(expected_dx).max())
  np.testing.assert_allclose(dx.astype(np.float32), expected_dx, rtol=0, atol=bound)
  of_tokens = (weights[..., None] * jnp.abs(wide)).sum((0, 1)).max()
  bound = 2**-9 * (of_tokens + jnp.abs(expected_dkernel).max())
  np.testing.assert_allclose(dkernel, expected_dkernel, rtol=0, atol=bound)


# --- Chunks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("size", [1, 8, 15])  # 15 does not divide 32
def test_many_chunks_are_one(chunks_of, axes, size):
  tokens, options = make_tokens(), {"cap": 2.0, "z_loss": 0.1}
  whole = actual_of(tokens, axes, **options)
  chunks_of(size)
  assert_close(actual_of(tokens, axes, **options), whole)


def largest_array(tokens, axes):
  """Elements of the largest array of any size in the compiled value and gradients."""
  kernel = tokens[1].T if axes == TIED else tokens[1]
  loss = differentiate(lambda *arguments: losses.cross_entropy(*arguments, axes=axes))
  text = loss.lower(tokens[0], kernel, *tokens[2:]).compile().as_text()
  shapes = re.findall(r"[a-z]\w*\[([\d,]+)\]", text)
  return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("axes", [TIED, UNTIED], ids=["tied", "untied"])
def test_the_logits_of_all_tokens_are_never_held(chunks_of, axes):
  tokens = make_tokens()
  assert largest_array(tokens, axes) >= B * T * V
  chunks_of(4)
  # Nothing is larger than what goes in and comes out.
  assert largest_array(tokens, axes) == max(B * T * D, D * V)


# --- Meshes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize(
  "sizes",
  [
    {"data": 2, "fsdp": 2},
    {"fsdp": 2, "tensor": 2},
    {"data": 2, "context": 2},
    {"tensor": 4},
  ],
  ids=str,
)
def test_a_mesh_changes_nothing(chunks_of, sizes, axes):
  tokens, options = make_tokens(), {"cap": 2.0, "z_loss": 0.1}
  expected = expected_of(tokens, **options)
  chunks_of(1)
  with jax.set_mesh(sharding.make_mesh(ONE | sizes)):
    assert_close(actual_of(tokens, axes, **options), expected)


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_bias_of_the_logits_counts_and_has_its_gradient(chunks_of, tensor):
  x_BTD, kernel_DV, targets_BT, weights_BT = make_tokens()
  bias_V = np.random.default_rng(1).normal(size=V).astype(np.float32)
  chunks_of(8)

  def expected(bias_V):
    # As one more column of the input, which is 1.
    x = jnp.concatenate([x_BTD, jnp.ones((B, T, 1))], axis=-1)
    kernel = jnp.concatenate([kernel_DV, bias_V[None]])
    return by_formula(x, kernel, targets_BT, weights_BT, cap=3.0, z_loss=0.1)[0]

  def actual(bias_V):
    tokens = (x_BTD, kernel_DV, targets_BT, weights_BT)
    return losses.cross_entropy(*tokens, axes=UNTIED, bias_V=bias_V, cap=3.0, z_loss=0.1).total

  mesh = sharding.make_mesh(ONE | {"data": 2, "tensor": tensor}, jax.devices()[: 2 * tensor])
  with jax.set_mesh(mesh):
    found = jax.device_get(jax.jit(jax.value_and_grad(actual))(bias_V))
  assert_close(found, jax.jit(jax.value_and_grad(expected))(bias_V))
