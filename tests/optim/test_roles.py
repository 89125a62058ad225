"""The role of a parameter is declared where it is made, and whoever needs it reads it there."""

import types

import optax
import pytest

from gptjax import tree
from gptjax.model.gpt import describe_parameters
from gptjax.model.layers import ROLES
from gptjax.optim.optimizer import make_optimizer
from gptjax.presets.parts import optim as presets

# Models that together have every parameter there is.
MODELS = {
  "bert": {
    "visibility": "bidirectional",
    "embed.token_types": 2,
    "embed.norm": True,
    "head.pooler": True,
    "head.transform": True,
    "head.bias": True,
    "head.tied": False,
  },
  "labels": {
    "label_head.num_labels": 3,
    "attention.sinks": True,
    "attention.qk_norm": True,
    "position.kind": "rope",
  },
  "experts": {
    "experts.count": 4,
    "experts.per_token": 2,
    "experts.router_bias": True,
    "residual.values": True,
    "residual.embedding": True,
    "experts.shared_dim": 8,
  },
  "t5": {"position.kind": "t5", "encoder_layers": 2, "head.tied": False},
}


@pytest.fixture(params=MODELS)
def parameters(request, tiny_config):
  return describe_parameters(tiny_config(**MODELS[request.param]))


def groups(parameters, preset, width_ratio=1.0):
  values = presets.DEFAULTS | presets.OPTIMIZERS[preset]
  schedule = optax.constant_schedule(0.1)
  return make_optimizer(types.SimpleNamespace(**values), parameters, schedule, width_ratio).groups


def test_every_parameter_has_a_role_that_fits_its_shape(parameters):
  for name, info in parameters.items():
    assert info.role in ROLES, name
    assert (info.role in ("hidden", "head", "router")) == (info.fan_in_axes is not None), name
    assert (info.role == "bias") == name.endswith("bias"), name
    assert (info.role == "embedding") == name.endswith("embedding"), name


def test_muon_takes_the_matrices_between_widths_alone(parameters):
  for name, group in groups(parameters, "muon").items():
    expected = "muon" if parameters[name].role in ("hidden", "router") else "adamw"
    assert group.algorithm == expected, name
    assert (group.decay == 0) == (parameters[name].role in ("norm", "bias", "scalar")), name


def test_the_head_of_labels_and_the_sinks_are_not_muons(tiny_config):
  found = groups(describe_parameters(tiny_config(**MODELS["labels"])), "muon")
  assert found["label_head/kernel"].algorithm == "adamw"
  assert found["blocks/attention/sinks"].algorithm == "adamw"


def test_across_widths_only_what_reads_a_width_learns_more_slowly(parameters):
  narrow, wide = groups(parameters, "adamw"), groups(parameters, "adamw", width_ratio=4.0)
  for name, info in parameters.items():
    times = 0.25 if info.role in ("hidden", "router") else 1.0
    assert wide[name].lr == narrow[name].lr * times, name


@pytest.mark.parametrize("name", ["token_type/embedding", "blocks/attention/sinks"])
def test_token_types_and_sinks_keep_their_rate_at_any_width(tiny_config, name):
  config = tiny_config(**{"attention.sinks": True, "embed.token_types": 2})
  assert groups(describe_parameters(config), "adamw", width_ratio=4.0)[name].lr == 1.0


def test_a_role_in_a_rule_stands_for_its_parameters():
  roles = {"a/kernel": "hidden", "b.c/kernel": "head", "b/cx/kernel": "hidden"}
  rules = tree.name_roles([("role:head", 1), ("role:norm", 2), ("kernel", 3)], roles)
  assert tree.match_rules(roles, rules, "test") == {
    "a/kernel": 3,
    "b.c/kernel": 1,
    "b/cx/kernel": 3,
  }
