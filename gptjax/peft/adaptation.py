"""Training of adapters; see `gptjax.training.adaptation.WholeModel` for the interface."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from gptjax import tree
from gptjax.config import RunLength
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT, ParameterInfo
from gptjax.optim.optimizer import Optimizer
from gptjax.peft import huggingface, surgery
from gptjax.peft.adalora import allocate_ranks
from gptjax.peft.config import PeftConfig
from gptjax.peft.layers import Adapter
from gptjax.peft.quantized import quantize_params
from gptjax.training.adaptation import WholeModel


@dataclasses.dataclass(frozen=True)
class Adapters(WholeModel):
  """Trains adapters beside a frozen model.

  Attributes:
    peft: the method and its targets.
    options: `config.peft`, which also has the durations of AdaLoRA's budget.
  """

  peft: PeftConfig
  options: Mapping[str, Any]

  is_whole = False
  kind = Adapter

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> "Adapters":
    """Reads `config.peft`; UserError for a value that cannot be used."""
    return cls(PeftConfig.from_config(config), config)

  @property
  def method(self) -> str:
    return self.peft.method

  def abstract_model(self, config: ModelConfig) -> GPT:
    return surgery.abstract_model(config, self.peft)

  def trained(self, config: ModelConfig) -> dict[str, ParameterInfo]:
    return surgery.describe_adapters(config, self.peft)

  def initial_params(
    self, config: ModelConfig, seed: int, base: Mapping[str, Any] | None
  ) -> dict[str, Any]:
    if base is None:  # Only shapes are needed.
      base = nnx.to_pure_dict(nnx.state(GPT(config, nnx.Rngs(seed)), nnx.Param))
    return surgery.initial_adapters(config, self.peft, base, seed)

  def wrap(
    self, optimizer: Optimizer, trained: Mapping[str, ParameterInfo], length: RunLength | None
  ) -> Optimizer:
    if self.method != "adalora":
      return optimizer
    return allocate_ranks(optimizer, self.options, trained, length)

  def freeze(
    self,
    base: Mapping[str, Any] | None,
    parameters: Mapping[str, ParameterInfo],
    trained: Mapping[str, ParameterInfo],
  ) -> dict[str, Any]:
    """The frozen parameters, in the format `peft.base`."""
    return quantize_params(tree.without(base, trained), parameters, self.peft.base)

  def merge(self, model: GPT) -> GPT:
    return surgery.merge(model) if self.method in surgery.MERGED else model

  def export(self, folder: Path, model: GPT, family: Any, base: str) -> None:
    """Writes the adapters of a model into a folder, in the format of the `peft` library.

    Args:
      folder: the folder to write to.
      model: the adapted model.
      family: its `gptjax.interop.family.Family`, which gives the names of tensors.
      base: the name of the adapters' base model.
    """
    adapters = nnx.to_pure_dict(nnx.state(model, Adapter))
    huggingface.write(folder, model.config, self.peft, adapters, family, base)
