"""Cross-entropy that never holds the logits of all tokens in memory.

Axes: B batch, T positions, C tokens of a chunk, D width, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.devices import sharding
from gptjax.objectives.head import LocalHead, scan_chunks, sum_over_rows


class LossSum(NamedTuple):
  """Weighted sums over tokens: float32 scalars, in nats.

  `total`, the `cross_entropy` plus the z-loss, is minimised. Only it has a gradient.
  """

  total: jax.Array
  cross_entropy: jax.Array


class _Options(NamedTuple):
  axes: tuple[str, str]
  cap: float
  z_loss: float


def cross_entropy(
  x_BTD: jax.Array,
  kernel: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  axes: tuple[str, str],
  bias_V: jax.Array | None = None,
  cap: float = 0.0,
  z_loss: float = 0.0,
) -> LossSum:
  """Sums -log softmax(x kernel + bias)[target] over the tokens, chunk by chunk.

  The gradients of a chunk are made at once, while its logits are in memory; the backward pass only
  scales them. (A token's loss is used only in the sum, so its cotangent is its weight.)

  Args:
    x_BTD: hidden states; the products have their dtype, sums and softmax are float32.
    kernel: float32 [D, V] or [V, D], as `axes` says.
    targets_BT: int32.
    weights_BT: float32, weight of each token.
    axes: ('embed', 'vocab') or ('vocab', 'embed').
    bias_V: float32.
    cap: soft cap of the logits; 0 is none.
    z_loss: factor of log(sum exp(logits))^2, which keeps the normaliser near 1 (Chowdhery et al.
      2022, arXiv:2204.02311, section 5).
  """
  options = _Options(axes, cap, z_loss)
  return LossSum(*_loss(x_BTD, (kernel, bias_V), targets_BT, weights_BT, options))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(x_BTD, head, targets_BT, weights_BT, options: _Options):
  loss = functools.partial(_local_loss, options=options, gradients=False)
  return _per_shard(loss, options, [(), ()])(x_BTD, *head, targets_BT, weights_BT)


def _loss_forward(x_BTD, head, targets_BT, weights_BT, options: _Options):
  loss = functools.partial(_local_loss, options=options, gradients=True)
  out_axes = [(), (), ("batch", "time", None), options.axes, ("vocab",)]
  total, plain, dx_BTD, *dhead = _per_shard(loss, options, out_axes)(
    x_BTD, *head, targets_BT, weights_BT
  )
  return (total, plain), (dx_BTD, tuple(dhead))


def _loss_backward(options: _Options, residuals, cotangents):
  dx_BTD, dhead = residuals
  scale, _ = cotangents
  dhead = jax.tree.map(lambda gradient: gradient * scale, dhead)
  return (dx_BTD * scale).astype(dx_BTD.dtype), dhead, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _per_shard(function, options: _Options, out_axes):
  tokens = ("batch", "time")
  in_axes = [(*tokens, None), options.axes, ("vocab",), tokens, tokens]
  return sharding.per_shard(function, in_axes, out_axes)


def _local_loss(
  x_BTD, kernel, bias_V, targets_BT, weights_BT, *, options: _Options, gradients: bool
):
  """The loss of one device's tokens over its part of the vocabulary."""
  head = LocalHead(kernel, bias_V, options.axes, options.cap, x_BTD.dtype)

  def chunk_loss(dhead, chunk):
    x_CD, targets_C, weights_C = chunk
    logits_CV = head.logits(x_CD)
    exp_CV, sum_C, normaliser_C = head.exponentials(logits_CV)
    is_target_CV = head.is_target(targets_C)
    target_C = head.add(jnp.where(is_target_CV, logits_CV, 0.0).sum(axis=-1))
    plain = jnp.vdot(weights_C, normaliser_C - target_C)
    total = plain + options.z_loss * jnp.vdot(weights_C, jnp.square(normaliser_C))
    if not gradients:
      return dhead, (total, plain)
    pull_C = weights_C * (1 + 2 * options.z_loss * normaliser_C) / sum_C
    dlogits_CV = exp_CV * pull_C[:, None] - jnp.where(is_target_CV, weights_C[:, None], 0.0)
    dhead, dx_CD = head.pull(dhead, dlogits_CV, logits_CV, x_CD)
    return dhead, (total, plain, dx_CD)

  dhead = head.no_gradient() if gradients else None
  tokens = (x_BTD, targets_BT, weights_BT)
  dhead, results = scan_chunks(chunk_loss, dhead, tokens, head.size)
  total, plain = (sum_over_rows(jnp.sum(part)) for part in results[:2])
  if not gradients:
    return total, plain
  return total, plain, results[2].reshape(x_BTD.shape), *head.over_rows(dhead)
