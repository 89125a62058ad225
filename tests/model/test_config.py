import re

import pytest

from gptjax.errors import UserError
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
  undocumented = [
    name for name in ModelConfig.defaults() if not re.search(rf"\b{name}\b", ModelConfig.__doc__)
  ]
  assert not undocumented


@pytest.mark.parametrize("rate", ["embed_dropout", "attention_dropout", "residual_dropout"])
def test_any_rate_is_dropout(tiny_config, rate):
  assert not tiny_config().has_dropout
  assert tiny_config(**{rate: 0.1}).has_dropout


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"norm": "layer_norm"}, r"model\.norm: no choice 'layer_norm'.*mean 'layernorm'"),
    ({"norm_placement": "prenorm"}, r"model\.norm_placement: no choice .*'pre'"),
    ({"activation": "swigelu"}, r"model\.activation.*'swiglu'"),
    ({"position": "rotary"}, r"model\.position: no choice 'rotary'.*alibi, learned, none, rope"),
    ({"rope_scaling": "llama-3"}, r"model\.rope_scaling.*'llama3'"),
    ({"remat": "ful"}, r"model\.remat.*'full'"),
    ({"dtype": "bf16"}, r"model\.dtype.*'bfloat16'"),
    ({"dtype": None}, r"model\.dtype"),
    ({"vocab_size": 0}, r"model\.vocab_size is 0"),
    ({"num_layers": 0}, r"model\.num_layers is 0"),
    ({"embed_dim": -1}, r"model\.embed_dim is -1"),
    ({"num_heads": 0}, r"model\.num_heads is 0"),
    ({"mlp_dim": 0}, r"model\.mlp_dim is 0"),
    ({"num_heads": 3}, r"model\.embed_dim=16 is not divisible by model\.num_heads=3"),
    ({"num_kv_heads": 3}, r"model\.num_heads=4 is not a multiple of model\.num_kv_heads=3"),
    ({"position": "rope", "head_dim": 5}, r"model\.head_dim=5 must be even"),
    (
      {"position": "rope", "rope_scaling": "yarn", "rope_factor": 4.0},
      r"'yarn' needs model\.rope_original_positions",
    ),
    (
      {"position": "rope", "rope_scaling": "llama3", "rope_factor": 4.0},
      r"'llama3' needs model\.rope_original_positions",
    ),
    ({"layer_pattern": ("full", "locale")}, r"model\.layer_pattern: no kind 'locale'.*'local'"),
    ({"layer_pattern": ("nope",)}, r"'nope' is of position='rope', not 'learned'"),
    (
      {"position": "rope", "rope_dim": 2, "rope_scaling": "dynamic"},
      r"rope_dim=2: rope_scaling='dynamic' needs 4 or more",
    ),
    (
      {"position": "rope", "rope_scaling": "dynamic"},
      r"'dynamic' needs model\.rope_original_positions",
    ),
    ({"next_sentence": True}, r"model\.next_sentence needs model\.pooler"),
    ({"layer_pattern": ()}, r"model\.layer_pattern has 0 entries"),
    ({"layer_pattern": ("full",) * 3}, r"3 entries, which does not divide model\.num_layers=2"),
    ({"layer_pattern": ("local",)}, r"model\.window=0: a 'local' layer needs a window"),
    ({"embed_dropout": 1.0}, r"model\.embed_dropout=1\.0 is not in \[0, 1\)"),
    ({"attention_dropout": -0.1}, r"model\.attention_dropout"),
    ({"residual_dropout": 2}, r"model\.residual_dropout"),
  ],
)
def test_a_bad_value_is_refused_by_its_key(tiny_config, changes, sentence):
  with pytest.raises(UserError, match=sentence):
    tiny_config(**changes)


def test_an_unknown_key_is_refused_with_the_nearest():
  with pytest.raises(UserError, match=r"model: no key 'num_layer'. Did you mean 'num_layers'"):
    ModelConfig.from_config(ModelConfig.defaults() | {"num_layer": 3})
