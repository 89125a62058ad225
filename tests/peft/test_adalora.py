"""AdaLoRA's budget: how many singular values stay, which, and what pulls on the factors."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from gptjax.config import RunLength
from gptjax.errors import UserError
from gptjax.optim import optimizer as optim
from gptjax.peft.adalora import allocate_ranks
from gptjax.peft.config import PeftConfig
from gptjax.peft.surgery import describe_adapters
from gptjax.presets.parts import optim as optim_presets

RANK, TARGET, TOTAL = 4, 2, 12
TARGETS = (("attention/(query|out)", {}), ("mlp/up", {"rank": 3}))
LEAVES = ("lora_a", "lora_b", "singular_values")
# Two layers of ranks 4, 4 and 3.
ALL, LEFT = 22, 12
DURATIONS = {"budget_initial_steps": 3, "budget_final_steps": 2, "budget_every_steps": 2}


@pytest.fixture(scope="module")
def parameters(model_config):
  config = PeftConfig("adalora", TARGETS, rank=RANK, target_rank=TARGET)
  return describe_adapters(model_config, config)


@pytest.fixture(scope="module")
def make_optimizer(parameters):
  """Returns a function that makes SGD of a learning rate of 0.1 with a budget."""

  def make(penalty=0.1, run=RunLength(1, None, TOTAL), **durations):  # noqa: B008
    values = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 0.0}
    values = types.SimpleNamespace(**(optim_presets.DEFAULTS | values))
    inner = optim.make_optimizer(values, parameters, optax.constant_schedule(0.1))
    config = {"rank": RANK, "target_rank": TARGET, "orthogonal_penalty": penalty}
    config = ConfigDict(config | DURATIONS | durations)
    return allocate_ranks(inner, config, parameters, run)

  return make


def random_like(parameters, seed):
  rng = np.random.default_rng(seed)
  return {name: jnp.asarray(rng.normal(size=i.shape), "float32") for name, i in parameters.items()}


def singular(params):
  return {name: np.asarray(x) for name, x in params.items() if name.endswith("singular_values")}


@pytest.fixture(scope="module")
def history(parameters, make_optimizer):
  """(params before, gradient, params after, state after) of each of the updates."""
  optimizer = make_optimizer()
  update = jax.jit(optimizer.update)
  params = random_like(parameters, 0)
  state, steps = optimizer.init(params), []
  for step in range(TOTAL):
    grads = random_like(parameters, step + 1)
    new, state, _ = update(grads, state, params, jnp.int32(step))
    steps.append((params, grads, new, state))
    params = new
  return steps


def test_the_number_of_singular_values_follows_the_schedule(history):
  found = [sum(np.count_nonzero(x) for x in singular(new).values()) for *_, new, _ in history]
  expected = []
  for updates in range(1, TOTAL + 1):
    left = 1 - (updates - 3) / (TOTAL - 2 - 3)
    budget = round(LEFT + (ALL - LEFT) * left**3) if updates < TOTAL - 2 else LEFT
    due = updates >= TOTAL - 2 or (updates > 3 and updates % 2 == 0)
    expected.append(budget if due else ALL)
  assert found == expected
  assert set(expected) == {ALL, LEFT, 18, 14}


def test_in_the_final_phase_the_same_stay(history):
  kept = [{n: x != 0 for n, x in singular(new).items()} for *_, new, _ in history[-3:]]
  for name, first in kept[0].items():
    np.testing.assert_array_equal(kept[1][name], first)
    np.testing.assert_array_equal(kept[2][name], first)
  # Neither each matrix nor each layer has its share.
  assert len({int(row.sum()) for x in kept[0].values() for row in x}) > 1


def test_the_most_important_triplets_stay(history, parameters):
  """Equations 7 to 11, by numpy, for the first update after which some are set to 0."""
  sensitivity = {name: np.zeros(info.shape) for name, info in parameters.items()}
  uncertainty = dict(sensitivity)
  for before, grads, *_ in history[:4]:
    for name, w in before.items():
      found = np.abs(w * (grads[name] + pull(name, w, parameters[name], 0.1)))
      sensitivity[name] = 0.85 * sensitivity[name] + 0.15 * found
      apart = np.abs(found - sensitivity[name])
      uncertainty[name] = 0.85 * uncertainty[name] + 0.15 * apart
  scores = []
  for name in singular(before):
    path = name.removesuffix("singular_values")
    for layer in range(2):
      s = {n: (sensitivity[path + n] * uncertainty[path + n])[layer] for n in LEAVES}
      rank = s["singular_values"].size
      a = s["lora_a"].reshape(-1, rank).mean(0)
      b = s["lora_b"].reshape(rank, -1).mean(1)
      scores += [(s["singular_values"][k] + a[k] + b[k], name, layer, k) for k in range(rank)]
  _, _, after, state = history[3]
  for name, value in sensitivity.items():
    np.testing.assert_allclose(state.sensitivity[name], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(state.uncertainty[name], uncertainty[name], rtol=1e-3, atol=1e-6)
  for place, (_, name, layer, k) in enumerate(sorted(scores, reverse=True)):
    assert (after[name][layer, k] != 0) == (place < 18), place


def pull(name, w, info, penalty):
  """The gradient of the penalty, by its closed form 4 A (A^T A - I)."""
  if name.endswith("singular_values"):
    return 0.0
  rank_axis = info.axes.index("rank") - 1
  layers = []
  for layer in np.asarray(w):
    a = np.moveaxis(layer, rank_axis, -1)
    columns = a.reshape(-1, a.shape[-1])
    gradient = 4 * columns @ (columns.T @ columns - np.eye(a.shape[-1]))
    layers.append(np.moveaxis(gradient.reshape(a.shape), -1, rank_axis))
  return penalty * np.stack(layers)


def test_the_penalty_pulls_towards_orthonormal_factors(history, parameters):
  before, grads, after, _ = history[0]
  for name, w in before.items():
    expected = w - 0.1 * (grads[name] + pull(name, w, parameters[name], 0.1))
    np.testing.assert_allclose(after[name], expected, rtol=1e-4, atol=1e-4, err_msg=name)


def test_phases_that_leave_no_step_between_them_are_an_error(make_optimizer):
  with pytest.raises(UserError, match=r"budget_initial of 6 steps and peft\.budget_final of 6"):
    make_optimizer(budget_initial_steps=6, budget_final_steps=6)


def test_it_is_traced_without_a_run(make_optimizer, parameters):
  optimizer = make_optimizer(run=None)
  state = jax.eval_shape(optimizer.init, random_like(parameters, 0))
  for watched in (state.sensitivity, state.uncertainty):
    assert jax.tree.map(jnp.shape, watched) == {n: info.shape for n, info in parameters.items()}
