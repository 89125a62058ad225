import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from gptjax import tree
from gptjax.config import RunLength
from gptjax.data.batch import Batch
from gptjax.devices import sharding
from gptjax.errors import UserError
from gptjax.model.gpt import GPT, describe_parameters
from gptjax.objectives.text import NextToken
from gptjax.optim import optimizer as optim
from gptjax.peft.adalora import allocate_ranks
from gptjax.peft.adaptation import Adapters
from gptjax.peft.config import PeftConfig
from gptjax.peft.layers import Adapter
from gptjax.peft.surgery import abstract_model, adapt, describe_adapters, merge, unmerge
from gptjax.presets.parts import optim as optim_presets
from gptjax.presets.parts.peft import DEFAULTS, PEFT
from gptjax.training import step as step_lib

ONE = dict.fromkeys(sharding.MESH_AXES, 1)


def preset(name, **changes):
  return PeftConfig.from_config(DEFAULTS | PEFT[name] | {"rank": 4, "target_rank": 2} | changes)


PROJECTIONS = ["lora", "dora", "ia3", "houlsby", "parallel"]


@pytest.fixture(scope="module")
def base_logits(make_model, logits):
  return logits(make_model())


@pytest.mark.parametrize("name", PROJECTIONS)
def test_an_adapted_model_computes_what_it_did(name, make_model, logits, base_logits):
  adapted = adapt(make_model(), preset(name), nnx.Rngs(0))
  # The norms of DoRA are divided by themselves.
  np.testing.assert_allclose(logits(adapted), base_logits, atol=1e-5 if name == "dora" else 0)


@pytest.mark.parametrize("name", ["lora", "adalora", "dora", "ia3"])
def test_merged_it_is_a_plain_model_with_the_same_logits(
  name, make_adapted, logits, base_logits, model_config
):
  inputs = {"scale_input": True} if name == "ia3" else {}
  targets = (("attention/(query|out)", {}), ("mlp/up", {}), ("mlp/down", inputs))
  adapted = make_adapted(preset(name, targets=targets))
  expected = logits(adapted)
  assert np.abs(expected - base_logits).max() > 0.1
  merged = merge(adapted)
  assert type(merged) is GPT
  assert set(tree.named_leaves(nnx.to_pure_dict(nnx.state(merged)))) == set(
    describe_parameters(model_config)
  )
  np.testing.assert_allclose(logits(merged), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_what_was_merged_can_be_taken_out_again(name, make_adapted):
  adapted = make_adapted(preset(name))
  adapters = nnx.to_pure_dict(nnx.state(adapted, Adapter))
  before = tree.named_leaves(nnx.to_pure_dict(nnx.state(adapted)))
  again = unmerge(merge(adapted), preset(name), adapters)
  after = tree.named_leaves(nnx.to_pure_dict(nnx.state(again)))
  assert set(after) == set(before)
  for leaf, value in before.items():
    np.testing.assert_allclose(after[leaf], value, atol=1e-5, err_msg=leaf)


def test_parameters_of_the_model_are_trained_beside_adapters(make_adapted, logits, model_config):
  config = preset("lora", unfrozen=(r"^embed/", r"norm/scale$"))
  whole = {name for name in describe_parameters(model_config) if name.endswith("norm/scale")}
  trained = {name for name in describe_adapters(model_config, config) if "/lora_" not in name}
  assert trained == whole | {"embed/embedding"}
  adapted = make_adapted(config)
  merged = merge(adapted)
  np.testing.assert_array_equal(merged.embed.embedding[...], adapted.embed.embedding[...])
  np.testing.assert_allclose(logits(merged), logits(adapted), atol=1e-4)


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"unfrozen": ("embedd/",)}, r"peft.unfrozen: 'embedd/' is found in the name of no parameter"),
    (
      {"unfrozen": ("mlp/up/kernel",), "base": "int8"},
      "'blocks/mlp/up/kernel' is kept in int8 and cannot be trained; set peft.base=float32",
    ),
  ],
)
def test_what_cannot_be_trained_whole_is_named(changes, sentence, make_model):
  with pytest.raises(UserError, match=sentence):
    adapt(make_model(), preset("lora", **changes), nnx.Rngs(0))


