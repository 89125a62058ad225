"""Configs drawn at random from the options of every family: the import has the logits of
`transformers`, or refuses by the field that it cannot read; what it has goes out again.

A draw that `transformers` itself cannot make or run is drawn again.
"""

import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

from gptjax.errors import UserError
from gptjax.interop import huggingface
from gptjax.interop.huggingface import HuggingFaceModel
from gptjax.model.gpt import model_graph

# How many are drawn of each family, and how many of them are in `make test`.
DRAWS, QUICK = 12, 1
LENGTH = 12
V = 40
ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "relu", "silu", "quick_gelu", "relu2", "tanh")
GPT = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 24}
HIDDEN = {
  "vocab_size": V,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "intermediate_size": 24,
  "max_position_embeddings": 24,
}
BOOLS = (True, False)
EPS = (1e-6, 1e-3, 0.3)
GPT_OPTIONS = {
  "n_head": (1, 2, 4),
  "n_embd": (8, 24),
  "n_layer": (1, 3),
  "n_positions": (12, 40),
  "layer_norm_epsilon": EPS,
  "tie_word_embeddings": BOOLS,
  "n_special": (0,),
  "predict_special_tokens": BOOLS,
}
BERT_OPTIONS = {
  "hidden_size": (8, 24),
  "num_attention_heads": (1, 2, 4),
  "num_hidden_layers": (1, 3),
  "hidden_act": ACTIVATIONS,
  "layer_norm_eps": EPS,
  "type_vocab_size": (1, 3),
  "max_position_embeddings": (16, 40),
  "is_decoder": (False, True),
  "tie_word_embeddings": (True,),
}


def rope(rng, fields):
  """`rope_parameters` of a kind that `transformers` has."""
  kind = rng.choice(["default", "linear", "dynamic", "yarn", "llama3", "longrope"])
  theta = float(rng.choice([50.0, 1000.0, 10_000.0]))
  parameters = {"rope_type": str(kind), "rope_theta": theta}
  if kind != "default":
    parameters["factor"] = float(rng.choice([1.0, 2.0, 8.0]))
  if kind in ("yarn", "llama3", "longrope"):
    parameters["original_max_position_embeddings"] = int(rng.choice([6, 12, 64]))
  if kind == "llama3":
    parameters |= {"low_freq_factor": 1.0, "high_freq_factor": float(rng.choice([3.0, 4.0]))}
  if kind == "yarn":
    options = {
      "attention_factor": 0.7,
      "mscale": 0.8,
      "mscale_all_dim": 1.3,
      "beta_fast": 8.0,
      "beta_slow": 2.0,
      "truncate": False,
    }
    parameters |= {name: value for name, value in options.items() if rng.random() < 0.4}
  if kind == "longrope":
    half = (fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]) // 2
    parameters |= {"short_factor": [1.0] * half, "long_factor": [2.0] * half}
  return parameters


def partial_rope(rng, fields):
  return rope(rng, fields) | {"partial_rotary_factor": float(rng.choice([0.25, 0.5, 1.0]))}


def two_ropes(rng, fields):
  local = {"rope_type": "default", "rope_theta": float(rng.choice([50.0, 1000.0]))}
  return {"full_attention": rope(rng, fields), "sliding_attention": local}


def layer_types(rng, fields):
  kinds = ["full_attention", "sliding_attention"]
  return [str(kind) for kind in rng.choice(kinds, fields["num_hidden_layers"])]


def neo_layers(rng, fields):
  pattern = [str(kind) for kind in rng.choice(["global", "local"], fields["num_layers"])]
  return [[pattern, 1]]


