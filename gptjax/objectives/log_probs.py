"""The log probability of each target, and the entropy of what it was drawn from, without holding
the logits of all tokens in memory.

Axes: B batch, T positions, C tokens of a chunk, D width, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.devices import sharding
from gptjax.objectives.head import LocalHead, scan_chunks


class TokenScores(NamedTuple):
  """Of each token [B, T], float32, in nats.

  Attributes:
    log_prob: the log probability of the target.
    entropy: of the distribution over the vocabulary.
  """

  log_prob: jax.Array
  entropy: jax.Array


class _Options(NamedTuple):
  axes: tuple[str, str]
  cap: float
  temperature: float


def token_log_probs(
  x_BTD: jax.Array,
  kernel: jax.Array,
  targets_BT: jax.Array,
  *,
  axes: tuple[str, str],
  bias_V: jax.Array | None = None,
  cap: float = 0.0,
  temperature: float = 1.0,
) -> TokenScores:
  """log softmax(logits / temperature) at the targets, logits = x kernel + bias, chunk by chunk.

  Both results have gradients, any for each token: the backward pass makes the logits of a chunk
  again. (`cross_entropy`, which knows that its tokens are added up, makes them once.)

  Args:
    x_BTD: hidden states; the products have their dtype, sums and softmax are float32.
    kernel: float32 [D, V] or [V, D], as `axes` says.
    targets_BT: int32.
    axes: ('embed', 'vocab') or ('vocab', 'embed').
    bias_V: float32.
    cap: soft cap of the logits; 0 is none.
    temperature: above 0, what the logits are divided by, as when the targets were drawn.
  """
  options = _Options(axes, cap, temperature)
  return TokenScores(*_scores(x_BTD, (kernel, bias_V), targets_BT, options))


_TOKENS = ("batch", "time")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scores(x_BTD, head, targets_BT, options: _Options):
  return _scores_forward(x_BTD, head, targets_BT, options)[0]


def _scores_forward(x_BTD, head, targets_BT, options: _Options):
  score = functools.partial(_local_scores, options=options)
  in_axes = [(*_TOKENS, None), options.axes, ("vocab",), _TOKENS]
  found = sharding.per_shard(score, in_axes, [_TOKENS] * 3)(x_BTD, *head, targets_BT)
  log_prob_BT, entropy_BT, normaliser_BT = found
  return (log_prob_BT, entropy_BT), (x_BTD, head, targets_BT, entropy_BT, normaliser_BT)


def _scores_backward(options: _Options, residuals, cotangents):
  x_BTD, head, *of_tokens = residuals
  pull = functools.partial(_local_pull, options=options)
  in_axes = [(*_TOKENS, None), options.axes, ("vocab",), *[_TOKENS] * 5]
  out_axes = [(*_TOKENS, None), options.axes, ("vocab",)]
  dx_BTD, *dhead = sharding.per_shard(pull, in_axes, out_axes)(
    x_BTD, *head, *of_tokens, *cotangents
  )
  return dx_BTD, tuple(dhead), None


_scores.defvjp(_scores_forward, _scores_backward)


def _local_scores(x_BTD, kernel, bias_V, targets_BT, *, options: _Options):
  """Of one device's tokens over its part of the vocabulary; also log sum exp(logits)."""
  head = LocalHead(kernel, bias_V, options.axes, options.cap, x_BTD.dtype)

  def score_chunk(state, chunk):
    x_CD, targets_C = chunk
    logits_CV = head.logits(x_CD) / options.temperature
    exp_CV, sum_C, normaliser_C = head.exponentials(logits_CV)
    target_C = head.add(jnp.where(head.is_target(targets_C), logits_CV, 0.0).sum(axis=-1))
    entropy_C = normaliser_C - head.add((exp_CV * logits_CV).sum(axis=-1)) / sum_C
    return state, (target_C - normaliser_C, entropy_C, normaliser_C)

  _, found = scan_chunks(score_chunk, None, (x_BTD, targets_BT), head.size)
  return tuple(one.reshape(targets_BT.shape) for one in found)


def _local_pull(
  x_BTD, kernel, bias_V, targets_BT, entropy_BT, normaliser_BT, dlog_prob_BT, dentropy_BT, *,
  options: _Options,
):  # fmt: skip
  """The gradients of one device's tokens, and of its part of the head."""
  head = LocalHead(kernel, bias_V, options.axes, options.cap, x_BTD.dtype)

  def pull_chunk(dhead, chunk):
    x_CD, targets_C, entropy_C, normaliser_C, dlog_prob_C, dentropy_C = chunk
    logits_CV = head.logits(x_CD)
    logp_CV = logits_CV / options.temperature - normaliser_C[:, None]
    # d log p[target] = is_target - p, and d entropy = -p (log p + entropy).
    pull_CV = dlog_prob_C[:, None] + dentropy_C[:, None] * (logp_CV + entropy_C[:, None])
    direct_CV = jnp.where(head.is_target(targets_C), dlog_prob_C[:, None], 0.0)
    dlogits_CV = (direct_CV - jnp.exp(logp_CV) * pull_CV) / options.temperature
    return head.pull(dhead, dlogits_CV, logits_CV, x_CD)

  tokens = (x_BTD, targets_BT, entropy_BT, normaliser_BT, dlog_prob_BT, dentropy_BT)
  dhead, dx = scan_chunks(pull_chunk, head.no_gradient(), tokens, head.size)
  return dx.reshape(x_BTD.shape), *head.over_rows(dhead)
