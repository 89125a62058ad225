"""Whole models, read and taken apart into parameters by name, and put together again."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx, traverse_util
from jax.typing import ArrayLike

from gptjax import tree
from gptjax.compression.calibration import read_rows
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError, check_number
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT, is_plain, model_graph
from gptjax.quantization.stored import is_stored
from gptjax.training.pretrained import load_model


def load_whole(
  checkpoint: epath.PathLike, *, ema: bool = False, progress: bool = True
) -> tuple[GPT, Tokenizer]:
  """Loads a model as `load_model`; UserError if it is stored in few bits already, has adapters
  that cannot be merged into it, or is an ensemble."""
  model, tokenizer = load_model(checkpoint, ema=ema, progress=progress)
  if is_stored(model):
    raise UserError(
      f"{checkpoint} is quantised already: give the model that it was made from, or write the "
      "weights that it stands for with gptjax.convert --format=gptjax first."
    )
  if not is_plain(model):
    raise UserError(
      f"{checkpoint} is no single model: it has adapters that cannot be merged, or is an ensemble."
    )
  return model, tokenizer


def params_of(model: GPT) -> dict[str, jax.Array]:
  """The parameters by name, float32."""
  return tree.named_leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def with_params(config: ModelConfig, params: Mapping[str, ArrayLike]) -> GPT:
  """The model of a config with these parameters, by name."""
  arrays = {name: jnp.asarray(x) for name, x in params.items()}
  return nnx.merge(model_graph(config), traverse_util.unflatten_dict(arrays, sep="/"))


def calibration_rows(
  data: str, tokenizer: Tokenizer, *, rows: int, length: int, seed: int
) -> np.ndarray:
  """Rows of text as `read_rows`; UserError too if there would be none to learn from."""
  check_number("--rows", rows, at_least=1)
  check_number("--length", length, at_least=2)
  return read_rows(data, tokenizer, rows=rows, length=length, seed=seed)
