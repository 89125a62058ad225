"""Reads GGUF files of llama.cpp: Llama, Qwen 2 and Qwen 3, with weights dequantised on reading."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.errors import UserError, did_you_mean
from gptjax.gguf.files import open_gguf
from gptjax.interop.fields import Fields, Rule, always, copied, ignored, same
from gptjax.interop.load import Importer
from gptjax.interop.tensors import Entry, linear, linears, norm, table
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import ParameterInfo, describe_parameters
from gptjax.model.positions import rope_frequencies

_ROPE_FACTORS = "rope_freqs.weight"
# Scaling of Llama 3.1 to 3.3; files have only the factors that follow from it.
_LLAMA3_ORIGINAL_POSITIONS = 8192


def _scaling(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
  kind = fields.take("rope.scaling.type", "none")
  factor = fields.take("rope.scaling.factor", 1.0, float)
  original = fields.take("rope.scaling.original_context_length", 0, int)
  fields.take("rope.scaling.finetuned", None)
  if kind not in ("none", "linear", "yarn"):
    raise fields.refuse("rope.scaling.type", kind, ("none", "linear", "yarn"))
  if kind == "none":
    return {}
  return {
    "rope.scaling": kind,
    "rope.factor": float(factor),
    "rope.original_positions": original,
  }


_RULES = (
  *copied(
    {
      "num_layers": "block_count",
      "position.max_positions": "context_length",
      "embed_dim": "embedding_length",
    }
  ),
  *copied({"mlp_dim": "feed_forward_length", "num_heads": "attention.head_count"}),
  same("attention.head_count_kv", "num_kv_heads", 0),
  same("attention.key_length", "head_dim", 0),
  same("attention.layer_norm_rms_epsilon", "norm.eps"),
  same("rope.freq_base", "rope.base", 10_000.0),
  same("rope.dimension_count", "rope.dim", 0),
  ignored("attention.value_length", "vocab_size"),
  Rule(_scaling, lambda config: {}),
  always(
    {"norm.kind": "rmsnorm", "bias": False, "mlp.activation": "swiglu", "position.kind": "rope"}
  ),
)
_FAMILIES = {
  "llama": {},
  "qwen2": {"attention.qkv_bias": True},
  "qwen3": {"attention.qk_norm": True},
}


def _entries(architecture: str) -> tuple[Entry, ...]:
  # llama.cpp rotates neighbouring dimensions of Llama together, and reorders them accordingly.
  pairs = {"rotary_pairs": architecture == "llama"}
  return (
    *table("token_embd", "embed"),
    *norm("output_norm", "final_norm"),
    *linear("output", "head"),
    *norm("blk.{i}.attn_norm", "blocks/attention_norm"),
    *linear("blk.{i}.attn_q", "blocks/attention/query", **pairs),
    *linear("blk.{i}.attn_k", "blocks/attention/key", **pairs),
    *linears("blk.{i}", "blocks/attention", value="attn_v", out="attn_output"),
    *norm("blk.{i}.attn_q_norm", "blocks/attention/query_norm"),
    *norm("blk.{i}.attn_k_norm", "blocks/attention/key_norm"),
    *norm("blk.{i}.ffn_norm", "blocks/mlp_norm"),
    *linears("blk.{i}", "blocks/mlp", gate="ffn_gate", up="ffn_up", down="ffn_down"),
  )


class _GGUFTensors:
  """Tensors of an opened file, dequantised when they are read."""

  def __init__(self, path: Path, tensors: Any, dequantise: Any):
    self._path = path
    self._tensors = {tensor.name: tensor for tensor in tensors}
    self._dequantise = dequantise

  @property
  def names(self) -> frozenset[str]:
    return frozenset(self._tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(self._tensors[name].shape))

  def read(self, name: str) -> np.ndarray:
    tensor = self._tensors[name]
    try:
      return self._dequantise(tensor.data, tensor.tensor_type).reshape(self.shape(name))
    except NotImplementedError as error:
      raise UserError(
        f"{self._path}: tensor {name!r} is {tensor.tensor_type.name}, which gguf cannot read."
      ) from error


class GGUFModel:
  """An opened file, `path`: our config of its model, and its parameters to load.

  Attributes:
    labels: None, since GGUF holds language models.

  Raises:
    UserError: there is no such file, it is damaged, its architecture or a field is unknown, or its
      tensors do not fit its fields.
  """

  labels = None

  def __init__(self, path: str):
    self.path = Path(path).expanduser()
    fields, self._tensors = _open(self.path)
    architecture = fields.get("general.architecture")
    if architecture not in _FAMILIES:
      raise UserError(
        f"{path}: no architecture {architecture!r} is read from GGUF. "
        f"{did_you_mean(str(architecture), _FAMILIES)}"
      )
    prefix = f"{architecture}."
    own = Fields(
      {name.removeprefix(prefix): x for name, x in fields.items() if name.startswith(prefix)},
      str(path),
      self._tensors.names,
    )
    found = {"head.tied": "output.weight" not in self._tensors.names, **_FAMILIES[architecture]}
    for rule in _RULES:
      found |= rule.read(own, found)
    own.refuse_unread()
    if "token_embd.weight" not in self._tensors.names:
      raise UserError(f"{path}: no tensor 'token_embd.weight', which the config needs.")
    found["vocab_size"] = self._tensors.shape("token_embd.weight")[0]
    # Stored in float32; the original number has few digits.
    found["norm.eps"] = float(f"{found['norm.eps']:.6g}")
    try:
      self.config = ModelConfig.from_config(self._with_llama3_rope(found))
    except UserError as error:
      raise UserError(f"{path}: {error}") from error
    self.parameters: Mapping[str, ParameterInfo] = describe_parameters(self.config)
    self._importer = Importer(
      _entries(architecture),
      self._tensors,
      self.parameters,
      self.config,
      source=str(path),
      ignored=(_ROPE_FACTORS,),
    )

  def load(
    self, shardings: Mapping[str, jax.sharding.Sharding], *, progress: bool = False
  ) -> dict[str, Any]:
    """Loads the parameters by `Importer.load`."""
    return self._importer.load(shardings, progress=progress)

  @property
  def tokenizer(self) -> str:
    """The spec of its tokenizer."""
    return str(self.path)

  @property
  def for_transformers(self) -> dict[str, Any]:
    """The arguments with which `transformers` loads it."""
    return {"pretrained_model_name_or_path": self.path.parent, "gguf_file": self.path.name}

  def _with_llama3_rope(self, found: dict[str, Any]) -> dict[str, Any]:
    """Adds Llama 3.1's scaling, recognised by the factors that divide the frequencies."""
    if _ROPE_FACTORS not in self._tensors.names:
      return found
    factors = self._tensors.read(_ROPE_FACTORS)
    scaled = found | {
      "rope.scaling": "llama3",
      "rope.factor": float(factors.max()),
      "rope.original_positions": _LLAMA3_ORIGINAL_POSITIONS,
    }
    plain, _ = rope_frequencies(ModelConfig.from_config(found))
    expected = plain / rope_frequencies(ModelConfig.from_config(scaled))[0]
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
      raise UserError(f"tensor {_ROPE_FACTORS!r} is not the scaling of Llama 3.1.")
    return scaled


def _open(path: Path) -> tuple[dict[str, Any], _GGUFTensors]:
  reader = open_gguf(path)
  from gguf.quants import dequantize  # Installed, since the file is open.

  # Lists of tokens and merges take seconds to decode, and the model does not need them.
  fields = {
    name: field.contents()
    for name, field in reader.fields.items()
    if not name.startswith("tokenizer.")
  }
  return fields, _GGUFTensors(path, reader.tensors, dequantize)
