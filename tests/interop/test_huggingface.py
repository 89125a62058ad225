"""Folders that cannot be used, each with one sentence; what we write, and for whom it cannot be."""

import json
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gptjax import tree
from gptjax.errors import UserError
from gptjax.interop import huggingface, safetensors_files
from gptjax.interop.huggingface import HuggingFaceModel
from gptjax.model.config import ModelConfig
from tests.interop.conftest import LLAMA, save_folder


@pytest.fixture(scope="module")
def original(tiny_config, random_params, tmp_path_factory):
  config = tiny_config(**LLAMA)
  folder = tmp_path_factory.mktemp("original") / "model"
  return save_folder(folder, config, random_params(config))


@pytest.fixture
def edit(original, tmp_path):
  """Returns a function that copies the small Llama with fields of its config changed ('...' is
  without the field), and with tensors added, changed or, by None, taken away."""

  def make(fields=None, tensors=None, base=None):
    config = base or json.loads((original / "config.json").read_text())
    config = {name: x for name, x in (config | (fields or {})).items() if x is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    named = safetensors.numpy.load_file(original / "model.safetensors") | (tensors or {})
    named = {name: tensor for name, tensor in named.items() if tensor is not None}
    safetensors.numpy.save_file(named, tmp_path / "model.safetensors")
    return str(tmp_path)

  return make


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model_type": "lama"}, "no model_type 'lama' is known. Did you mean 'llama'"),
    ({"model_type": ...}, "no model_type 'None' is known"),
    ({"model_type": ["llama"]}, "no model_type"),
    ({"sandwich": True}, "field 'sandwich' = True is not known"),
    ({"hidden_act": "mish"}, "field 'hidden_act' is 'mish'; only 'silu' can be read"),
    ({"hidden_act": ["silu"]}, "field 'hidden_act' is ['silu']"),
    ({"hidden_size": ...}, "no field 'hidden_size', which the architecture needs"),
    ({"hidden_size": None}, "field 'hidden_size' is None, not a value of type int"),
    ({"hidden_size": "16"}, "field 'hidden_size' is '16', not a value of type int"),
    ({"hidden_size": 16.5}, "field 'hidden_size' is 16.5, not a value of type int"),
    ({"hidden_size": True}, "field 'hidden_size' is True, not a value of type int"),
    ({"num_attention_heads": 5, "head_dim": None}, "config.json: model.embed_dim=16 is not div"),
    ({"tie_word_embeddings": 1}, "field 'tie_word_embeddings' is 1, not a value of type bool"),
    ({"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4}}, "field 'rope_type' is 'ntk'"),
    (
      {"rope_parameters": ..., "rope_scaling": {"type": "ntk", "factor": 2.0}},
      "field 'type' is 'ntk'; only 'default' or 'linear'",
    ),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: no field 'factor'"),
    ({"rope_parameters": {"wave": 3}}, "rope_parameters: field 'wave' = 3 is not known"),
    ({"rope_parameters": "default"}, "field 'rope_parameters' is 'default', not a value of type"),
    (
      {"rope_parameters": {"rope_theta": "big"}},
      "'rope_theta' is 'big', not a value of type float",
    ),
    ({"quantization_config": {"bits": 4}}, "'quantization_config': quantised weights are not read"),
    ({"model_type": "qwen3", "head_dim": ...}, "no field 'head_dim'"),
    ({"model_type": "mistral", "num_key_value_heads": ...}, "no field 'num_key_value_heads'"),
    (
      {"model_type": "qwen3", "layer_types": ["full_attention", "linear_attention"]},
      "field 'layer_types' is 'linear_attention'; only 'full_attention' or 'sliding_attention'",
    ),
    (
      {"model_type": "qwen3", "layer_types": ["full_attention"]},
      "'layer_types' is of 1 layers, not 2",
    ),
    (
      {
        "model_type": "qwen3",
        "mlp_bias": ...,
        "layer_types": ["sliding_attention"] * 2,
        "sliding_window": None,
      },
      "a 'local' layer needs a window",
    ),
    ({"intermediate_size": 40}, "mlp.gate_proj.weight' is [32, 16], the config makes it [40, 16]"),
    ({"num_hidden_layers": 3}, "no tensor 'model.layers.2."),
    ({"num_hidden_layers": 1}, "tensor 'model.layers.1.input_layernorm.weight' has no place"),
  ],
)
def test_a_config_is_refused_by_the_field_that_is_wrong(edit, fields, message):
  with pytest.raises(UserError) as error:
    HuggingFaceModel(edit(fields))
  assert message in str(error.value)
  assert str(error.value).count("\n") == 0


@pytest.mark.parametrize(
  ("tensors", "message"),
  [
    (
      {"model.norm.weight": None},
      "no tensor 'model.norm.weight', which the config needs",
    ),
    (
      {"model.norm.weight": np.ones(8, np.float32)},
      "'model.norm.weight' is [8], the config makes",
    ),
    (
      {"model.norm.bias": np.ones(16, np.float32)},
      "tensor 'model.norm.bias' has no place",
    ),
  ],
)
def test_weights_are_refused_by_the_tensor_that_does_not_fit(edit, tensors, message):
  with pytest.raises(UserError) as error:
    HuggingFaceModel(edit(tensors=tensors))
  assert message in str(error.value)


def test_fields_that_change_nothing_are_passed_over(edit, original):
  fields = {"transformers.js_config": {}, "quantization_config": None, "rope_interleaved": False}
  assert HuggingFaceModel(edit(fields)).config == HuggingFaceModel(str(original)).config


def test_older_spellings_of_rotary_positions_are_read(edit):
  scaling = {"type": "linear", "factor": 4.0}
  fields = {"rope_parameters": ..., "rope_theta": 5000, "rope_scaling": scaling}
  config = HuggingFaceModel(edit(fields)).config
  assert (config.rope.base, config.rope.scaling, config.rope.factor) == (5000.0, "linear", 4.0)


def test_llama_3_is_read_as_the_presets_say_it(edit):
  scaling = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }
  config = HuggingFaceModel(edit({"rope_parameters": ..., "rope_scaling": scaling})).config
  said = {"rope.scaling": "llama3", "rope.factor": 8.0, "rope.original_positions": 8192}
  assert (
    config.differences(
      ModelConfig.from_config(config.architecture | said | {"rope.low_freq_factor": 0.0})
    )
    == []
  )
  assert huggingface.find_family(config).model_type == "llama"


