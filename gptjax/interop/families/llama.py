"""Llama and what descends from it: Mistral, Qwen 2 and 3, Gemma 2 and 3, Mixtral, gpt-oss."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from gptjax.interop.family import Family, always_these
from gptjax.interop.fields import (
  REQUIRED,
  Fields,
  Rule,
  always,
  choice,
  fixed,
  ignored,
  read_layers,
  read_rope,
  rope,
  same,
  several,
  write_rope,
)
from gptjax.interop.labels import LabelHead
from gptjax.interop.tensors import Entry, linear, norm, table

_FULL, _SLIDING = "full_attention", "sliding_attention"
_KINDS = {_FULL: "full", _SLIDING: "local"}


def _shape(
  norm_eps: float = 1e-6, *, kv_heads: Any = REQUIRED, head_dim: Any = None
) -> tuple[Rule, ...]:
  """`kv_heads` and `head_dim`: None where they follow from the other sizes if the file does not
  have them; other families then have numbers of one model's."""
  return (
    same("vocab_size", "vocab_size"),
    same("hidden_size", "embed_dim"),
    same("intermediate_size", "mlp_dim"),
    same("num_hidden_layers", "num_layers"),
    same("num_attention_heads", "num_heads"),
    same("num_key_value_heads", "num_kv_heads", kv_heads, none=0),
    same("head_dim", "head_dim", head_dim, none=0),
    same("max_position_embeddings", "max_positions"),
    same("rms_norm_eps", "norm_eps", norm_eps),
    same("initializer_range", "init_std", 0.02),
    same("attention_dropout", "attention_dropout", 0.0),
    always(norm="rmsnorm", bias=False),
  )


_SWIGLU = choice("hidden_act", {"silu": {"activation": "swiglu"}}, "silu")
_UNTIED = same("tie_word_embeddings", "tied_head", False)
_ATTENTION_BIAS = several("attention_bias", "qkv_bias", "out_bias", default=False)
_DEFAULT_ROPE = rope(10_000.0)


def _attention(prefix: str) -> list[Entry]:
  theirs = f"{prefix}layers.{{i}}.self_attn"
  return [
    *linear(f"{theirs}.q_proj", "blocks/attention/query"),
    *linear(f"{theirs}.k_proj", "blocks/attention/key"),
    *linear(f"{theirs}.v_proj", "blocks/attention/value"),
    *linear(f"{theirs}.o_proj", "blocks/attention/out"),
    *norm(f"{theirs}.q_norm", "blocks/attention/query_norm"),
    *norm(f"{theirs}.k_norm", "blocks/attention/key_norm"),
    Entry(f"{theirs}.sinks", ("blocks/attention/sinks",)),
  ]


