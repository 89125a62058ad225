"""The choice of the next token from logits, each row by settings of its own.

Settings are arrays, so that a request with others compiles nothing. Axes: R rows, V vocabulary, C
candidates. Where many logits are reduced, V is J lines of L, rounded up: over either axis, a
processor reduces with vector instructions.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.devices.sharding import constrain
from gptjax.errors import check_number

EXCLUDED = -jnp.inf
# How often each function of the engine was compiled in this process.
compilations: collections.Counter[str] = collections.Counter()
LANES = 128
# Likeliest tokens that are told at a position, at most.
MAX_CANDIDATES = 20


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Settings of sampling; they apply in this order.

  Attributes:
    repetition_penalty: divides positive logits and multiplies negative logits of tokens that are
      already in the row (Keskar et al. 2019, section 4.1). 1 is off.
    presence_penalty: subtracted from the logits of tokens that the completion has.
    frequency_penalty: subtracted once for each time that the completion has the token.
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
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0

  def __post_init__(self):
    check_number("temperature", self.temperature, at_least=0)
    check_number("top_k", self.top_k, at_least=0)
    check_number("top_p", self.top_p, above=0, at_most=1)
    check_number("min_p", self.min_p, at_least=0, at_most=1)
    check_number("repetition_penalty", self.repetition_penalty, above=0)
    check_number("presence_penalty", self.presence_penalty)
    check_number("frequency_penalty", self.frequency_penalty)

  @property
  def looks_back(self) -> bool:
    """Whether the logits depend on the tokens before."""
    return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
  """`Sampling` of each row, float32 [R] (top_k int32), and what a row's randomness comes from: its
  seed, uint32 [R], and how many tokens are before the choice, int32 [R]."""

  temperature: np.ndarray
  top_k: np.ndarray
  top_p: np.ndarray
  min_p: np.ndarray
  repetition_penalty: np.ndarray
  seeds: np.ndarray
  lengths: np.ndarray

  @classmethod
  def of(
    cls, samplings: Sequence[Sampling], seeds: Sequence[int], lengths: Sequence[int]
  ) -> "Settings":
    def column(name: str, dtype: type = np.float32) -> np.ndarray:
      return np.array([getattr(sampling, name) for sampling in samplings], dtype)

    return cls(
      temperature=column("temperature"),
      top_k=column("top_k", np.int32),
      top_p=column("top_p"),
      min_p=column("min_p"),
      repetition_penalty=column("repetition_penalty"),
      seeds=np.array(seeds, np.uint32),
      lengths=np.array(lengths, np.int32),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adjustment:
  """Changes of the logits: what is added, float32 [R, V], and the tokens that are in the row, bool
  [R, V], for the repetition penalty."""

  added: np.ndarray
  seen: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
  """The token of each row, int32 [R], and where they are told, the logarithm of its probability
  before all settings, float32 [R], and both for the likeliest tokens, [R, C]. Probabilities are the
  model's, of all of its vocabulary."""

  tokens: jax.Array
  log_probs: jax.Array | None = None
  candidates: jax.Array | None = None
  candidate_log_probs: jax.Array | None = None


@functools.partial(jax.jit, static_argnames=("vocab_size", "candidates"))
def choose(
  logits: jax.Array,
  settings: Settings,
  adjustment: Adjustment | None = None,
  *,
  vocab_size: int,
  candidates: int | None = None,
) -> Choice:
  """Draws one token a row of the logits [..., V], whose leading axes are those of R. It is below
  `vocab_size`: an embedding may have more rows than the tokenizer has tokens. Log-probabilities are
  told if `candidates`, how many of the likeliest tokens are told, is not None."""
  compilations["choose"] += 1
  logits_RV = logits.reshape(-1, logits.shape[-1])

  def of_row(row):
    logits_V, settings, adjustment = row
    token = _draw(logits_V[:vocab_size], settings, adjustment)
    if candidates is None:
      return Choice(token)
    return _tell(logits_V, token, vocab_size, candidates)

  # Row after row, so that the sums of a row are made in one order however many there are, and a
  # row that takes the likeliest token need not sort the others.
  chosen = jax.lax.map(of_row, (logits_RV, settings, adjustment))
  # Replicated, as every host of a mesh reads these.
  return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), chosen)


def _tell(logits_V: jax.Array, token: jax.Array, vocab_size: int, candidates: int) -> Choice:
  log_probs_V = jax.nn.log_softmax(logits_V)[:vocab_size]
  best, indices = jax.lax.top_k(log_probs_V, candidates)
  return Choice(token, log_probs_V[token], indices, best)


