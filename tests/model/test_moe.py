"""A mixture of experts against a plain loop over experts, on one device and on several."""

import functools
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax.devices import sharding
from gptjax.errors import UserError
from gptjax.model.config import ModelConfig
from gptjax.model.feedforward import activate
from gptjax.model.moe import MixtureOfExperts, measure
from gptjax.model.stats import RouterStats

B, T, D, F, E = 4, 8, 16, 12, 4
# What is compared sums over 32 tokens and then 16 columns: 512 roundings of 2^-24 are 3e-5 of the
# largest element, if all of them err to one side.
TOLERANCE = 3e-5
ONE = dict.fromkeys(sharding.MESH_AXES, 1)

PLAIN = {
  "bias": False,
  "mlp.activation": "relu2",
  "experts.per_token": 1,
  "experts.router_normalize": False,
}
FULL = {
  "bias": True,
  "mlp.activation": "swiglu_clamped",
  "experts.per_token": 2,
  "experts.router_bias": True,
  "experts.shared_dim": 8,
}
CASES = {
  "switch": PLAIN,
  "switch with biases": PLAIN | {"bias": True, "experts.router_bias": True},
  "mixtral": {"bias": False, "mlp.activation": "swiglu", "experts.per_token": 2},
  "all of them": {"bias": True, "mlp.activation": "gelu", "experts.per_token": 4},
  "probabilities among all": FULL | {"experts.router_normalize": False},
  "full": FULL,
}
MESHES = [
  {"expert": 4},
  {"expert": 2, "tensor": 2},
  {"expert": 2, "fsdp": 2},
  {"expert": 2, "data": 2},
  {"expert": 2, "context": 2},
  {"fsdp": 2, "tensor": 2},
]


def make_config(**changes):
  shape = {"vocab_size": 32, "num_layers": 2, "num_heads": 2, "experts.count": E}
  return ModelConfig.from_config(shape | {"embed_dim": D, "mlp_dim": F} | changes)


@functools.cache
def make_graph(config):
  return nnx.graphdef(nnx.eval_shape(lambda: MixtureOfExperts(config, nnx.Rngs(0))))


def make_params(config):
  rng = np.random.default_rng(0)
  abstract = nnx.to_pure_dict(
    nnx.state(nnx.eval_shape(lambda: MixtureOfExperts(config, nnx.Rngs(0))), nnx.Param)
  )
  return jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), abstract)


def make_tokens(padded=True):
  """Tokens, which of them are valid, and what the outputs are weighed with."""
  rng = np.random.default_rng(1)
  x, v = rng.normal(size=(2, B, T, D)).astype(np.float32)
  valid = np.ones((B, T), bool)
  if padded:
    valid[0, 3:], valid[2] = False, False
  return x, valid, v * valid[..., None]


def by_module(config, params, x, valid):
  router_stats = RouterStats()
  y = nnx.merge(make_graph(config), params)(x, valid_BT=valid, router_stats=router_stats)
  return y, dict(router_stats)


def by_loop(config, params, x, valid):
  def project(layer, x, i=...):
    y = x @ layer["kernel"][i]
    return y + jnp.broadcast_to(layer["bias"][i], y.shape) if "bias" in layer else y

  def feed_forward(layers, i=...):
    gate = project(layers["gate"], x, i) if "gate" in layers else None
    return project(
      layers["down"], activate(config.mlp.activation, project(layers["up"], x, i), gate), i
    )

  logits = project(params["router"], x)
  k = config.experts.per_token
  chosen = logits >= jnp.sort(logits)[..., -k, None]
  probabilities = jax.nn.softmax(logits)
  weights = jnp.where(chosen, probabilities, 0)
  if config.experts.router_normalize:
    weights = weights / weights.sum(-1, keepdims=True)
  y = sum(weights[..., i, None] * feed_forward(params, i) for i in range(E))
  if "shared" in params:
    y += feed_forward(params["shared"])
  shares = [(chosen[..., i] * valid).sum() / (k * valid.sum()) for i in range(E)]
  means = [(probabilities[..., i] * valid).sum() / valid.sum() for i in range(E)]
  squares = jnp.log(jnp.exp(logits).sum(-1)) ** 2
  return y, {
    "balance_loss": E * sum(a * b for a, b in zip(shares, means, strict=True)),
    "z_loss": (squares * valid).sum() / valid.sum(),
    "load": jnp.stack(shares),
  }


