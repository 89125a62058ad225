"""The forward pass of a batch, which all losses begin with."""

import jax

from gptjax.data.batch import Batch
from gptjax.model.figures import Figures, Routing
from gptjax.model.gpt import GPT
from gptjax.objectives import cross_entropy
from gptjax.objectives.cross_entropy import LossSum


def hidden(
  model: GPT,
  batch: Batch,
  key: jax.Array | None = None,
  figures: Figures | None = None,
  routing: Routing | None = None,
) -> jax.Array:
  """Hidden states [B, T, D] of a batch, through the encoder first where the model has one; `key` is
  of dropout, `figures` and `routing` are as of `GPT.hidden`."""
  encoded = None
  if batch.encoder_inputs is not None:
    key, encoder_key = (None, None) if key is None else jax.random.split(key)
    encoded = model.encode(
      batch.encoder_inputs,
      positions_BS=batch.encoder_positions,
      segment_ids_BS=batch.encoder_segment_ids,
      key=encoder_key,
    )
  x_BTD, _ = model.hidden(
    batch.inputs,
    positions_BT=batch.positions,
    segment_ids_BT=batch.segment_ids,
    prefix_BS=batch.prefix,
    token_types_BT=batch.token_types,
    encoded=encoded,
    key=key,
    figures=figures,
    routing=routing,
  )
  return x_BTD


def token_loss(
  model: GPT,
  batch: Batch,
  key: jax.Array | None = None,
  *,
  z_loss: float = 0.0,
  figures: Figures | None = None,
  routing: Routing | None = None,
) -> LossSum:
  """The cross-entropy of the target tokens by their weights; arguments as of `Task.loss`."""
  x_BTD = hidden(model, batch, key, figures, routing)
  kernel, axes = model.output_kernel()
  return cross_entropy.cross_entropy(
    model.features(x_BTD),
    kernel,
    batch.targets,
    batch.weights,
    axes=axes,
    bias_V=None if model.head_bias is None else model.head_bias[...],
    cap=model.config.logit_soft_cap,
    z_loss=z_loss,
  )


def label_logits(
  model: GPT,
  batch: Batch,
  key: jax.Array | None = None,
  figures: Figures | None = None,
  routing: Routing | None = None,
) -> jax.Array:
  """Scores of the labels at each input, [B, T, K], float32; arguments as of `Task.loss`."""
  keys = (None, None) if key is None else jax.random.split(key)
  x_BTD = hidden(model, batch, keys[0], figures, routing)
  return model.label_logits(x_BTD, batch.segment_ids, keys[1])
