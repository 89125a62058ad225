"""Cross-entropy that never holds the logits of all tokens in memory.

Axes: B batch, T positions, C tokens of a chunk, D width, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.devices import sharding
from gptjax.model.layers import soft_cap

# Most bytes of float32 logits that a device holds at a time.
MAX_LOGIT_BYTES = 2**30


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
  B, T, D = x_BTD.shape
  dtype, vocab_axis = x_BTD.dtype, options.axes.index("vocab")
  over_rows, over_vocab = sharding.split_names("batch", "time"), sharding.split_names("vocab")
  over_width = sharding.split_names("embed")
  kernel = kernel.astype(dtype)
  if over_width:
    kernel = jax.lax.all_gather(kernel, over_width, axis=1 - vocab_axis, tiled=True)
  V = kernel.shape[vocab_axis]
  first = jax.lax.axis_index(over_vocab) * V if over_vocab else 0

  def sum_over(x, names):
    return jax.lax.psum(x, names) if names else x

  def chunk_loss(dhead, chunk):
    x_CD, targets_C, weights_C = chunk
    raw_CV = jax.lax.dot_general(
      x_CD, kernel, (((1,), (1 - vocab_axis,)), ((), ())), preferred_element_type=jnp.float32
    )
    if bias_V is not None:
      raw_CV += bias_V[None]
    logits_CV = soft_cap(raw_CV, options.cap)
    top_C = logits_CV.max(axis=-1)
    if over_vocab:
      top_C = jax.lax.pmax(top_C, over_vocab)
    exp_CV = jnp.exp(logits_CV - top_C[:, None])
    sum_C = sum_over(exp_CV.sum(axis=-1), over_vocab)
    normaliser_C = jnp.log(sum_C) + top_C
    is_target_CV = (targets_C - first)[:, None] == jnp.arange(V)[None, :]
    target_C = sum_over(jnp.where(is_target_CV, logits_CV, 0.0).sum(axis=-1), over_vocab)
    plain = jnp.vdot(weights_C, normaliser_C - target_C)
    total = plain + options.z_loss * jnp.vdot(weights_C, jnp.square(normaliser_C))
    if not gradients:
      return dhead, (total, plain)
    pull_C = weights_C * (1 + 2 * options.z_loss * normaliser_C) / sum_C
    dlogits_CV = exp_CV * pull_C[:, None] - jnp.where(is_target_CV, weights_C[:, None], 0.0)
    if options.cap:
      dlogits_CV *= 1 - jnp.square(logits_CV / options.cap)
    dbias_V = None if bias_V is None else dhead[1] + dlogits_CV.sum(axis=0)
    dlogits_CV = dlogits_CV.astype(dtype)
    dx_CD = jax.lax.dot_general(dlogits_CV, kernel, (((1,), (vocab_axis,)), ((), ())))
    pair = (dlogits_CV, x_CD) if vocab_axis == 0 else (x_CD, dlogits_CV)
    added = jax.lax.dot_general(*pair, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return (dhead[0] + added, dbias_V), (total, plain, sum_over(dx_CD, over_vocab))

  chunks = count_chunks(B * T, V)
  chunked = jax.tree.map(
    lambda leaf: leaf.reshape(chunks, B * T // chunks, *leaf.shape[2:]),
    (x_BTD, targets_BT, weights_BT),
  )
  dhead = None
  if gradients:
    dhead = (
      jnp.zeros(kernel.shape, jnp.float32),
      None if bias_V is None else jnp.zeros(V, jnp.float32),
    )
  if chunks == 1:
    dhead, results = chunk_loss(dhead, jax.tree.map(lambda leaf: leaf[0], chunked))
  else:
    dhead, results = jax.lax.scan(chunk_loss, dhead, chunked)
  total, plain = (sum_over(jnp.sum(part), over_rows) for part in results[:2])
  if not gradients:
    return total, plain
  dkernel, dbias_V = dhead
  dkernel = sharding.sum_scatter(dkernel, options.axes, over_rows)
  dbias_V = None if dbias_V is None else sum_over(dbias_V, over_rows)
  return total, plain, results[2].reshape(B, T, D), dkernel, dbias_V


def count_chunks(tokens: int, vocab: int) -> int:
  """The fewest equal chunks whose logits are at most MAX_LOGIT_BYTES."""
  return next(
    chunks
    for chunks in range(1, tokens + 1)
    if tokens % chunks == 0
    and (tokens // chunks * vocab * 4 <= MAX_LOGIT_BYTES or chunks == tokens)
  )
