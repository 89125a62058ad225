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
  assert gemma.attention.soft_cap == theirs.attn_logit_softcapping > 0
  assert gemma.head.soft_cap == theirs.final_logit_softcapping > 0
  assert gemma.window == theirs.sliding_window
  assert read("mistral").window == transformers.MistralConfig().sliding_window
  assert read("mixtral", num_local_experts=4, num_experts_per_tok=2).window == 0
  assert read("llama").rope.base == transformers.LlamaConfig().rope_parameters["rope_theta"]


def test_gpt_oss_must_say_how_its_positions_are_scaled():
  experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
  with pytest.raises(UserError, match="no field 'rope_parameters'"):
    read("gpt_oss", **experts)
  assert read("gpt_oss", **experts, rope_scaling={"rope_type": "default"}).rope.base == 150_000.0


# Fields of public configs beside those that make the model, as their repositories print them.
PRINTED = {
  "openai-gpt": {
    "afn": "gelu",
    "n_ctx": 512,
    "n_special": 0,
    "predict_special_tokens": True,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
  },
  "gpt2": {
    "_num_labels": 1,
    "finetuning_task": None,
    "id2label": {"0": "LABEL_0"},
    "is_decoder": False,
    "label2id": {"LABEL_0": 0},
    "n_ctx": 1024,
    "n_special": 0,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_past": True,
    "predict_special_tokens": True,
    "pruned_heads": {},
    "torchscript": False,
    "use_bfloat16": False,
  },
  "gptj": {
    "gradient_checkpointing": False,
    "rotary": True,
    "rotary_dim": 4,
    "scale_attn_weights": True,
    "tokenizer_class": "GPT2Tokenizer",
    "transformers_version": "4.18.0.dev0",
  },
  "phi3": {
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "original_max_position_embeddings": 24,
    "rope_scaling": None,
    "sliding_window": None,
  },
  "llama": {"_attn_implementation_autoset": True, "unsloth_version": "2024.12.4"},
}


@pytest.mark.parametrize("model_type", PRINTED)
def test_configs_are_read_as_public_repositories_print_them(model_type):
  shape = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 24, "vocab_size": 32}
  shape = SHAPE if model_type in ("llama", "phi3") else shape
  plain = {"rotary_dim": 4} if model_type == "gptj" else {}
  family = FAMILIES[model_type]
  config = family.read_config(Fields(shape | PRINTED[model_type], "config.json"))
  assert config == family.read_config(Fields(shape | plain, "config.json"))


def test_fields_that_would_change_the_model_are_refused():
  with pytest.raises(UserError, match=r"'pruned_heads' is {'1': \[0\]}; only {} can be read"):
    read("llama", pruned_heads={"1": [0]})
  with pytest.raises(UserError, match=r"'is_decoder' is True; only False can be read"):
    FAMILIES["bert"].read_config(Fields(SHAPE | {"is_decoder": True}, "config.json"))


@pytest.mark.parametrize("types", [[["global", "local"]], 3, [[["global", 1], 1]], [[[], 1]]])
def test_kinds_of_layers_that_cannot_be_read_are_refused(types):
  fields = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 32}
  fields |= {"max_position_embeddings": 8, "attention_types": types}
  with pytest.raises(UserError, match="'attention_types'"):
    FAMILIES["gpt_neo"].read_config(Fields(fields, "config.json"))
