"""A model whose matrices are stored in few bits: what a compressed checkpoint holds."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx, traverse_util

from gptjax import tree
from gptjax.errors import UserError, check_choice, did_you_mean
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT, ParameterInfo, abstract_model, describe
from gptjax.model.layers import find
from gptjax.quantization.formats import ACTIVATIONS, Format
from gptjax.quantization.kernel import StoredEmbedding, StoredKernel, as_matrix, round_matrix
from gptjax.training.adaptation import WholeModel

# The key of a checkpoint's config that says how its model is stored.
KEY = "stored"


@dataclasses.dataclass(frozen=True)
class Stored(WholeModel):
  """How a model is stored; see `WholeModel` for the interface.

  Attributes:
    weights: format of the kernels of all layers, experts included. Routers, norms and biases stay
      float32.
    embedding: format of the table of tokens, which is the head too if they are tied; None is
      float32.
    head: format of a head of its own; None is float32.
    scales_inputs: whether the inputs of the kernels are multiplied by stored factors first.
    activations: what these inputs are rounded to, one of `formats.ACTIVATIONS`; 'int8' is of
      kernels in int8 without groups and zero points, which are then multiplied as whole numbers.
  """

  weights: Format
  embedding: Format | None = None
  head: Format | None = None
  scales_inputs: bool = False
  activations: str = "none"

  def __post_init__(self):
    check_choice("activations", self.activations, ACTIVATIONS)
    if self.activations != "none" and self.weights != Format("int8"):
      raise UserError(
        f"activations={self.activations!r} is of weights in int8, without groups and zero points."
      )

  method = KEY
  kind = nnx.Variable

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> "Stored":
    """Reads what `to_config` wrote; UserError for a value that cannot be used."""
    known = [field.name for field in dataclasses.fields(cls)]
    for key in config:
      if key not in known:
        raise UserError(f"{KEY}: no key {key!r}. {did_you_mean(key, known)}")
    formats = {key: config.get(key) for key in ("weights", "embedding", "head")}
    made = {key: value and Format(**value) for key, value in formats.items()}
    others = {key: config[key] for key in ("scales_inputs", "activations") if key in config}
    return cls(**made, **others)

  def to_config(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  def abstract_model(self, config: ModelConfig) -> GPT:
    return nnx.eval_shape(lambda: self.store(GPT(config, nnx.Rngs(0))))

  def trained(self, config: ModelConfig) -> dict[str, ParameterInfo]:
    raise UserError(
      "a model whose weights are stored in few bits is not trained further as it is: start a run "
      "from it (--config.init_from), which takes the weights that they stand for."
    )

  def store(self, model: GPT) -> GPT:
    """Rounds a model to its format. The model itself is changed.

    Raises:
      UserError: a matrix cannot be stored in its format, by its name.
    """
    for name, info in stored_kernels(describe(model)).items():
      if self.activations != "none" and "experts" in info.axes:
        raise UserError(f"activations={self.activations!r}: not of experts, as {name!r} is.")
      *path, leaf = name.split("/")
      module = find(model, path)
      inputs = len(info.fan_in_axes)
      in_shape = [info.shape[axis] for axis in info.fan_in_axes]
      out_shape = [info.shape[axis] for axis in info.fan_out_axes]
      matrix = as_matrix(getattr(module, leaf)[...], inputs, len(out_shape))
      self.weights.check(name, matrix.shape[-1])
      ones = jnp.ones((*matrix.shape[:-2], matrix.shape[-1])) if self.scales_inputs else None
      matrix = round_matrix(matrix, self.weights)
      kernel = StoredKernel(matrix, in_shape, out_shape, ones, self.activations)
      setattr(module, leaf, kernel)
    if self.embedding is not None:
      table = model.embed.embedding[...]
      self.embedding.check("embed/embedding", table.shape[-1])
      model.embed = StoredEmbedding(round_matrix(table, self.embedding))
    if self.head is not None:
      if model.head is None:
        raise UserError("head: the model's head is its embedding; set that format alone.")
      kernel = model.head.kernel[...]
      self.head.check("head/kernel", kernel.shape[0])
      matrix = round_matrix(as_matrix(kernel, 1, 1), self.head)
      model.head.kernel = StoredKernel(matrix, kernel.shape[:1], kernel.shape[1:])
    return model

  def plain(self, model: GPT) -> GPT:
    """The float32 model that a stored one stands for."""
    params = {}
    for path, module in nnx.iter_modules(model):
      name = "/".join(map(str, path))
      if isinstance(module, StoredKernel):
        params[name] = module[...]
      elif isinstance(module, StoredEmbedding):
        params[f"{name}/embedding"] = module.embedding
    plain = abstract_model(model.config)
    params |= tree.named_leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return nnx.merge(nnx.graphdef(plain), traverse_util.unflatten_dict(params, sep="/"))


def stored_kernels(parameters: Mapping[str, ParameterInfo]) -> dict[str, ParameterInfo]:
  """The kernels of the layers of a model, those of an encoder included."""
  return {
    name: info
    for name, info in parameters.items()
    if info.role == "hidden" and info.axes[0] == "layers"
  }


def is_stored(model: GPT) -> bool:
  """Whether any matrix of a model is stored in few bits."""
  kinds = (StoredKernel, StoredEmbedding)
  return any(isinstance(module, kinds) for _, module in nnx.iter_modules(model))
