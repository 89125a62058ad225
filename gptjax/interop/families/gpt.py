"""GPT-1, GPT-2, GPT-Neo, GPT-NeoX (Pythia) and GPT-J."""

from typing import Any

from gptjax.interop.family import Family, always_these
from gptjax.interop.fields import (
  Rule,
  always,
  choice,
  copied,
  fixed,
  ignored,
  read_layers,
  same,
  several,
)
from gptjax.interop.labels import LabelHead
from gptjax.interop.rope import rope
from gptjax.interop.tensors import Entry, conv1d, linear, linears, norm, table
from gptjax.model.config import ModelConfig

ACTIVATIONS = {
  "gelu_new": {"mlp.activation": "gelu_tanh"},
  "gelu_pytorch_tanh": {"mlp.activation": "gelu_tanh"},
  "gelu_fast": {"mlp.activation": "gelu_tanh"},
  "gelu": {"mlp.activation": "gelu"},
  "gelu_python": {"mlp.activation": "gelu"},
  "quick_gelu": {"mlp.activation": "quick_gelu"},
  "relu": {"mlp.activation": "relu"},
  "relu2": {"mlp.activation": "relu2"},
  "silu": {"mlp.activation": "silu"},
  "swish": {"mlp.activation": "silu"},
}
_DROPOUTS = (
  same("embd_pdrop", "dropout.embed", 0.1),
  same("attn_pdrop", "dropout.attention", 0.1),
  same("resid_pdrop", "dropout.residual", 0.1),
)
_SHAPE = (
  *copied({"vocab_size": "vocab_size", "embed_dim": "n_embd", "num_layers": "n_layer"}),
  *copied({"num_heads": "n_head", "position.max_positions": "n_positions"}),
  same("layer_norm_epsilon", "norm.eps", 1e-5),
  same("initializer_range", "init.std", 0.02),
)

_SCORE = LabelHead("score", bias=False)


def _label_heads(stem: str) -> dict[str, LabelHead]:
  return {
    f"{stem}ForSequenceClassification": _SCORE,
    f"{stem}ForTokenClassification": LabelHead("classifier"),
    f"{stem}ForQuestionAnswering": LabelHead("qa_outputs"),
  }


def _mlp_dim(theirs: str) -> Rule:
  """The feed-forward width, null for four times the model's width."""
  return Rule(
    lambda fields, found: {
      "mlp_dim": fields.take(theirs, None, int | None) or 4 * found["embed_dim"]
    },
    lambda config: {theirs: config.mlp_dim},
  )


def _gpt2_layer(theirs: str) -> list[Entry]:
  """A layer of GPT-1 and GPT-2."""
  queries_keys_values = [f"blocks/attention/{name}" for name in ("query", "key", "value")]
  return [
    *norm(f"{theirs}.ln_1", "blocks/attention_norm"),
    *norm(f"{theirs}.ln_2", "blocks/mlp_norm"),
    *conv1d(f"{theirs}.attn.c_attn", *queries_keys_values),
    *conv1d(f"{theirs}.attn.c_proj", "blocks/attention/out"),
    *conv1d(f"{theirs}.mlp.c_fc", "blocks/mlp/up"),
    *conv1d(f"{theirs}.mlp.c_proj", "blocks/mlp/down"),
  ]


GPT1 = Family(
  "openai-gpt",
  lambda config: "OpenAIGPTLMHeadModel",
  (
    *_SHAPE,
    *_DROPOUTS,
    Rule(lambda fields, found: {"mlp_dim": 4 * found["embed_dim"]}, lambda config: {}),
    # In this architecture 'gelu' is the approximation by tanh.
    choice(
      "afn", {"gelu": {"mlp.activation": "gelu_tanh"}, "relu": {"mlp.activation": "relu"}}, "gelu"
    ),
    same("tie_word_embeddings", "head.tied", True),
    always({"norm.placement": "post"}),
  ),
  always_these(
    *table("transformer.tokens_embed", "embed"),
    *table("transformer.positions_embed", "position"),
    *_gpt2_layer("transformer.h.{i}"),
    *linear("lm_head", "head"),
  ),
  prefix="transformer.",
  ignored=(r"(transformer\.)?h\.\d+\.attn\.bias", r"(transformer\.)?position_ids"),
  copies={"lm_head.weight": "transformer.tokens_embed.weight"},
  label_heads={"OpenAIGPTForSequenceClassification": _SCORE},
)

