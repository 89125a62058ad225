"""Sampling of the next token from logits. Axes: B batch, T positions, V vocabulary."""

import dataclasses

import jax
import jax.numpy as jnp

from gptjax.errors import check_number

EXCLUDED = -jnp.inf


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Settings of sampling; the filters apply in this order.

  Attributes:
    repetition_penalty: divides positive logits and multiplies negative logits of tokens that are
      already in the row (Keskar et al. 2019, section 4.1). 1 is off.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: keeps the k likeliest tokens (Fan et al. 2018). 0 is off.
    top_p: keeps the fewest tokens whose probabilities reach p (Holtzman et al. 2020). 1 is off.
    min_p: keeps tokens at least this likely relative to the likeliest (Nguyen et al. 2024). 0 is
      off.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0

  def __post_init__(self):
    check_number("temperature", self.temperature, at_least=0)
    check_number("top_k", self.top_k, at_least=0)
    check_number("top_p", self.top_p, above=0, at_most=1)
    check_number("min_p", self.min_p, at_least=0, at_most=1)
    check_number("repetition_penalty", self.repetition_penalty, above=0)


def penalise_repetition(
  logits_BV: jax.Array, tokens_BT: jax.Array, valid_BT: jax.Array, penalty: float
) -> jax.Array:
  """Makes the valid tokens of each row less likely."""
  rows = jnp.arange(logits_BV.shape[0])[:, None]
  seen_BV = jnp.zeros(logits_BV.shape, bool).at[rows, tokens_BT].max(valid_BT)
  penalised = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
  return jnp.where(seen_BV, penalised, logits_BV)


def filter_logits(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
  """Applies temperature, top-k, top-p and min-p; excluded tokens become -inf.

  The likeliest token is always kept. `sampling.temperature` must not be 0.
  """
  logits_BV = logits_BV / sampling.temperature
  if sampling.top_k and sampling.top_k < logits_BV.shape[-1]:
    kth = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < kth, EXCLUDED, logits_BV)
  if sampling.top_p < 1:
    descending = -jnp.sort(-logits_BV, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.where(before < sampling.top_p, descending, jnp.inf)
    logits_BV = jnp.where(logits_BV < kept.min(-1, keepdims=True), EXCLUDED, logits_BV)
  if sampling.min_p > 0:
    floor = logits_BV.max(-1, keepdims=True) + jnp.log(sampling.min_p)
    logits_BV = jnp.where(logits_BV < floor, EXCLUDED, logits_BV)
  return logits_BV


def choose(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
  """Draws one token a row, int32 [B], each row with its own key."""
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  filtered = filter_logits(logits_BV, sampling)
  return jax.vmap(jax.random.categorical)(keys_B, filtered).astype(jnp.int32)
