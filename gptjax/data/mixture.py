"""Corpora in given proportions, each shuffled anew in every epoch of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

# Makes a row from an item; the row depends on the item and the randomness alone.
MakeRow = Callable[[Any, np.random.Generator], Any]


def training_rows(
  parts: Mapping[str, Sequence[Any]], weights: Mapping[str, float], *, seed: int, make_row: MakeRow
) -> grain.MapDataset[Any]:
  """Returns rows without end; row i depends on the arguments and i alone.

  Args:
    parts: the items of each corpus (windows, packed rows, examples), none of them empty.
    weights: the share of rows from each corpus, in any unit, above 0.
    seed: decides the order of each part, and the randomness of `make_row`.
    make_row: all that is random about a row.
  """
  datasets = []
  for name, child in zip(parts, np.random.SeedSequence(seed).spawn(len(parts)), strict=True):
    shuffle_seed, row_seed = (int(word) for word in child.generate_state(2))
    # Before the shuffle, so that the randomness belongs to the window and the epoch.
    dataset = grain.MapDataset.source(parts[name]).random_map(make_row, seed=row_seed)
    datasets.append(dataset.shuffle(shuffle_seed).repeat())
  return grain.MapDataset.mix(datasets, [weights[name] for name in parts])