GPT2 = Family(
  "gpt2",
  lambda config: "GPT2LMHeadModel",
  (
    *_SHAPE,
    *_DROPOUTS,
    _mlp_dim("n_inner"),
    choice("activation_function", ACTIVATIONS, "gelu_new"),
    choice(
      "scale_attn_weights", {True: {"attention.scale": 0.0}, False: {"attention.scale": 1.0}}, True
    ),
    fixed("scale_attn_by_inverse_layer_idx", False),
    ignored("reorder_and_upcast_attn"),
    same("tie_word_embeddings", "head.tied", True),
  ),
  always_these(
    *table("transformer.wte", "embed"),
    *table("transformer.wpe", "position"),
    *_gpt2_layer("transformer.h.{i}"),
    *norm("transformer.ln_f", "final_norm"),
    *linear("lm_head", "head"),
  ),
  prefix="transformer.",
  ignored=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
  copies={"lm_head.weight": "transformer.wte.weight"},
  label_heads=_label_heads("GPT2"),
)


_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}


def _read_neo_layers(fields, found) -> dict[str, Any]:
  types = fields.take("attention_types", [[["global", "local"], found["num_layers"] // 2]])
  fields.take("attention_layers", None)
  window = fields.take("window_size", 256, int)
  try:
    kinds = [kind for pattern, times in types for kind in pattern * times]
  except (TypeError, ValueError) as error:
    raise fields.refuse("attention_types", types, ([[["global", "local"], 12]],)) from error
  names = {"global": "full", "local": "local"}
  return read_layers(fields, "attention_types", kinds, names, window, found["num_layers"])


def _write_neo_layers(config: ModelConfig) -> dict[str, Any]:
  pattern = ["global" if kind == "full" else "local" for kind in config.layer_pattern]
  return {
    "attention_types": [[pattern, config.num_layers // len(pattern)]],
    "window_size": config.window or 256,
  }


GPT_NEO = Family(
  "gpt_neo",
  lambda config: "GPTNeoForCausalLM",
  (
    *copied({"vocab_size": "vocab_size", "embed_dim": "hidden_size"}),
    *copied({"num_layers": "num_layers", "num_heads": "num_heads"}),
    *copied({"position.max_positions": "max_position_embeddings"}),
    _mlp_dim("intermediate_size"),
    same("layer_norm_epsilon", "norm.eps", 1e-5),
    same("initializer_range", "init.std", 0.02),
    same("embed_dropout", "dropout.embed", 0.0),
    same("attention_dropout", "dropout.attention", 0.0),
    same("resid_dropout", "dropout.residual", 0.0),
    choice("activation_function", ACTIVATIONS, "gelu_new"),
    Rule(_read_neo_layers, _write_neo_layers),
    same("tie_word_embeddings", "head.tied", True),
    always({"attention.qkv_bias": False, "attention.scale": 1.0}),
  ),
  always_these(
    *table("transformer.wte", "embed"),
    *table("transformer.wpe", "position"),
    *norm("transformer.h.{i}.ln_1", "blocks/attention_norm"),
    *norm("transformer.h.{i}.ln_2", "blocks/mlp_norm"),
    *linears("transformer.h.{i}.attn.attention", "blocks/attention", **_PROJECTIONS),
    *linears("transformer.h.{i}.mlp", "blocks/mlp", up="c_fc", down="c_proj"),
    *norm("transformer.ln_f", "final_norm"),
    *linear("lm_head", "head"),
  ),
  prefix="transformer.",
  ignored=(r"(transformer\.)?h\.\d+\.attn\.attention\.(masked_)?bias",),
  copies={"lm_head.weight": "transformer.wte.weight"},
  label_heads=_label_heads("GPTNeo"),
)

GPT_NEOX = Family(
  "gpt_neox",
  lambda config: "GPTNeoXForCausalLM",
  (
    *copied({"vocab_size": "vocab_size", "embed_dim": "hidden_size"}),
    *copied({"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}),
    *copied({"mlp_dim": "intermediate_size", "position.max_positions": "max_position_embeddings"}),
    same("layer_norm_eps", "norm.eps", 1e-5),
    same("initializer_range", "init.std", 0.02),
    several("hidden_dropout", "dropout.embed", "dropout.residual", default=0.0),
    same("attention_dropout", "dropout.attention", 0.0),
    choice("hidden_act", ACTIVATIONS, "gelu"),
    several("attention_bias", "attention.qkv_bias", "attention.out_bias", default=True),
    choice(
      "use_parallel_residual",
      {True: {"residual.kind": "parallel"}, False: {"residual.kind": "sequential"}},
      True,
    ),
    rope(
      10_000.0, older_base="rotary_emb_base", older_fraction="rotary_pct", default_fraction=0.25
    ),
    same("tie_word_embeddings", "head.tied", False),
  ),
  always_these(
    *table("gpt_neox.embed_in", "embed"),
    *norm("gpt_neox.layers.{i}.input_layernorm", "blocks/attention_norm"),
    *norm("gpt_neox.layers.{i}.post_attention_layernorm", "blocks/mlp_norm"),
    *linear(
      "gpt_neox.layers.{i}.attention.query_key_value",
      "blocks/attention/query",
      "blocks/attention/key",
      "blocks/attention/value",
      groups="heads",
    ),
    *linear("gpt_neox.layers.{i}.attention.dense", "blocks/attention/out"),
    *linears("gpt_neox.layers.{i}.mlp", "blocks/mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
    *norm("gpt_neox.final_layer_norm", "final_norm"),
    *linear("embed_out", "head"),
  ),
  prefix="gpt_neox.",
  ignored=(r"(gpt_neox\.)?layers\.\d+\.attention\.(masked_bias|bias|rotary_emb\.inv_freq)",),
  copies={"embed_out.weight": "gpt_neox.embed_in.weight"},
  label_heads=_label_heads("GPTNeoX"),
)

GPT_J = Family(
  "gptj",
  lambda config: "GPTJForCausalLM",
  (
    *_SHAPE,
    same("embd_pdrop", "dropout.embed", 0.0),
    same("attn_pdrop", "dropout.attention", 0.0),
    same("resid_pdrop", "dropout.residual", 0.0),
    _mlp_dim("n_inner"),
    same("rotary_dim", "rope.dim"),
    choice("activation_function", ACTIVATIONS, "gelu_new"),
    same("tie_word_embeddings", "head.tied", False),
    ignored("rotary", "scale_attn_weights"),
    always(
      {
        "position.kind": "rope",
        "residual.kind": "parallel_one_norm",
        "attention.qkv_bias": False,
        "attention.out_bias": False,
        "head.bias": True,
      }
    ),
  ),
  always_these(
    *table("transformer.wte", "embed"),
    *norm("transformer.h.{i}.ln_1", "blocks/attention_norm"),
    *linear("transformer.h.{i}.attn.q_proj", "blocks/attention/query", rotary_pairs=True),
    *linear("transformer.h.{i}.attn.k_proj", "blocks/attention/key", rotary_pairs=True),
    *linear("transformer.h.{i}.attn.v_proj", "blocks/attention/value"),
    *linear("transformer.h.{i}.attn.out_proj", "blocks/attention/out"),
    *linears("transformer.h.{i}.mlp", "blocks/mlp", up="fc_in", down="fc_out"),
    *norm("transformer.ln_f", "final_norm"),
    Entry("lm_head.weight", ("head/kernel",), transposed=True),
    Entry("lm_head.bias", ("head_bias",)),
  ),
  prefix="transformer.",
  ignored=(r"(transformer\.)?h\.\d+\.attn\.(masked_bias|bias|embed_positions)",),
  label_heads={
    "GPTJForSequenceClassification": _SCORE,
    "GPTJForQuestionAnswering": LabelHead("qa_outputs"),
  },
)