LLAMA = HIDDEN | {"num_key_value_heads": 2}
LLAMA_OPTIONS = {
  "hidden_size": (8, 24),
  "num_hidden_layers": (1, 3),
  "num_attention_heads": (2, 4),
  "num_key_value_heads": (1, 2),
  "head_dim": (4, 6, 10),
  "hidden_act": ("silu", "gelu", "gelu_pytorch_tanh", "relu"),
  "rms_norm_eps": EPS,
  "tie_word_embeddings": BOOLS,
  "rope_parameters": rope,
}
WINDOW = {"sliding_window": (None, 3, 5)}
TYPES = WINDOW | {"layer_types": layer_types}
QWEN = LLAMA_OPTIONS | TYPES | {"use_sliding_window": BOOLS, "max_window_layers": (0, 1, 2)}
GEMMA2 = (
  LLAMA_OPTIONS
  | {"sliding_window": (3, 5), "layer_types": layer_types}
  | {
    "hidden_activation": ("gelu_pytorch_tanh", "gelu"),
    "attention_bias": BOOLS,
    "query_pre_attn_scalar": (4, 7),
    "final_logit_softcapping": (None, 5.0),
    "attn_logit_softcapping": (None, 0.5, 50.0),
    "use_bidirectional_attention": (None, False, True),
  }
)
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERT_OPTIONS = {"num_local_experts": (2, 6), "num_experts_per_tok": (1, 2)}
T5 = {"vocab_size": V, "d_model": 16, "d_ff": 24, "num_heads": 4, "d_kv": 6, "num_layers": 2}
T5_OPTIONS = {
  "d_model": (8, 24),
  "d_kv": (4, 5),
  "num_heads": (1, 2),
  "num_layers": (1, 3),
  "num_decoder_layers": (1, 2),
  "relative_attention_num_buckets": (8, 12),
  "relative_attention_max_distance": (9, 20),
  "layer_norm_epsilon": EPS,
  "feed_forward_proj": ("relu", "gated-gelu", "gated-silu", "gelu"),
  "tie_word_embeddings": BOOLS,
  "scale_decoder_outputs": BOOLS,
}
# By family: the classes, the config, its fields, and what they are drawn from.
FAMILIES = {
  "openai-gpt": (
    ("OpenAIGPTLMHeadModel",),
    "OpenAIGPTConfig",
    GPT,
    GPT_OPTIONS | {"afn": ("gelu", "relu", "silu")},
  ),
  "gpt2": (
    ("GPT2LMHeadModel",),
    "GPT2Config",
    GPT,
    GPT_OPTIONS
    | {
      "n_inner": (None, 20),
      "activation_function": ACTIVATIONS,
      "scale_attn_weights": BOOLS,
      "scale_attn_by_inverse_layer_idx": BOOLS,
      "reorder_and_upcast_attn": BOOLS,
    },
  ),
  "gpt_neo": (
    ("GPTNeoForCausalLM",),
    "GPTNeoConfig",
    {
      "vocab_size": V,
      "hidden_size": 16,
      "num_layers": 2,
      "num_heads": 4,
      "attention_types": [[["global"], 2]],
      "max_position_embeddings": 24,
    },
    {
      "hidden_size": (8, 24),
      "num_heads": (1, 2),
      "num_layers": (1, 3),
      "attention_types": neo_layers,
      "window_size": (3, 5),
      "intermediate_size": (None, 20),
      "activation_function": ACTIVATIONS,
      "layer_norm_epsilon": EPS,
      "tie_word_embeddings": BOOLS,
    },
  ),
  "gpt_neox": (
    ("GPTNeoXForCausalLM",),
    "GPTNeoXConfig",
    HIDDEN | {"num_attention_heads": 2},
    BERT_OPTIONS
    | {
      "tie_word_embeddings": BOOLS,
      "attention_bias": BOOLS,
      "use_parallel_residual": BOOLS,
      "rope_parameters": partial_rope,
      "type_vocab_size": (),
      "is_decoder": (False,),
    },
  ),
  "gptj": (
    ("GPTJForCausalLM",),
    "GPTJConfig",
    GPT | {"rotary_dim": 4},
    GPT_OPTIONS | {"rotary_dim": (2, 4), "n_inner": (None, 20), "activation_function": ACTIVATIONS},
  ),
  "llama": (
    ("LlamaForCausalLM",),
    "LlamaConfig",
    LLAMA,
    LLAMA_OPTIONS
    | {"attention_bias": BOOLS, "mlp_bias": BOOLS, "num_key_value_heads": (None, 1, 2)},
  ),
  "mistral": (("MistralForCausalLM",), "MistralConfig", LLAMA, LLAMA_OPTIONS | WINDOW),
  "qwen2": (("Qwen2ForCausalLM",), "Qwen2Config", LLAMA, QWEN),
  "qwen3": (
    ("Qwen3ForCausalLM",),
    "Qwen3Config",
    LLAMA | {"head_dim": 6},
    QWEN | {"attention_bias": BOOLS},
  ),
  "gemma2": (("Gemma2ForCausalLM",), "Gemma2Config", LLAMA | {"head_dim": 6}, GEMMA2),
  "gemma3_text": (
    ("Gemma3ForCausalLM",),
    "Gemma3TextConfig",
    LLAMA | {"head_dim": 6},
    GEMMA2 | {"rope_parameters": two_ropes},
  ),
  "smollm3": (
    ("SmolLM3ForCausalLM",),
    "SmolLM3Config",
    LLAMA | {"pad_token_id": 0},
    LLAMA_OPTIONS
    | {
      "num_hidden_layers": (1, 3, 5),
      "attention_bias": BOOLS,
      "mlp_bias": BOOLS,
      "no_rope_layers": ([1, 0, 1, 0, 1], [0, 0, 0, 1, 1]),
      "no_rope_layer_interval": (1, 2),
      "use_sliding_window": BOOLS,
      "sliding_window": (None, 3),
    },
  ),
  "olmo2": (
    ("Olmo2ForCausalLM",),
    "Olmo2Config",
    LLAMA | {"pad_token_id": 0},
    LLAMA_OPTIONS | {"attention_bias": BOOLS},
  ),
  "phi3": (
    ("Phi3ForCausalLM",),
    "Phi3Config",
    LLAMA | {"pad_token_id": 0},
    LLAMA_OPTIONS | WINDOW | {"rope_parameters": partial_rope},
  ),
  "granite": (
    ("GraniteForCausalLM",),
    "GraniteConfig",
    LLAMA,
    LLAMA_OPTIONS
    | {
      "attention_bias": BOOLS,
      "mlp_bias": BOOLS,
      "embedding_multiplier": (12, 0.5),
      "residual_multiplier": (0.22, 2),
      "attention_multiplier": (0.015625, 0.3),
      "logits_scaling": (8, 0.7),
    },
  ),
  "gemma": (
    ("GemmaForCausalLM",),
    "GemmaConfig",
    LLAMA | {"head_dim": 6},
    LLAMA_OPTIONS | {"attention_bias": BOOLS, "use_bidirectional_attention": (None, True)},
  ),
  "qwen3_moe": (
    ("Qwen3MoeForCausalLM",),
    "Qwen3MoeConfig",
    LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    LLAMA_OPTIONS
    | WINDOW
    | {
      "num_experts": (2, 6),
      "num_experts_per_tok": (1, 2),
      "norm_topk_prob": BOOLS,
      "use_sliding_window": BOOLS,
      "decoder_sparse_step": (1, 2),
      "mlp_only_layers": ([], [0]),
    },
  ),
  "mixtral": (
    ("MixtralForCausalLM",),
    "MixtralConfig",
    LLAMA | EXPERTS,
    LLAMA_OPTIONS | WINDOW | EXPERT_OPTIONS | {"router_jitter_noise": (0.0, 0.1)},
  ),
  "gpt_oss": (
    ("GptOssForCausalLM",),
    "GptOssConfig",
    LLAMA | EXPERTS | {"head_dim": 6, "rope_parameters": {"rope_type": "default"}},
    LLAMA_OPTIONS
    | EXPERT_OPTIONS
    | {"sliding_window": (3, 5), "layer_types": layer_types, "attention_bias": BOOLS}
    | {"hidden_act": ("silu",), "swiglu_limit": (7.0, 2.0)},
  ),
  "bert": (
    ("BertForMaskedLM", "BertForPreTraining"),
    "BertConfig",
    HIDDEN,
    BERT_OPTIONS | {"position_embedding_type": ("absolute",)},
  ),
  "roberta": (
    ("RobertaForMaskedLM",),
    "RobertaConfig",
    HIDDEN | {"type_vocab_size": 1},
    BERT_OPTIONS | {"pad_token_id": (0, 1, 3)},
  ),
  "xlm-roberta": (
    ("XLMRobertaForMaskedLM",),
    "XLMRobertaConfig",
    HIDDEN | {"type_vocab_size": 1},
    BERT_OPTIONS | {"pad_token_id": (0, 1, 3)},
  ),
  "camembert": (
    ("CamembertForMaskedLM",),
    "CamembertConfig",
    HIDDEN | {"type_vocab_size": 1},
    BERT_OPTIONS | {"pad_token_id": (0, 1, 3)},
  ),
  "distilbert": (
    ("DistilBertForMaskedLM",),
    "DistilBertConfig",
    {
      "vocab_size": V,
      "dim": 16,
      "n_layers": 2,
      "n_heads": 4,
      "hidden_dim": 24,
      "max_position_embeddings": 24,
    },
    {
      "dim": (8, 24),
      "n_layers": (1, 3),
      "n_heads": (1, 2),
      "activation": ACTIVATIONS,
      "sinusoidal_pos_embds": BOOLS,
    },
  ),
  "t5": (("T5ForConditionalGeneration",), "T5Config", T5, T5_OPTIONS),
  "mt5": (("MT5ForConditionalGeneration",), "MT5Config", T5, T5_OPTIONS),
}


