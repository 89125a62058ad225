"""The forward pass of a batch, shared by all losses."""

import jax

from gptjax.data.batch import Batch
from gptjax.model.gpt import GPT
from gptjax.model.stats import ActivationStats, RouterStats
from gptjax.objectives import cross_entropy
from gptjax.objectives.cross_entropy import LossSum
from gptjax.objectives.log_probs import TokenScores, token_log_probs


def hidden(
  model: GPT,
  batch: Batch,
  key: jax.Array | None = None,
  stats: ActivationStats | None = None,
  router_stats: RouterStats | None = None,
) -> jax.Array:
  """Hidden states [B, T, D], after running an encoder if there is one; see `GPT.hidden`."""
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
    stats=stats,
    router_stats=router_stats,
  )
  return x_BTD


def token_loss(
  model: GPT,
  batch: Batch,
  key: jax.Array | None = None,
  *,
  z_loss: float = 0.0,
  stats: ActivationStats | None = None,
  router_stats: RouterStats | None = None,
) -> LossSum:
  """The weighted cross-entropy of the target tokens; arguments as in `Task.loss`."""
  x_BTD = hidden(model, batch, key, stats, router_stats)
  kernel, axes = model.output_kernel()
  return cross_entropy.cross_entropy(
    model.features(x_BTD),
    kernel,
    batch.targets,
    batch.weights,
    axes=axes,
    bias_V=None if model.head_bias is None else model.head_bias[...],
    cap=model.config.head.soft_cap,
    z_loss=z_loss,
  )


def token_scores(model: GPT, x_BTD: jax.Array, batch: Batch) -> TokenScores:
  """Log probabilities of the target tokens after hidden states, and entropies, [B, T]."""
  kernel, axes = model.output_kernel()
  return token_log_probs(
    model.features(x_BTD),
    kernel,
    batch.targets,
    axes=axes,
    bias_V=None if model.head_bias is None else model.head_bias[...],
    cap=model.config.head.soft_cap,
  )


def label_logits(
  model: GPT,
  batch: Batch,
  key: jax.Array | None = None,
  stats: ActivationStats | None = None,
  router_stats: RouterStats | None = None,
) -> jax.Array:
  """Scores of the labels at each input, [B, T, K], float32; arguments as in `Task.loss`."""
  keys = (None, None) if key is None else jax.random.split(key)
  x_BTD = hidden(model, batch, keys[0], stats, router_stats)
  return model.label_logits(x_BTD, batch.segment_ids, keys[1])
