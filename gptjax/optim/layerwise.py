"""Layerwise learning rates, frozen layers and gradual unfreezing."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.errors import UserError
from gptjax.model.gpt import ParameterInfo

_BELOW = ("embed", "position", "token_type")


@dataclasses.dataclass(frozen=True, eq=False)
class LayerwiseRates:
  """Multipliers of the learning rate by depth: embeddings 0, layers 1 to L, the rest above L + 1.

  Attributes:
    decay: multiplier of each layer in parts of the one above it (Howard and Ruder 2018,
      arXiv:1801.06146, section 3.2, where it is 1 / 2.6; Clark et al. 2020, table 7).
    frozen: depth up to which layers are not trained, nor the embeddings if it is above 0.
    unfreeze_steps: depth d is trained from step (L + 1 - d) * unfreeze_steps on (Howard and Ruder
      2018, section 3.3); 0 is from the start.
    of: {parameter: depth}, for a stack [L, 1, ...].
    top: depth L + 1.
  """

  decay: float
  frozen: int
  unfreeze_steps: int
  of: Mapping[str, np.ndarray]
  top: int

  @classmethod
  def from_config(
    cls, config: Any, parameters: Mapping[str, ParameterInfo], unfreeze_steps: int
  ) -> "LayerwiseRates":
    """Reads `config.optim`; UserError for a value that is out of range."""
    top = 1 + max((len(_layers(info)) for info in parameters.values()), default=0)
    if not 0 < config.layer_decay <= 1:
      raise UserError(f"optim.layer_decay={config.layer_decay} is not above 0 and at most 1.")
    if not 0 <= config.freeze_layers < top:
      raise UserError(
        f"optim.freeze_layers={config.freeze_layers} is not from 0 to the {top - 1} layers."
      )
    of = {name: _depth(name, info, top) for name, info in parameters.items()}
    return cls(config.layer_decay, config.freeze_layers, unfreeze_steps, of, top)

  def factor(self, name: str, step: jax.Array) -> jax.Array | None:
    """The multiplier of a parameter at a step, a scalar or [L, 1, ...]; 0 if it is not trained,
    None if nothing depends on depth."""
    if self.decay == 1 and not self.frozen and not self.unfreeze_steps:
      return None
    depth = self.of[name]
    factor = self.decay ** (self.top - depth) * (depth > (self.frozen or -1))
    since = (self.top - depth) * self.unfreeze_steps
    return jnp.where(step >= since, factor, 0.0).astype(jnp.float32)


def _depth(name: str, info: ParameterInfo, top: int) -> np.ndarray:
  if layers := _layers(info):
    return np.arange(1.0, len(layers) + 1).reshape(-1, *(1,) * (len(info.shape) - 1))
  return np.array(0.0 if name.startswith(_BELOW) else top, float)


def _layers(info: ParameterInfo) -> range:
  return range(info.shape[0] if info.axes[:1] == ("layers",) else 0)
