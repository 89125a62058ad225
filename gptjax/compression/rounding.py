"""Quantisation-aware training: weights are rounded in the forward pass, and gradients go
to the weights behind them (straight-through, Bengio et al. 2013, arXiv:1308.3432; Jacob et al.
2018, arXiv:1712.05877)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx, traverse_util

from gptjax import tree
from gptjax.errors import UserError, check_choice, did_you_mean
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT, abstract_model, describe, describe_parameters
from gptjax.model.layers import Linear, adopt, contract, find
from gptjax.quantization.formats import ACTIVATIONS, BITS, Format, nearest
from gptjax.quantization.kernel import as_matrix, from_matrix, round_tokens
from gptjax.quantization.stored import stored_kernels
from gptjax.training.adaptation import NOT_ROUNDED, WholeModel


@dataclasses.dataclass(frozen=True)
class Rounded(WholeModel):
  """Trains a model whose kernels are rounded; see `WholeModel` for the interface.

  `gptjax.compress quantize` with the same format, group and symmetry stores what was trained.

  Attributes:
    form: format of the kernels of all layers.
    activations: 'int8' also rounds the inputs of these kernels, each token by its largest; 'none'.
  """

  form: Format
  activations: str = "none"

  method = "quantize"

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> "Rounded":
    """Reads `config.quantize`; UserError for a value that cannot be used."""
    for key in config:
      if key not in NOT_ROUNDED:
        raise UserError(f"quantize: no key {key!r}. {did_you_mean(key, NOT_ROUNDED)}")
    config = NOT_ROUNDED | config
    if (name := config.get("format")) == "none":
      raise UserError("quantize.format='none' rounds nothing: set it, or leave the others out.")
    check_choice("quantize.format", name, BITS)
    check_choice("quantize.activations", activations := config.get("activations"), ACTIVATIONS)
    return cls(Format(name, config.get("group"), config.get("symmetric")), activations)

  def abstract_model(self, config: ModelConfig) -> GPT:
    for name, info in stored_kernels(describe_parameters(config)).items():
      if "experts" in info.axes:
        raise UserError(f"quantize: {name!r} of experts cannot be rounded in training.")
      self.form.check(name, info.fan_in)
    return nnx.eval_shape(lambda: self._round(GPT(config, nnx.Rngs(0))))

  def merge(self, model: GPT) -> GPT:
    """The plain model with the rounded kernels."""
    params = tree.named_leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    for name, info in stored_kernels(describe(model)).items():
      inputs = [info.shape[axis] for axis in info.fan_in_axes]
      outputs = [info.shape[axis] for axis in info.fan_out_axes]
      matrix = as_matrix(params[name], len(inputs), len(outputs))
      params[name] = from_matrix(nearest(matrix, self.form), inputs, outputs)
    graph = nnx.graphdef(abstract_model(model.config))
    return nnx.merge(graph, traverse_util.unflatten_dict(params, sep="/"))

  def _round(self, model: GPT) -> GPT:
    for name in stored_kernels(describe(model)):
      *path, last, _ = name.split("/")
      parent = find(model, path)
      rounded = RoundedLinear(getattr(parent, last), self.form, self.activations)
      setattr(parent, last, rounded)
    return model


class RoundedLinear(Linear):
  """A projection whose kernel, and inputs if `activations` says so, are rounded as they are used;
  its parameters are those of the projection."""

  def __init__(self, base: Linear, form: Format, activations: str):
    adopt(self, base)
    self.form, self.activations = form, activations

  def product(self, x: jax.Array) -> jax.Array:
    kernel, count = self.kernel[...], self.contracted_axes
    matrix = as_matrix(kernel, count, kernel.ndim - count)
    rounded = from_matrix(nearest(matrix, self.form), kernel.shape[:count], kernel.shape[count:])
    kernel = straight_through(kernel, rounded).astype(self.dtype)
    if self.activations == "int8":
      x = straight_through(x, round_tokens(x, count))
    return contract(x.astype(self.dtype), kernel, count, self.axes)


def straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
  """The rounded numbers, with the gradient of the numbers themselves."""
  # The difference is 0, so that the rounded numbers stay exact.
  return jax.lax.stop_gradient(rounded) + (x - jax.lax.stop_gradient(x))
