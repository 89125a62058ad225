"""Rows for prefix, masked and denoising language models, in the place of `packing.pack`.

Each class makes a `Batch` row from a window of the token stream and randomness. The loss is always
the weighted cross-entropy of the targets.
"""

import dataclasses
import math

import numpy as np

from gptjax.data.batch import Batch
from gptjax.data.packing import pack, pad
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.words import word_ids
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PrefixLanguageModel:
  """Prefix language model (Raffel et al. 2020, section 3.2.3; Dong et al. 2019).

  Each segment of a row is cut after 1 to all of its inputs, uniformly; the inputs before the cut
  are its prefix. Only targets outside the prefix count: the first of them follows the prefix's last
  token, as the first token of an answer follows a prompt.

  Attributes:
    sequence_length: length of a row, T.
    end_of_text: id of the separator.
  """

  sequence_length: int
  end_of_text: int

  def __call__(self, window: np.ndarray, rng: np.random.Generator) -> Batch:
    """Makes a row, each field [T], of a window, int32 [up to T + 1]."""
    row = pack(window, self.sequence_length, self.end_of_text)
    lengths = np.maximum(np.bincount(row.segment_ids), 1)  # There may be no padding, segment 0.
    cuts = rng.integers(1, lengths + 1)[row.segment_ids]
    valid = row.segment_ids > 0
    return dataclasses.replace(
      row,
      prefix=(valid & (row.positions < cuts)).astype(np.int32),
      weights=(valid & (row.positions >= cuts - 1)).astype(np.float32),
    )


