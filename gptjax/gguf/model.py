"""Reads GGUF files of llama.cpp, with weights dequantised on reading."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.errors import UserError, did_you_mean
from gptjax.gguf.families import FAMILIES, ROPE_FACTORS, rope_factors
from gptjax.gguf.files import open_gguf
from gptjax.interop.fields import Fields
from gptjax.interop.load import Importer
from gptjax.model.gpt import ParameterInfo, describe_parameters


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
    fields, tensors = _open(self.path)
    architecture = fields.get("general.architecture")
    if architecture not in FAMILIES:
      raise UserError(
        f"{path}: no architecture {architecture!r} is read from GGUF. "
        f"{did_you_mean(str(architecture), FAMILIES)}"
      )
    family, prefix = FAMILIES[architecture], f"{architecture}."
    own = {name.removeprefix(prefix): x for name, x in fields.items() if name.startswith(prefix)}
    if "token_embd.weight" not in tensors.names:
      raise UserError(f"{path}: no tensor 'token_embd.weight', which the config needs.")
    own["vocab_size"] = tensors.shape("token_embd.weight")[0]
    factors = tensors.read(ROPE_FACTORS) if ROPE_FACTORS in tensors.names else None
    if factors is not None:
      own[ROPE_FACTORS] = float(factors.max())
    self.config = family.read_config(Fields(own, str(path), tensors.names))
    if factors is not None:
      expected = rope_factors(self.config)
      if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise UserError(f"{path}: tensor {ROPE_FACTORS!r} is not the scaling of Llama 3.1.")
    self.parameters: Mapping[str, ParameterInfo] = describe_parameters(self.config)
    self._importer = Importer(
      family.entries(self.config),
      tensors,
      self.parameters,
      self.config,
      source=str(path),
      ignored=(ROPE_FACTORS,),
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