def everything(forward, config, params, tokens):
  """Outputs, what the router tells, and the gradients of a function of all of them."""

  def objective(params, x, valid, v):
    y, router_stats = forward(config, params, x, valid)
    weighed = jnp.vdot(y, v) + 3 * router_stats["balance_loss"] + 2 * router_stats["z_loss"]
    return weighed, (y * valid[..., None], router_stats)

  grads, values = jax.jit(jax.grad(objective, (0, 1), has_aux=True))(params, *tokens)
  return jax.device_get((grads, values))


@functools.cache
def expected(name):
  config = make_config(**CASES[name])
  return everything(by_loop, config, make_params(config), make_tokens())


def assert_close(actual, wanted):
  actual, wanted = (jax.tree_util.tree_leaves_with_path(tree) for tree in (actual, wanted))
  for (path, a), (same, b) in zip(actual, wanted, strict=True):
    assert path == same
    np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * np.abs(b).max(), err_msg=str(path))


@pytest.mark.parametrize("name", CASES)
def test_a_mixture_is_the_loop_over_its_experts(name):
  config = make_config(**CASES[name])
  assert_close(everything(by_module, config, make_params(config), make_tokens()), expected(name))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_mixture_does_not_depend_on_where_its_experts_are(mesh):
  config = make_config(**FULL)
  with jax.set_mesh(sharding.make_mesh(ONE | mesh)):
    assert_close(
      everything(by_module, config, make_params(config), make_tokens()), expected("full")
    )


def test_rows_that_the_mesh_does_not_divide_go_to_all_experts():
  config = make_config(**FULL)
  params, (x, *_) = make_params(config), make_tokens()
  with jax.set_mesh(sharding.make_mesh(ONE | {"expert": 2, "context": 2})):
    one_token = jax.jit(functools.partial(by_module, config))(params, x[1:2, :1], None)[0]
  np.testing.assert_allclose(one_token, expected("full")[1][0][1:2, :1], atol=1e-5)


@pytest.mark.parametrize("mesh", [None, {"expert": 4}], ids=str)
def test_no_token_is_dropped_when_all_choose_one_expert(mesh):
  config = make_config(**PLAIN, **{"experts.router_bias": True})
  params, tokens = make_params(config), make_tokens()
  params["router"]["bias"] = np.array([0, 0, 30, 0], np.float32)
  wanted = everything(by_loop, config, params, tokens)
  with jax.set_mesh(sharding.make_mesh(ONE | (mesh or {}), None if mesh else jax.devices()[:1])):
    grads, (y, router_stats) = everything(by_module, config, params, tokens)
  assert_close((grads, (y, router_stats)), wanted)
  np.testing.assert_array_equal(router_stats["load"], [0, 0, 1, 0])
  assert np.abs(grads[0]["up"]["kernel"]).max((1, 2)).nonzero()[0].tolist() == [2]


def test_padding_goes_nowhere():
  # What stands in the place of padding changes neither what is told nor the other outputs.
  config = make_config(**FULL)
  graph, params = make_graph(config), make_params(config)
  x, valid, _ = make_tokens()
  run = jax.jit(lambda x: by_module(config, params, x, valid))
  y, router_stats = run(x)
  y2, router_stats2 = run(np.where(valid[..., None], x, 100))
  np.testing.assert_array_equal(y[valid], y2[valid])
  for name in router_stats:
    np.testing.assert_array_equal(router_stats[name], router_stats2[name])
  no_shared = nnx.merge(graph, params)
  no_shared.shared, no_shared.down.bias = None, None
  assert not no_shared(x, valid_BT=valid)[~valid].any()


