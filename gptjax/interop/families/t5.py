"""T5, its version 1.1, and mT5."""

from collections.abc import Mapping
from typing import Any

from gptjax.interop.family import Family
from gptjax.interop.fields import (
  Fields,
  Rule,
  always,
  choice,
  copied,
  fixed,
  ignored,
  same,
  several,
)
from gptjax.interop.tensors import Entry, linear, linears, norm, table
from gptjax.model.config import ModelConfig


def _read_layers(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
  encoder = fields.take("num_layers", kind=int)
  return {
    "encoder_layers": encoder,
    "num_layers": fields.take("num_decoder_layers", None, int | None) or encoder,
  }


def _write_layers(config: ModelConfig) -> dict[str, Any]:
  return {"num_layers": config.encoder_layers, "num_decoder_layers": config.num_layers}


def _read_head(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
  """An untied head has its matrix in the file, whatever the config says about tying."""
  fields.take("tie_word_embeddings", None)
  return {"head.tied": "lm_head.weight" not in fields.tensors}


def _read_scale(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
  """The scale of the hidden states in T5, but not in version 1.1, which in older files is known by
  the untied head."""
  tied = fields.take("tie_word_embeddings", True)
  scaled = fields.take("scale_decoder_outputs", tied is not False)
  return {"head.scale": found["embed_dim"] ** -0.5 if scaled else 1.0}


def _write_scale(config: ModelConfig) -> dict[str, Any]:
  scaled = config.head.scale != 1
  return {"scale_decoder_outputs": scaled, "tie_word_embeddings": scaled}


_RULES = (
  *copied(
    {"vocab_size": "vocab_size", "embed_dim": "d_model", "head_dim": "d_kv", "mlp_dim": "d_ff"}
  ),
  *copied({"num_heads": "num_heads"}),
  Rule(_read_layers, _write_layers),
  same("relative_attention_num_buckets", "position.t5_buckets", 32),
  same("relative_attention_max_distance", "position.t5_max_distance", 128),
  same("layer_norm_epsilon", "norm.eps", 1e-6),
  # Its positions do not end there.
  same("n_positions", "position.max_positions", 512),
  several("dropout_rate", "dropout.residual", "dropout.attention", "dropout.embed", default=0.1),
  same("decoder_start_token_id", "decoder_start", 0),
  fixed("is_encoder_decoder", True),
  ignored("dense_act_fn", "is_gated_act", "initializer_factor"),
  always({"bias": False, "norm.kind": "rmsnorm", "position.kind": "t5", "attention.scale": 1.0}),
)
_ACTIVATIONS = {
  "relu": {"mlp.activation": "relu"},
  "gated-gelu": {"mlp.activation": "geglu"},
  "gated-silu": {"mlp.activation": "swiglu"},
}


_QKV = {"query": "q", "key": "k", "value": "v", "out": "o"}


def _stack(theirs: str, ours: str, last: int) -> list[Entry]:
  """A stack of layers with `last` sublayers before the feed-forward network."""
  layer, blocks = f"{theirs}.block.{{i}}.layer", f"{ours}blocks"
  feed_forward = f"{layer}.{last}.DenseReluDense"
  return [
    *norm(f"{layer}.0.layer_norm", f"{blocks}/attention_norm"),
    *linears(f"{layer}.0.SelfAttention", f"{blocks}/attention", **_QKV),
    *table(
      f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias",
      f"{ours}attention_bias/relative",
    ),
    *norm(f"{layer}.{last}.layer_norm", f"{blocks}/mlp_norm"),
    *linears(feed_forward, f"{blocks}/mlp", gate="wi_0", down="wo"),
    *norm(f"{theirs}.final_layer_norm", f"{ours}final_norm"),
  ]


def _entries(up: str) -> tuple[Entry, ...]:
  """All tensors; `up` is the projection's name in the plain or the gated network."""
  return (
    *table("shared", "embed"),
    *_stack("encoder", "encoder/", 1),
    *linear(f"encoder.block.{{i}}.layer.1.DenseReluDense.{up}", "encoder/blocks/mlp/up"),
    *_stack("decoder", "", 2),
    *linear(f"decoder.block.{{i}}.layer.2.DenseReluDense.{up}", "blocks/mlp/up"),
    *norm("decoder.block.{i}.layer.1.layer_norm", "blocks/cross_norm"),
    *linears("decoder.block.{i}.layer.1.EncDecAttention", "blocks/cross_attention", **_QKV),
    *linear("lm_head", "head"),
  )


def _of_config(config: ModelConfig) -> tuple[Entry, ...]:
  return _entries("wi" if config.mlp.activation == "relu" else "wi_1")


_COPIES = {
  "encoder.embed_tokens.weight": "shared.weight",
  "decoder.embed_tokens.weight": "shared.weight",
}

T5 = Family(
  "t5",
  lambda config: "T5ForConditionalGeneration",
  (
    *_RULES,
    choice("feed_forward_proj", _ACTIVATIONS, "relu"),
    Rule(_read_scale, _write_scale),
    Rule(_read_head, lambda config: {}),
  ),
  _of_config,
  # An early file has a bias of cross-attention that nothing reads.
  ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
  copies=_COPIES,
)

MT5 = Family(
  "mt5",
  lambda config: "MT5ForConditionalGeneration",
  (
    *_RULES,
    choice("feed_forward_proj", _ACTIVATIONS, "gated-gelu"),
    Rule(_read_head, lambda config: {"tie_word_embeddings": config.head.tied}),
  ),
  _of_config,
  copies=_COPIES,
)
