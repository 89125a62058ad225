"""Fill in the middle (Bavarian et al. 2022, arXiv:2207.14255): learn to infill by reordering.

A document is cut at two points drawn uniformly over its characters, and written as one of

    PSM   <prefix> prefix <suffix> suffix <middle> middle
    SPM   <prefix> <suffix> suffix <middle> prefix middle

the latter being the paper's variant that shares its separators with PSM (section 3). Documents are
reordered at the context level (section 4.4): only their part within the row.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
  """Reorders documents of a window.

  Attributes:
    tokenizer: has the three separators; UserError if it does not.
    fim_rate: share of documents that are reordered.
    spm_rate: share of reordered documents that are written as SPM.
  """

  tokenizer: Tokenizer
  fim_rate: float
  spm_rate: float

  def __post_init__(self):
    tokenizer = self.tokenizer
    if None in (tokenizer.fim_prefix, tokenizer.fim_middle, tokenizer.fim_suffix):
      raise UserError(
        f"tokenizer {tokenizer.spec!r} has no fill-in-the-middle tokens. "
        "Set --config.task.fim_rate=0, or use 'bytes' or 'bpe:N'."
      )

  def __call__(self, window: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns int32 [up to the same length]; the separators push some tokens out at the end."""
    separators = np.flatnonzero(window == self.tokenizer.end_of_text)
    pieces = []
    for piece in np.split(window, np.union1d(separators, separators + 1)):
      is_text = len(piece) and piece[0] != self.tokenizer.end_of_text
      reorder = is_text and rng.random() < self.fim_rate
      pieces.append(self._reorder(piece.tolist(), rng) if reorder else piece)
    return np.concatenate(pieces).astype(np.int32)[: len(window)]

  def _reorder(self, tokens: list[int], rng: np.random.Generator) -> list[int]:
    tokenizer = self.tokenizer
    prefix, middle, suffix = self._cut(tokens, rng)
    if rng.random() < self.spm_rate:
      before, after = [tokenizer.fim_prefix], prefix + middle
    else:
      before, after = [tokenizer.fim_prefix, *prefix], middle
    return [*before, tokenizer.fim_suffix, *suffix, tokenizer.fim_middle, *after]

  def _cut(self, tokens: list[int], rng: np.random.Generator) -> Sequence[list[int]]:
    """Cuts between characters, as generation will; or between tokens, if the window's edge cut a
    character, or if the tokenizer puts spaces where texts begin."""
    content = self.tokenizer.decode_bytes(tokens)
    with contextlib.suppress(UnicodeDecodeError):
      parts = [self.tokenizer.encode(part) for part in _cut_at_random(content.decode("utf-8"), rng)]
      if self.tokenizer.decode_bytes(itertools.chain(*parts)) == content:
        return parts
    return _cut_at_random(tokens, rng)


def _cut_at_random(document: Sequence, rng: np.random.Generator) -> tuple[Sequence, ...]:
  first, second = sorted(rng.integers(0, len(document) + 1, size=2))
  return document[:first], document[first:second], document[second:]
