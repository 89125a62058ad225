"""Cuts a token stream into rows, each computed from its index alone."""

import numpy as np

from gptjax.data.batch import Batch
from gptjax.data.cache import TokenCache
from gptjax.errors import UserError


class Windows:
  """Windows of T + 1 tokens of a stream, each sharing its last token with the next window.

  As inputs and targets of T tokens they predict every token but the stream's first exactly once.
  """

  def __init__(self, cache: TokenCache, length: int, *, drop_remainder: bool):
    """Prepares windows of `length` + 1 tokens.

    Args:
      cache: the stream.
      length: T, the tokens of a row.
      drop_remainder: whether to leave out a last window that is shorter (training does).

    Raises:
      UserError: if the stream is too short for a single window.
    """
    predicted = cache.num_tokens - 1
    full, remainder = divmod(predicted, length)
    if drop_remainder and not full:
      raise UserError(
        f"a row takes {length} tokens, but the training corpus has only {predicted} "
        f"tokens to predict. Set --config.sequence_length={predicted} or less, or add text."
      )
    self._tokens = cache.tokens
    self._stride = length
    self._count = full + (remainder > 0 and not drop_remainder)

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> np.ndarray:
    """Returns int32 [T + 1], or [2 to T + 1] for the last window."""
    if not 0 <= index < len(self):
      raise IndexError(index)
    start = index * self._stride
    return self._tokens[start : start + self._stride + 1].astype(np.int32)


def pack(window: np.ndarray, sequence_length: int, end_of_text: int) -> Batch:
  """Makes a row, each field [T], from a window.

  A document starts at each end_of_text (encoding never yields one), and the separator at its end
  counts in the loss as any other target.

  Args:
    window: int32 [up to T + 1] tokens.
    sequence_length: T; a shorter window is padded with weight 0.
    end_of_text: id of the separator.
  """
  inputs, targets = window[:-1], window[1:]
  index = np.arange(len(inputs), dtype=np.int32)
  starts = inputs == end_of_text
  starts[:1] = True
  return Batch(
    inputs=pad(inputs, sequence_length),
    targets=pad(targets, sequence_length),
    weights=pad(np.ones(len(inputs), np.float32), sequence_length),
    segment_ids=pad(np.cumsum(starts, dtype=np.int32), sequence_length),
    positions=pad(index - np.maximum.accumulate(np.where(starts, index, 0)), sequence_length),
  )


def pad(values: np.ndarray, length: int) -> np.ndarray:
  """Fills up an array with zeros to [length]."""
  return np.pad(values, (0, length - len(values)))
