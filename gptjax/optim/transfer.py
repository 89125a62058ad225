"""Hyper-parameters that transfer from a narrow model to a wide one: the optimizer's side of muP.

`ModelConfig.parametrization` sets what the forward pass and the initialisation owe to width and
depth; here is what the update of each parameter owes, so that the learning rate and the weight
decay that are best at `base_embed_dim` stay best. With C a constant, m the width over that of the
base, and updates of C a step to what a layer puts out:

  Adam and what else makes every element of an update about equally large moves the product of a
  matrix with m times as many aligned terms by m times as much: its learning rate is divided by m
  (Yang et al. 2022, arXiv:2203.03466, table 8).
  Muon's update is a rotation times 0.2 sqrt(width): that root is divided out (spectral condition,
  Yang, Simon and Bernstein 2023, arXiv:2310.17813, equation 3).
  Embeddings, biases and norms are the same at any width; the division of the logits by m is the
  model's (`GPT.hidden`).

Decay follows the learning rate inversely, so that their product, the share of a weight that a step
takes away, is the same at any width (Dey et al. 2025, arXiv:2505.01618, table 1). Depth asks for no
other rate: CompleteP's residual branches are divided by the depth.
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
  """The matrices that read a width; all other parameters keep their learning rate."""
  return {name for name, info in parameters.items() if info.role in _HIDDEN}


def learning_rate_multiplier(algorithm: str, width_ratio: float) -> float:
  """Of the hidden matrices that `algorithm` updates.

  Raises:
    UserError: the algorithm has no rule.
  """
  if width_ratio == 1:
    return 1.0
  if algorithm not in _POWER:
    raise UserError(
      f"model.parametrization: no rule for optim {algorithm!r} across widths; there is one for "
      f"{', '.join(_POWER)}."
    )
  return width_ratio ** _POWER[algorithm]
