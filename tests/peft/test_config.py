import pytest

from gptjax.errors import UserError
from gptjax.peft.config import PeftConfig
from gptjax.presets.parts.peft import DEFAULTS, PEFT


@pytest.mark.parametrize(
  ("fields", "sentence"),
  [
    ({"method": "lorra"}, "no method 'lorra'. Did you mean 'lora'"),
    ({"method": "lora"}, "peft.method='lora' needs peft.targets"),
    ({"method": "prompt", "targets": ("query",)}, "peft.method='prompt' has no peft.targets"),
    ({"method": "prefix", "virtual_tokens": 0}, "peft.virtual_tokens=0 is below 1"),
    (
      {"method": "lora", "targets": (("query", {"rang": 2}),)},
      "no option 'rang' in the rule 'query'",
    ),
    ({"method": "lora", "targets": (("query", {"rank": 0}),)}, "a rank of 0 is below 1"),
    (
      {"method": "adalora", "targets": ("query",), "rank": 4, "target_rank": 5},
      "peft.target_rank=5 is not between 1 and the rank 4 of the rule 'query'",
    ),
    ({"method": "lora", "target": ("query",)}, "no key 'target'. Did you mean 'targets'"),
  ],
)
def test_what_cannot_be_is_named(fields, sentence):
  with pytest.raises(UserError, match=sentence):
    PeftConfig.from_config(fields)


def test_none_is_no_adapters():
  assert PeftConfig.from_config(DEFAULTS) is None
  assert PeftConfig.from_config(None) is None  # A run that was saved before there were any.


@pytest.mark.parametrize("name", [name for name in PEFT if name != "none"])
def test_every_preset_is_a_config(name):
  assert PeftConfig.from_config(DEFAULTS | PEFT[name]).method in (
    "lora" if name == "rslora" else name
  )


def test_the_factor_of_a_product():
  assert PeftConfig("lora", ("q",)).scale(4, 16.0) == 4
  assert PeftConfig("lora", ("q",), rank_stabilized=True).scale(4, 16.0) == 8
