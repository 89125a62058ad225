"""Converts a model or its adapters from one format to another."""

from collections.abc import Callable
from pathlib import Path

from etils import epath
from flax import nnx
from safetensors import SafetensorError

from gptjax import config as config_lib
from gptjax import wings
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.interop import huggingface
from gptjax.interop.family import Family
from gptjax.interop.labels import config_fields, transformers_task
from gptjax.interop.model_card import model_card
from gptjax.interop.tokenizer_export import export
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT, describe, describe_parameters
from gptjax.small_files import check_new, new_folder
from gptjax.training.adaptation import make_adaptation
from gptjax.training.pretrained import (
  Labels,
  is_run,
  labels_of,
  load_checkpoint,
  load_model,
  load_run,
  name_checkpoint,
  open_foreign,
  read_model_config,
  save_model,
)

FORMATS = ("gptjax", "hf", "peft", "gguf")


def convert(
  source: str,
  target: Path,
  *,
  to: str,
  family: str | None = None,
  dtype: str = "float32",
  adapter: Path | None = None,
) -> None:
  """Writes the model and the tokenizer of a checkpoint, or its adapters, into a new folder or file.

  Args:
    source: a checkpoint for `pretrained.load_model`; for 'peft', a run that trained adapters.
    target: a folder that does not exist or is empty; for 'gguf', a file that does not exist. It is
      written completely or not at all.
    to: 'gptjax', 'hf', 'peft' or 'gguf'.
    family: `model_type` for 'hf', 'peft' and an adapter; None is the type of the source or of its
      `init_from`, or the first that fits.
    dtype: dtype of the weights for 'hf', or their type for 'gguf'.
    adapter: a folder of the `peft` library to merge into the model.

  Raises:
    UserError: the source cannot be read, the target exists or cannot be written, the family
      cannot express the model, the dtype cannot hold a weight, or the adapters cannot be merged or
      written.
  """
  if to == "gguf":
    config = read_model_config(source)
    writer = wings.load("gptjax.gguf.writer:Writer", "--format=gguf")(target, config, dtype)
    chosen = None if adapter is None else family_of(source, config, family)
    writer.write(*_load(source, adapter, chosen)[:2])
    return
  check_new(target)
  if to == "peft":
    write = _adapters_of(source, family)
  else:
    write = _model_of(source, to, family, dtype, adapter)
  try:
    with new_folder(target) as folder:
      write(folder)
  except SafetensorError as error:
    raise UserError(f"--to={target}: cannot be written ({error}).") from error


def _model_of(
  source: str, to: str, family: str | None, dtype: str, adapter: Path | None
) -> Callable[[Path], None]:
  """Loads a model, merged with an adapter; returns the function that writes it into a folder."""
  labels, chosen = labels_of(source), None
  if to == "hf" or adapter is not None:
    task = transformers_task(labels) if labels else ""
    chosen = family_of(source, read_model_config(source), family, task)
  model, tokenizer, step = _load(source, adapter, chosen)

  def write(folder: Path) -> None:
    if to == "gptjax":
      save_model(folder, model, tokenizer, labels)
      return
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    fields = tokenizer.token_ids | (config_fields(labels) if labels else {})
    # Our texts end in end_of_text, which a classifier would not find if it were also the padding.
    if labels and is_run(source) and fields["pad_token_id"] == tokenizer.end_of_text:
      fields["pad_token_id"] = None
    huggingface.save(folder, model.config, params, chosen, dtype, fields)
    # A text to be labelled does not begin with a document's start tokens.
    export(folder, tokenizer, starts=tokenizer.is_own and not labels)
    if step and adapter is None:
      (folder / "README.md").write_text(
        model_card(epath.Path(source), step, chosen.architecture(model.config))
      )

  return write


def _load(source: str, adapter: Path | None, family: Family | None) -> tuple[GPT, Tokenizer, int]:
  """Loads a model, merged with an adapter in the names of a family, and the step of a run, or 0."""
  run = is_run(source)
  model, tokenizer, step = load_run(source, plain=True) if run else (*load_model(source), 0)
  if adapter is not None:
    merge_folder = wings.load("gptjax.peft.huggingface:merge_folder", "--adapter")
    model = merge_folder(model, adapter, family)
  if set(describe(model)) != set(describe_parameters(model.config)):
    of = source if adapter is None else adapter
    raise UserError(f"{of}: its adapters cannot be merged, so that no format here can hold it.")
  return model, tokenizer, step


def unwritable(config: ModelConfig, task: str) -> str:
  """Tells why a model trained for a task cannot be written for `transformers`; '' if it can."""
  head = transformers_task(Labels(task, ())) if config.label_head.num_labels else ""
  try:
    huggingface.find_family(config, task=head)
  except UserError as error:
    return str(error)
  return ""


def _adapters_of(source: str, family: str | None) -> Callable[[Path], None]:
  """Loads the adapters of a run; returns the function that writes them into a folder."""
  config = None if open_foreign(source) else config_lib.open_saved(epath.Path(source))
  adaptation = None if config is None else make_adaptation(config)
  if adaptation is None or adaptation.is_whole:
    raise UserError(f"--format=peft: {source} is no run that trained adapters.")
  model_config = read_model_config(source)
  labels = labels_of(source)
  task = transformers_task(labels) if labels else ""
  chosen = family_of(config.init_from, model_config, family, task)
  model, _ = load_checkpoint(source)
  base = name_checkpoint(config.init_from).removeprefix("hf:")
  return lambda folder: adaptation.export(folder, model, chosen, base)


def family_of(source: str, config: ModelConfig, name: str | None = None, task: str = "") -> Family:
  """The named family, the family of the source's files, or the first that can be the model."""
  foreign = None if name else open_foreign(source)
  if isinstance(foreign, huggingface.HuggingFaceModel):
    if task and foreign.labels:
      return foreign.family
    name = foreign.family.model_type
  return huggingface.find_family(config, name, task)
