"""Corpora in given proportions, each shuffled anew in every epoch of its own."""

from collections.abc import Callable, Mapping

import grain
import numpy as np

from gptjax.data.batch import Batch
from gptjax.data.chat_packing import PackedConversations
from gptjax.data.label_packing import PackedExamples
from gptjax.data.packing import Windows

# Makes a row of an item of these: it depends on the item and the randomness alone.
MakeRow = Callable[[np.ndarray | Batch, np.random.Generator], Batch]


def training_rows(
  parts: Mapping[str, Windows | PackedConversations | PackedExamples],
  weights: Mapping[str, float],
  *,
  seed: int,
  make_row: MakeRow,
) -> grain.MapDataset[Batch]:
  """Returns rows without end; row i depends on the arguments and i alone.

  Args:
    parts: the windows, the packed conversations or examples of each corpus, none of them empty.
    weights: the share of rows from each corpus, in any unit, above 0.
    seed: decides the order of each part, and the randomness of `make_row`.
    make_row: the objective.
  """
  datasets = []
  for name, child in zip(parts, np.random.SeedSequence(seed).spawn(len(parts)), strict=True):
    shuffle_seed, row_seed = (int(word) for word in child.generate_state(2))
    # Before the shuffle: the randomness is of the window and the epoch.
    dataset = grain.MapDataset.source(parts[name]).random_map(make_row, seed=row_seed)
    datasets.append(dataset.shuffle(shuffle_seed).repeat())
  return grain.MapDataset.mix(datasets, [weights[name] for name in parts])