_OUTSIDE = (
  *table("model.embed_tokens", "embed"),
  *norm("model.norm", "final_norm"),
  *linear("lm_head", "head"),
)
_DENSE = (
  *linear("model.layers.{i}.mlp.gate_proj", "blocks/mlp/gate"),
  *linear("model.layers.{i}.mlp.up_proj", "blocks/mlp/up"),
  *linear("model.layers.{i}.mlp.down_proj", "blocks/mlp/down"),
)
_PRE_NORMS = (
  *norm("model.layers.{i}.input_layernorm", "blocks/attention_norm"),
  *norm("model.layers.{i}.post_attention_layernorm", "blocks/mlp_norm"),
)
_LLAMA = (*_OUTSIDE, *_attention("model."), *_PRE_NORMS, *_DENSE)
_COMMON: Mapping[str, Any] = {
  "prefix": "model.",
  "ignored": (r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
  "copies": {"lm_head.weight": "model.embed_tokens.weight"},
}


def _label_heads(stem: str, question_answering: str | None = None) -> dict[str, LabelHead]:
  """`question_answering`: the prefix of the class for it, of a family that has one."""
  heads = {
    f"{stem}ForSequenceClassification": LabelHead("score", bias=False),
    f"{stem}ForTokenClassification": LabelHead("score"),
  }
  if question_answering:
    qa_outputs = LabelHead("qa_outputs", prefix=question_answering)
    heads[f"{stem}ForQuestionAnswering"] = qa_outputs
  return heads


def _layers(
  window: int | None, default: Callable[[Fields, Mapping[str, Any], int | None], list[str]]
) -> Rule:
  """`layer_types` and `sliding_window`. `default(fields, found, window)` makes the types of a file
  that does not list them; null is no window."""

  def read(fields, found):
    size = fields.take("sliding_window", window, int | None)
    types = fields.take("layer_types", None, list | None)
    implied = default(fields, found, size)
    return read_layers(fields, "layer_types", types or implied, _KINDS, size, found["num_layers"])

  def write(config):
    names = {ours: theirs for theirs, ours in _KINDS.items()}
    periods = config.num_layers // len(config.layer_pattern)
    types = [names[kind] for kind in config.layer_pattern] * periods
    return {"layer_types": types, "sliding_window": config.window or window}

  return Rule(read, write)


def _one_window(default: int | None) -> Rule:
  """A window of all layers, or of none (Mistral)."""

  def read(fields, found):
    window = fields.take("sliding_window", default, int | None)
    return {"layer_pattern": ("local",) if window else ("full",), "window": window or 0}

  def write(config):
    return {"sliding_window": config.window if "local" in config.layer_pattern else None}

  return Rule(read, write)


def _qwen_layers() -> Rule:
  """Layers from `max_window_layers` on have a window, where windows are used at all."""

  def default(fields, found, window):
    uses, first = (
      fields.take("use_sliding_window", False),
      fields.take("max_window_layers", 28, int),
    )
    layers = range(found["num_layers"])
    return [_SLIDING if uses and window and i >= first else _FULL for i in layers]

  rule = _layers(4096, default)

  def write(config):
    uses = "local" in config.layer_pattern
    window = {"sliding_window": config.window if uses else None}
    return rule.write(config) | {"use_sliding_window": uses} | window

  return Rule(rule.read, write)


LLAMA = Family(
  "llama",
  lambda config: "LlamaForCausalLM",
  (
    *_shape(kv_heads=None),
    _SWIGLU,
    _UNTIED,
    _ATTENTION_BIAS,
    same("mlp_bias", "mlp_bias", False),
    _DEFAULT_ROPE,
    fixed("rope_interleaved", False),
    ignored("pretraining_tp", "is_llama_config"),
  ),
  always_these(*_LLAMA),
  label_heads=_label_heads("Llama", "transformer."),
  **_COMMON,
)

MISTRAL = Family(
  "mistral",
  lambda config: "MistralForCausalLM",
  (*_shape(), _SWIGLU, _UNTIED, _one_window(4096), _DEFAULT_ROPE),
  always_these(*_LLAMA),
  label_heads=_label_heads("Mistral", "model."),
  **_COMMON,
)

QWEN2 = Family(
  "qwen2",
  lambda config: "Qwen2ForCausalLM",
  (
    *_shape(),
    _SWIGLU,
    _UNTIED,
    always(qkv_bias=True),
    _qwen_layers(),
    _DEFAULT_ROPE,
    fixed("use_mrope", False),
  ),
  always_these(*_LLAMA),
  label_heads=_label_heads("Qwen2", "transformer."),
  **_COMMON,
)

QWEN3 = Family(
  "qwen3",
  lambda config: "Qwen3ForCausalLM",
  (
    *_shape(head_dim=REQUIRED),
    _SWIGLU,
    _UNTIED,
    _ATTENTION_BIAS,
    always(qk_norm=True),
    _qwen_layers(),
    _DEFAULT_ROPE,
  ),
  always_these(*_LLAMA),
  label_heads=_label_heads("Qwen3", "transformer."),
  **_COMMON,
)


def _attention_scale() -> Rule:
  """`query_pre_attn_scalar`, of whose root the logits are divided."""

  def write(config):
    scalar = round((config.attention_scale or config.head_dim**-0.5) ** -2, 6)
    return {"query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar}

  return Rule(
    lambda fields, found: {
      "attention_scale": fields.take("query_pre_attn_scalar", 256, float) ** -0.5
    },
    write,
  )


_GEMMA = (
  *_shape(head_dim=REQUIRED),
  choice("hidden_activation", {"gelu_pytorch_tanh": {"activation": "geglu"}}, "gelu_pytorch_tanh"),
  # Older files say it here too, where it is not read.
  ignored("hidden_act"),
  same("tie_word_embeddings", "tied_head", True),
  _ATTENTION_BIAS,
  _attention_scale(),
  choice("use_bidirectional_attention", {False: {}, None: {}}, None),
  always(norm_placement="both", norm_offset=1.0),
  Rule(lambda fields, found: {"embed_scale": math.sqrt(found["embed_dim"])}, lambda config: {}),
)


def _final_cap(default: float | None) -> Rule:
  return same("final_logit_softcapping", "logit_soft_cap", default, none=0.0)


_GEMMA_NORMS = (
  *norm("model.layers.{i}.input_layernorm", "blocks/attention_norm"),
  *norm("model.layers.{i}.post_attention_layernorm", "blocks/attention_out_norm"),
  *norm("model.layers.{i}.pre_feedforward_layernorm", "blocks/mlp_norm"),
  *norm("model.layers.{i}.post_feedforward_layernorm", "blocks/mlp_out_norm"),
)


def _every_other(fields, found, window) -> list[str]:
  return [_FULL if i % 2 else _SLIDING for i in range(found["num_layers"])]


GEMMA2 = Family(
  "gemma2",
  lambda config: "Gemma2ForCausalLM",
  (
    *_GEMMA,
    same("attn_logit_softcapping", "attention_soft_cap", 50.0, none=0.0),
    _final_cap(30.0),
    _layers(4096, _every_other),
    _DEFAULT_ROPE,
  ),
  always_these(*_OUTSIDE, *_attention("model."), *_GEMMA_NORMS, *_DENSE),
  label_heads=_label_heads("Gemma2"),
  **_COMMON,
)


def _five_local(fields, found, window) -> list[str]:
  period = fields.take("sliding_window_pattern", 6, int)
  return [_SLIDING if (i + 1) % period else _FULL for i in range(found["num_layers"])]


def _gemma3_rope() -> Rule:
  """Rotary positions of both kinds of layers; those of the local ones are never scaled."""

  def read(fields, found):
    parameters = fields.take_mapping("rope_parameters")
    base = fields.take("rope_theta", 1_000_000.0)
    local_base = fields.take("rope_local_base_freq", 10_000.0)
    scaling = fields.take_mapping("rope_scaling") or {}
    if parameters is None:
      parameters = {
        _FULL: {"rope_theta": base} | scaling,
        _SLIDING: {"rope_theta": local_base},
      }
    both = fields.nested("rope_parameters", parameters)
    full, sliding = both.take(_FULL, kind=dict), both.take(_SLIDING, kind=dict)
    both.refuse_unread()
    local = read_rope(both.nested(_SLIDING, sliding), found)
    if "rope_scaling" in local:
      raise both.refuse(f"{_SLIDING}.rope_type", local["rope_scaling"], ("default",))
    return read_rope(both.nested(_FULL, full), found) | {"rope_local_base": local["rope_base"]}

  def write(config):
    local = {"rope_theta": config.rope_local_base, "rope_type": "default"}
    return {"rope_parameters": {_FULL: write_rope(config), _SLIDING: local}}

  return Rule(read, write)


GEMMA3 = Family(
  "gemma3_text",
  lambda config: "Gemma3ForCausalLM",
  (
    *_GEMMA,
    _final_cap(None),
    # The reference has a field for a cap of attention, which it does not read.
    ignored("_sliding_window_pattern", "attn_logit_softcapping"),
    always(qk_norm=True),
    _layers(4096, _five_local),
    _gemma3_rope(),
  ),
  always_these(*_OUTSIDE, *_attention("model."), *_GEMMA_NORMS, *_DENSE),
  label_heads={"Gemma3TextForSequenceClassification": LabelHead("score", bias=False)},
  **_COMMON,
)

_EXPERTS = (
  same("num_local_experts", "num_experts", REQUIRED),
  same("num_experts_per_tok", "experts_per_token", REQUIRED),
)

MIXTRAL = Family(
  "mixtral",
  lambda config: "MixtralForCausalLM",
  (
    *_shape(1e-5),
    _SWIGLU,
    _UNTIED,
    *_EXPERTS,
    fixed("router_jitter_noise", 0.0),
    _one_window(None),
    rope(1_000_000.0),
  ),
  always_these(
    *_OUTSIDE,
    *_attention("model."),
    *_PRE_NORMS,
    *linear("model.layers.{i}.block_sparse_moe.gate", "blocks/mlp/router"),
    *linear("model.layers.{i}.block_sparse_moe.experts.{e}.w1", "blocks/mlp/gate"),
    *linear("model.layers.{i}.block_sparse_moe.experts.{e}.w3", "blocks/mlp/up"),
    *linear("model.layers.{i}.block_sparse_moe.experts.{e}.w2", "blocks/mlp/down"),
  ),
  label_heads=_label_heads("Mixtral", "model."),
  **_COMMON,
)


def _interleaved(theirs: str, part: str) -> Entry:
  """Gate and up of each expert in one tensor, their outputs in turn."""
  return Entry(theirs, (f"blocks/mlp/gate/{part}", f"blocks/mlp/up/{part}"), groups="mlp")


GPT_OSS = Family(
  "gpt_oss",
  lambda config: "GptOssForCausalLM",
  (
    *_shape(1e-5, head_dim=REQUIRED),
    choice("hidden_act", {"silu": {"activation": "swiglu_clamped"}}, "silu"),
    _UNTIED,
    *_EXPERTS,
    several("attention_bias", "qkv_bias", "out_bias", default=True),
    _layers(128, _every_other),
    rope(150_000.0, must_say_scaling=True),
    fixed("swiglu_limit", 7.0),
    fixed("swiglu_alpha", 1.702),
    always(attention_sinks=True, mlp_bias=True, router_bias=True),
    ignored("experts_per_token", "initial_context_length"),
  ),
  always_these(
    *_OUTSIDE,
    *_attention("model."),
    *_PRE_NORMS,
    *linear("model.layers.{i}.mlp.router", "blocks/mlp/router"),
    _interleaved("model.layers.{i}.mlp.experts.gate_up_proj", "kernel"),
    _interleaved("model.layers.{i}.mlp.experts.gate_up_proj_bias", "bias"),
    Entry("model.layers.{i}.mlp.experts.down_proj", ("blocks/mlp/down/kernel",)),
    Entry("model.layers.{i}.mlp.experts.down_proj_bias", ("blocks/mlp/down/bias",)),
  ),
  label_heads=_label_heads("GptOss"),
  **_COMMON,
)
