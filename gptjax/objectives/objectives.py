"""What is minimised: batch + model -> sums over targets. Means are taken by the step."""

import jax

from gptjax.data.batch import Batch
from gptjax.model.figures import Figures, Routing
from gptjax.model.gpt import GPT
from gptjax.objectives import cross_entropy as losses
from gptjax.objectives.cross_entropy import LossSum
from gptjax.objectives.label_losses import LabelLoss


def target_loss(
  model: GPT,
  batch: Batch,
  key: jax.Array | None = None,
  *,
  labels: LabelLoss | None = None,
  z_loss: float = 0.0,
  router_balance_loss: float = 0.0,
  router_z_loss: float = 0.0,
  figures: Figures | None = None,
  routing: Routing | None = None,
) -> LossSum:
  """The loss of every target, times its weight, summed: the cross-entropy of tokens, or what
  `labels` says. `key` is of dropout, `figures` and `routing` are of `GPT.hidden`.

  Where there is `routing`, `total` also has the two router losses, the mean of the layers, times
  their factors and the sum of the weights.
  """
  if labels is None:
    x_BTD = _hidden(model, batch, key, figures, routing)
    kernel, axes = model.output_kernel()
    sums = losses.cross_entropy(
      model.features(x_BTD),
      kernel,
      batch.targets,
      batch.weights,
      axes=axes,
      bias_V=None if model.head_bias is None else model.head_bias[...],
      cap=model.config.logit_soft_cap,
      z_loss=z_loss,
    )
  elif labels.r_drop and key is not None:
    keys = jax.random.split(key)
    a, b = (label_logits(model, batch, key, figures, routing) for key in keys)
    passes = labels(a, batch), labels(b, batch)
    sums = jax.tree.map(lambda x, y: (x + y) / 2, *passes)
    divergence = labels.r_drop / 4 * labels.divergence(a, b, batch)
    sums = sums._replace(total=sums.total + divergence)
  else:
    sums = labels(label_logits(model, batch, key, figures, routing), batch)
  if routing is None:
    return sums
  of_token = router_balance_loss * routing["balance_loss"] + router_z_loss * routing["z_loss"]
  return sums._replace(total=sums.total + batch.weights.sum() * of_token.mean())


def label_logits(
  model: GPT,
  batch: Batch,
  key: jax.Array | None = None,
  figures: Figures | None = None,
  routing: Routing | None = None,
) -> jax.Array:
  """Scores of the labels at each input, [B, T, K]; arguments as of `target_loss`."""
  keys = (None, None) if key is None else jax.random.split(key)
  x_BTD = _hidden(model, batch, keys[0], figures, routing)
  return model.label_logits(x_BTD, batch.segment_ids, keys[1])


def _hidden(
  model: GPT,
  batch: Batch,
  key: jax.Array | None,
  figures: Figures | None,
  routing: Routing | None,
) -> jax.Array:
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
