import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gptjax import tree
from gptjax.data.batch import Batch
from gptjax.devices import sharding
from gptjax.model.gpt import describe_parameters, model_graph
from gptjax.model.stats import RouterStats
from gptjax.objectives.text import NextToken
from gptjax.optim import optimizer as optim
from gptjax.presets.parts import optim as presets
from gptjax.training import step as step_lib

B, T = 8, 8
EMA = 0.75
ONE = dict.fromkeys(sharding.MESH_AXES, 1)


@pytest.fixture(scope="module")
def config(tiny_config):
  return tiny_config(num_layers=1, num_kv_heads=2, **{"position.kind": "rope"})


@pytest.fixture(scope="module")
def batch():
  # Every other row has one valid token: a mean of the means of micro-batches would be another.
  rng = np.random.default_rng(0)
  weights = (np.arange(T)[None] < np.array([[8], [1]] * (B // 2))).astype(np.float32)
  return Batch(
    inputs=rng.integers(0, 32, (B, T)).astype(np.int32),
    targets=rng.integers(0, 32, (B, T)).astype(np.int32),
    weights=weights,
    segment_ids=np.repeat([[1, 2]], T // 2, axis=1).astype(np.int32) * np.ones((B, 1), np.int32),
    positions=np.tile(np.arange(T // 2, dtype=np.int32), (B, 2)),
  )


def make_optimizer(config, name="sgd", **changes):
  # Updates of plain SGD are the gradient itself; those of Adam would hide its scale.
  plain = {"weight_decay": 0.0, "clip_norm": 0.0, "momentum": 0.9, "rules": ((".*", {}),)}
  values = types.SimpleNamespace(**(presets.DEFAULTS | plain | {"name": name} | changes))
  return optim.make_optimizer(values, describe_parameters(config), optax.constant_schedule(0.5))


def make_step(config, optimizer, *, seed=0, z_loss=0.0, **options):
  task, options = NextToken(z_loss=z_loss), step_lib.StepOptions(seed=seed, **options)
  return step_lib.make_train_step(model_graph(config), task, optimizer, options, ema_decay=EMA)


@pytest.fixture(scope="module")
def optimizer(config):
  return make_optimizer(config)


@pytest.fixture(scope="module")
def train_step(config, optimizer):
  return make_step(config, optimizer)


@pytest.fixture(scope="module")
def start(optimizer, config, random_params):
  """Returns a function that makes a state of parameters that matter."""

  def start():
    params = jax.tree.map(jnp.asarray, random_params(config))
    return step_lib.TrainState(
      step=jnp.int32(0),
      skipped=jnp.int32(0),
      params=params,
      opt_state=optimizer.init(params),
      ema=jax.tree.map(jnp.copy, params),
    )

  return start


@pytest.fixture(scope="module")
def after_two_steps(train_step, start, batch):
  state, metrics = train_step(start(), batch)
  state, second = train_step(state, batch)
  return jax.device_get((state, metrics, second))


def assert_close(actual, expected, atol=1e-5):
  actual, expected = tree.named_leaves(actual), tree.named_leaves(expected)
  assert set(actual) == set(expected)
  for name in expected:
    np.testing.assert_allclose(actual[name], expected[name], atol=atol, rtol=1e-4, err_msg=name)


# --- The loss is token-exact -------------------------------------------------------------------


def test_the_loss_is_the_mean_over_all_valid_tokens(config, start, batch, after_two_steps):
  graph = model_graph(config)

  @jax.jit
  def per_token(params):
    logits_BTV = nnx.merge(graph, params)(
      batch.inputs, positions_BT=batch.positions, segment_ids_BT=batch.segment_ids
    )
    return -jnp.take_along_axis(
      jax.nn.log_softmax(logits_BTV), jnp.asarray(batch.targets)[..., None], axis=-1
    )[..., 0]

  losses = np.asarray(per_token(start().params)) * batch.weights
  _, metrics, second = after_two_steps
  assert metrics["batch_tokens"] == 36
  assert metrics["loss"] == pytest.approx(losses.sum() / 36, rel=1e-5)
  assert second["loss"] < metrics["loss"]
  # The tests below can tell it from a mean of means.
  means = [losses[i::2].sum() / batch.weights[i::2].sum() for i in range(2)]
  assert abs(np.mean(means) - losses.sum() / 36) > 0.05


def test_the_z_loss_is_minimised_and_not_reported(config, optimizer, start, batch, after_two_steps):
  plain, metrics, second = after_two_steps
  step = make_step(config, optimizer, z_loss=0.1)
  state, with_z = step(start(), batch)
  assert float(with_z["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
  state, second_with_z = step(state, batch)
  assert abs(float(second_with_z["loss"]) - float(second["loss"])) > 1e-3
  table, plain_table = (s.params["embed"]["embedding"] for s in (state, plain))
  assert np.abs(table - plain_table).max() > 1e-3


@pytest.mark.slow
def test_a_mixture_minimises_the_losses_of_its_routers_and_tells_them(
  tiny_config, random_params, batch, after_two_steps
):
  config = tiny_config(
    num_layers=2, **{"experts.count": 4, "experts.per_token": 2, "execution.scan_layers": True}
  )
  optimizer = make_optimizer(config)
  params = random_params(config)
  batch = dataclasses.replace(batch, weights=np.ones_like(batch.weights))

  def run(**options):
    factors = {"router_balance_loss": 0.2, "router_z_loss": 0.1}
    step = make_step(config, optimizer, **factors, **options)
    arrays = jax.tree.map(jnp.asarray, params)
    opt_state = optimizer.init(arrays)
    state = step_lib.TrainState(jnp.int32(0), jnp.int32(0), arrays, opt_state, None)
    return jax.device_get(step(state, batch))

  @jax.jit
  def by_hand(params):
    router_stats = RouterStats()
    logits_BTV = nnx.merge(model_graph(config), params)(
      batch.inputs,
      positions_BT=batch.positions,
      segment_ids_BT=batch.segment_ids,
      router_stats=router_stats,
    )
    picked = jax.nn.one_hot(batch.targets, 32) * jax.nn.log_softmax(logits_BTV)
    loss, balance, z = -picked.sum(-1).mean(), router_stats["balance_loss"], router_stats["z_loss"]
    told = {
      "loss": loss,
      "router/balance_loss": balance.mean(),
      "router/z_loss": z.mean(),
      "router/largest_load": 4 * router_stats["load"].max(-1).mean(),
    }
    return loss + 0.2 * balance.mean() + 0.1 * z.mean(), told

  grads, told = jax.grad(by_hand, has_aux=True)(params)
  state, metrics = run()
  for name, value in told.items():
    assert metrics[name] == pytest.approx(float(value), rel=1e-5), name
  # One step of plain SGD is the gradient.
  assert_close(jax.tree.map(lambda old, new: (old - new) / 0.5, params, state.params), grads, 1e-4)
  # Of micro-batches, all but the balance is the mean.
  _, accumulated = run(grad_accumulation=2)
  for name in ("loss", "router/z_loss"):
    assert accumulated[name] == pytest.approx(float(told[name]), rel=1e-5), name
  assert accumulated["router/largest_load"] == metrics["router/largest_load"]
  assert not [name for name in after_two_steps[1] if name.startswith("router")]


@pytest.mark.parametrize("grad_accumulation", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_updates_do_not_depend_on_accumulation(
  config, optimizer, start, batch, after_two_steps, grad_accumulation
):
  step = make_step(config, optimizer, grad_accumulation=grad_accumulation)
  state, metrics = step(start(), batch)
  state, _ = step(state, batch)
  expected, expected_metrics, _ = after_two_steps
  assert_close(metrics, expected_metrics)
  assert_close(state.params, expected.params)
  assert_close(state.opt_state, expected.opt_state)


@pytest.mark.parametrize(
  ("sizes", "grad_accumulation"),
  [
    pytest.param({"data": 4}, 2, marks=pytest.mark.slow),
    pytest.param({"fsdp": 4}, 1, marks=pytest.mark.slow),
    ({"data": 2, "fsdp": 2}, 2),
    pytest.param({"tensor": 2}, 1, marks=pytest.mark.slow),
    ({"data": 2, "context": 2}, 1),
  ],
  ids=str,
)
def test_updates_do_not_depend_on_the_mesh(
  config, optimizer, start, batch, after_two_steps, sizes, grad_accumulation
):
  devices = jax.devices()[: int(np.prod([*sizes.values()]))]
  mesh = sharding.make_mesh(ONE | sizes, devices)
  parameters = describe_parameters(config)
  abstract = step_lib.abstract_state(config, optimizer, parameters, mesh, ema=True)
  step = make_step(config, optimizer, grad_accumulation=grad_accumulation)
  with jax.set_mesh(mesh):
    state = jax.device_put(start(), jax.tree.map(lambda leaf: leaf.sharding, abstract))
    global_batch = sharding.to_global(batch, mesh)
    state, metrics = step(state, global_batch)
    state, _ = step(state, global_batch)
  expected, expected_metrics, _ = after_two_steps
  assert_close(jax.device_get(metrics), expected_metrics)
  assert_close(jax.device_get(state.params), expected.params)
  assert_close(jax.device_get(state.ema), expected.ema)
  for name, leaf in tree.named_leaves(state).items():
    wanted = tree.named_leaves(abstract)[name].sharding
    assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), name  # it stays where it was


def test_validation_sums_are_those_of_the_batch(config, start, batch, after_two_steps):
  _, metrics, _ = after_two_steps
  eval_step = step_lib.make_eval_step(model_graph(config), NextToken())
  sums, _ = eval_step(start().params, batch)
  nats, tokens = sums["loss"]
  assert float(tokens) == 36
  assert float(nats) == pytest.approx(36 * float(metrics["loss"]), rel=1e-5)


def test_a_batch_without_a_valid_token_changes_nothing(train_step, start, batch):
  empty = dataclasses.replace(batch, weights=np.zeros_like(batch.weights))
  state, metrics = train_step(start(), empty)
  assert float(metrics["loss"]) == 0
  assert int(state.skipped) == 0
  jax.tree.map(np.testing.assert_array_equal, state.params, start().params)


# --- Statistics of the layers ------------------------------------------------------------------


@pytest.fixture(scope="module")
def observed(config, optimizer, start, batch):
  return jax.device_get(observe(config, optimizer)(start(), batch))


def observe(config, optimizer, *, grad_accumulation=1):
  options = step_lib.StepOptions(seed=0, grad_accumulation=grad_accumulation)
  return step_lib.make_observe_step(model_graph(config), NextToken(), optimizer, options)


def test_observed_norms_are_those_of_the_gradient_and_the_update(config, start, batch, observed):
  graph = model_graph(config)

  def loss(params):
    logits_BTV = nnx.merge(graph, params)(
      batch.inputs, positions_BT=batch.positions, segment_ids_BT=batch.segment_ids
    )
    targets = jnp.asarray(batch.targets)[..., None]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets, axis=-1)[..., 0]
    return (losses * batch.weights).sum() / batch.weights.sum()

  params = start().params
  grads = tree.named_leaves(jax.jit(jax.grad(loss))(params))
  for name, x in tree.named_leaves(params).items():

    def norm(x, name=name):
      # One layer, so that the whole is that of layer 0.
      whole = np.linalg.norm(np.ravel(x))
      return [whole] if name.startswith("blocks/") else whole

    close = {"rtol": 1e-4, "atol": 1e-6, "err_msg": name}
    np.testing.assert_allclose(observed[f"gradient_norm/{name}"], norm(grads[name]), **close)
    np.testing.assert_allclose(observed[f"parameter_norm/{name}"], norm(x), **close)
    # SGD's first step at a learning rate of 0.5.
    np.testing.assert_allclose(observed[f"update_norm/{name}"], norm(0.5 * grads[name]), **close)
  kinds = ("gradient_norm", "parameter_norm", "update_norm")
  layers = {"layers/attention_rms", "layers/mlp_rms", "layers/residual_rms", "layers/largest_logit"}
  assert set(observed) == layers | {f"{kind}/{name}" for kind in kinds for name in grads}


def test_the_norms_of_a_stack_are_a_layer_each(tiny_config, random_params, batch):
  config = tiny_config(num_layers=2, **{"position.kind": "rope"})
  optimizer = make_optimizer(config)
  params = jax.tree.map(jnp.asarray, random_params(config))
  state = step_lib.TrainState(jnp.int32(0), jnp.int32(0), params, optimizer.init(params), ema=None)
  stats = jax.device_get(observe(config, optimizer)(state, batch))
  kernels = np.asarray(params["blocks"]["mlp"]["up"]["kernel"])  # the state was not donated
  expected = [np.linalg.norm(kernel) for kernel in kernels]
  np.testing.assert_allclose(stats["parameter_norm/blocks/mlp/up/kernel"], expected, rtol=1e-5)
  named = step_lib.name_layers(stats)
  assert named["parameter_norm/blocks/mlp/up/kernel/01"] == pytest.approx(expected[1], rel=1e-5)
  assert named["layers/residual_rms/01"] == stats["layers/residual_rms"][1]
  assert isinstance(named["gradient_norm/embed/embedding"], float)


@pytest.mark.parametrize(
  ("sizes", "grad_accumulation"),
  [
    ({"data": 2, "fsdp": 2}, 2),
    pytest.param({"tensor": 2, "context": 2}, 1, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_figures_do_not_depend_on_accumulation_and_mesh(
  config, optimizer, start, batch, observed, sizes, grad_accumulation
):
  mesh = sharding.make_mesh(ONE | sizes, jax.devices()[: int(np.prod([*sizes.values()]))])
  parameters = describe_parameters(config)
  abstract = step_lib.abstract_state(config, optimizer, parameters, mesh, ema=True)
  with jax.set_mesh(mesh):
    state = jax.device_put(start(), jax.tree.map(lambda leaf: leaf.sharding, abstract))
    step = observe(config, optimizer, grad_accumulation=grad_accumulation)
    stats = step(state, sharding.to_global(batch, mesh))
  assert all(x.is_fully_replicated for x in stats.values())
  assert_close(jax.device_get(stats), observed)


# --- The state ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_what_an_optimizer_keeps_is_sharded_like_its_parameter(config, name):
  preset = presets.OPTIMIZERS[name]
  optimizer = make_optimizer(config, name, rules=preset.get("rules", ((".*", {}),)))
  parameters = describe_parameters(config)
  mesh = sharding.make_mesh(ONE | {"fsdp": 2, "tensor": 2})
  abstract = step_lib.abstract_state(config, optimizer, parameters, mesh, ema=True)
  assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(abstract))
  shardings = sharding.parameter_shardings(parameters, mesh)
  for part in (abstract.params, abstract.ema):
    leaves = tree.named_leaves(part)
    assert {name: leaf.sharding for name, leaf in leaves.items()} == shardings
  kept = set()
  for path, leaf in tree.named_leaves(abstract.opt_state).items():
    for parameter, info in parameters.items():
      if path.endswith(f"/{parameter}") and leaf.shape == info.shape:
        assert leaf.sharding == shardings[parameter]
        kept.add(parameter)
  assert kept == set(parameters)


def test_the_state_is_born_sharded(config):
  optimizer = make_optimizer(config, "adamw")
  mesh = sharding.make_mesh(ONE | {"fsdp": 2, "tensor": 2})
  parameters = describe_parameters(config)
  abstract = step_lib.abstract_state(config, optimizer, parameters, mesh, ema=True)
  state = step_lib.init_state(config, optimizer, 3, abstract)
  assert jax.tree.structure(state) == jax.tree.structure(abstract)
  for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
    assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
    assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
  query = state.params["blocks"]["attention"]["query"]["kernel"]
  assert query.addressable_shards[0].data.shape == (1, 8, 2, 4)
  # The same values as on one device, and others by another seed.
  alone = jax.jit(step_lib.make_state, static_argnums=(0, 1, 2, 3))(config, optimizer, 3, True)
  jax.tree.map(np.testing.assert_allclose, jax.device_get(state), jax.device_get(alone))
  assert int(state.step) == 0


def test_loaded_parameters_take_the_place_of_the_initial_ones(start):
  state = start()
  loaded = {"embed": {"embedding": np.full((32, 16), 7.0, np.float32)}}
  replaced = step_lib.replace_params(state, loaded)
  for part in (replaced.params, replaced.ema):
    assert (part["embed"]["embedding"] == 7).all()
    np.testing.assert_array_equal(
      part["blocks"]["mlp"]["up"]["kernel"], state.params["blocks"]["mlp"]["up"]["kernel"]
    )


def test_the_average_moves_towards_the_weights(train_step, start, batch):
  before = jax.device_get(start())
  state, _ = train_step(start(), batch)
  state = jax.device_get(state)
  expected = jax.tree.map(lambda a, p: EMA * a + (1 - EMA) * p, before.ema, state.params)
  assert_close(state.ema, expected, atol=1e-6)
  assert np.abs(state.params["embed"]["embedding"] - before.params["embed"]["embedding"]).max() > 0


# --- What is not finite ------------------------------------------------------------------------


def test_an_update_that_is_not_finite_is_skipped(train_step, start, batch):
  state, _ = train_step(start(), batch)
  before = jax.device_get(state)
  bad = dataclasses.replace(batch, weights=np.where(batch.weights, np.inf, 0).astype(np.float32))
  state, metrics = train_step(state, bad)
  assert not np.isfinite(float(metrics["loss"]))
  assert (int(state.step), int(state.skipped), int(metrics["skipped"])) == (2, 1, 1)
  for part in ("params", "opt_state", "ema"):
    after = jax.device_get(getattr(state, part))
    jax.tree.map(np.testing.assert_array_equal, after, getattr(before, part))
  # A good one is applied again.
  state, metrics = train_step(state, batch)
  assert (int(state.step), int(state.skipped)) == (3, 1)
  embedding = state.params["embed"]["embedding"]
  assert (np.asarray(embedding) != before.params["embed"]["embedding"]).any()


def test_a_finite_loss_is_skipped_for_its_gradient(train_step, start, batch):
  state = start()
  mlp = state.params["blocks"]["mlp"]
  # Nothing comes of the huge activations, but the gradient of `down` is a multiple of them.
  mlp["up"]["bias"] = jnp.full_like(mlp["up"]["bias"], 1e25)
  mlp["down"]["kernel"] = jnp.zeros_like(mlp["down"]["kernel"])
  before = jax.device_get(state.params)
  state, metrics = train_step(state, batch)
  assert np.isfinite(float(metrics["loss"]))
  assert not np.isfinite(float(metrics["grad_norm"]))
  assert (int(state.step), int(state.skipped)) == (1, 1)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)


# --- Randomness --------------------------------------------------------------------------------


def test_dropout_is_a_function_of_seed_and_step(config, optimizer, start, batch):
  config = config.replace({"dropout.residual": 0.2})

  def loss(step, at):
    return float(step(dataclasses.replace(start(), step=jnp.int32(at)), batch)[1]["loss"])

  step = make_step(config, optimizer, dropout=True)
  first = loss(step, 0)
  assert loss(step, 0) == first
  assert loss(step, 1) != first
  other_seed = make_step(config, optimizer, dropout=True, seed=1)
  assert loss(other_seed, 0) != first
