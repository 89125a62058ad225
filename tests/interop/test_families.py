"""Every family against `transformers`: the same logits from its files, and from ours."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from gptjax.interop import huggingface
from gptjax.interop.huggingface import HuggingFaceModel
from gptjax.model.gpt import model_graph

V, D, L, N = 32, 16, 2, 4
GPT = {"vocab_size": V, "n_embd": D, "n_layer": L, "n_head": N, "n_positions": 24}
BERT = {
  "vocab_size": V,
  "hidden_size": D,
  "num_hidden_layers": L,
  "num_attention_heads": N,
  "intermediate_size": 24,
  "max_position_embeddings": 24,
}
LLAMA = BERT | {"num_key_value_heads": 2}
T5 = {"vocab_size": V, "d_model": D, "d_ff": 24, "num_heads": N, "d_kv": 6}
LLAMA3_ROPE = {
  "rope_type": "llama3",
  "rope_theta": 100.0,
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 3.0,
  "original_max_position_embeddings": 8,
}
YARN = {
  "rope_type": "yarn",
  "rope_theta": 100.0,
  "factor": 4.0,
  "original_max_position_embeddings": 64,
}
SLIDING = ["sliding_attention", "full_attention"]
# (architecture, config, its fields): small, and with the options that a family has.
MODELS = {
  "gpt1": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT),
  "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
  "gpt2-odd": (
    "GPT2LMHeadModel",
    "GPT2Config",
    GPT
    | {
      "n_inner": 40,
      "activation_function": "gelu",
      "scale_attn_weights": False,
      "tie_word_embeddings": False,
    },
  ),
  "gpt_neo": (
    "GPTNeoForCausalLM",
    "GPTNeoConfig",
    {
      "vocab_size": V,
      "hidden_size": D,
      "num_layers": L,
      "num_heads": N,
      "attention_types": [[["global", "local"], 1]],
      "window_size": 3,
      "max_position_embeddings": 24,
    },
  ),
  "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT | {"rotary_pct": 0.5}),
  "gpt_neox-whole": (
    "GPTNeoXForCausalLM",
    "GPTNeoXConfig",
    BERT | {"rotary_pct": 1.0, "hidden_act": "quick_gelu"},
  ),
  "gpt_neox-sequential": (
    "GPTNeoXForCausalLM",
    "GPTNeoXConfig",
    BERT
    | {
      "num_attention_heads": 2,
      "use_parallel_residual": False,
      "attention_bias": False,
      "rope_parameters": LLAMA3_ROPE,
    },
  ),
  "gptj": ("GPTJForCausalLM", "GPTJConfig", GPT | {"n_head": 2, "rotary_dim": 4}),
  "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"rope_parameters": LLAMA3_ROPE}),
  "llama-dynamic": (
    "LlamaForCausalLM",
    "LlamaConfig",
    LLAMA
    | {
      "max_position_embeddings": 4,
      "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0},
    },
  ),
  "llama-biases": (
    "LlamaForCausalLM",
    "LlamaConfig",
    LLAMA
    | {
      "attention_bias": True,
      "mlp_bias": True,
      "tie_word_embeddings": True,
      "head_dim": 6,
      "rope_parameters": YARN,
    },
  ),
  "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA | {"sliding_window": 3}),
  "qwen2": (
    "Qwen2ForCausalLM",
    "Qwen2Config",
    LLAMA | {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 3},
  ),
  "qwen3": (
    "Qwen3ForCausalLM",
    "Qwen3Config",
    LLAMA
    | {
      "head_dim": 6,
      "attention_bias": True,
      "rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5},
    },
  ),
  "gemma2": (
    "Gemma2ForCausalLM",
    "Gemma2Config",
    LLAMA | {"head_dim": 6, "sliding_window": 3, "query_pre_attn_scalar": 5},
  ),
  "gemma3": (
    "Gemma3ForCausalLM",
    "Gemma3TextConfig",
    LLAMA
    | {
      "head_dim": 6,
      "sliding_window": 3,
      "query_pre_attn_scalar": 7,
      "attn_logit_softcapping": 0.5,  # Which the reference does not apply.
      "layer_types": SLIDING,
      "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
      },
    },
  ),
  "mixtral": (
    "MixtralForCausalLM",
    "MixtralConfig",
    LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3},
  ),
  "gpt_oss": (
    "GptOssForCausalLM",
    "GptOssConfig",
    LLAMA
    | {
      "head_dim": 6,
      "num_local_experts": 4,
      "num_experts_per_tok": 2,
      "sliding_window": 3,
      "rope_parameters": YARN | {"truncate": False},
    },
  ),
  "bert": ("BertForMaskedLM", "BertConfig", BERT),
  "bert-pretraining": ("BertForPreTraining", "BertConfig", BERT | {"hidden_act": "gelu_new"}),
  "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT | {"type_vocab_size": 1}),
  "t5": ("T5ForConditionalGeneration", "T5Config", T5 | {"num_layers": 2, "num_decoder_layers": 1}),
  "t5-gated": (
    "T5ForConditionalGeneration",
    "T5Config",
    T5
    | {
      "num_layers": 1,
      "feed_forward_proj": "gated-gelu",
      "scale_decoder_outputs": False,
      "relative_attention_num_buckets": 8,
      "relative_attention_max_distance": 12,
    },
  ),
  "mt5": ("MT5ForConditionalGeneration", "MT5Config", T5 | {"num_layers": 1}),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, make_reference, tmp_path_factory):
  """(model of transformers, our model opened from what it saved)."""
  model = make_reference(*MODELS[request.param][:2], **MODELS[request.param][2])
  folder = tmp_path_factory.mktemp(request.param)
  model.save_pretrained(folder)
  return model, HuggingFaceModel(str(folder))


@pytest.mark.slow
def test_the_text_of_a_multimodal_gemma_3_is_read_and_written_as_a_gemma_3_of_text(
  make_reference, reference, load_params, tmp_path
):
  torch, transformers = reference
  text = LLAMA | {"head_dim": 6, "sliding_window": 3, "layer_types": SLIDING}
  vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 28}
  vision |= {"num_attention_heads": 2, "patch_size": 14}
  architecture = "Gemma3ForConditionalGeneration"
  model = make_reference(architecture, "Gemma3Config", text_config=text, vision_config=vision)
  model.save_pretrained(tmp_path / "theirs")
  # Public files leave out what is as in Google's own.
  path = tmp_path / "theirs/config.json"
  fields = json.loads(path.read_text())
  del fields["text_config"]["rms_norm_eps"]
  path.write_text(json.dumps(fields))
  tokens = np.arange(4, 16).reshape(2, 6)
  with torch.no_grad():
    expected = model(input_ids=torch.tensor(tokens)).logits.numpy()
  opened = HuggingFaceModel(str(tmp_path / "theirs"))
  params = load_params(opened)
  ours = nnx.merge(model_graph(opened.config), params)(tokens)
  np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)

  (tmp_path / "ours").mkdir()
  family = huggingface.find_family(opened.config, opened.family.model_type)
  huggingface.save(tmp_path / "ours", opened.config, params, family)
  again = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "ours", attn_implementation="eager"
  )
  assert type(again).__name__ == "Gemma3ForCausalLM"
  with torch.no_grad():
    actual = again(input_ids=torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)


def reference_logits(torch, model, documents, decoder_tokens):
  tokens, mask = torch.tensor(documents["padded"]).long(), torch.tensor(documents["mask"])
  with torch.no_grad():
    if model.config.is_encoder_decoder:
      decoder_tokens = torch.tensor(decoder_tokens).long()
      out = model(input_ids=tokens, attention_mask=mask, decoder_input_ids=decoder_tokens)
    else:
      out = model(input_ids=tokens, attention_mask=mask)
  return (out.prediction_logits if hasattr(out, "prediction_logits") else out.logits).numpy()


def test_logits_are_those_of_the_reference(pair, reference, load_params, two_documents, tmp_path):
  torch, transformers = reference
  model, opened = pair
  config = opened.config
  params, documents = load_params(opened), two_documents
  graph = model_graph(config)
  decoder_tokens = np.roll(documents["padded"], 1, axis=1)[:, :5]
  expected = reference_logits(torch, model, documents, decoder_tokens)
  assert 0.1 < expected.std() < 30

  @jax.jit
  def forward(params, tokens, segments, positions, decoder, decoder_segments, decoder_positions):
    model = nnx.merge(graph, params)
    here = {"positions_BT": positions, "segment_ids_BT": segments}
    if model.encoder is None:
      return model(tokens, **here)
    encoded = model.encode(tokens, positions_BS=positions, segment_ids_BS=segments)
    there = {"positions_BT": decoder_positions, "segment_ids_BT": decoder_segments}
    return model(decoder, encoded=encoded, **there)

  def rows(separate, together):
    """The documents as two rows, the rest of which is 0, and as one."""
    widened = np.pad(separate, ((0, 0), (0, together.shape[1] - separate.shape[1])))
    return np.concatenate([widened, together]).astype(np.int32)

  logits = forward(
    params,
    rows(documents["padded"], documents["packed"]),
    rows(documents["mask"], documents["segments"]),
    rows(np.tile(np.arange(6), (2, 1)), documents["positions"]),
    rows(decoder_tokens, decoder_tokens.reshape(1, 10)),
    rows(np.ones((2, 5)), np.repeat([[1, 2]], 5, axis=1)),
    rows(np.tile(np.arange(5), (2, 1)), np.tile(np.arange(5), 2)[None]),
  )
  first, second = (5, 5) if config.encoder_layers else (6, 4)
  for ours, theirs in (
    (logits[0, :first], expected[0]),
    (logits[1, :second], expected[1, :second]),
    (logits[2, :first], expected[0]),
    (logits[2, first:], expected[1, :second]),
  ):
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)

  # And back: what we write loads there without a parameter too many or too few.
  family = huggingface.find_family(config, opened.family.model_type)
  folder = tmp_path / "exported"
  folder.mkdir()
  huggingface.save(folder, config, params, family)
  architecture = getattr(
    transformers, json.loads((folder / "config.json").read_text())["architectures"][0]
  )
  again, told = architecture.from_pretrained(
    folder, output_loading_info=True, attn_implementation="eager"
  )
  assert not told["missing_keys"]
  assert not told["mismatched_keys"]
  assert type(again) is type(model)
  written = again.state_dict()
  for name, tensor in model.state_dict().items():
    np.testing.assert_array_equal(written[name], tensor, err_msg=name)
  np.testing.assert_allclose(
    reference_logits(torch, again.eval(), documents, decoder_tokens), expected, atol=1e-6
  )
  reopened = HuggingFaceModel(str(folder))
  assert reopened.config == config
  jax.tree.map(np.testing.assert_array_equal, load_params(reopened), params)
