"""Which parameters a run trains: all of its model's, or adapters beside a frozen model."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from gptjax import wings
from gptjax.config import RunLength
from gptjax.errors import UserError
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT, ParameterInfo, abstract_model, describe_parameters
from gptjax.optim.optimizer import Optimizer

# Methods that train a whole model in a wing's own way; others are of adapters.
_METHODS = {"sparse": "gptjax.compression.recovery:SparseModel"}
# Keys of checkpoints that are used and not trained: how their models are kept.
_USED = {
  "stored": "gptjax.quantization.stored:Stored",
  "ensemble": "gptjax.compression.ensemble:Together",
}


class WholeModel:
  """Trains every parameter of the model.

  The alternatives have the same attributes and methods: `gptjax.peft.adaptation.Adapters`,
  `gptjax.compression.rounding.Rounded` and, of checkpoints that are only used,
  `gptjax.quantization.stored.Stored` and `gptjax.compression.ensemble.Together`.

  Attributes:
    method: `config.peft.method`.
    is_whole: whether the trained parameters are the whole model, so that nothing is frozen.
    kind: the variables of the model that are trained, and that a checkpoint holds.
  """

  method = "none"
  is_whole = True
  kind: type[nnx.Variable] = nnx.Param

  def abstract_model(self, config: ModelConfig) -> GPT:
    """The model with what is trained, without allocating anything."""
    return abstract_model(config)

  def trained(self, config: ModelConfig) -> dict[str, ParameterInfo]:
    """Name, shape and axes of every trained parameter; nothing is allocated."""
    return describe_parameters(config)

  def initial_params(
    self, config: ModelConfig, seed: int, base: Mapping[str, Any] | None
  ) -> dict[str, Any]:
    """The trained parameters at step 0, a nested dict; `base` are a frozen model's parameters."""
    del base
    return nnx.to_pure_dict(nnx.state(GPT(config, nnx.Rngs(seed)), nnx.Param))

  def check_start(self, params: Any, parameters: Mapping[str, ParameterInfo]) -> None:
    """Raises UserError for parameters that the method cannot start a run from."""

  def wrap(
    self, optimizer: Optimizer, trained: Mapping[str, ParameterInfo], length: RunLength | None
  ) -> Optimizer:
    """The optimizer with the method's additions; without a length it is only traced."""
    del trained, length
    return optimizer

  def freeze(
    self,
    base: Mapping[str, Any] | None,
    parameters: Mapping[str, ParameterInfo],
    trained: Mapping[str, ParameterInfo],
  ) -> dict[str, Any] | None:
    """The frozen parameters that the step takes beside the state.

    Args:
      base: the model's parameters, a nested dict, which must not be used afterwards.
      parameters: describes them.
      trained: describes the trained parameters.
    """
    del base, parameters, trained
    return None

  def merge(self, model: GPT) -> GPT:
    """The model for use, with adapters merged into it where that is possible."""
    return model

  def plain(self, model: GPT) -> GPT:
    """The model of float32 parameters that a model for use is, where there is one."""
    return self.merge(model)


WHOLE = WholeModel()
# `config.quantize` of a run that trains no rounded weights.
NOT_ROUNDED = {"format": "none", "group": 0, "symmetric": True, "activations": "none"}


def make_adaptation(config: Mapping[str, Any]) -> WholeModel:
  """Reads `peft` (adapters by their method), `quantize` and the keys of `_USED` in a run's config.

  Raises:
    UserError: a value that cannot be used, by its key.
  """
  for key, path in _USED.items():
    if used := config.get(key):
      return wings.load(path, key).from_config(used)
  rounding, config = dict(config.get("quantize") or {}), config.get("peft") or {}
  if rounding and rounding != NOT_ROUNDED:
    if config.get("method", WHOLE.method) != WHOLE.method:
      raise UserError("quantize is of a model that is trained whole; beside peft, set peft.base.")
    return wings.load("gptjax.compression.rounding:Rounded", "quantize").from_config(rounding)
  if (method := config.get("method", WHOLE.method)) != WHOLE.method:
    path = _METHODS.get(method, "gptjax.peft.adaptation:Adapters")
    return wings.load(path, f"peft.method={method!r}").from_config(config)
  if (base := config.get("base", "float32")) != "float32":
    raise UserError(f"peft.base={base!r} is the format of a frozen model: choose a peft.method.")
  return WHOLE