class MaskedLanguageModel:
  """Masked language model (Devlin et al. 2019, section 3.1 and appendix A.1).

  Words are chosen at random until `mask_rate` of a row's tokens are chosen; a word with more tokens
  than are still wanted is skipped. 80 % of the chosen tokens are masked, 10 % replaced by a random
  token, 10 % kept, and all are targets. With `whole_words` a word is chosen with all its tokens
  (Cui et al. 2019, arXiv:1906.08101); else each token is a word. Separators are never chosen.
  """

  def __init__(
    self, tokenizer: Tokenizer, sequence_length: int, mask_rate: float, whole_words: bool
  ):
    """Raises UserError if the tokenizer has no mask token."""
    if tokenizer.mask is None:
      raise UserError(
        f"tokenizer {tokenizer.spec!r} has no mask token, which objective='masked' needs. "
        "Use 'bytes+mask' or 'bpe:N+mask'."
      )
    self._tokenizer = tokenizer
    self._sequence_length = sequence_length
    self._mask_rate, self._whole_words = mask_rate, whole_words
    self._is_text = tokenizer.bytes_per_token() > 0
    self._text_tokens = np.flatnonzero(self._is_text).astype(np.int32)

  def __call__(self, window: np.ndarray, rng: np.random.Generator) -> Batch:
    """Makes a row, each field [T], from a window, int32 [up to T + 1], without its last token, as
    that also begins the next window."""
    row = pack(window, self._sequence_length, self._tokenizer.end_of_text)
    tokens, T = row.inputs, self._sequence_length
    chosen = pad(self._choose(tokens[: len(window) - 1], rng), T)
    fate = rng.random(T)
    random_tokens = rng.choice(self._text_tokens, T)
    masked = np.where(fate < 0.8, np.int32(self._tokenizer.mask), random_tokens)
    return dataclasses.replace(
      row,
      inputs=np.where(chosen & (fate < 0.9), masked, tokens),
      targets=tokens,
      weights=chosen.astype(np.float32),
    )

  def _choose(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    words = word_ids(tokens, self._tokenizer) if self._whole_words else np.arange(len(tokens))
    is_text = self._is_text[tokens]
    sizes = np.bincount(words[is_text], minlength=words[-1] + 1)
    wanted = max(1, _round(self._mask_rate * is_text.sum()))
    chosen = np.zeros(len(sizes), bool)
    for word in rng.permutation(np.flatnonzero(sizes)):
      if sizes[word] <= wanted:
        chosen[word] = True
        wanted -= sizes[word]
      if not wanted:
        break
    return chosen[words]


class SpanCorruption:
  """Span corruption (Raffel et al. 2020, section 3.3.4), for an encoder and a decoder.

  For the encoder, `mask_rate` of a window's tokens, in spans of `mean_span` tokens on average, are
  replaced by one sentinel per span. The decoder writes each sentinel followed by its span, and one
  final sentinel. All lengths and places of spans with the right sums are equally likely. A window
  is one segment, even across documents: the encoder reads separators as ordinary tokens, but no
  span contains them; a separator within the reach of a span is moved behind its sentinel.

  Attributes:
    window_length: tokens of a window, chosen so that the corrupted window has S tokens.
    target_length: T, tokens of the decoder's row.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    sequence_length: int,
    mask_rate: float,
    mean_span: float,
    decoder_start: int,
  ):
    """Raises UserError if the tokenizer has too few sentinels. `sequence_length` is S."""
    self._sequence_length = sequence_length
    self._mask_rate, self._mean_span = mask_rate, mean_span
    self._decoder_start = decoder_start
    self._is_text = tokenizer.bytes_per_token() > 0
    self.window_length, self.target_length = span_corruption_lengths(
      sequence_length, mask_rate, mean_span
    )
    _, spans = _count(self.window_length, mask_rate, mean_span)
    if spans + 1 > len(tokenizer.sentinels):
      raise UserError(
        f"tokenizer {tokenizer.spec!r} has {len(tokenizer.sentinels)} sentinels, but "
        f"objective='span_corruption' needs {spans + 1} for sequence_length={sequence_length}. "
        "Use 'bytes+sentinels' or 'bpe:N+sentinels', or a smaller sequence_length."
      )
    self._sentinels = np.array(tokenizer.sentinels, np.int32)

  def __call__(self, window: np.ndarray, rng: np.random.Generator) -> Batch:
    """Makes a row, the encoder's fields [S] and the others [T], from a window, int32 [up to
    window_length + 1], without its last token, which also begins the next window."""
    tokens = window[:-1]
    text = np.flatnonzero(self._is_text[tokens])
    noise, spans = _count(len(tokens), self._mask_rate, self._mean_span)
    noise = min(noise, len(text))
    spans = min(spans, noise, len(text) - noise + 1)
    lengths = _partition(noise, spans, rng)
    gaps = _partition(len(text) - noise + 2, spans + 1, rng)
    gaps[0] -= 1  # Between two spans there is a token; before the first perhaps none,
    gaps[-1] -= 1  # nor after the last.
    starts = np.cumsum(gaps[:-1]) + np.cumsum(lengths) - lengths
    corrupted = np.zeros(len(tokens), bool)
    corrupted[text] = np.repeat(
      np.arange(2 * spans + 1) % 2 == 1, np.insert(gaps, np.arange(1, spans + 1), lengths)
    )
    kept = ~corrupted
    kept[text[starts]] = True
    encoder = tokens.copy()
    encoder[text[starts]] = self._sentinels[:spans]
    encoder = encoder[kept][: self._sequence_length]
    spans_of_text = np.insert(
      tokens[corrupted], np.cumsum(lengths) - lengths, self._sentinels[:spans]
    )
    targets = np.append(spans_of_text, self._sentinels[spans])
    inputs = np.insert(targets[:-1], 0, self._decoder_start)
    S, T = self._sequence_length, self.target_length
    return Batch(
      inputs=pad(inputs, T),
      targets=pad(targets, T),
      weights=pad(np.ones(len(targets), np.float32), T),
      segment_ids=pad(np.ones(len(targets), np.int32), T),
      positions=pad(np.arange(len(targets), dtype=np.int32), T),
      encoder_inputs=pad(encoder, S),
      encoder_segment_ids=pad(np.ones(len(encoder), np.int32), S),
      encoder_positions=pad(np.arange(len(encoder), dtype=np.int32), S),
    )


def span_corruption_lengths(
  sequence_length: int, mask_rate: float, mean_span: float
) -> tuple[int, int]:
  """Lengths of a window and of the decoder's row, T, for an encoder's row of `sequence_length`.

  The window is the longest whose kept tokens and sentinels fit the encoder's row; the decoder's row
  has its other tokens, their sentinels and the final one.
  """

  def encoder_length(window: int) -> int:
    noise, spans = _count(window, mask_rate, mean_span)
    return window - noise + spans

  window = sequence_length
  while encoder_length(window + 1) <= sequence_length:
    window += 1
  noise, spans = _count(window, mask_rate, mean_span)
  return window, noise + spans + 1


def _count(length: int, mask_rate: float, mean_span: float) -> tuple[int, int]:
  """Numbers of corrupted tokens of `length`, of which one at least is not, and of spans."""
  noise = min(max(1, _round(length * mask_rate)), length - 1)
  return noise, min(max(1, _round(noise / mean_span)), noise, length - noise + 1)


def _round(x: float) -> int:
  return math.floor(x + 0.5)


def _partition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
  """Draws int64 [parts], each at least 1, with a sum of `total`, uniformly."""
  cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1 if parts > 1 else []
  return np.diff(np.concatenate([[0], cuts, [total]]).astype(np.int64))[:parts]