def test_a_tied_copy_must_be_one(edit, load_params):
  tied = {"tie_word_embeddings": True}
  folder = edit(tied)  # Whose head is another matrix.
  with pytest.raises(UserError, match=r"'lm_head\.weight' is not 'model\.embed_tokens\.weight'"):
    load_params(HuggingFaceModel(folder))
  embed = safetensors.numpy.load_file(f"{folder}/model.safetensors")["model.embed_tokens.weight"]
  assert "head" not in load_params(HuggingFaceModel(edit(tied, {"lm_head.weight": embed})))


def test_the_older_names_of_layer_norms_in_bert_are_read(
  tiny_config, random_params, load_params, tmp_path
):
  config = tiny_config(
    vocab_size=280,
    visibility="bidirectional",
    **{
      "norm.placement": "post",
      "embed.norm": True,
      "embed.token_types": 2,
      "head.transform": True,
      "head.bias": True,
    },
  )
  params = random_params(config)
  folder = save_folder(tmp_path / "bert", config, params, "bert")
  named = safetensors.numpy.load_file(folder / "model.safetensors")
  older = {
    name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
    for name, tensor in named.items()
  }
  assert older.keys() != named.keys()
  safetensors.numpy.save_file(older, folder / "model.safetensors")
  loaded = tree.named_leaves(load_params(HuggingFaceModel(str(folder))))
  for name, expected in tree.named_leaves(params).items():
    np.testing.assert_array_equal(loaded[name], expected, err_msg=name)


@pytest.mark.parametrize(
  ("text", "message"),
  [("{", "not JSON"), ("[1]", "not an object"), (None, "no config.json"), ("\0", "not JSON")],
)
def test_a_config_that_is_none_is_refused(edit, tmp_path, text, message):
  edit()
  path = tmp_path / "config.json"
  path.unlink() if text is None else path.write_text(text)
  with pytest.raises(UserError, match=message):
    HuggingFaceModel(str(tmp_path))


def test_what_is_no_folder_and_no_id_is_refused(tmp_path):
  with pytest.raises(UserError, match="no folder of a model, nor an id of the Hub"):
    HuggingFaceModel(str(tmp_path / "nothing"))


