"""How far a student's distribution of the next token is from its teacher's, without holding the
logits of all tokens in memory.

Axes: B batch, T positions, C tokens of a chunk, D width of the student, E width of the teacher,
V vocabulary or labels.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.data.batch import Batch
from gptjax.devices import sharding
from gptjax.model.gpt import GPT
from gptjax.objectives.head import LocalHead, scan_chunks, sum_over_rows

# Of p, the teacher's probabilities, and q, the student's: KL(p, q), KL(q, p), and the generalised
# Jensen-Shannon divergence beta KL(p, m) + (1 - beta) KL(q, m), where m = beta p + (1 - beta) q
# (Agarwal et al. 2023, arXiv:2306.13649, section 2).
DIVERGENCES = ("forward_kl", "reverse_kl", "js")


class Measure(NamedTuple):
  """What is minimised: (1 - alpha) cross-entropy + alpha temperature^2 divergence + z-loss.

  Attributes:
    alpha: share of the divergence.
    temperature: what the logits of both models are divided by before the divergence. Its square
      keeps the size of the gradients (Hinton et al. 2015, arXiv:1503.02531, section 2).
    divergence: one of `DIVERGENCES`.
    beta: the teacher's part of the mixture in 'js'.
    z_loss: as in `cross_entropy`.
  """

  alpha: float = 1.0
  temperature: float = 1.0
  divergence: str = "forward_kl"
  beta: float = 0.5
  z_loss: float = 0.0


class Comparison(NamedTuple):
  """Weighted sums over tokens, float32 scalars. Only `total`, which is minimised, has a gradient.

  Attributes:
    cross_entropy: of the targets, in nats.
    divergence: at the temperature, in nats.
    agreement: the tokens whose likeliest successor is the same for both models.
  """

  total: jax.Array
  cross_entropy: jax.Array
  divergence: jax.Array
  agreement: jax.Array


class _Static(NamedTuple):
  """The measure, and of each head the logical axes of its kernel and the cap of its logits."""

  measure: Measure
  axes: tuple[str, str]
  cap: float
  their_axes: tuple[str, str]
  their_cap: float


def diverge(
  logp: jax.Array,
  logq: jax.Array,
  measure: Measure,
  add: Callable[[jax.Array], jax.Array] = lambda sums: sums,
) -> tuple[jax.Array, jax.Array]:
  """The divergence of each token, [...], and its gradient by the student's logits, [..., V].

  Args:
    logp: log probabilities of the teacher, [..., V], float32.
    logq: those of the student.
    measure: the kind, and its beta.
    add: adds up sums over the parts of a vocabulary that is split over devices.
  """
  p, q = jnp.exp(logp), jnp.exp(logq)
  if measure.divergence == "forward_kl":
    return add((p * (logp - logq)).sum(-1)), q - p
  # `pull` is the gradient by q, up to a constant, which the softmax does not see.
  if measure.divergence == "reverse_kl":
    pull = logq - logp
    value = mean = add((q * pull).sum(-1))
  else:
    beta = measure.beta
    logm = jnp.logaddexp(logp + jnp.log(beta), logq + jnp.log1p(-beta))
    pull = (1 - beta) * (logq - logm)
    mean = add((q * pull).sum(-1))
    value = beta * add((p * (logp - logm)).sum(-1)) + mean
  return value, q * (pull - mean[..., None])


def compare(
  model: GPT, x_BTD: jax.Array, y_BTE: jax.Array, batch: Batch, measure: Measure
) -> Comparison:
  """Compares a language model with its `second` one, of the same vocabulary, chunk by chunk.

  As in `cross_entropy`, the gradients of a chunk are made while its logits are in memory. Products
  have the dtype of the hidden states; sums and softmax are float32. The second model has no
  gradient.

  Args:
    model: the model.
    x_BTD: its hidden states.
    y_BTE: those of the second model.
    batch: has the targets and their weights.
    measure: what is minimised.
  """
  arrays, static = [], [measure]
  for one in (model, model.second):
    kernel, axes = one.output_kernel()
    arrays.append((kernel, None if one.head_bias is None else one.head_bias[...]))
    static += [axes, one.config.head.soft_cap]
  features = (model.features(x_BTD), model.second.features(y_BTE))
  found = _compare(*features, *arrays, batch.targets, batch.weights, _Static(*static))
  return Comparison(*found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _compare(x_BTD, y_BTE, head, their_head, targets_BT, weights_BT, static: _Static):
  run = _per_shard(static, [()] * 4, gradients=False)
  return run(x_BTD, y_BTE, *head, *their_head, targets_BT, weights_BT)


def _compare_forward(x_BTD, y_BTE, head, their_head, targets_BT, weights_BT, static: _Static):
  of_gradients = [("batch", "time", None), static.axes, ("vocab",)]
  run = _per_shard(static, [()] * 4 + of_gradients, gradients=True)
  *sums, dx_BTD, dkernel, dbias_V = run(x_BTD, y_BTE, *head, *their_head, targets_BT, weights_BT)
  return tuple(sums), (dx_BTD, (dkernel, dbias_V))


def _compare_backward(static: _Static, residuals, cotangents):
  dx_BTD, dhead = residuals
  dhead = jax.tree.map(lambda gradient: gradient * cotangents[0], dhead)
  return (dx_BTD * cotangents[0]).astype(dx_BTD.dtype), None, dhead, None, None, None


_compare.defvjp(_compare_forward, _compare_backward)


def _per_shard(static: _Static, out_axes, *, gradients: bool):
  tokens = ("batch", "time")
  heads = [static.axes, ("vocab",), static.their_axes, ("vocab",)]
  in_axes = [(*tokens, None)] * 2 + heads + [tokens] * 2
  local = functools.partial(_local, static=static, gradients=gradients)
  return sharding.per_shard(local, in_axes, out_axes)


def _local(*arrays, static: _Static, gradients: bool):
  """The sums over one device's tokens and its part of the vocabulary, and their gradients."""
  x_BTD, y_BTE, kernel, bias_V, their_kernel, their_bias_V, targets_BT, weights_BT = arrays
  measure = static.measure
  head = LocalHead(kernel, bias_V, static.axes, static.cap, x_BTD.dtype)
  their_head = LocalHead(
    their_kernel, their_bias_V, static.their_axes, static.their_cap, y_BTE.dtype
  )
  hard, soft = 1 - measure.alpha, measure.alpha * measure.temperature

  def compare_chunk(dhead, chunk):
    x_CD, y_CE, targets_C, weights_C = chunk
    logits_CV, theirs_CV = head.logits(x_CD), their_head.logits(y_CE)
    plain_CV, normaliser_C = head.log_softmax(logits_CV)
    is_target_CV = head.is_target(targets_C)
    loss_C = -head.add(jnp.where(is_target_CV, plain_CV, 0.0).sum(axis=-1))
    logp_CV, logq_CV = (
      head.log_softmax(x / measure.temperature)[0] for x in (theirs_CV, logits_CV)
    )
    apart_C, dapart_CV = diverge(logp_CV, logq_CV, measure, head.add)
    minimised_C = hard * loss_C + soft * measure.temperature * apart_C
    minimised_C += measure.z_loss * jnp.square(normaliser_C)
    agrees_C = (head.likeliest(logits_CV) == head.likeliest(theirs_CV)).astype(jnp.float32)
    sums = [jnp.vdot(weights_C, x_C) for x_C in (minimised_C, loss_C, apart_C, agrees_C)]
    if not gradients:
      return dhead, sums
    pull_C = hard + 2 * measure.z_loss * normaliser_C
    dlogits_CV = jnp.exp(plain_CV) * pull_C[:, None] - jnp.where(is_target_CV, hard, 0.0)
    dlogits_CV = (dlogits_CV + soft * dapart_CV) * weights_C[:, None]
    dhead, dx_CD = head.pull(dhead, dlogits_CV, logits_CV, x_CD)
    return dhead, [*sums, dx_CD]

  dhead = head.no_gradient() if gradients else None
  tokens = (x_BTD, y_BTE, targets_BT, weights_BT)
  # The logits of both models.
  dhead, results = scan_chunks(compare_chunk, dhead, tokens, 2 * head.size)
  sums = tuple(sum_over_rows(jnp.sum(part)) for part in results[:4])
  return (*sums, results[4].reshape(x_BTD.shape), *head.over_rows(dhead)) if gradients else sums