def _draw(logits_V: jax.Array, settings: Settings, adjustment: Adjustment | None) -> jax.Array:
  if adjustment is not None:
    penalty = settings.repetition_penalty
    penalised_V = jnp.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
    logits_V = jnp.where(adjustment.seen, penalised_V, logits_V) + adjustment.added

  padding = (0, -logits_V.size % LANES)
  logits_JL = jnp.pad(logits_V, padding, constant_values=EXCLUDED).reshape(-1, LANES)

  def draw() -> jax.Array:
    # From the row's own seed and length: the same alone as in any batch.
    key = jax.random.fold_in(jax.random.key(settings.seeds), settings.lengths)
    return _race(filter_logits(logits_JL, settings), jax.random.key_data(key))

  is_greedy = settings.temperature == 0
  return jax.lax.cond(is_greedy, lambda: _likeliest(logits_JL), draw).astype(jnp.int32)


def _likeliest(scores_JL: jax.Array) -> jax.Array:
  """The place of the first of the largest."""
  line = scores_JL.max(1).argmax()
  return line * LANES + scores_JL[line].argmax()


def _race(logits_JL: jax.Array, words: jax.Array) -> jax.Array:
  """Draws a token: the first to finish, if each takes a time drawn from an exponential distribution
  whose rate is the token's probability.

  The times are fixed by the two uint32 words of a key, so that logits that are nearly the same draw
  the same token. (In logarithms it is the Gumbel-max trick: Maddison et al. 2014, section 3.)
  """
  # JAX's own random bits take most of a step of a small model on a CPU.
  bits_V = jnp.arange(logits_JL.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
  for word in words:
    bits_V = _mix(bits_V ^ word)
  uniform_V = ((bits_V >> 9).astype(jnp.float32) + 0.5) * 2**-23
  return _likeliest(_exponentials(logits_JL) / -jnp.log(uniform_V).reshape(logits_JL.shape))


def _mix(bits: jax.Array) -> jax.Array:
  """Changes each of 32 bits by all others: the last steps of MurmurHash3 (Appleby 2011)."""
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
  bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
  return bits ^ (bits >> 16)


def filter_logits(logits: jax.Array, settings: Settings) -> jax.Array:
  """Applies temperature, top-k, top-p and min-p to logits of any shape.

  Excluded tokens become -inf. The likeliest token is always kept, and of tokens that are as likely
  all or none. The temperature must not be 0.
  """
  logits = logits / settings.temperature

  def top_k(logits: jax.Array) -> jax.Array:
    return _keep_above(logits, lambda above: above.sum(0).sum() < settings.top_k)

  def top_p(logits: jax.Array) -> jax.Array:
    weights = _exponentials(logits)
    most = settings.top_p * weights.sum(0).sum()
    return _keep_above(logits, lambda above: jnp.where(above, weights, 0).sum(0).sum() < most)

  def same(logits: jax.Array) -> jax.Array:
    return logits

  logits = jax.lax.cond(settings.top_k > 0, top_k, same, logits)
  logits = jax.lax.cond(settings.top_p < 1, top_p, same, logits)
  floor = logits.max() + jnp.log(settings.min_p)
  return jnp.where(logits < floor, EXCLUDED, logits)


def _exponentials(logits: jax.Array) -> jax.Array:
  """Probabilities but for a common factor."""
  return jnp.exp(logits - logits.max(0).max())


def _keep_above(logits: jax.Array, has_room) -> jax.Array:
  """Keeps each logit for whose larger ones, bool in the shape of the logits, `has_room` is true.

  The smallest such value is found bit by bit, which is faster than sorting the vocabulary.
  """
  bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
  # Integers in the order of the floats.
  order = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)

  def halve(_, bounds):
    low, high = bounds  # has_room(order > high), but not (order > low).
    middle = (low >> 1) + (high >> 1) + (low & high & 1)
    fits = has_room(order > middle)
    return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

  _, smallest = jax.lax.fori_loop(0, 33, halve, (jnp.int32(-(2**31)), order.max(0).max()))
  return jnp.where(order < smallest, EXCLUDED, logits)


@functools.partial(jax.jit, static_argnames=("vocab_size", "candidates"))
def score_tokens(
  logits_RV: jax.Array, tokens_R: np.ndarray, *, vocab_size: int, candidates: int = 0
) -> Choice:
  """Tells of given tokens what `choose` tells of those that it draws."""

  def of_row(row):
    return _tell(*row, vocab_size, candidates)

  scored = jax.lax.map(of_row, (logits_RV, tokens_R))
  return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), scored)
