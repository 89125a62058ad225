"""Llama and its descendants: Mistral, Qwen 2 and 3 (dense and with experts), Phi-3, Granite,
OLMo 2, SmolLM3, Mixtral, gpt-oss. Gemma is in a file of its own."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from gptjax.interop.family import Family, always_these
from gptjax.interop.fields import (
  REQUIRED,
  Fields,
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
from gptjax.interop.tensors import Entry, linear, linears, norm, table
from gptjax.model.config import ModelConfig

FULL, SLIDING = "full_attention", "sliding_attention"
_KINDS = {FULL: "full", SLIDING: "local"}


def shape(
  norm_eps: float = 1e-6, *, kv_heads: Any = REQUIRED, head_dim: Any = None
) -> tuple[Rule, ...]:
  """Rules for a model's sizes. `kv_heads` and `head_dim` are defaults, the numbers of one model;
  None derives them from the other sizes."""
  return (
    *copied({"vocab_size": "vocab_size", "embed_dim": "hidden_size"}),
    *copied({"mlp_dim": "intermediate_size"}),
    *copied({"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}),
    same("num_key_value_heads", "num_kv_heads", kv_heads, none=0),
    same("head_dim", "head_dim", head_dim, none=0),
    same("max_position_embeddings", "position.max_positions"),
    same("rms_norm_eps", "norm.eps", norm_eps),
    same("initializer_range", "init.std", 0.02),
    same("attention_dropout", "dropout.attention", 0.0),
    always({"norm.kind": "rmsnorm", "bias": False}),
  )


_SWIGLU = choice("hidden_act", {"silu": {"mlp.activation": "swiglu"}}, "silu")
_UNTIED = same("tie_word_embeddings", "head.tied", False)
ATTENTION_BIAS = several(
  "attention_bias", "attention.qkv_bias", "attention.out_bias", default=False
)
DEFAULT_ROPE = rope(10_000.0)

_SELF = "model.layers.{i}.self_attn"
ATTENTION = (
  *linears(_SELF, "blocks/attention", query="q_proj", key="k_proj", value="v_proj", out="o_proj"),
  *norm(f"{_SELF}.q_norm", "blocks/attention/query_norm"),
  *norm(f"{_SELF}.k_norm", "blocks/attention/key_norm"),
  Entry(f"{_SELF}.sinks", ("blocks/attention/sinks",)),
)
OUTSIDE = (
  *table("model.embed_tokens", "embed"),
  *norm("model.norm", "final_norm"),
  *linear("lm_head", "head"),
)
_SWIGLU_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
DENSE = linears("model.layers.{i}.mlp", "blocks/mlp", **_SWIGLU_NAMES)
PRE_NORMS = (
  *norm("model.layers.{i}.input_layernorm", "blocks/attention_norm"),
  *norm("model.layers.{i}.post_attention_layernorm", "blocks/mlp_norm"),
)
_AROUND = (*OUTSIDE, *ATTENTION, *PRE_NORMS)
LLAMA_ENTRIES = (*_AROUND, *DENSE)


def decoder(
  model_type: str,
  stem: str,
  rules: Sequence[Rule],
  *,
  entries: Sequence[Entry] = LLAMA_ENTRIES,
  heads: Mapping[str, LabelHead] = MappingProxyType({}),
) -> Family:
  """A family of decoders, whose class of language models is `stem`ForCausalLM."""
  return Family(
    model_type,
    lambda config: f"{stem}ForCausalLM",
    rules,
    always_these(*entries),
    prefix="model.",
    ignored=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    label_heads=heads,
  )


def label_heads(stem: str, question_answering: str | None = None) -> dict[str, LabelHead]:
  """Label heads of a family; `question_answering` is the prefix of that class, if there is one."""
  heads = {
    f"{stem}ForSequenceClassification": LabelHead("score", bias=False),
    f"{stem}ForTokenClassification": LabelHead("score"),
  }
  if question_answering:
    qa_outputs = LabelHead("qa_outputs", prefix=question_answering)
    heads[f"{stem}ForQuestionAnswering"] = qa_outputs
  return heads


def layers(
  window: int | None, default: Callable[[Fields, Mapping[str, Any], int | None], list[str]]
) -> Rule:
  """`layer_types` and `sliding_window`, null for no window. `default(fields, found, window)` makes
  the types for a file that does not list them."""

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


def _one_window(default: int | None, switch: str | None = None) -> Rule:
  """A window in all layers or in none (Mistral). `switch` is a field that says whether it is used,
  False if it is missing."""

  def read(fields, found):
    window = fields.take("sliding_window", default, int | None)
    if switch and not fields.take(switch, False, bool):
      window = None
    return {"layer_pattern": ("local",) if window else ("full",), "window": window or 0}

  def write(config):
    uses = "local" in config.layer_pattern
    window = {"sliding_window": config.window if uses else None}
    return window | ({switch: uses} if switch else {})

  return Rule(read, write)


def _qwen_layers() -> Rule:
  """Layers from `max_window_layers` on have a window, if windows are used at all."""

  def default(fields, found, window):
    uses = fields.take("use_sliding_window", False, bool)
    first = fields.take("max_window_layers", 28, int)
    numbers = range(found["num_layers"])
    return [SLIDING if uses and window and i >= first else FULL for i in numbers]

  rule = layers(4096, default)

  def write(config):
    uses = "local" in config.layer_pattern
    window = {"sliding_window": config.window if uses else None}
    return rule.write(config) | {"use_sliding_window": uses} | window

  return Rule(rule.read, write)


LLAMA = decoder(
  "llama",
  "Llama",
  (
    *shape(kv_heads=None),
    _SWIGLU,
    _UNTIED,
    ATTENTION_BIAS,
    same("mlp_bias", "mlp.bias", False),
    DEFAULT_ROPE,
    fixed("rope_interleaved", False),
    ignored("pretraining_tp", "is_llama_config"),
  ),
  heads=label_heads("Llama", "transformer."),
)

MISTRAL = decoder(
  "mistral",
  "Mistral",
  (*shape(), _SWIGLU, _UNTIED, _one_window(4096), DEFAULT_ROPE),
  heads=label_heads("Mistral", "model."),
)

QWEN2 = decoder(
  "qwen2",
  "Qwen2",
  (
    *shape(),
    _SWIGLU,
    _UNTIED,
    always({"attention.qkv_bias": True}),
    _qwen_layers(),
    DEFAULT_ROPE,
    fixed("use_mrope", False),
  ),
  heads=label_heads("Qwen2", "transformer."),
)

QWEN3 = decoder(
  "qwen3",
  "Qwen3",
  (
    *shape(head_dim=REQUIRED),
    _SWIGLU,
    _UNTIED,
    ATTENTION_BIAS,
    always({"attention.qk_norm": True}),
    _qwen_layers(),
    DEFAULT_ROPE,
  ),
  heads=label_heads("Qwen3", "transformer."),
)


def _read_rotary_layers(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
  """`no_rope_layers`, 1 for layers that rotate; or an interval, whose last layer does not."""
  count, interval = found["num_layers"], fields.take("no_rope_layer_interval", 4, int)
  rotary = fields.take("no_rope_layers", None, list | None)
  if rotary is None:
    rotary = [int((i + 1) % interval != 0) for i in range(count)]
  for kind in fields.take("layer_types", None, list | None) or ():
    if kind != FULL:
      raise fields.refuse("layer_types", kind, (FULL,))
  names = {"1": "full", "0": "nope"}
  return read_layers(fields, "no_rope_layers", [*map(str, rotary[:count])], names, None, count)


def _write_rotary_layers(config: ModelConfig) -> dict[str, Any]:
  periods = config.num_layers // len(config.layer_pattern)
  return {"no_rope_layers": [int(kind != "nope") for kind in config.layer_pattern] * periods}


SMOLLM3 = decoder(
  "smollm3",
  "SmolLM3",
  (
    *shape(),
    _SWIGLU,
    same("tie_word_embeddings", "head.tied", True),
    ATTENTION_BIAS,
    same("mlp_bias", "mlp.bias", False),
    Rule(_read_rotary_layers, _write_rotary_layers),
    fixed("use_sliding_window", False),
    ignored("sliding_window", "max_window_layers", "pretraining_tp"),
    rope(2_000_000.0),
  ),
  heads=label_heads("SmolLM3", "transformer."),
)

OLMO2 = decoder(
  "olmo2",
  "Olmo2",
  (
    *shape(1e-5, kv_heads=None),
    _SWIGLU,
    _UNTIED,
    ATTENTION_BIAS,
    always(
      {"norm.placement": "after", "attention.qk_norm": True, "attention.qk_norm_per_head": False}
    ),
    DEFAULT_ROPE,
  ),
  entries=(
    *OUTSIDE,
    *ATTENTION,
    *norm("model.layers.{i}.post_attention_layernorm", "blocks/attention_out_norm"),
    *norm("model.layers.{i}.post_feedforward_layernorm", "blocks/mlp_out_norm"),
    *DENSE,
  ),
  heads={"Olmo2ForSequenceClassification": LabelHead("score", bias=False)},
)

PHI3 = decoder(
  "phi3",
  "Phi3",
  (
    *shape(1e-5, kv_heads=None),
    _SWIGLU,
    _UNTIED,
    same("resid_pdrop", "dropout.residual", 0.0),
    same("embd_pdrop", "dropout.embed", 0.0),
    _one_window(None),
    rope(10_000.0, older_fraction="partial_rotary_factor", kinds=("default",)),
    fixed("attention_bias", False),
    # The code that came with older files, before `transformers` had the family.
    ignored("original_max_position_embeddings", "auto_map"),
  ),
  entries=(
    *OUTSIDE,
    *PRE_NORMS,
    *linear(f"{_SELF}.qkv_proj", *(f"blocks/attention/{x}" for x in ("query", "key", "value"))),
    *linear(f"{_SELF}.o_proj", "blocks/attention/out"),
    *linear("model.layers.{i}.mlp.gate_up_proj", "blocks/mlp/gate", "blocks/mlp/up"),
    *linear("model.layers.{i}.mlp.down_proj", "blocks/mlp/down"),
  ),
  heads=label_heads("Phi3"),
)

GRANITE = decoder(
  "granite",
  "Granite",
  (
    *shape(kv_heads=None),
    _SWIGLU,
    _UNTIED,
    ATTENTION_BIAS,
    same("mlp_bias", "mlp.bias", False),
    DEFAULT_ROPE,
    same("embedding_multiplier", "embed.scale", 1.0),
    same("residual_multiplier", "residual.scale", 1.0),
    Rule(
      lambda fields, found: {"attention.scale": fields.take("attention_multiplier", 1.0, float)},
      lambda config: {"attention_multiplier": config.attention.scale or config.head_dim**-0.5},
    ),
    # The divisor of the logits.
    Rule(
      lambda fields, found: {"head.scale": 1 / fields.take("logits_scaling", 1.0, float)},
      lambda config: {"logits_scaling": round(1 / config.head.scale, 6)},
    ),
  ),
)


def every_other(fields, found, window) -> list[str]:
  return [FULL if i % 2 else SLIDING for i in range(found["num_layers"])]


def _experts(theirs: str, **projections: str) -> list[Entry]:
  """The router and each expert's projections, by our names."""
  theirs = f"model.layers.{{i}}.{theirs}"
  router = linear(f"{theirs}.gate", "blocks/mlp/router")
  return [*router, *linears(f"{theirs}.experts.{{e}}", "blocks/mlp", **projections)]


