"""Packs whole conversations into rows; they do not see each other."""

import bisect
from collections import deque
from collections.abc import Sequence

import numpy as np

from gptjax.data.batch import Batch
from gptjax.data.cache import TokenCache
from gptjax.data.packing import pad
from gptjax.errors import UserError
from gptjax.finetuning.chat_encoding import decode_flags


class PackedConversations:
  """Rows of T inputs and targets with every conversation once, except dropped ones.

  A conversation of n tokens takes n - 1 positions. Only lengths decide which of them share a row.

  Attributes:
    sequence_length: length of a row, T.
    truncated: how many conversations were longer than a row and cut.
    dropped: how many were longer and left out.
  """

  def __init__(self, cache: TokenCache, sequence_length: int, overlong: str):
    """Packs documents that a `ChatEncoder` or a `PromptEncoder` encoded.

    Args:
      cache: the conversations.
      sequence_length: length of a row, T.
      overlong: 'truncate' keeps the first T + 1 tokens of a longer conversation, if a learnt one is
        among the targets; 'drop' keeps none.

    Raises:
      UserError: no conversation is left.
    """
    self._tokens, self.sequence_length = cache.tokens, sequence_length
    self._starts, self._stops = document_spans(cache)
    places = self._stops - self._starts - 1
    kept = places <= sequence_length
    overlong_ones = np.flatnonzero(~kept)
    if overlong == "truncate":
      kept[overlong_ones] = [self._has_target(one) for one in overlong_ones]
    self.truncated = int(kept[overlong_ones].sum())
    self.dropped = int((~kept).sum())
    if not kept.any():
      raise UserError(
        f"none of {cache.num_documents} documents fits a row of {sequence_length} tokens "
        f"(task.overlong={overlong!r}); the shortest takes {places.min()}. "
        f"Set --config.sequence_length={places.min()} or more."
      )
    kept = np.flatnonzero(kept)
    places = np.minimum(places, sequence_length)
    self._members, self._row_ends = pack_whole(kept, places, sequence_length)

  def __len__(self) -> int:
    return len(self._row_ends)

  def __getitem__(self, index: int) -> Batch:
    """Returns a row, each field [T]; weights are 1 for learnt targets."""
    if not 0 <= index < len(self):
      raise IndexError(index)
    first = self._row_ends[index - 1] if index else 0
    inputs, targets, weights, segment_ids, positions = [], [], [], [], []
    for segment, one in enumerate(self._members[first : self._row_ends[index]], start=1):
      tokens, learnt = self._read(one)
      inputs.append(tokens[:-1])
      targets.append(tokens[1:])
      weights.append(learnt[1:].astype(np.float32))
      segment_ids.append(np.full(len(tokens) - 1, segment, np.int32))
      positions.append(np.arange(len(tokens) - 1, dtype=np.int32))
    fields = (inputs, targets, weights, segment_ids, positions)
    return Batch(*(pad(np.concatenate(field), self.sequence_length) for field in fields))

  def _read(self, one: int) -> tuple[np.ndarray, np.ndarray]:
    stop = min(self._stops[one], self._starts[one] + self.sequence_length + 1)
    return decode_flags(self._tokens[self._starts[one] : stop])

  def _has_target(self, one: int) -> bool:
    return bool(self._read(one)[1][1:].any())


def document_spans(cache: TokenCache) -> tuple[np.ndarray, np.ndarray]:
  """Where each document's tokens start and stop in a cache, without separators; int64."""
  starts = np.asarray(cache.boundaries) + 1
  return starts, np.append(starts[1:] - 1, cache.num_tokens - 1)


def pack_whole(
  kept: np.ndarray, places: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
  """Packs documents, whole, into rows.

  Args:
    kept: the numbers of those that are packed.
    places: what each document takes, also those that are not kept.
    capacity: what a row has room for.

  Returns:
    The documents row after row, and where each row ends among them.
  """
  rows = first_fit_decreasing(places[kept], capacity)
  return kept[np.concatenate(rows)], np.cumsum([len(row) for row in rows])


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[np.ndarray]:
  """Packs items into bins: the largest first, each into the first bin that has room for it.

  It uses at most 11/9 of the fewest bins possible, plus 2/3 (Dosa 2007).

  Args:
    sizes: none above `capacity`; equal sizes are packed in their order.

  Returns:
    The items of each bin, int64, in increasing order.
  """
  waiting: dict[int, deque[int]] = {}
  for item, size in enumerate(sizes):
    waiting.setdefault(int(size), deque()).append(item)
  available = sorted(waiting)
  bins = []
  # Filling one bin at a time with the largest item that still fits gives the same bins.
  while available:
    room, items = capacity, []
    while place := bisect.bisect_right(available, room):
      size = available[place - 1]
      items.append(waiting[size].popleft())
      room -= size
      if not waiting[size]:
        del available[place - 1]
    bins.append(np.array(sorted(items), np.int64))
  return bins