def test_what_cannot_be_merged_or_taken_out_is_refused(make_adapted, make_model):
  with pytest.raises(UserError, match="adapter: Bottleneck is not to be merged"):
    merge(make_adapted(preset("houlsby")))
  with pytest.raises(UserError, match="what was merged cannot be told apart"):
    unmerge(make_model(), preset("dora"), {})


@pytest.mark.parametrize("name", [name for name in PEFT if name != "none"])
def test_adapters_are_what_the_filter_finds_and_all_are_sharded(name, tiny_config, make_model):
  config = tiny_config()
  adapted = adapt(make_model(config), preset(name), nnx.Rngs(0))
  _, trained, rest = nnx.split(adapted, Adapter, ...)
  described = describe_adapters(config, preset(name))
  found = tree.named_leaves(nnx.to_pure_dict(trained))
  assert {leaf: x.shape for leaf, x in found.items()} == {n: i.shape for n, i in described.items()}
  # The model's own parameters keep their names.
  own = {*found, *tree.named_leaves(nnx.to_pure_dict(rest))} - set(described)
  assert own == set(describe_parameters(config)) - set(described)
  mesh = sharding.make_mesh(ONE | {"fsdp": 2, "tensor": 2})
  shardings = sharding.parameter_shardings(described, mesh)
  if name == "lora":
    up = shardings["blocks/attention/query/lora_b"]
    assert up.spec == jax.sharding.PartitionSpec(None, None, ("tensor",), None)
  if name == "bitfit":
    assert set(described) == {n for n in describe_parameters(config) if n.endswith("bias")}


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_of_labels_is_trained_with_what_it_has(bias, tiny_config, make_model):
  adapted = adapt(
    make_model(tiny_config(**{"label_head.num_labels": 2, "label_head.bias": bias})),
    preset("ia3"),
    nnx.Rngs(0),
  )
  found = tree.named_leaves(nnx.to_pure_dict(nnx.state(adapted, Adapter)))
  expected = {"label_head/kernel", "label_head/bias"} if bias else {"label_head/kernel"}
  assert {name for name in found if "label_head" in name} == expected


def test_a_rule_gives_what_it_names_a_rank_of_its_own(make_model):
  targets = (("query", {"rank": 2}), "attention")
  adapted = adapt(make_model(), preset("lora", targets=targets, alpha=8.0), nnx.Rngs(0))
  attention = adapted.blocks.attention
  assert (attention.query.lora_a.shape[-1], attention.query.scale) == (2, 4.0)
  assert (attention.out.lora_a.shape[-1], attention.out.scale) == (4, 2.0)


@pytest.mark.parametrize(
  ("name", "pattern", "sentence"),
  [
    ("lora", "attention/qury", "'attention/qury' is found in the name of no projection"),
    ("lora", "attention_norm", "'attention_norm' is found in the name of no projection"),
    ("lora", "^head", "'^head' is found in the name of no projection"),
    ("bitfit", "bias$", "'bias$' is found in the name of no bias of the model. It has none"),
    ("parallel", "attention", "no feed-forward network"),
  ],
)
def test_a_rule_that_names_nothing_is_an_error(name, pattern, sentence, make_model, tiny_config):
  model = make_model(tiny_config(bias=False, **{"head.tied": False}))
  rules = (".*", pattern) if name == "lora" else (pattern,)
  with pytest.raises(UserError, match=re.escape(sentence)):
    adapt(model, preset(name, targets=rules), nnx.Rngs(0))


# --- The step: the same update whatever the mesh, the accumulation and the execution -----------

