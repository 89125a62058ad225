"""Prefill and the decoding loop, compiled once per batch shape, run a few tokens at a time.

Axes: B batch, T positions, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.devices.sharding import constrain
from gptjax.inference.sampling import Sampling, choose, penalise_repetition
from gptjax.model.gpt import GPT
from gptjax.model.stack import Cache, Encoded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
  """State of decoding a batch of rows.

  tokens: int32 [B, T], prompt and completion, left-aligned; lengths: int32 [B], how many are valid.
  logits: float32 [B, V] of the next token. finished: bool [B]. keys: one PRNG key a row [B].
  encoded: an encoder's output for the prompts, or None.
  """

  tokens: jax.Array
  lengths: jax.Array
  logits: jax.Array
  finished: jax.Array
  keys: jax.Array
  cache: Cache
  encoded: Encoded | None = None


@functools.partial(jax.jit, static_argnames=("graphdef", "prompt_length"))
def prefill(
  graphdef: nnx.GraphDef,
  params,
  tokens_BT: jax.Array,
  lengths_B: jax.Array,
  keys_B: jax.Array,
  *,
  prompt_length: int,
  source: tuple[jax.Array, jax.Array] | None = None,
) -> Decoding:
  """Reads the prompts, all within the first `prompt_length` columns of the row.

  `source` is an encoder's input, int32 tokens [B, S] and how many of each row are valid [B]. With
  visibility 'prefix' the prompt is the prefix.

  The padding after a short prompt fills slots of the cache that no query of the row sees before
  they are overwritten, so rows do not depend on each other.
  """
  model = nnx.merge(graphdef, params)
  B, T = tokens_BT.shape
  encoded = None
  if source is not None:
    valid_BS = jnp.arange(source[0].shape[1])[None] < source[1][:, None]
    encoded = model.encode(source[0], segment_ids_BS=valid_BS.astype(jnp.int32), for_decoding=True)
  hidden_BTD, cache = model.hidden(
    tokens_BT[:, :prompt_length],
    prefix_BS=(jnp.arange(T)[None] < lengths_B[:, None]).astype(jnp.int32),
    encoded=encoded,
    cache=model.empty_cache(B, T),
  )
  last_B1D = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)
  return Decoding(
    tokens=tokens_BT,
    lengths=lengths_B,
    logits=model.logits(last_B1D)[:, 0],
    finished=jnp.zeros(B, bool),
    keys=keys_B,
    cache=cache,
    encoded=encoded,
  )


@functools.partial(
  jax.jit,
  static_argnames=("graphdef", "steps", "sampling", "vocab_size"),
  donate_argnames=("decoding",),
)
def decode(
  graphdef: nnx.GraphDef,
  params,
  decoding: Decoding,
  limits_B: jax.Array,
  stops: jax.Array,
  *,
  steps: int,
  sampling: Sampling,
  vocab_size: int | None = None,
) -> Decoding:
  """Appends up to `steps` tokens to each row, until all rows are finished.

  A row finishes with one of the tokens `stops` (int32, one or an array), which is kept, or at its
  limit [B] of tokens. Only tokens below `vocab_size` are chosen: a model's embedding may have more
  rows than its tokenizer has tokens.
  """
  model = nnx.merge(graphdef, params)
  model.unstack()

  def proceed(carry):
    count, state = carry
    return (count < steps) & ~state.finished.all()

  def step(carry):
    count, state = carry
    return count + 1, append(
      model, state, limits_B, stops, sampling=sampling, vocab_size=vocab_size
    )

  state = jax.lax.while_loop(proceed, step, (jnp.int32(0), decoding))[1]
  # Replicated, as every host of a mesh reads these.
  return dataclasses.replace(
    state,
    tokens=constrain(state.tokens, None, None),
    lengths=constrain(state.lengths, None),
    finished=constrain(state.finished, None),
  )


def append(
  model: GPT,
  state: Decoding,
  limits_B: jax.Array,
  stops: jax.Array,
  *,
  sampling: Sampling,
  vocab_size: int | None = None,
) -> Decoding:
  """Appends one token to each row; arguments as for `decode`."""
  rows_B = jnp.arange(state.tokens.shape[0])
  logits_BV = state.logits[:, :vocab_size]
  if sampling.repetition_penalty != 1:
    valid_BT = jnp.arange(state.tokens.shape[1])[None] < state.lengths[:, None]
    logits_BV = penalise_repetition(logits_BV, state.tokens, valid_BT, sampling.repetition_penalty)
  # A row's randomness comes from its own key and length: the same alone as in any batch.
  keys_B = jax.vmap(jax.random.fold_in)(state.keys, state.lengths)
  next_B = choose(logits_BV, keys_B, sampling)
  # A finished row is computed along with the others; it writes behind its end or nowhere.
  tokens_BT = state.tokens.at[rows_B, state.lengths].set(next_B, mode="drop")
  hidden_B1D, cache = model.hidden(
    next_B[:, None],
    positions_BT=state.lengths[:, None],
    encoded=state.encoded,
    cache=state.cache,
  )
  lengths_B = jnp.where(state.finished, state.lengths, state.lengths + 1)
  stopped_B = (next_B[:, None] == jnp.ravel(stops)[None]).any(axis=1)
  return Decoding(
    tokens=tokens_BT,
    lengths=lengths_B,
    logits=model.logits(hidden_B1D)[:, 0],
    finished=state.finished | stopped_B | (lengths_B >= limits_B),
    keys=state.keys,
    cache=cache,
    encoded=state.encoded,
  )