def draw(rng, family):
  """Each option keeps its default as often as not; an option without values has none here."""
  architectures, config, fields, options = FAMILIES[family]
  fields = dict(fields)
  drawn = []
  for name, choices in options.items():
    if choices and rng.random() < 0.4:
      drawn.append(name)
      made = choices(rng, fields) if callable(choices) else choices[rng.integers(len(choices))]
      fields[name] = made
  return architectures[rng.integers(len(architectures))], config, fields, drawn


def reference_logits(torch, model, tokens):
  extra = {"decoder_input_ids": tokens[:, :5]} if model.config.is_encoder_decoder else {}
  with torch.no_grad():
    out = model(input_ids=tokens, **extra)
  return (out.prediction_logits if "prediction_logits" in out else out.logits).numpy()


def make_drawn(torch, make_reference, rng, family, tokens):
  """A model of `transformers` of a drawn config, its logits, and the names of what was drawn."""
  for _ in range(50):
    architecture, config, fields, drawn = draw(rng, family)
    try:
      model = make_reference(architecture, config, **fields)
      logits = reference_logits(torch, model, tokens)
    except Exception:  # noqa: BLE001 of any kind: it is a config that `transformers` cannot run.
      continue
    if np.isfinite(logits).all():
      return model, logits, drawn
  raise AssertionError(f"{family}: 50 configs that transformers cannot run.")