@pytest.mark.parametrize("choices", [1, 2])
def test_the_balance_loss_is_1_in_balance_and_largest_when_all_choose_alike(choices):
  logits = np.full((1, E, E), -30, np.float32)
  for token in range(E):
    logits[0, token, [(token + i) % E for i in range(choices)]] = 0

  def told(logits):
    _, chosen = jax.lax.top_k(logits, choices)
    return measure(logits, jax.nn.one_hot(chosen, E), None)

  assert told(logits)["balance_loss"] == pytest.approx(1)
  np.testing.assert_allclose(told(logits)["load"], 1 / E)
  alike = np.repeat(logits[:, :1], E, axis=1)
  assert told(alike)["balance_loss"] == pytest.approx(E / choices)
  # E equal logits of c: log(sum exp) is c + log(E).
  assert told(np.full((1, 3, E), 2.0))["z_loss"] == pytest.approx((2 + np.log(E)) ** 2)


def test_the_router_is_float32_whatever_computes():
  # The largest of two logits that bfloat16 cannot tell apart.
  config = make_config(**PLAIN, dtype="bfloat16")
  params = make_params(config)
  params["router"]["kernel"] = np.zeros((D, E), np.float32)
  params["router"]["kernel"][0] = [0, 1, 1.0001, 0]
  x = np.ones((1, 1, D), np.float32)
  y, router_stats = by_module(config, params, x, None)
  np.testing.assert_array_equal(router_stats["load"], [0, 0, 1, 0])
  assert y.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in router_stats.values()} == {jnp.dtype("float32")}


def test_experts_that_the_mesh_does_not_divide_are_refused():
  config = make_config(**PLAIN | {"experts.count": 6})
  model = nnx.eval_shape(lambda: MixtureOfExperts(config, nnx.Rngs(0)))
  kernel = model.up.kernel
  described = {"up/kernel": types.SimpleNamespace(shape=kernel.shape, axes=kernel.axes)}
  with pytest.raises(UserError, match=r"'experts' of .*'up/kernel' has size 6.* expert = 4 does"):
    sharding.parameter_shardings(described, sharding.make_mesh(ONE | {"expert": 4}))


EIGHT = """
import jax, numpy as np
from flax import nnx
from gptjax.objectives.forward import token_loss
from gptjax.devices import sharding
from gptjax.data.batch import Batch
from gptjax.model.config import ModelConfig
from gptjax.model.stats import RouterStats
from gptjax.model.gpt import GPT

shape = {"vocab_size": 32, "num_layers": 2, "embed_dim": 16, "num_heads": 2, "mlp_dim": 24}
shape |= {"experts.count": 8, "experts.per_token": 2, "mlp.activation": "swiglu", "init.std": 0.3}
config = ModelConfig.from_config(shape)
graph, params = nnx.split(GPT(config, nnx.Rngs(0)))
tokens = np.random.default_rng(0).integers(0, 32, (8, 16)).astype(np.int32)
ones = np.ones_like(tokens)
batch = Batch(tokens, tokens, ones.astype(np.float32), ones, np.arange(16)[None] * ones)

def loss(params):
  model, router_stats = nnx.merge(graph, params), RouterStats()
  total = token_loss(model, batch, router_stats=router_stats).total
  of_routers = 0.1 * router_stats["balance_loss"].mean() + 0.1 * router_stats["z_loss"].mean()
  return total + batch.weights.sum() * of_routers

def on(mesh, devices):
  with jax.set_mesh(sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1) | mesh, devices)):
    return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))

assert jax.device_count() == 8
expected = on({}, jax.devices()[:1])
for mesh in ({"expert": 8}, {"expert": 4, "tensor": 2}, {"expert": 2, "fsdp": 2, "tensor": 2}):
  found = on(mesh, jax.devices())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3), found, expected)
print("the same")
"""


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(cpu_devices):
  environment = os.environ | cpu_devices(8)
  found = subprocess.run(
    [sys.executable, "-c", EIGHT], env=environment, capture_output=True, text=True
  )
  assert found.stdout.strip() == "the same", found.stderr[-2000:]
