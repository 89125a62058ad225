"""Loads LoRA adapters from files, and puts them beside each other on their base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath
from flax import nnx

from gptjax import config as config_lib
from gptjax import tree
from gptjax.errors import UserError
from gptjax.interop.convert import family_of
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT, describe, describe_parameters
from gptjax.peft import huggingface
from gptjax.peft.config import PeftConfig
from gptjax.peft.several import put_several_on
from gptjax.training.adaptation import make_adaptation
from gptjax.training.checkpoints import checksum, restore_params
from gptjax.training.pretrained import CHECKPOINTS, makes_best, on_one_device


def load_adapters(model: GPT, checkpoint: str, paths: Mapping[str, str]) -> GPT:
  """Puts adapters from files on a model, to be chosen by their numbers in the order of `paths`.

  Args:
    model: the adapters' base, plain; changed, and must not be used afterwards.
    checkpoint: where the model is from, which tells the names of tensors in a folder.
    paths: {name: path} of each adapter: the work directory of a run, of which the newest
      checkpoint is taken, or the best if that is the run's result; or a folder of the `peft`
      library.

  Raises:
    UserError: a path is neither, or an adapter is not LoRA, was trained beside another model or a
      rounded one, or does not fit the model. It names the adapter.
  """
  if set(describe(model)) != set(describe_parameters(model.config)):
    raise UserError(f"{checkpoint} has adapters that are not to be merged; others need a base.")
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  adapters = []
  for name, path in paths.items():
    folder = Path(path).expanduser()
    try:
      if (folder / huggingface.CONFIG).exists():
        family = family_of(checkpoint, model.config)
        adapters.append(huggingface.read(folder, model.config, family))
      elif (epath.Path(path) / config_lib.CONFIG_FILE).exists():
        adapters.append(_read_run(epath.Path(path), model.config, params))
      else:
        raise UserError(
          f"no adapters; name a run that trained them, which has a {config_lib.CONFIG_FILE}, or a "
          f"folder of the `peft` library, which has an {huggingface.CONFIG}."
        )
      if (base := adapters[-1][0].base) != "float32":
        raise UserError(
          f"trained beside a model in {base}, not the one that is loaded; load {path} itself."
        )
    except UserError as error:
      raise UserError(f"adapter {name}={path}: {error}") from error
  return put_several_on(model, adapters, [f"{name}={path}" for name, path in paths.items()])


def _read_run(
  run: epath.Path, model_config: ModelConfig, base: Mapping[str, Any]
) -> tuple[PeftConfig, dict[str, Any]]:
  """The adapters of a run, whose base must have the given config and parameters."""
  config = config_lib.open_saved(run)
  adaptation = make_adaptation(config)
  if adaptation.is_whole:
    raise UserError("a run that trained a whole model; load it as one.")
  own_config = ModelConfig.from_config(config.model)
  differences = own_config.differences(model_config) + own_config.head_differences(model_config)
  if differences:
    raise UserError(f"trained beside another model: {'; '.join(differences)}.")
  state = nnx.state(adaptation.abstract_model(own_config), adaptation.kind)
  shardings = on_one_device(tree.named_leaves(nnx.to_pure_dict(state)))
  abstract = tree.map_named(
    lambda name, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name]),
    nnx.to_pure_dict(state),
  )
  adapters, report = restore_params(run / CHECKPOINTS, abstract, best=makes_best(config))
  if report.missing or report.mismatched:
    raise UserError(f"its checkpoint does not fit its config.\n{report}")
  if report.base_checksum != (found := checksum(base)):
    raise UserError(
      f"trained beside another model, that of init_from={config.get('init_from')} "
      f"(checksum {report.base_checksum}, not {found})."
    )
  return adaptation.peft, adapters