def our_logits(config, params, tokens):
  graph = model_graph(config)

  @jax.jit
  def run(params, tokens):
    model = nnx.merge(graph, params)
    if model.encoder is None:
      return model(tokens)
    return model(tokens[:, :5], encoded=model.encode(tokens))

  return np.asarray(run(params, np.asarray(tokens, np.int32)))


def open_or_refuse(folder):
  """The opened model, or the sentence that refuses it."""
  try:
    return HuggingFaceModel(str(folder)), None
  except UserError as error:
    return None, str(error)


def spell_as_before(path):
  """Writes rotary positions into config.json as files of before 2026 have them."""
  fields = json.loads(path.read_text())
  parameters = fields.get("rope_parameters")
  if parameters and "rope_theta" in parameters:
    del fields["rope_parameters"]
    fields["rope_theta"] = parameters.pop("rope_theta")
    fields["rope_scaling"] = {"type": parameters.pop("rope_type"), **parameters}
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
  ("family", "number"),
  [
    pytest.param(family, number, marks=[] if number < QUICK else pytest.mark.slow)
    for family in FAMILIES
    for number in range(DRAWS)
  ],
)
def test_a_drawn_config_has_the_logits_of_the_reference_or_is_refused_by_its_field(
  family, number, make_reference, reference, load_params, tmp_path
):
  torch, transformers = reference
  rng = np.random.default_rng([number, *family.encode()])
  tokens = torch.tensor(rng.integers(4, V, (2, LENGTH)))
  model, expected, drawn = make_drawn(torch, make_reference, rng, family, tokens)
  model.save_pretrained(tmp_path / "theirs")
  if number % 2:
    spell_as_before(tmp_path / "theirs/config.json")
  opened, refusal = open_or_refuse(tmp_path / "theirs")
  if refusal:
    (field,) = re.findall(r"field '(\w+)'", refusal)
    assert f'"{field}"' in (tmp_path / "theirs/config.json").read_text(), refusal
    return
  params = load_params(opened)
  tolerance = 1e-4 * max(1, np.abs(expected).max())
  ours = our_logits(opened.config, params, tokens)
  np.testing.assert_allclose(ours, expected, atol=tolerance, rtol=0, err_msg=str(drawn))

  (tmp_path / "ours").mkdir()
  huggingface.save(tmp_path / "ours", opened.config, params, opened.family)
  (name,) = json.loads((tmp_path / "ours/config.json").read_text())["architectures"]
  again = getattr(transformers, name).from_pretrained(
    tmp_path / "ours", attn_implementation="eager"
  )
  actual = reference_logits(torch, again.eval(), tokens)
  np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=0, err_msg=str(drawn))
