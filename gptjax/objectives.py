"""What is minimised: batch + model -> sums over tokens. Means are taken by the step."""

import jax

from gptjax import losses
from gptjax.data.batch import Batch
from gptjax.losses import LossSum
from gptjax.model.figures import Figures, Routing
from gptjax.model.gpt import GPT


def target_loss(
  model: GPT,
  batch: Batch,
  key: jax.Array | None = None,
  *,
  z_loss: float = 0.0,
  router_balance_loss: float = 0.0,
  router_z_loss: float = 0.0,
  figures: Figures | None = None,
  routing: Routing | None = None,
) -> LossSum:
  """Cross-entropy of every target, times its weight, summed. `key` is of dropout, `figures` and
  `routing` are of `GPT.hidden`.

  Where there is `routing`, `total` also has the two router losses, the mean of the layers, times
  their factors and the sum of the weights.
  """
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
    encoded=encoded,
    key=key,
    figures=figures,
    routing=routing,
  )
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
  if routing is None:
    return sums
  of_token = router_balance_loss * routing["balance_loss"] + router_z_loss * routing["z_loss"]
  return sums._replace(total=sums.total + batch.weights.sum() * of_token.mean())
