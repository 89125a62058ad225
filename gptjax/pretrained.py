"""A trained model to use: weights, tokenizer and config, of a run or of another library's files.

A checkpoint is named by the work directory of a run, by hf:FOLDER or hf:ORG/NAME (Hugging Face), or
by gguf:FILE.
"""

from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from flax import nnx, traverse_util
from jax.sharding import Sharding, SingleDeviceSharding

from gptjax import config as config_lib
from gptjax.checkpoint import restore_params
from gptjax.data import tokenizer as tokenizers
from gptjax.data.tokenizer import Tokenizer, open_saved
from gptjax.errors import UserError
from gptjax.interop.gguf import GGUFModel
from gptjax.interop.huggingface import HuggingFaceModel
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
_FORMATS = {"hf:": HuggingFaceModel, "gguf:": GGUFModel}


def open_foreign(checkpoint: epath.PathLike) -> HuggingFaceModel | GGUFModel | None:
  """Opens hf:PATH or gguf:PATH; None if the checkpoint is not named so.

  Raises:
    UserError: there is no model that can be read.
  """
  for prefix, open_model in _FORMATS.items():
    if str(checkpoint).startswith(prefix):
      return open_model(str(checkpoint).removeprefix(prefix))
  return None


def load_run(
  checkpoint: epath.PathLike, *, ema: bool = False, progress: bool = True
) -> tuple[GPT, Tokenizer]:
  """Loads a model on one device, of a run the newest whole checkpoint.

  Args:
    checkpoint: the work directory of a run, hf:PATH or gguf:PATH.
    ema: take the moving average of the weights.
    progress: show a bar, on stderr, while another library's files are read.

  Raises:
    UserError: no model or no tokenizer is there, a run has no checkpoint yet, the weights are not
      of the config, or the tokenizer has more tokens than the model.
  """
  if (foreign := open_foreign(checkpoint)) is None:
    folder = epath.Path(checkpoint) / TOKENIZER
    model, _ = load_checkpoint(checkpoint, ema=ema)
    if (tokenizer := open_saved(folder)) is None:
      raise UserError(f"{folder}: no whole tokenizer, which a run keeps there.")
    return model, tokenizer
  if ema:
    raise UserError(f"{checkpoint} has no moving average of its weights.")
  tokenizer = tokenizers.load(foreign.tokenizer)
  check_vocabulary(tokenizer, foreign.config, str(checkpoint))
  graph = nnx.graphdef(nnx.eval_shape(lambda: GPT(foreign.config, nnx.Rngs(0))))
  params = foreign.load(on_one_device(foreign.parameters), progress=progress)
  return nnx.merge(graph, params), tokenizer


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, source: str) -> None:
  """Raises UserError if the tokenizer has more tokens than the model."""
  if tokenizer.vocab_size > config.vocab_size:
    raise UserError(
      f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, more than the model's "
      f"{config.vocab_size}."
    )


def on_one_device(parameters: Mapping[str, Any]) -> dict[str, Sharding]:
  return dict.fromkeys(parameters, SingleDeviceSharding(jax.devices()[0]))


def read_model_config(checkpoint: epath.PathLike) -> ModelConfig:
  """The config of a checkpoint's model, of whatever kind; UserError if there is none."""
  foreign = open_foreign(checkpoint)
  if foreign is not None:
    return foreign.config
  return ModelConfig.from_config(config_lib.open_saved(epath.Path(checkpoint)).model)


def tokenizer_of(checkpoint: epath.PathLike) -> str:
  """The spec of a checkpoint's tokenizer; UserError if there is none."""
  if not checkpoint:
    raise UserError("tokenizer='init_from' needs init_from: a run, hf:PATH or gguf:PATH.")
  foreign = open_foreign(checkpoint)
  return str(epath.Path(checkpoint) / TOKENIZER) if foreign is None else foreign.tokenizer


def load_params_into(
  checkpoint: epath.PathLike, config: ModelConfig, abstract: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
  """The parameters of a checkpoint, each where `abstract` puts it, and a report of what was found.

  Args:
    checkpoint: as of `load_run`.
    config: of the model that they are for.
    abstract: its parameters as `jax.ShapeDtypeStruct`s with shardings.

  Raises:
    UserError: the weights do not fit the model.
  """
  foreign = open_foreign(checkpoint)
  if foreign is None:
    source = epath.Path(checkpoint)
    loaded, report = restore_params(source / CHECKPOINTS, abstract)
    if report.mismatched or not report.matched:
      raise UserError(f"init_from={source} does not fit the model of this config.\n{report}")
    return loaded, str(report)
  if differences := config.differences(foreign.config):
    raise UserError(
      f"init_from={checkpoint} does not fit the model of this config: {'; '.join(differences)}. "
      "Choose the preset model=init_from to take the checkpoint's."
    )
  flat = traverse_util.flatten_dict(abstract, sep="/")
  shardings = {name: leaf.sharding for name, leaf in flat.items()}
  loaded = foreign.load(shardings, progress=jax.process_index() == 0)
  return loaded, f"{checkpoint}: all {len(shardings)} parameters"


def load_checkpoint(
  workdir: epath.PathLike, *, ema: bool = False, near: int | None = None
) -> tuple[GPT, int]:
  """The model of a run and the step of its checkpoint: of those kept the newest, or the one whose
  step is nearest to `near`."""
  workdir = epath.Path(workdir)
  config = config_lib.open_saved(workdir)
  model_config = ModelConfig.from_config(config.model)
  model = nnx.eval_shape(lambda: GPT(model_config, nnx.Rngs(0)))
  graph, abstract = nnx.split(model)
  device = SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
    nnx.to_pure_dict(abstract),
  )
  params, report = restore_params(workdir / CHECKPOINTS, abstract, ema=ema, near=near)
  if report.missing or report.mismatched:
    raise UserError(f"{workdir}: its checkpoint does not fit its config.\n{report}")
  return nnx.merge(graph, params), int(report.source.name)
