import dataclasses
import re

import pytest

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.model import groups
from gptjax.model.config import ModelConfig


def test_defaults_are_derived_from_the_shape(tiny_config):
  config = tiny_config(num_kv_heads=0, head_dim=0)
  assert (config.num_kv_heads, config.head_dim) == (4, 4)
  assert tiny_config(head_dim=6).head_dim == 6


def test_the_layer_pattern_gives_each_layer_its_window(tiny_config):
  config = tiny_config(layer_pattern=("full", "local"), window=5)
  assert config.windows == (None, 5)


def test_equal_configs_are_one_key_of_a_jit_cache(tiny_config):
  # A saved config comes back from JSON with a list in place of the tuple.
  config = tiny_config(layer_pattern=["full", "local"], window=5)
  assert hash(config) == hash(tiny_config(layer_pattern=("full", "local"), window=5))


def test_every_field_has_a_default_and_is_documented():
  for kind in (ModelConfig, *groups.Group.__subclasses__()):
    own = [field.name for field in dataclasses.fields(kind)]
    values = [name for name in own if not dataclasses.is_dataclass(getattr(kind, name))]
    assert [name for name in values if not re.search(rf"^ +{name}: ", kind.__doc__, re.M)] == []


def test_every_group_is_a_field_of_its_key():
  assert {kind.key: kind for kind in groups.Group.__subclasses__()} == {
    field.name: field.type
    for field in dataclasses.fields(ModelConfig)
    if dataclasses.is_dataclass(field.type)
  }


def test_nested_and_dotted_keys_are_one_config(tiny_config):
  config = tiny_config(**{"norm.kind": "rmsnorm", "rope.base": 500.0})
  nested = config_lib.flatten(dataclasses.asdict(config))
  assert ModelConfig.from_config(dataclasses.asdict(config)) == config
  assert ModelConfig.from_config(nested) == config
  assert config.replace({"rope.base": 7.0}).rope.base == 7.0


@pytest.mark.parametrize("rate", ["dropout.embed", "dropout.attention", "dropout.residual"])
def test_any_rate_is_dropout(tiny_config, rate):
  assert not tiny_config().dropout
  assert tiny_config(**{rate: 0.1}).dropout


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"norm.kind": "layer_norm"}, r"model\.norm\.kind: no choice 'layer_norm'.*mean 'layernorm'"),
    ({"norm.placement": "prenorm"}, r"model\.norm\.placement: no choice .*'pre'"),
    ({"mlp.activation": "swigelu"}, r"model\.mlp\.activation.*'swiglu'"),
    (
      {"position.kind": "rotary"},
      r"model\.position\.kind: no choice 'rotary'.*alibi, learned, none, rope",
    ),
    ({"rope.scaling": "llama-3"}, r"model\.rope\.scaling.*'llama3'"),
    ({"execution.remat": "ful"}, r"model\.execution\.remat.*'full'"),
    ({"dtype": "bf16"}, r"model\.dtype.*'bfloat16'"),
    ({"dtype": None}, r"model\.dtype"),
    ({"vocab_size": 0}, r"model\.vocab_size is 0"),
    ({"num_layers": 0}, r"model\.num_layers is 0"),
    ({"embed_dim": -1}, r"model\.embed_dim is -1"),
    ({"num_heads": 0}, r"model\.num_heads is 0"),
    ({"mlp_dim": 0}, r"model\.mlp_dim is 0"),
    ({"num_heads": 3}, r"model\.embed_dim=16 is not divisible by model\.num_heads=3"),
    ({"num_kv_heads": 3}, r"model\.num_heads=4 is not a multiple of model\.num_kv_heads=3"),
    ({"position.kind": "rope", "head_dim": 5}, r"model\.head_dim=5 must be even"),
    (
      {"position.kind": "rope", "rope.scaling": "yarn", "rope.factor": 4.0},
      r"'yarn' needs model\.rope\.original_positions",
    ),
    (
      {"position.kind": "rope", "rope.scaling": "llama3", "rope.factor": 4.0},
      r"'llama3' needs model\.rope\.original_positions",
    ),
    ({"layer_pattern": ("full", "locale")}, r"model\.layer_pattern: no choice 'locale'.*'local'"),
    ({"layer_pattern": ("nope",)}, r"'nope' is of position\.kind='rope', not 'learned'"),
    (
      {"position.kind": "rope", "rope.dim": 2, "rope.scaling": "dynamic"}
      | {"rope.original_positions": 8},
      r"rope\.dim=2: rope\.scaling='dynamic' needs 4 or more",
    ),
    (
      {"position.kind": "rope", "rope.scaling": "dynamic"},
      r"'dynamic' needs model\.rope\.original_positions",
    ),
    ({"head.next_sentence": True}, r"model\.head\.next_sentence needs model\.head\.pooler"),
    ({"layer_pattern": ()}, r"model\.layer_pattern has 0 entries"),
    ({"layer_pattern": ("full",) * 3}, r"3 entries, which does not divide model\.num_layers=2"),
    ({"layer_pattern": ("local",)}, r"model\.window=0: a 'local' layer needs a window"),
    ({"encoder_layers": -1}, r"model\.encoder_layers is -1; it must be at least 0"),
    ({"window": -1}, r"model\.window is -1; it must be at least 0"),
    ({"norm.eps": -1.0}, r"model\.norm\.eps is -1\.0; it must be at least 0"),
    ({"attention.soft_cap": -1.0}, r"model\.attention\.soft_cap is -1\.0; it must be at least 0"),
    ({"dropout.embed": 1.0}, r"model\.dropout\.embed is 1\.0; it must be at least 0 and below 1"),
    ({"dropout.attention": -0.1}, r"model\.dropout\.attention"),
    ({"dropout.residual": 2}, r"model\.dropout\.residual"),
  ],
)
def test_a_bad_value_is_refused_by_its_key(tiny_config, changes, sentence):
  with pytest.raises(UserError, match=sentence):
    tiny_config(**changes)


def test_an_unknown_key_is_refused_with_the_nearest():
  with pytest.raises(UserError, match=r"model: no key 'num_layer'. Did you mean 'num_layers'"):
    ModelConfig.from_config(ModelConfig.defaults() | {"num_layer": 3})
