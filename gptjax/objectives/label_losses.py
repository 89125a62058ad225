"""Losses of labels: of a segment, of each of its words, or of a span of its tokens.

Axes: B batch, T and S positions, K labels.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gptjax.data.batch import Batch
from gptjax.model.attention import same_segment
from gptjax.objectives.cross_entropy import LossSum

# In the place of the logit of a token that cannot be an answer; infinities would make NaN of 0.
_NEVER = -1e30


@dataclasses.dataclass(frozen=True)
class LabelLoss:
  """What is minimised under an objective of labels.

  objective: 'classification' and 'tagging', cross-entropy of one label among K; 'multi_label',
    binary cross-entropy, the mean of the K labels; 'regression', squared error, likewise; 'span',
    cross-entropy of the first and of the last token of the answer among those of token type 1, the
    mean of the two (Devlin et al. 2019, section 4.2).
  smoothing: the share of the target that is spread evenly over the labels (Szegedy et al. 2016,
    section 7); 'span' and 'regression' have none.
  r_drop: the factor of half the symmetric divergence between two passes with other dropout, beside
    the mean of their losses: half of equation 4 of Liang et al. 2021 (arXiv:2106.14448).
  """

  objective: str
  smoothing: float = 0.0
  r_drop: float = 0.0

  def __call__(self, logits_BTK: jax.Array, batch: Batch) -> LossSum:
    """Sums over the tokens with a weight: what is minimised, and the loss without smoothing."""
    plain_BT = self._loss(logits_BTK, batch, 0.0)
    total_BT = self._loss(logits_BTK, batch, self.smoothing) if self.smoothing else plain_BT
    return LossSum(*(jnp.vdot(loss_BT, batch.weights) for loss_BT in (total_BT, plain_BT)))

  def divergence(self, a_BTK: jax.Array, b_BTK: jax.Array, batch: Batch) -> jax.Array:
    """The symmetric Kullback-Leibler divergence of what is predicted, summed as the loss is."""
    if self.objective == "multi_label":
      logit_a, logit_b = a_BTK, b_BTK
      p_a, p_b = jax.nn.sigmoid(a_BTK), jax.nn.sigmoid(b_BTK)
      # The logarithms of the normalisers cancel in the sum of the two directions.
      both_BT = ((p_a - p_b) * (logit_a - logit_b)).mean(-1)
    else:
      logp_a, logp_b = jax.nn.log_softmax(a_BTK), jax.nn.log_softmax(b_BTK)
      both_BT = ((jnp.exp(logp_a) - jnp.exp(logp_b)) * (logp_a - logp_b)).sum(-1)
    return jnp.vdot(both_BT, batch.weights)

  def _loss(self, logits_BTK: jax.Array, batch: Batch, smoothing: float) -> jax.Array:
    match self.objective:
      case "multi_label":
        wanted_BTK = batch.values * (1 - smoothing) + smoothing / 2
        positive, negative = jax.nn.log_sigmoid(logits_BTK), jax.nn.log_sigmoid(-logits_BTK)
        return -(wanted_BTK * positive + (1 - wanted_BTK) * negative).mean(-1)
      case "regression":
        return jnp.square(logits_BTK - batch.values).mean(-1)
      case "span":
        return _span_loss(logits_BTK, batch)
    logp_BTK = jax.nn.log_softmax(logits_BTK)
    wanted_BT = jnp.take_along_axis(logp_BTK, batch.targets[..., None], axis=-1)[..., 0]
    return -((1 - smoothing) * wanted_BT + smoothing * logp_BTK.mean(-1))


def answer_candidates(batch: Batch) -> jax.Array:
  """bool [B, T]: of what an answer may be made, the second text without its end_of_text."""
  second_BT = batch.token_types == 1
  return second_BT & jnp.pad(second_BT[:, 1:], ((0, 0), (0, 1)))


def _span_loss(logits_BTK: jax.Array, batch: Batch) -> jax.Array:
  """That of a token's segment, [B, T]."""
  candidate_BS = answer_candidates(batch)
  segments_BT = batch.segment_ids
  among_BTS = same_segment(segments_BT, segments_BT) & candidate_BS[:, None, :]
  logits_BKS = logits_BTK.swapaxes(1, 2)
  logits_BKTS = jnp.where(among_BTS[:, None], logits_BKS[:, :, None], _NEVER)
  normaliser_BKT = jax.nn.logsumexp(logits_BKTS, axis=-1)
  answer_BKS = batch.values.swapaxes(1, 2) * logits_BKS
  answer_BKT = jnp.einsum("bts,bks->bkt", among_BTS.astype(jnp.float32), answer_BKS)
  return (normaliser_BKT - answer_BKT).mean(1)
