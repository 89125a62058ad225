"""Packs whole examples with labels into the rows of a batch; they do not see each other."""

import math
from collections.abc import Sequence

import numpy as np

from gptjax.data.batch import Batch
from gptjax.finetuning.label_encoding import Example
from gptjax.finetuning.record_packing import first_fit_decreasing


def pack_examples(
  examples: Sequence[Example],
  sequence_length: int,
  *,
  columns: int = 0,
  pairs: bool = False,
  row_multiple: int = 1,
) -> tuple[Batch, list[int]]:
  """Packs examples into the fewest rows that first-fit-decreasing finds.

  The number of rows is `row_multiple` times a power of two, so that batches have few shapes; the
  rest is padding.

  Args:
    examples: none of them longer than T.
    sequence_length: T.
    columns: K of the batch's `values`; 0 is none.
    pairs: whether the batch has `token_types`.
    row_multiple: the number of rows is a multiple of it.

  Returns:
    The batch, fields [B, T] and values [B, T, K]; and the examples' indices in their order in the
    batch, row by row and from left to right.
  """
  rows = first_fit_decreasing([len(example.tokens) for example in examples], sequence_length)
  shape = (_round_up(len(rows), row_multiple), sequence_length)
  inputs, targets, segment_ids, positions, token_types = np.zeros((5, *shape), np.int32)
  weights, values = np.zeros(shape, np.float32), np.zeros((*shape, columns), np.float32)
  for row, members in enumerate(rows):
    start, segment = 0, 0
    for member in members:
      example = examples[member]
      inputs[row, start : start + len(example.tokens)] = example.tokens
      first, last = (start + place for place in example.second)
      token_types[row, first:last] = 1
      for target in example.targets:
        targets[row, start + target.place] = target.label
        weights[row, start + target.place] = target.weight
      for place, column, value in example.values:
        values[row, start + place, column] = value
      for length in example.segments or (len(example.tokens),):
        segment += 1
        segment_ids[row, start : start + length] = segment
        positions[row, start : start + length] = np.arange(length)
        start += length
  batch = Batch(
    inputs,
    targets,
    weights,
    segment_ids,
    positions,
    token_types=token_types if pairs else None,
    values=values if columns else None,
  )
  return batch, [int(member) for members in rows for member in members]


def _round_up(rows: int, multiple: int) -> int:
  return multiple * 2 ** math.ceil(math.log2(max(1, math.ceil(rows / multiple))))
