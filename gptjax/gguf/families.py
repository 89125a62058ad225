"""Architectures of llama.cpp whose files are read and written: GPT-2, Llama, Qwen 2 and Qwen 3.

Names of fields and tensors are those of the GGUF specification; what an architecture must have
follows llama.cpp's src/models.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.interop.family import Family, always_these
from gptjax.interop.fields import REQUIRED, Fields, Rule, always, copied, ignored, same
from gptjax.interop.huggingface import find_family
from gptjax.interop.tensors import linear, linears, norm, table
from gptjax.model.config import ModelConfig
from gptjax.model.positions import rope_frequencies

# A tensor, which is how files hold Llama 3.1's scaling; as a field of ours, its largest factor.
ROPE_FACTORS = "rope_freqs.weight"
# Of Llama 3.1 to 3.3; files have only the factors that follow from it.
_LLAMA3_ORIGINAL_POSITIONS = 8192
_SCALINGS = ("none", "linear", "yarn")


def _eps(theirs: str) -> Rule:
  """The norms' constant, stored in float32; the original number has few digits."""
  return Rule(
    lambda fields, found: {"norm.eps": float(f"{fields.take(theirs, REQUIRED, float):.6g}")},
    lambda config: {theirs: float(config.norm.eps)},
  )


def _read_scaling(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
  kind = fields.take("rope.scaling.type", "none")
  factor = fields.take("rope.scaling.factor", 1.0, float)
  original = fields.take("rope.scaling.original_context_length", 0, int)
  fields.take("rope.scaling.finetuned", None)
  largest = fields.take(ROPE_FACTORS, None)
  if kind not in _SCALINGS:
    raise fields.refuse("rope.scaling.type", kind, _SCALINGS)
  if largest is not None:
    kind, factor, original = "llama3", largest, _LLAMA3_ORIGINAL_POSITIONS
  if kind == "none":
    return {}
  return {
    "rope.scaling": kind,
    "rope.factor": float(factor),
    "rope.original_positions": original,
  }


def _write_scaling(config: ModelConfig, *, factors: bool) -> dict[str, Any]:
  """The inverse. What reads as another scaling is refused: one that llama.cpp lacks, and factors in
  an architecture that has no such tensor there (`factors`)."""
  if config.rope.scaling == "llama3":
    return {ROPE_FACTORS: float(rope_factors(config).max())} if factors else {}
  if config.rope.scaling not in ("linear", "yarn"):
    return {}
  fields = {
    "rope.scaling.type": config.rope.scaling,
    "rope.scaling.factor": float(config.rope.factor),
  }
  if original := config.rope.original_positions:  # 'linear' has none.
    fields["rope.scaling.original_context_length"] = original
  return fields


def rope_factors(config: ModelConfig) -> np.ndarray:
  """What the scaling of a config divides each frequency by, float32 [rope_dim / 2]."""
  plain, _ = rope_frequencies(config.replace({"rope.scaling": "none"}))
  return (plain / rope_frequencies(config)[0]).astype(np.float32)


_SHAPE = (
  *copied(
    {
      "vocab_size": "vocab_size",
      "num_layers": "block_count",
      "position.max_positions": "context_length",
      "embed_dim": "embedding_length",
    }
  ),
  *copied({"mlp_dim": "feed_forward_length", "num_heads": "attention.head_count"}),
  same("attention.head_count_kv", "num_kv_heads", 0),
  Rule(
    lambda fields, found: {"head.tied": "output.weight" not in fields.tensors}, lambda config: {}
  ),
)
_BLOCK = "blk.{i}"
_AROUND = (
  *table("token_embd", "embed"),
  *norm("output_norm", "final_norm"),
  *linear("output", "head"),
  *norm(f"{_BLOCK}.attn_norm", "blocks/attention_norm"),
  *linear(f"{_BLOCK}.attn_output", "blocks/attention/out"),
  *norm(f"{_BLOCK}.ffn_norm", "blocks/mlp_norm"),
  *linears(_BLOCK, "blocks/mlp", gate="ffn_gate", up="ffn_up", down="ffn_down"),
)
_QUERY_KEY_VALUE = tuple(f"blocks/attention/{name}" for name in ("query", "key", "value"))

GPT2 = Family(
  "gpt2",
  lambda config: "gpt2",
  (*_SHAPE, _eps("attention.layer_norm_epsilon")),
  always_these(
    *_AROUND,
    *table("position_embd", "position"),
    *linear(f"{_BLOCK}.attn_qkv", *_QUERY_KEY_VALUE),
  ),
)


def _rotary(architecture: str, implied: Mapping[str, Any], *, is_llama: bool = False) -> Family:
  """A family with rotary positions and SwiGLU. llama.cpp rotates neighbouring dimensions of Llama
  together, and reorders them accordingly; it divides frequencies by factors in Llama alone."""
  return Family(
    architecture,
    lambda config: architecture,
    (
      *_SHAPE,
      same("attention.key_length", "head_dim", 0),
      Rule(
        ignored("attention.value_length").read,
        lambda config: {"attention.value_length": config.head_dim},
      ),
      _eps("attention.layer_norm_rms_epsilon"),
      Rule(
        same("rope.freq_base", "rope.base", 10_000.0).read,
        lambda config: {"rope.freq_base": float(config.rope.base)},
      ),
      # It rotates whole heads: part of one, read back, is another model.
      Rule(
        same("rope.dimension_count", "rope.dim", 0).read,
        lambda config: {"rope.dimension_count": config.head_dim},
      ),
      Rule(_read_scaling, lambda config: _write_scaling(config, factors=is_llama)),
      always(
        {"norm.kind": "rmsnorm", "bias": False, "mlp.activation": "swiglu", "position.kind": "rope"}
      ),
      always(implied),
    ),
    always_these(
      *_AROUND,
      *linear(f"{_BLOCK}.attn_q", "blocks/attention/query", rotary_pairs=is_llama),
      *linear(f"{_BLOCK}.attn_k", "blocks/attention/key", rotary_pairs=is_llama),
      *linear(f"{_BLOCK}.attn_v", "blocks/attention/value"),
      *norm(f"{_BLOCK}.attn_q_norm", "blocks/attention/query_norm"),
      *norm(f"{_BLOCK}.attn_k_norm", "blocks/attention/key_norm"),
    ),
  )


FAMILIES: Mapping[str, Family] = {
  family.model_type: family
  for family in (
    GPT2,
    _rotary("llama", {}, is_llama=True),
    _rotary("qwen2", {"attention.qkv_bias": True}),
    _rotary("qwen3", {"attention.qk_norm": True}),
  )
}


def find(config: ModelConfig) -> Family:
  """The architecture that can be this model.

  Raises:
    UserError: there is none; it says what the nearest lacks.
  """
  if config.label_head.num_labels:
    raise UserError(
      f"model.label_head.num_labels={config.label_head.num_labels}: files for llama.cpp hold "
      "language models; a head of labels is written by --format=hf."
    )
  kind = f"architecture of llama.cpp among {', '.join(FAMILIES)}"
  return find_family(config, families=FAMILIES, kind=kind)