TARGETS = (("attention/(query|value|out)", {}), ("mlp", {}))
STEPS = {name: preset(name) for name in PEFT if name not in ("none", "rslora")} | {
  "dora": preset("dora", targets=TARGETS),
  "prompt": preset("prompt", virtual_tokens=4),
}
B, T = 8, 8


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  return Batch(
    inputs=rng.integers(0, 32, (B, T)).astype(np.int32),
    targets=rng.integers(0, 32, (B, T)).astype(np.int32),
    weights=(np.arange(T)[None] < np.array([[8], [1]] * (B // 2))).astype(np.float32),
    segment_ids=np.repeat([[1, 2]], T // 2, axis=1).astype(np.int32) * np.ones((B, 1), np.int32),
    positions=np.tile(np.arange(T // 2, dtype=np.int32), (B, 2)),
  )


@pytest.fixture(scope="module")
def run(model_config, batch, random_params, make_adapted):
  """Returns a function: one step of SGD, and its state and metrics."""

  def run(method, sizes=None, grad_accumulation=1, **execution):
    peft, config = STEPS[method], model_config.replace(execution)
    described = describe_adapters(config, peft)
    values = {"name": "sgd", "weight_decay": 0.0, "clip_norm": 0.0, "rules": ((".*", {}),)}
    values = types.SimpleNamespace(**(optim_presets.DEFAULTS | values))
    optimizer = optim.make_optimizer(values, described, optax.constant_schedule(0.5))
    if method == "adalora":  # Which sets singular values to 0 after the first update.
      phases = {"budget_initial_steps": 0, "budget_final_steps": 1, "budget_every_steps": 1}
      section = ConfigDict(dataclasses.asdict(peft) | phases)
      optimizer = allocate_ranks(optimizer, section, described, RunLength(1, None, 2))
    params = nnx.to_pure_dict(nnx.state(make_adapted(peft, config), Adapter))
    state = step_lib.TrainState(
      jnp.int32(0), jnp.int32(0), params, optimizer.init(params), None, jnp.uint32(7)
    )
    frozen = tree.without(random_params(config), described)
    step = step_lib.make_train_step(
      nnx.graphdef(abstract_model(config, peft)),
      NextToken(),
      optimizer,
      step_lib.StepOptions(seed=0, grad_accumulation=grad_accumulation),
    )
    devices = jax.devices()[: int(np.prod([*(sizes or {}).values()], dtype=int))]
    mesh = sharding.make_mesh(ONE | (sizes or {}), devices)
    adaptation = Adapters(peft, {})
    abstract = step_lib.abstract_state(
      config, optimizer, described, mesh, ema=False, adaptation=adaptation
    )
    where = sharding.parameter_shardings(describe_parameters(config), mesh)
    with jax.set_mesh(mesh):
      state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))
      frozen = tree.map_named(lambda name, x: jax.device_put(x, where[name]), frozen)
      state, metrics = step(state, sharding.to_global(batch, mesh), frozen)
    return jax.device_get((state, metrics))

  return run


@pytest.fixture(scope="module")
def alone(run):
  """Returns a function: the result of a method on one device."""
  return functools.cache(run)


MESH = {"sizes": {"fsdp": 2, "tensor": 2}, "grad_accumulation": 2}


@pytest.mark.parametrize(
  ("method", "how"),
  [
    ("dora", MESH | {"execution.remat": "full"}),
    pytest.param("prompt", {"sizes": {"data": 2, "context": 2}}, marks=pytest.mark.slow),
    *(
      pytest.param(method, how, marks=pytest.mark.slow)
      for method in STEPS
      for how in (MESH | {"execution.remat": "full"}, MESH | {"execution.scan_layers": False})
      if (method, how.get("execution.remat")) != ("dora", "full")
    ),
  ],
  ids=str,
)
def test_updates_do_not_depend_on_mesh_accumulation_and_execution(method, how, run, alone):
  state, metrics = run(method, **how)
  expected, expected_metrics = alone(method)
  assert metrics["loss"] == pytest.approx(float(expected_metrics["loss"]), rel=1e-5)
  actual = tree.named_leaves(state.params)
  for name, value in tree.named_leaves(expected.params).items():
    np.testing.assert_allclose(actual[name], value, atol=2e-5, rtol=1e-4, err_msg=name)


def test_only_adapters_are_updated_and_kept(alone, make_adapted, model_config):
  state, _ = alone("dora")
  before = nnx.to_pure_dict(nnx.state(make_adapted(STEPS["dora"], model_config), Adapter))
  described = describe_adapters(model_config, STEPS["dora"])
  assert set(tree.named_leaves(state.params)) == set(described)
  kept = sum(x.size for x in jax.tree.leaves(state.opt_state))
  assert kept == sum(int(np.prod(info.shape)) for info in described.values())
  for name, value in tree.named_leaves(before).items():
    assert np.abs(tree.named_leaves(state.params)[name] - value).max() > 1e-4, name
  assert state.base_checksum == 7
