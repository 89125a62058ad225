"""Baselines without a neural network on a text, in bits per byte."""

import gzip
from collections.abc import Iterable, Sequence

import numpy as np


def bits_per_byte(training: Iterable[str], validation: Sequence[str]) -> dict[str, float]:
  """Measures each of them on the validation documents, by its name."""
  return {
    "gzip -9": gzip_bits_per_byte(validation),
    "byte 5-gram": ngram_bits_per_byte(training, validation, order=5),
  }


def gzip_bits_per_byte(documents: Iterable[str]) -> float:
  """Size of `gzip -9` of the documents one after another, in bits per byte of text."""
  text = "".join(documents).encode()
  return 8 * len(gzip.compress(text, compresslevel=9)) / len(text)


def ngram_bits_per_byte(
  training: Iterable[str], validation: Iterable[str], order: int = 5
) -> float:
  """Cross-entropy of a byte n-gram model, in bits per byte.

  Interpolated Kneser-Ney smoothing (Chen and Goodman 1998, section 2.7): absolute discounting with
  the discount n1 / (n1 + 2 n2) of each order, continuation counts below the highest order, and a
  uniform distribution over 256 bytes below the first.

  Args:
    training, validation: documents; each side is read as one stream.
    order: bytes of an n-gram, the predicted one included; at most 7.
  """
  if not 1 <= order <= 7:
    raise ValueError(f"order {order} is not from 1 to 7: a gram is packed into 64 bits")
  train, valid = _as_bytes(training), _as_bytes(validation)
  levels = []
  keys, counts = np.unique(_grams(train, order), return_counts=True)
  for length in range(order, 0, -1):
    levels.append(_Level(keys, counts))
    # Counts how many distinct bytes precede the shorter gram, not how often it occurs.
    shorter = keys & np.uint64(256 ** (length - 1) - 1)
    keys, counts = np.unique(shorter, return_counts=True)
  probability = np.full(len(valid), 1 / 256)
  for length, level in zip(range(1, order + 1), reversed(levels), strict=True):
    probability = level.interpolate(_grams(valid, length), probability)
  return float(-np.log2(probability).mean())


class _Level:
  """The n-grams of one length: the count of each, and the bytes that followed each context."""

  def __init__(self, keys: np.ndarray, counts: np.ndarray):
    self.keys, self.counts = keys, counts
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    # A discount of 0, the estimate if nothing was counted once, would make new grams impossible.
    self.discount = once / (once + 2 * twice) if once else 0.5
    # Keys are sorted, so the grams of a context, which differ in their last byte, are neighbours.
    self.contexts, first = np.unique(keys >> np.uint64(8), return_index=True)
    self.totals = np.add.reduceat(counts, first)
    self.followers = np.diff(np.append(first, len(keys)))

  def interpolate(self, grams: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    """Probabilities of the last bytes of `grams`, given those under one byte less of context."""
    counts = _look_up(self.keys, self.counts, grams)
    context = grams >> np.uint64(8)
    totals = _look_up(self.contexts, self.totals, context)
    followers = _look_up(self.contexts, self.followers, context)
    seen = np.maximum(totals, 1)
    mixed = np.maximum(counts - self.discount, 0) + self.discount * followers * shorter
    return np.where(totals > 0, mixed / seen, shorter)


def _as_bytes(documents: Iterable[str]) -> np.ndarray:
  return np.frombuffer("".join(documents).encode(), np.uint8)


def _grams(text: np.ndarray, length: int) -> np.ndarray:
  """The `length` bytes that end at each position, as one integer; zeros before the start."""
  grams = np.zeros(len(text), np.uint64)
  for back in range(length):
    grams[back:] |= text[: len(text) - back].astype(np.uint64) << np.uint64(8 * back)
  return grams


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  """values[keys == wanted], 0 where there is no such key. Keys are sorted."""
  index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  return np.where(keys[index] == wanted, values[index], 0)
