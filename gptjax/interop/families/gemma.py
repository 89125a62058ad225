"""Gemma 1 to 3, and the text inside a multimodal Gemma 3."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.interop.families.llama import (
  ATTENTION,
  ATTENTION_BIAS,
  DEFAULT_ROPE,
  DENSE,
  FULL,
  OUTSIDE,
  SLIDING,
  decoder,
  every_other,
  label_heads,
  layers,
  shape,
)
from gptjax.interop.family import always_these, pass_over_bookkeeping
from gptjax.interop.fields import REQUIRED, Rule, always, choice, fixed, ignored, same
from gptjax.interop.labels import LabelHead
from gptjax.interop.rope import read_rope, write_rope
from gptjax.interop.tensors import norm


def _attention_scale() -> Rule:
  """`query_pre_attn_scalar`, whose root divides the attention logits."""

  def write(config):
    scalar = round((config.attention.scale or config.head_dim**-0.5) ** -2, 6)
    return {"query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar}

  return Rule(
    lambda fields, found: {
      "attention.scale": fields.take("query_pre_attn_scalar", 256, float) ** -0.5
    },
    write,
  )


_GEMMA = (
  *shape(head_dim=REQUIRED),
  same("tie_word_embeddings", "head.tied", True),
  ATTENTION_BIAS,
  choice("use_bidirectional_attention", {False: {}, None: {}}, None),
  always({"norm.offset": 1.0}),
  Rule(lambda fields, found: {"embed.scale": math.sqrt(found["embed_dim"])}, lambda config: {}),
)
_LATER_GEMMA = (
  *_GEMMA,
  choice(
    "hidden_activation", {"gelu_pytorch_tanh": {"mlp.activation": "geglu"}}, "gelu_pytorch_tanh"
  ),
  # Older files repeat it in this field, which is not read.
  ignored("hidden_act"),
  _attention_scale(),
  always({"norm.placement": "both"}),
)

GEMMA = decoder(
  "gemma",
  "Gemma",
  (
    *_GEMMA,
    # The first files say 'gelu' but mean its approximation.
    choice(
      "hidden_act",
      {"gelu_pytorch_tanh": {"mlp.activation": "geglu"}, "gelu": {"mlp.activation": "geglu"}},
      "gelu_pytorch_tanh",
    ),
    choice("hidden_activation", {None: {}, "gelu_pytorch_tanh": {}}, None),
    DEFAULT_ROPE,
  ),
  heads=label_heads("Gemma"),
)


_GEMMA_NORMS = (
  *norm("model.layers.{i}.input_layernorm", "blocks/attention_norm"),
  *norm("model.layers.{i}.post_attention_layernorm", "blocks/attention_out_norm"),
  *norm("model.layers.{i}.pre_feedforward_layernorm", "blocks/mlp_norm"),
  *norm("model.layers.{i}.post_feedforward_layernorm", "blocks/mlp_out_norm"),
)
_GEMMA_ENTRIES = (*OUTSIDE, *ATTENTION, *_GEMMA_NORMS, *DENSE)

GEMMA2 = decoder(
  "gemma2",
  "Gemma2",
  (
    *_LATER_GEMMA,
    same("attn_logit_softcapping", "attention.soft_cap", 50.0, none=0.0),
    same("final_logit_softcapping", "head.soft_cap", 30.0, none=0.0),
    layers(4096, every_other),
    DEFAULT_ROPE,
  ),
  entries=_GEMMA_ENTRIES,
  heads=label_heads("Gemma2"),
)


def _five_local(fields, found, window) -> list[str]:
  period = fields.take("sliding_window_pattern", 6, int)
  return [SLIDING if (i + 1) % period else FULL for i in range(found["num_layers"])]


def _gemma3_rope() -> Rule:
  """Rotary positions of both kinds of layers; in local layers they are never scaled."""

  def read(fields, found):
    parameters = fields.take_mapping("rope_parameters")
    base = fields.take("rope_theta", 1_000_000.0)
    local_base = fields.take("rope_local_base_freq", 10_000.0)
    scaling = fields.take_mapping("rope_scaling") or {}
    if parameters is None:
      parameters = {FULL: {"rope_theta": base} | scaling, SLIDING: {"rope_theta": local_base}}
    both = fields.nested("rope_parameters", parameters)
    full, sliding = both.take(FULL, kind=dict), both.take(SLIDING, kind=dict)
    both.refuse_unread()
    local = read_rope(both.nested(SLIDING, sliding), found, ("default",))
    return read_rope(both.nested(FULL, full), found) | {"rope.local_base": local["rope.base"]}

  def write(config):
    local = {"rope_theta": config.rope.local_base, "rope_type": "default"}
    return {"rope_parameters": {FULL: write_rope(config), SLIDING: local}}

  return Rule(read, write)


GEMMA3 = decoder(
  "gemma3_text",
  "Gemma3",
  (
    *_LATER_GEMMA,
    same("final_logit_softcapping", "head.soft_cap", None, none=0.0),
    # The reference has a field for a cap of attention but does not read it.
    ignored("_sliding_window_pattern", "attn_logit_softcapping"),
    always({"attention.qk_norm": True}),
    layers(4096, _five_local),
    _gemma3_rope(),
  ),
  entries=_GEMMA_ENTRIES,
  heads={"Gemma3TextForSequenceClassification": LabelHead("score", bias=False)},
)


def _text_config(rules: Sequence[Rule], defaults: Mapping[str, Any]) -> Rule:
  """The text's part of a multimodal config; `defaults` are for fields that its files omit."""

  def read(fields, found):
    inner = fields.nested("text_config", {**defaults, **fields.take("text_config", kind=dict)})
    for rule in rules:
      found = found | rule.read(inner, found)
    pass_over_bookkeeping(inner)
    inner.refuse_unread()
    return found

  return Rule(read, lambda config: {})


# The text model of a multimodal Gemma 3, whose files have its weights under another name beside the
# image model's, which are left out. It is written as a Gemma 3 for text.
GEMMA3_INSIDE = dataclasses.replace(
  GEMMA3,
  rules=(
    # Defaults of `transformers` for fields that are missing in the configs of 4B to 27B.
    _text_config(
      GEMMA3.rules,
      {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
      },
    ),
    fixed("tie_word_embeddings", True),
    ignored("boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image"),
    ignored("vision_config", "initializer_range"),
  ),
  entries=always_these(*(one.with_prefix("", "language_model.") for one in _GEMMA_ENTRIES)),
  prefix="",
  ignored=(r"vision_tower\..*", r"multi_modal_projector\..*"),
  copies={"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"},
  label_heads={},
)
