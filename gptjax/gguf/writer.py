"""Writes models as GGUF files, which llama.cpp runs."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from flax import nnx

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError, check_choice
from gptjax.gguf.families import ROPE_FACTORS, find, rope_factors
from gptjax.gguf.files import import_gguf
from gptjax.gguf.tokenizer_writer import make_fields
from gptjax.interop.load import export
from gptjax.interop.tensors import applicable
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT, describe_parameters
from gptjax.training.pretrained import check_vocabulary

# The type of matrices in the files, by the names that users give.
TYPES = {
  **{"float32": "F32", "float16": "F16", "bfloat16": "BF16"},
  **{"q8_0": "Q8_0", "q4_0": "Q4_0"},
}
# What the table of `Family` has beside the fields of a file.
_NOT_IN_FILES = ("model_type", "architectures", ROPE_FACTORS)


class Writer:
  """A GGUF file that can be written for a model.

  Vectors and learned positions are float32 in all files, as llama.cpp has them. In a 'q4_0' file
  the matrix that makes logits, which is the embedding if it is tied, is Q8_0: llama.cpp's own is
  Q6_K, which `gguf` does not make, or Q8_0. Matrices whose rows are no multiple of a block's 32
  values are float16, as llama.cpp's converter falls back; a warning names them.

  Args:
    path: a file FILE.gguf that does not exist.
    config: config of the model.
    dtype: one of `TYPES`.

  Raises:
    UserError: the file exists or is not called so, `gguf` is not installed, the dtype is unknown,
      or no architecture of llama.cpp can be the model.
  """

  def __init__(self, path: Path, config: ModelConfig, dtype: str = "float32"):
    if path.suffix != ".gguf":
      raise UserError(f"--to={path}: the name of a file for llama.cpp ends in .gguf.")
    if path.exists():
      raise UserError(f"--to={path} is there already; nothing is overwritten.")
    check_choice("--dtype", dtype, TYPES)
    self._gguf = import_gguf(path)
    self._path, self._config, self._dtype = path, config, dtype
    self._family, self._parameters = find(config), describe_parameters(config)

  def write(self, model: GPT, tokenizer: Tokenizer) -> None:
    """Writes the file, completely or not at all. Beside the model, memory holds one tensor.

    Raises:
      UserError: llama.cpp would cut texts into other tokens, a value is not finite in its type, or
        the file cannot be written.
    """
    check_vocabulary(tokenizer, self._config, str(self._path))
    name = self._family.model_type
    own = self._family.write_config(self._config).items()
    fields = {f"{name}.{field}": value for field, value in own if field not in _NOT_IN_FILES}
    fields |= make_fields(tokenizer, self._config.vocab_size)
    partial = self._path.with_name(f"{self._path.name}.partial")
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      try:
        self._write(partial, fields, model)
        partial.rename(self._path)
      finally:
        partial.unlink(missing_ok=True)
    except OSError as error:
      raise UserError(f"--to={self._path}: cannot be written ({error}).") from error

  def _write(self, path: Path, fields: Mapping[str, Any], model: GPT) -> None:
    gguf, shapes = self._gguf, self._shapes()
    kinds = self._kinds(shapes)
    writer = gguf.GGUFWriter(path, self._family.model_type)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    try:
      writer.add_type("model")
      writer.add_name(self._path.stem)
      kind = TYPES[self._dtype]
      writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
      writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
      for name, value in fields.items():
        add[type(value)](name, value)
      for name, shape in shapes.items():
        size = math.prod(gguf.quants.quant_shape_to_byte_shape(shape, kinds[name]))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kinds[name])
      writer.write_header_to_file()
      writer.write_kv_data_to_file()
      writer.write_ti_data_to_file()
      for name, tensor in self._tensors(model):  # In the order of their shapes.
        writer.write_tensor_data(self._round(name, tensor, kinds[name]))
    finally:
      writer.close()

  def _shapes(self) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the file."""
    scaled = self._config.rope.scaling == "llama3"
    shapes = {ROPE_FACTORS: rope_factors(self._config).shape} if scaled else {}
    entries = self._family.entries(self._config)
    for entry in applicable(entries, self._parameters, self._family.model_type):
      shape = entry.shape(self._parameters, self._config)
      shapes |= {name: shape for name, _ in entry.names(self._parameters)}
    return shapes

  def _tensors(self, model: GPT) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of `_shapes`, float32, in the same order."""
    if self._config.rope.scaling == "llama3":
      yield ROPE_FACTORS, rope_factors(self._config)
    yield from export(
      self._family.entries(self._config),
      nnx.to_pure_dict(nnx.state(model, nnx.Param)),
      self._parameters,
      self._config,
      self._family.model_type,
      np.float32,
    )

  def _kinds(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The type of each tensor, a gguf.GGMLQuantizationType."""
    types = self._gguf.GGMLQuantizationType
    logits = "token_embd.weight" if self._config.head.tied else "output.weight"
    kinds, odd = {}, []
    for name, shape in shapes.items():
      kind = types[TYPES[self._dtype]]
      if len(shape) < 2 or name == "position_embd.weight":
        kind = types.F32
      elif kind is types.Q4_0 and name == logits:
        kind = types.Q8_0
      block, _ = self._gguf.GGML_QUANT_SIZES[kind]
      if shape[-1] % block:
        kind = types.F16
        odd.append(f"{name} ({shape[-1]})")
      kinds[name] = kind
    if odd:
      logging.warning(
        "%s: float16 in the place of %s, whose blocks are of 32 values, for tensors with other "
        "rows: %s.",
        *(self._path, self._dtype, ", ".join(odd)),
      )
    return kinds

  def _round(self, name: str, tensor: np.ndarray, kind: Any) -> np.ndarray:
    """A tensor in a type of the file: bytes, or floats if the type is F32 or F16."""
    quants = self._gguf.quants
    with np.errstate(all="ignore"):
      stored = quants.quantize(np.ascontiguousarray(tensor), kind)
      if np.isfinite(quants.dequantize(stored, kind)).all():
        return stored
    raise UserError(
      f"--dtype={self._dtype}: tensor {name!r} has a value that is not finite in {kind.name}."
    )
