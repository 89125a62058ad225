"""Hyper-parameters that transfer from a narrow model to a wide one: the optimizer's side of muP.

`ModelConfig.parametrization` scales the forward pass and the initialisation with width and depth;
this module scales the update of each parameter, so that the learning rate and the weight decay that
are best at `base_embed_dim` stay best. Each update should change a layer's output by the same
amount at any width; m is the width over the base's:

  Adam and other algorithms whose updates have elements of about equal size change the product of a
  matrix with m times as many aligned terms m times as much: the learning rate is divided by m (Yang
  et al. 2022, arXiv:2203.03466, table 8).
  Muon's update is a rotation times 0.2 sqrt(width): that root is divided out (spectral condition,
  Yang, Simon and Bernstein 2023, arXiv:2310.17813, equation 3).
  Embeddings, biases and norms are the same at any width; the model itself divides the logits by m
  (`GPT.hidden`).

Weight decay is inverse to the learning rate, so that their product, the share of a weight that a
step removes, is the same at any width (Dey et al. 2025, arXiv:2505.01618, table 1). Depth needs no
other rate: CompleteP divides the residual branches by the depth.
"""

from collections.abc import Mapping

from gptjax.errors import UserError
from gptjax.model.gpt import ParameterInfo

# The roles of matrices whose fan-in grows with the width.
_HIDDEN = ("hidden", "router")
_POWER = {
  "adamw": -1.0,
  "adam": -1.0,
  "lion": -1.0,
  "adafactor": -1.0,
  "soap": -1.0,
  "muon": -0.5,
}


def hidden_parameters(parameters: Mapping[str, ParameterInfo]) -> set[str]:
  """Names of the matrices whose fan-in is a width; other parameters keep their learning rate."""
  return {name for name, info in parameters.items() if info.role in _HIDDEN}


def learning_rate_multiplier(algorithm: str, width_ratio: float) -> float:
  """Multiplier of the learning rate of hidden matrices that `algorithm` updates.

  Raises:
    UserError: the algorithm has no rule.
  """
  if width_ratio == 1:
    return 1.0
  if algorithm not in _POWER:
    raise UserError(
      f"model.transfer.parametrization: no rule for optim {algorithm!r} across widths; there is "
      f"one for {', '.join(_POWER)}."
    )
  return width_ratio ** _POWER[algorithm]
