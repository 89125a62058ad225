"""What is minimised: batch + model -> weighted loss of each token. Means are taken by the step."""

import jax
import jax.numpy as jnp

from gptjax.data.batch import Batch
from gptjax.model.gpt import GPT


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
  """-log softmax(logits)[target], float32 [B, T], in nats."""
  target_logits = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits_BTV, axis=-1) - target_logits


def next_token(model: GPT, batch: Batch, key: jax.Array | None = None) -> jax.Array:
  """Cross-entropy of every target, times its weight: float32 [B, T], in nats."""
  logits_BTV = model(
    batch.inputs, positions_BT=batch.positions, segment_ids_BT=batch.segment_ids, key=key
  )
  return cross_entropy(logits_BTV, batch.targets) * batch.weights
