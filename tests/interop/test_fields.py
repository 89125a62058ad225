"""Fields of other libraries' configs: their kinds, and what one that is missing means."""

import pytest

from gptjax.errors import UserError
from gptjax.interop.fields import Fields
from gptjax.interop.huggingface import FAMILIES

SHAPE = {
  "vocab_size": 32,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 4,
  "max_position_embeddings": 24,
}


def read(model_type, **fields):
  return FAMILIES[model_type].read_config(Fields(SHAPE | fields, "config.json"))


@pytest.mark.parametrize(
  ("value", "kind"),
  [
    (1, int),
    (1, float),
    (0.5, float),
    (True, bool),
    ("a", str),
    (None, int | None),
    (2, int | None),
  ],
)
def test_a_value_of_a_kind_is_taken(value, kind):
  fields = Fields({"a": value}, "here")
  assert fields.take("a", kind=kind) == value
  fields.refuse_unread()


@pytest.mark.parametrize(
  ("value", "kind"),
  [
    (1.5, int),
    (True, int),
    (True, float),
    (1, bool),
    (1, str),
    (None, int),
    ("1", int | None),
    (True, int | None),
  ],
)
def test_a_value_of_another_kind_is_refused(value, kind):
  with pytest.raises(UserError, match=f"here: field 'a' is {value!r}, not a value of type"):
    Fields({"a": value}, "here").take("a", kind=kind)


def test_a_missing_field_of_a_family_is_what_it_is_in_transformers(reference):
  _, transformers = reference
  theirs = transformers.Gemma2Config()
  gemma = read("gemma2")
  assert gemma.attention_soft_cap == theirs.attn_logit_softcapping > 0
  assert gemma.logit_soft_cap == theirs.final_logit_softcapping > 0
  assert gemma.window == theirs.sliding_window
  assert read("mistral").window == transformers.MistralConfig().sliding_window
  assert read("mixtral", num_local_experts=4, num_experts_per_tok=2).window == 0
  assert read("llama").rope_base == transformers.LlamaConfig().rope_parameters["rope_theta"]


def test_gpt_oss_must_say_how_its_positions_are_scaled():
  experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
  with pytest.raises(UserError, match="no field 'rope_parameters'"):
    read("gpt_oss", **experts)
  assert read("gpt_oss", **experts, rope_scaling={"rope_type": "default"}).rope_base == 150_000.0


@pytest.mark.parametrize("types", [[["global", "local"]], 3, [[["global", 1], 1]], [[[], 1]]])
def test_kinds_of_layers_that_cannot_be_read_are_refused(types):
  fields = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 32}
  fields |= {"max_position_embeddings": 8, "attention_types": types}
  with pytest.raises(UserError, match="'attention_types'"):
    FAMILIES["gpt_neo"].read_config(Fields(fields, "config.json"))