_EXPERTS = (
  same("num_local_experts", "experts.count", REQUIRED),
  same("num_experts_per_tok", "experts.per_token", REQUIRED),
)

MIXTRAL = decoder(
  "mixtral",
  "Mixtral",
  (
    *shape(1e-5),
    _SWIGLU,
    _UNTIED,
    *_EXPERTS,
    fixed("router_jitter_noise", 0.0),
    _one_window(None),
    rope(1_000_000.0),
  ),
  entries=(*_AROUND, *_experts("block_sparse_moe", gate="w1", up="w3", down="w2")),
  heads=label_heads("Mixtral", "model."),
)


def _read_expert_count(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
  """`num_experts`, which the newest files call `num_local_experts`."""
  newest = fields.take("num_local_experts", None, int | None)
  return {"experts.count": fields.take("num_experts", newest or REQUIRED, int)}


QWEN3_MOE = decoder(
  "qwen3_moe",
  "Qwen3Moe",
  (
    *shape(),
    same("moe_intermediate_size", "mlp_dim", 768),
    _SWIGLU,
    _UNTIED,
    ATTENTION_BIAS,
    Rule(_read_expert_count, lambda config: {"num_experts": config.experts.count}),
    same("num_experts_per_tok", "experts.per_token", 8),
    same("norm_topk_prob", "experts.router_normalize", False),
    fixed("decoder_sparse_step", 1),
    fixed("mlp_only_layers", []),
    always({"attention.qk_norm": True}),
    _one_window(4096, "use_sliding_window"),
    ignored("max_window_layers"),
    DEFAULT_ROPE,
  ),
  entries=(*_AROUND, *_experts("mlp", **_SWIGLU_NAMES)),
  heads=label_heads("Qwen3Moe", "transformer."),
)


def _interleaved(theirs: str, part: str) -> Entry:
  """Gate and up of each expert in one tensor, with alternating outputs."""
  return Entry(theirs, (f"blocks/mlp/gate/{part}", f"blocks/mlp/up/{part}"), groups="mlp")


GPT_OSS = decoder(
  "gpt_oss",
  "GptOss",
  (
    *shape(1e-5, head_dim=REQUIRED),
    choice("hidden_act", {"silu": {"mlp.activation": "swiglu_clamped"}}, "silu"),
    _UNTIED,
    *_EXPERTS,
    several("attention_bias", "attention.qkv_bias", "attention.out_bias", default=True),
    layers(128, every_other),
    rope(150_000.0, must_say_scaling=True),
    fixed("swiglu_limit", 7.0),
    fixed("swiglu_alpha", 1.702),
    always({"attention.sinks": True, "mlp.bias": True, "experts.router_bias": True}),
    ignored("experts_per_token", "initial_context_length"),
  ),
  entries=(
    *_AROUND,
    *linear("model.layers.{i}.mlp.router", "blocks/mlp/router"),
    _interleaved("model.layers.{i}.mlp.experts.gate_up_proj", "kernel"),
    _interleaved("model.layers.{i}.mlp.experts.gate_up_proj_bias", "bias"),
    Entry("model.layers.{i}.mlp.experts.down_proj", ("blocks/mlp/down/kernel",)),
    Entry("model.layers.{i}.mlp.experts.down_proj_bias", ("blocks/mlp/down/bias",)),
  ),
  heads=label_heads("GptOss"),
)
