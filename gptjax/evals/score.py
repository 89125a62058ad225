"""Log-likelihoods of continuations after their contexts, in batches.

Axes: B rows, T positions, C scored positions, K continuations of a row, D width.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from tqdm import tqdm

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.inference.lengths import round_up, rows_of_batch
from gptjax.model.gpt import GPT

Tokens = Sequence[int]
Pair = tuple[Tokens, Tokens]  # A context and its continuation.

# Most bytes of float32 logits held at a time.
_MAX_LOGIT_BYTES = 2**28
_LENGTH_MULTIPLE = 32


@dataclasses.dataclass(frozen=True)
class Score:
  """Score of a continuation. log_likelihood: sum over its tokens, in nats. greedy: whether each
  token is the likeliest in its position."""

  log_likelihood: float
  tokens: int
  greedy: bool


def score(
  model: GPT,
  pairs: Sequence[Pair],
  *,
  batch_size: int = 8,
  max_length: int | None = None,
  progress: bool = False,
) -> list[Score]:
  """Scores each continuation after its context; a score does not depend on the rest of the batch.

  Rows of similar length share a batch shape, and so a compilation. Continuations of one context
  that differ only in their last token, such as labels of one token, share a row.

  Args:
    model: causal, or with visibility 'prefix', the context being the prefix.
    pairs: ids of (context, continuation), neither empty.
    batch_size: most rows of a batch.
    max_length: tokens that the model reads at a time, by default its `max_positions`. Longer pairs
      lose the start of the context.
    progress: show a bar, on stderr.

  Raises:
    UserError: the model sees the future or has an encoder, a context or a continuation is empty,
      or a continuation is longer than `max_length`.
  """
  max_length = _decoder_length(model, max_length)
  warn_of_cuts([len(context) + len(after) - 1 for context, after in pairs], max_length)
  rows: dict[tuple[tuple[int, ...], int], list[int]] = {}
  for index, (context, continuation) in enumerate(pairs):
    if not len(context) or not len(continuation):
      raise UserError("a context or a continuation to score has no tokens; each needs at least 1.")
    if len(continuation) > max_length:
      raise UserError(
        f"a continuation of {len(continuation)} tokens does not fit the {max_length} that the "
        "model reads at a time."
      )
    inputs = tuple([*context, *continuation][-max_length - 1 : -1])
    rows.setdefault((inputs, len(continuation)), []).append(index)

  buckets: dict[tuple[int, int], list] = {}
  for (inputs, count), indices in rows.items():
    # Short lengths, such as those of labels, to a power of two.
    C = 1 << (count - 1).bit_length()
    C = C if C <= _LENGTH_MULTIPLE else round_up(count, _LENGTH_MULTIPLE)
    T = round_up(max(len(inputs), C), _LENGTH_MULTIPLE, max_length)
    buckets.setdefault((T, min(C, T)), []).append((inputs, count, indices))
  K = max(map(len, rows.values()), default=0)
  graphdef, params = nnx.split(model)
  scores: list[Score | None] = [None] * len(pairs)
  with tqdm(total=len(rows), desc="scoring", unit="row", disable=not progress) as bar:
    # The largest shape first, so that one that does not fit into memory fails at once.
    for (T, C), bucket in sorted(buckets.items(), reverse=True):
      B = rows_of_batch(len(bucket), batch_size)
      for start in range(0, len(bucket), B):
        batch = bucket[start : start + B]
        tokens_BT = np.zeros((B, T), np.int32)
        lengths_B, counts_B = np.ones((2, B), np.int32)
        targets_BKC = np.zeros((B, K, C), np.int32)
        for row, (inputs, count, indices) in enumerate(batch):
          tokens_BT[row, : len(inputs)] = inputs
          lengths_B[row], counts_B[row] = len(inputs), count
          for k, index in enumerate(indices):
            targets_BKC[row, k, C - count :] = pairs[index][1]
        found = _score(graphdef, params, tokens_BT, lengths_B, counts_B, targets_BKC)
        log_p_BKC, likeliest_BKC = jax.device_get(found)
        for row, (_, count, indices) in enumerate(batch):
          for k, index in enumerate(indices):
            scores[index] = Score(
              float(log_p_BKC[row, k, C - count :].sum(dtype=np.float64)),
              count,
              bool(likeliest_BKC[row, k, C - count :].all()),
            )
        bar.update(len(batch))
  return scores


def _decoder_length(model: GPT, max_length: int | None) -> int:
  if model.config.visibility == "bidirectional" or model.encoder is not None:
    raise UserError("only a decoder that reads from left to right scores a continuation.")
  return context_length(model, max_length)


def warn_of_cuts(lengths: Sequence[int], room: int) -> None:
  """Warns how many rows of these lengths lose their start."""
  if cut := sum(length > room for length in lengths):
    logging.warning(
      "%d of %d prompts are longer than %d tokens; their start is left out.",
      *(cut, len(lengths), room),
    )


def context_length(model: GPT, max_length: int | None) -> int:
  """The number of tokens that the model reads at a time; UserError if it has fewer positions."""
  position = model.config.position
  if position.kind == "learned" and (max_length or 0) > position.room:
    raise UserError(
      f"max_length={max_length} exceeds the model's {position.room} learned positions."
    )
  return max_length or position.room


@functools.partial(jax.jit, static_argnames="graphdef")
def _score(graphdef, params, tokens_BT, lengths_B, counts_B, targets_BKC):
  """log p of the targets and whether each is the likeliest, both [B, K, C], for the last C
  positions of each row."""
  model = nnx.merge(graphdef, params)
  (B, T), (_, K, C) = tokens_BT.shape, targets_BKC.shape
  # Padding comes after a row's tokens, which do not see it.
  prefix_BS = jnp.arange(T)[None] <= (lengths_B - counts_B)[:, None]
  hidden_BTD, _ = model.hidden(tokens_BT, prefix_BS=prefix_BS.astype(jnp.int32))
  scored_BC = jnp.maximum(lengths_B[:, None] - C + jnp.arange(C)[None], 0)
  hidden_BCD = jnp.take_along_axis(hidden_BTD, scored_BC[:, :, None], axis=1)

  def look_up(position):
    hidden_D, targets_K = position
    logits_V = model.logits(hidden_D[None, None])[0, 0]
    return jax.nn.log_softmax(logits_V)[targets_K], jnp.argmax(logits_V) == targets_K

  positions = hidden_BCD.reshape(B * C, -1), targets_BKC.transpose(0, 2, 1).reshape(B * C, K)
  at_once = max(_MAX_LOGIT_BYTES // (4 * model.config.vocab_size), 1)
  found = jax.lax.map(look_up, positions, batch_size=at_once)
  return [x.reshape(B, C, K).transpose(0, 2, 1) for x in found]


def encode_pair(tokenizer: Tokenizer, context: str | Tokens, continuation: str) -> Pair:
  """Ids of a text split at its continuation.

  The text is encoded as a whole, as the model would read it; a token across the border, or white
  space at the end of the context, belongs to the continuation. A context given as ids is kept.

  Raises:
    UserError: the continuation is empty.
  """
  if not continuation:
    raise UserError("a continuation to score is empty.")
  if not isinstance(context, str):
    return context, tokenizer.encode(continuation)
  border = len(context.rstrip())
  before = tokenizer.encode(context[:border]) if border else []
  whole = tokenizer.encode(context + continuation)
  same = next(
    (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b),
    min(len(before), len(whole)),
  )
  return [*tokenizer.start, *whole[:same]] or [tokenizer.prefix], whole[same:]


def score_documents(
  model: GPT,
  tokenizer: Tokenizer,
  texts: Sequence[str],
  *,
  max_length: int | None = None,
  **options,
) -> list[Score]:
  """Scores each text whole, every token once, in windows of `max_length` tokens.

  The last window of a text reaches back so that it is full (`loglikelihood_rolling` of Gao et al.,
  A framework for few-shot language model evaluation). Options and errors are as in `score`.
  """
  max_length = _decoder_length(model, max_length)
  start, pairs, owners = tokenizer.start or (tokenizer.prefix,), [], []
  for owner, tokens in enumerate(tokenizer.encode_batch(texts)):
    windows = list(rolling_windows(start, tokens.tolist(), max_length))
    pairs += windows
    owners += [owner] * len(windows)
  log_likelihoods, counts = np.zeros(len(texts)), np.zeros(len(texts), int)
  greedy = np.ones(len(texts), bool)
  for owner, one in zip(owners, score(model, pairs, max_length=max_length, **options), strict=True):
    log_likelihoods[owner] += one.log_likelihood
    counts[owner] += one.tokens
    greedy[owner] &= one.greedy
  return [
    Score(float(nats), int(count), bool(best))
    for nats, count, best in zip(log_likelihoods, counts, greedy, strict=True)
  ]


def rolling_windows(start: Tokens, tokens: Tokens, max_length: int) -> Iterator[Pair]:
  """Yields (context, continuation), all tokens once, in windows of `max_length` inputs, or fewer if
  the text is short."""
  text = [*start, *tokens]
  begin, end = len(start), max_length + 1
  while begin < len(text):
    end = min(end, len(text))
    yield text[max(end - max_length - 1, 0) : begin], text[begin:end]
    begin, end = end, end + max_length
