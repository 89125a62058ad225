"""Floating-point operations of a training step, as MFU counts them."""

import math
import re
from collections.abc import Mapping

from gptjax.devices import chips
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import ParameterInfo

_ENCODER = "encoder/|blocks/cross_attention/(key|value)/"


def flops_per_token(
  model: ModelConfig,
  parameters: Mapping[str, ParameterInfo],
  trained: Mapping[str, ParameterInfo],
  sequence_length: int,
  target_length: int,
) -> float:
  """FLOPs of training on one token, forward and backward, by the rule of `chips.flops_per_token`.

  Args:
    model: the model.
    parameters: describes its parameters.
    trained: describes the trained ones. A frozen matrix has no gradient: two thirds of the FLOPs.
    sequence_length: tokens of a row; with an encoder, of its row, whose tokens are counted.
    target_length: tokens of the decoder's row.
  """
  whole = trained.keys() >= parameters.keys()

  def matmul_params(pattern: str) -> float:
    return sum(
      math.prod(info.shape)
      * (model.experts.active if "experts" in info.axes else 1)
      * (1 if name in trained else 2 / 3)
      for name, info in (parameters | trained).items()
      if info.fan_in_axes is not None and re.match(pattern, name)
    )

  attention = {"heads": model.num_heads, "head_dim": model.head_dim}
  # The decoder's own tokens, and its cross-attention keys and values of the encoder's tokens.
  decoder = matmul_params(f"(?!{_ENCODER})")
  if model.head.tied and not model.label_head.num_labels:
    decoder += model.vocab_size * model.embed_dim * (1 if whole else 2 / 3)
  flops = chips.flops_per_token(
    matmul_params=decoder,
    sequence_length=target_length,
    windows=model.windows * (model.num_layers // len(model.windows)),
    causal=model.visibility != "bidirectional",
    **attention,
  )
  if not model.encoder_layers:
    return flops
  flops += 12.0 * model.num_heads * model.head_dim * sequence_length * model.num_layers
  encoder = chips.flops_per_token(
    matmul_params=matmul_params(_ENCODER),
    sequence_length=sequence_length,
    windows=[None] * model.encoder_layers,
    causal=False,
    **attention,
  )
  return encoder + flops * target_length / sequence_length
