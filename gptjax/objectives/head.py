"""The output projection of a chunk of tokens, on one device: what losses share that never hold the
logits of all tokens in memory.

Axes: C tokens of a chunk, D width, V vocabulary, or one device's part of it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.devices import sharding
from gptjax.model.layers import soft_cap

# Most bytes of float32 logits that a device holds at a time.
MAX_LOGIT_BYTES = 2**30
# The gradients of a head: of its kernel, float32, and of its bias [V], if it has one.
HeadGradient = tuple[jax.Array, jax.Array | None]


class LocalHead:
  """A device's part of a head, its whole width, within `sharding.per_shard`.

  Products have a dtype of their own; sums and softmax are float32.

  Attributes:
    size: tokens of the part of the vocabulary.
    first: the number of the first one.
  """

  def __init__(
    self,
    kernel: jax.Array,
    bias_V: jax.Array | None,
    axes: tuple[str, str],
    cap: float,
    dtype: jax.typing.DTypeLike,
  ):
    """Gathers the width of the kernel.

    Args:
      kernel: float32 [D, V] or [V, D], as `axes` says.
      bias_V: float32.
      axes: ('embed', 'vocab') or ('vocab', 'embed').
      cap: soft cap of the logits; 0 is none.
      dtype: of the products.
    """
    self.axes, self.cap, self.bias_V, self.dtype = axes, cap, bias_V, dtype
    self._vocab_axis = axes.index("vocab")
    self._over_vocab = sharding.split_names("vocab")
    kernel = kernel.astype(dtype)
    if over_width := sharding.split_names("embed"):
      axis = 1 - self._vocab_axis
      kernel = jax.lax.all_gather(kernel, over_width, axis=axis, tiled=True)
    self.kernel, self.size = kernel, kernel.shape[self._vocab_axis]
    self.first = jax.lax.axis_index(self._over_vocab) * self.size if self._over_vocab else 0

  def add(self, sums: jax.Array) -> jax.Array:
    """Adds up sums over the parts of the vocabulary."""
    return jax.lax.psum(sums, self._over_vocab) if self._over_vocab else sums

  def logits(self, x_CD: jax.Array) -> jax.Array:
    """Hidden states -> logits [C, V], float32."""
    contracted = (((1,), (1 - self._vocab_axis,)), ((), ()))
    raw_CV = jax.lax.dot_general(x_CD, self.kernel, contracted, preferred_element_type=jnp.float32)
    if self.bias_V is not None:
      raw_CV += self.bias_V[None]
    return soft_cap(raw_CV, self.cap)

  def exponentials(self, logits_CV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """exp(logits - their largest) [C, V]; its sum, and log sum exp(logits), over the whole
    vocabulary, [C]."""
    top_C = logits_CV.max(axis=-1)
    if self._over_vocab:
      top_C = jax.lax.pmax(top_C, self._over_vocab)
    exp_CV = jnp.exp(logits_CV - top_C[:, None])
    sum_C = self.add(exp_CV.sum(axis=-1))
    return exp_CV, sum_C, jnp.log(sum_C) + top_C

  def log_softmax(self, logits_CV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log probabilities [C, V], and the logarithm of what they are normalised by, [C]."""
    normaliser_C = self.exponentials(logits_CV)[2]
    return logits_CV - normaliser_C[:, None], normaliser_C

  def is_target(self, targets_C: jax.Array) -> jax.Array:
    """Where in the part of the vocabulary the targets are: booleans [C, V]."""
    return (targets_C - self.first)[:, None] == jnp.arange(self.size)[None, :]

  def likeliest(self, logits_CV: jax.Array) -> jax.Array:
    """The tokens with the largest logits, the first of several, [C]."""
    top_C, token_C = logits_CV.max(axis=-1), self.first + logits_CV.argmax(axis=-1)
    if not self._over_vocab:
      return token_C
    is_largest_C = top_C == jax.lax.pmax(top_C, self._over_vocab)
    tokens_C = jnp.where(is_largest_C, token_C, jnp.iinfo(jnp.int32).max)
    return jax.lax.pmin(tokens_C, self._over_vocab)

  def no_gradient(self) -> HeadGradient:
    """Zeros, to which `pull` adds."""
    bias_V = None if self.bias_V is None else jnp.zeros(self.size, jnp.float32)
    return jnp.zeros(self.kernel.shape, jnp.float32), bias_V

  def pull(
    self, dhead: HeadGradient, dlogits_CV: jax.Array, logits_CV: jax.Array, x_CD: jax.Array
  ) -> tuple[HeadGradient, jax.Array]:
    """The gradients of a chunk by those of its logits: of the head, added to `dhead`, and of x."""
    if self.cap:
      dlogits_CV *= 1 - jnp.square(logits_CV / self.cap)
    dbias_V = None if self.bias_V is None else dhead[1] + dlogits_CV.sum(axis=0)
    dlogits_CV = dlogits_CV.astype(self.dtype)
    dx_CD = jax.lax.dot_general(dlogits_CV, self.kernel, (((1,), (self._vocab_axis,)), ((), ())))
    pair = (dlogits_CV, x_CD) if self._vocab_axis == 0 else (x_CD, dlogits_CV)
    added = jax.lax.dot_general(*pair, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return (dhead[0] + added, dbias_V), self.add(dx_CD)

  def over_rows(self, dhead: HeadGradient) -> HeadGradient:
    """The gradients of all devices' rows, the kernel's split as the kernel is."""
    dkernel, dbias_V = dhead
    dkernel = sharding.sum_scatter(dkernel, self.axes, rows())
    return dkernel, None if dbias_V is None else sum_over_rows(dbias_V)


def rows() -> tuple[str, ...]:
  """The axes of the mesh over which tokens are split."""
  return sharding.split_names("batch", "time")


def sum_over_rows(x: jax.Array) -> jax.Array:
  return jax.lax.psum(x, rows()) if rows() else x


def scan_chunks(
  run: Callable[[Any, Any], tuple[Any, Any]], state: Any, tokens: Any, vocab: int
) -> tuple[Any, Any]:
  """Runs `run(state, chunk)`, as `jax.lax.scan` does, over arrays [B, T, ...] in chunks of tokens.

  Args:
    run: takes and returns the state, and for a chunk returns arrays [C, ...] or of any shape.
    state: the first state.
    tokens: a tree of arrays [B, T, ...].
    vocab: numbers that a token has in memory.

  Returns:
    The last state, and what was returned for the chunks, stacked; for one chunk as it is.
  """
  B, T = jax.tree.leaves(tokens)[0].shape[:2]
  chunks = count_chunks(B * T, vocab)
  chunked = jax.tree.map(
    lambda leaf: leaf.reshape(chunks, B * T // chunks, *leaf.shape[2:]),
    tokens,
  )
  if chunks == 1:
    return run(state, jax.tree.map(lambda leaf: leaf[0], chunked))
  return jax.lax.scan(run, state, chunked)


def count_chunks(tokens: int, vocab: int) -> int:
  """The fewest equal chunks whose logits are at most MAX_LOGIT_BYTES."""
  return next(
    chunks
    for chunks in range(1, tokens + 1)
    if tokens % chunks == 0
    and (tokens // chunks * vocab * 4 <= MAX_LOGIT_BYTES or chunks == tokens)
  )
