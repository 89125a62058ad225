"""Reads and writes folders of Hugging Face models: config.json, safetensors and a tokenizer."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from gptjax.errors import UserError, did_you_mean
from gptjax.interop import safetensors_files
from gptjax.interop.families import bert, gemma, gpt, llama, t5
from gptjax.interop.family import Family
from gptjax.interop.fields import Fields
from gptjax.interop.labels import fold_bias, read_labels
from gptjax.interop.load import Importer, export
from gptjax.interop.safetensors_files import DTYPES, TensorFiles
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import ParameterInfo, describe_parameters
from gptjax.small_files import read_json

FAMILIES: Mapping[str, Family] = {
  family.model_type: family
  for family in (
    gpt.GPT1,
    gpt.GPT2,
    gpt.GPT_NEO,
    gpt.GPT_NEOX,
    gpt.GPT_J,
    llama.LLAMA,
    llama.MISTRAL,
    llama.QWEN2,
    llama.QWEN3,
    llama.OLMO2,
    llama.SMOLLM3,
    llama.PHI3,
    llama.GRANITE,
    gemma.GEMMA,
    gemma.GEMMA2,
    gemma.GEMMA3,
    llama.MIXTRAL,
    llama.QWEN3_MOE,
    llama.GPT_OSS,
    bert.BERT,
    bert.ROBERTA,
    bert.XLM_ROBERTA,
    bert.CAMEMBERT,
    bert.DISTILBERT,
    t5.T5,
    t5.MT5,
  )
}
# Families of models that are inside files of another `model_type`, by that type.
_INSIDE: Mapping[str, Family] = {"gemma3": gemma.GEMMA3_INSIDE}
_READ: Mapping[str, Family] = {**FAMILIES, **_INSIDE}
# Without these fields `transformers` takes the token ids of one model of the family.
_NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
_HUB_ID = r"[\w.-]+/[\w.-]+"
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.bpe"]


class HuggingFaceModel:
  """An opened folder: our config of its model, and its parameters to load.

  Attributes:
    labels: the labels of its head; None for a language model.

  Raises:
    UserError: there is no such folder, its architecture or one of its fields is unknown, its
      weights are damaged, missing or pickled, or do not fit its config.
  """

  def __init__(self, path: str):
    self.folder = find_folder(path)
    source = self.folder / "config.json"
    values = _read_config(source)
    kind = str(values.get("model_type"))
    if kind not in _READ:
      raise UserError(f"{source}: no model_type {kind!r} is known. {did_you_mean(kind, _READ)}")
    self.family, self.labels = _READ[kind], None
    (architecture, *_) = values.get("architectures") or [None]
    if architecture in self.family.label_heads:
      self.family = self.family.with_label_head(architecture)
      self.labels = read_labels(values, architecture.rpartition("For")[2], str(source))
    if values.pop("quantization_config", None) is not None:
      raise UserError(
        f"{source}: field 'quantization_config': quantised weights are not read here; convert the "
        "model to bfloat16 with transformers, or take a GGUF file."
      )
    with TensorFiles(self.folder) as tensors:
      self.config = self.family.read_config(Fields(values, str(source), tensors.names))
      self.parameters: Mapping[str, ParameterInfo] = describe_parameters(self.config)
      self._importer(tensors)

  def load(
    self, shardings: Mapping[str, jax.sharding.Sharding], *, progress: bool = False
  ) -> dict[str, Any]:
    """Loads the parameters by `Importer.load`."""
    with TensorFiles(self.folder) as tensors:
      return self._importer(tensors).load(shardings, progress=progress)

  @property
  def tokenizer(self) -> str:
    """The spec of its tokenizer."""
    return str(self.folder)

  @property
  def for_transformers(self) -> dict[str, Any]:
    """The arguments with which `transformers` loads it."""
    return {"pretrained_model_name_or_path": self.folder}

  def _importer(self, tensors: TensorFiles) -> Importer:
    family = self.family
    return Importer(
      family.entries(self.config),
      tensors,
      self.parameters,
      self.config,
      source=str(self.folder),
      prefix=family.prefix,
      older_names=family.older_names,
      ignored=family.ignored,
      copies=family.copies,
    )


def find_folder(path: str) -> Path:
  """A local folder, or a model of the Hub, fetched by its id with `huggingface_hub`.

  Raises:
    UserError: it is neither, or it cannot be fetched.
  """
  folder = Path(path).expanduser()
  if folder.is_dir():
    return folder
  if folder.exists() or not re.fullmatch(_HUB_ID, path):
    raise UserError(f"{path}: no folder of a model, nor an id of the Hub such as 'ORG/NAME'.")
  try:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
  except ImportError as error:
    raise UserError(
      f"{path}: no such folder; to fetch it from the Hub, pip install huggingface_hub."
    ) from error
  try:
    return Path(huggingface_hub.snapshot_download(path, allow_patterns=_HUB_FILES))
  except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
    first = str(error).strip().partition("\n")[0]
    raise UserError(f"{path}: no such folder, and the Hub does not give it ({first}).") from error


def _read_config(path: Path) -> dict[str, Any]:
  if not path.exists():
    raise UserError(f"{path.parent}: no config.json, so not a model's folder.")
  values = read_json(path)
  if not isinstance(values, dict):
    raise UserError(f"{path}: not an object of fields.")
  return values


def find_family(
  config: ModelConfig,
  name: str | None = None,
  task: str = "",
  families: Mapping[str, Family] = FAMILIES,
  kind: str = "family of Hugging Face",
) -> Family:
  """The first family that can express this config, or the named one.

  Args:
    config: config of the model.
    name: a `model_type`.
    task: for a model with a label head, the head's name in `transformers`.
    families: where to look, and what it is called, `kind`.

  Raises:
    UserError: no family can, or the named one cannot; it says what is missing.
  """
  if config.label_head.num_labels and not task:
    raise UserError(
      f"model.label_head.num_labels={config.label_head.num_labels}: a head of labels is not "
      "written without its task."
    )
  if name is not None:
    if name not in families:
      raise UserError(f"no family {name!r}. {did_you_mean(name, families)}")
    family = families[name].with_task(task) if task else families[name]
    family.write_config(config)
    return family
  found = []
  for family in families.values():
    try:
      family = family.with_task(task) if task else family
      found.append((family.lacks(config), family))
    except UserError:
      continue  # Less suitable than a family that only lacks something.
  if not found:
    raise UserError(f"no {kind} can be this model.")
  lacking, nearest = min(found, key=lambda one: len(one[0]))
  if lacking:
    name = nearest.architecture(config) if task else repr(nearest.model_type)
    raise UserError(
      f"no {kind} can be this model; the nearest, {name}, lacks {'; '.join(lacking)}."
    )
  return nearest


def save(
  folder: Path,
  config: ModelConfig,
  params: Mapping[str, Any],
  family: Family,
  dtype: str = "float32",
  more_fields: Mapping[str, Any] = MappingProxyType({}),
) -> None:
  """Writes config.json, with `more_fields`, and the weights into an existing empty folder.

  Raises:
    UserError: the family cannot express the config, a label bias has no place there, or the dtype
      cannot hold a value.
  """
  fields = _NO_TOKENS | more_fields | family.write_config(config) | {"dtype": dtype}
  stored = family.stored(config)
  if config.label_head.bias and not stored.label_head.bias:
    params = fold_bias(params)
  config, parameters = stored, describe_parameters(stored)
  strip = family.prefix if fields["architectures"][0].endswith("Model") else ""
  tensors = export(
    family.entries(config), params, parameters, config, family.model_type, DTYPES[dtype]
  )
  safetensors_files.write(folder, ((name.removeprefix(strip), array) for name, array in tensors))
  (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
