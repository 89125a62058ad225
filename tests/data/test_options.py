import pytest

from configs.parts import data as presets
from gptjax.data.options import read_options
from gptjax.errors import UserError


@pytest.mark.parametrize(
  ("changes", "problem"),
  [
    ({"source": "txt"}, "data.source: no source 'txt'. Did you mean 'text'"),
    ({"undecodable": "skp"}, "data.undecodable: no policy 'skp'. Did you mean 'skip'"),
    ({"path": ""}, "data.path: a 'text' source needs one. Set --config.data.path="),
    ({"validation_fraction": 0.0}, "data.validation_fraction is 0.0; it must be between 0 and 1"),
    ({"fim_rate": 1.5}, "data.fim_rate is 1.5; it must be from 0 to 1"),
    ({"spm_rate": -1}, "data.spm_rate is -1; it must be from 0 to 1"),
    ({"mask_rate": 0.0}, "data.mask_rate is 0.0; it must be between 0 and 1"),
    ({"mean_span": 0.5}, "data.mean_span is 0.5; it must be 1 or more"),
    ({"format": "chats"}, "data.format: no choice 'chats'. Did you mean 'chat'"),
    ({"train_on": "al"}, "data.train_on: no choice 'al'. Did you mean 'all'"),
    ({"overlong": "cut"}, "data.overlong: no choice 'cut'. Choose one of: drop, truncate"),
    (
      {"format": "chat"},
      "data part 'text': a 'text' source has no records. data.format='chat'",
    ),
    (
      {"format": "chat", "source": "jsonl", "objective": "prefix"},
      "data.format='chat' needs objective='next_token' and data.fim_rate=0, not 'prefix' and 0.0",
    ),
    (
      {"format": "labels", "source": "jsonl"},
      "data.format='labels' needs an objective one of classification, multi_label, regression, ",
    ),
    ({"objective": "span"}, "data.format='text' needs an objective of tokens, not 'span'"),
    ({"objective": "maskd"}, "objective: no choice 'maskd'. Did you mean 'masked'"),
    (
      {"objective": "prefix", "fim_rate": 0.5},
      "data.fim_rate=0.5 needs objective='next_token', not 'prefix'",
    ),
    ({"seed": -1}, "seed is -1; it must be 0 or more"),
    ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
    ({"sequence_length": 0}, "sequence_length is 0; it must be 1 or more"),
  ],
)
def test_a_bad_value_is_named_with_the_right_ones(make_config, changes, problem):
  with pytest.raises(UserError) as error:
    read_options(make_config(**changes))
  assert problem in str(error.value)


@pytest.mark.parametrize("weight", [0, -1.0])
def test_a_part_needs_a_weight_above_zero(make_config, weight):
  config = make_config(preset="stdlib+tiny_shakespeare")
  config.data.mixture.stdlib.weight = weight
  with pytest.raises(UserError, match=r"data\.mixture\.stdlib\.weight is .* above 0"):
    read_options(config)


def test_a_part_needs_every_key(make_config):
  config = make_config(mixture={"mine": {"source": "stdlib", "weight": 1.0}})
  with pytest.raises(UserError, match=r"data\.mixture\.mine: no key 'path'"):
    read_options(config)


@pytest.mark.parametrize("name", presets.DATA)
def test_presets_are_whole(make_config, name):
  config = make_config(preset=name)
  config.data.path = config.data.path or "somewhere"
  (part,) = read_options(config).parts.values()
  assert part.source == config.data.source


def test_presets_compose():
  mixture = presets.get("stdlib+fineweb")["mixture"]
  assert {name: part["weight"] for name, part in mixture.items()} == {"stdlib": 1, "fineweb": 1}
  with pytest.raises(UserError, match=r"no data preset 'finewb'\. Did you mean 'fineweb'"):
    presets.get("stdlib+finewb")
  with pytest.raises(UserError, match="names a part twice"):
    presets.get("stdlib+stdlib")
