"""Shows a row of training data as text, with the learnt targets highlighted."""

import itertools
from collections.abc import Iterator

import numpy as np

from gptjax.data.batch import Batch
from gptjax.data.tokenizer import Tokenizer

# Colours for learnt and not learnt: bold green and faint (ECMA-48).
_COLOURS = (("\033[1;32m", "\033[0m"), ("\033[2m", "\033[0m"))
_MARKS = (("⟦", "⟧"), ("", ""))


def describe_row(row: Batch, tokenizer: Tokenizer, *, colours: bool) -> Iterator[str]:
  """Yields the text of each segment of a row, fields [T], under a line that says how long it is."""
  learnt, other = _COLOURS if colours else _MARKS
  segments = int(row.segment_ids.max())
  yield (
    f"{segments} segments in {np.count_nonzero(row.segment_ids)} of {len(row.inputs)} places, "
    f"{np.count_nonzero(row.weights)} targets learnt"
  )
  for segment in range(1, segments + 1):
    inside = row.segment_ids == segment
    targets, weights = row.targets[inside], row.weights[inside]
    yield f"--- segment {segment}: {len(targets)} targets, {np.count_nonzero(weights)} learnt"
    tokens = zip([row.inputs[inside][0], *targets], [False, *(weights > 0)], strict=True)
    runs = itertools.groupby(tokens, key=lambda token: token[1])
    yield "".join(
      f"{before}{text_of(tokenizer, [int(token) for token, _ in run])}{after}"
      for is_learnt, run in runs
      for before, after in [learnt if is_learnt else other]
    )


def text_of(tokenizer: Tokenizer, tokens: list[int]) -> str:
  """The text of a piece of a document, with special tokens by name."""
  names = {token: text.encode() for text, token in tokenizer.specials.items()}
  pieces = (names.get(token) or tokenizer.decode_bytes([token]) for token in tokens)
  return b"".join(pieces).decode("utf-8", errors="replace")