def test_an_id_needs_huggingface_hub(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(UserError, match=r"org/name: no such folder; .* pip install huggingface_hub"):
    HuggingFaceModel("org/name")


def test_an_id_that_the_hub_does_not_give_is_refused(monkeypatch):
  import huggingface_hub
  from huggingface_hub.errors import LocalEntryNotFoundError

  def refuse(path, **kwargs):
    raise LocalEntryNotFoundError("offline mode is enabled.\nA second line.")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
  with pytest.raises(UserError, match=r"the Hub does not give it \(offline mode is enabled\.\)"):
    HuggingFaceModel("org/name")


def test_an_id_is_fetched_without_pickles(monkeypatch, original):
  import huggingface_hub

  asked = {}

  def fetch(path, *, allow_patterns):
    asked[path] = allow_patterns
    return str(original)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
  assert HuggingFaceModel("org/name").folder == original
  assert not [pattern for pattern in asked["org/name"] if "bin" in pattern]


def test_bfloat16_is_the_rounding_of_what_was_saved(
  tiny_config, random_params, load_params, tmp_path
):
  config = tiny_config(**LLAMA)
  params = random_params(config)
  folder = save_folder(tmp_path / "model", config, params, dtype="bfloat16")
  loaded = tree.named_leaves(load_params(HuggingFaceModel(str(folder))))
  for name, original in tree.named_leaves(params).items():
    rounded = original.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert not np.array_equal(rounded, original), name
    np.testing.assert_array_equal(loaded[name], rounded, err_msg=name)


def test_shards_load_in_transformers_and_here(
  tiny_config, random_params, load_params, reference, monkeypatch, tmp_path
):
  monkeypatch.setattr(safetensors_files, "MAX_SHARD_BYTES", 8000)
  config = tiny_config(**LLAMA)
  params = random_params(config)
  folder = save_folder(tmp_path / "model", config, params)
  assert len(list(folder.glob("model-*.safetensors"))) > 3
  loaded = tree.named_leaves(load_params(HuggingFaceModel(str(folder))))
  for name, original in tree.named_leaves(params).items():
    np.testing.assert_array_equal(loaded[name], original, err_msg=name)
  _, transformers = reference
  model, told = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
  assert not told["missing_keys"]
  assert not told["unexpected_keys"]
  ours = params["blocks"]["mlp"]["down"]["kernel"][1].T
  np.testing.assert_array_equal(model.model.layers[1].mlp.down_proj.weight.detach().numpy(), ours)


@pytest.mark.parametrize(
  ("changes", "nearest", "lacking"),
  [
    ({"residual.values": True}, "gpt2", "model.residual.values=True, not False"),
    ({"position.kind": "alibi"}, "gpt2", "model.position.kind='alibi', not 'learned'"),
    (LLAMA | {"residual.embedding": True}, "llama", "model.residual.embedding=True, not False"),
  ],
)
def test_what_no_family_can_be_is_refused_with_what_is_lacking(
  tiny_config, changes, nearest, lacking
):
  config = tiny_config(**changes)
  with pytest.raises(UserError, match=f"the nearest, '{nearest}', lacks {lacking}"):
    huggingface.find_family(config)
  with pytest.raises(UserError, match=f"family '{nearest}' lacks {lacking}"):
    huggingface.find_family(config, nearest)


def test_a_family_that_is_not_known_is_refused(tiny_config):
  with pytest.raises(UserError, match=r"no family 'lama'\. Did you mean 'llama'"):
    huggingface.find_family(tiny_config(), "lama")


def test_a_head_that_roberta_does_not_have_is_refused(tiny_config):
  # Its activation is GELU whatever `hidden_act` is.
  changes = {"visibility": "bidirectional", "norm.placement": "post", "embed.norm": True}
  config = tiny_config(
    **changes, **{"embed.token_types": 1, "position.offset": 2, "mlp.activation": "relu"}
  )
  with pytest.raises(UserError, match=r"family 'roberta' lacks model\.mlp\.activation='relu'"):
    huggingface.find_family(config, "roberta")


def test_experts_are_not_said_by_a_dense_family(tiny_config):
  config = tiny_config(**LLAMA, **{"experts.count": 4, "experts.per_token": 2})
  assert huggingface.find_family(config).model_type == "mixtral"
  with pytest.raises(UserError, match=r"family 'llama' lacks model\.experts\.count=4, not 0"):
    huggingface.find_family(config, "llama")
