"""Corpora in given proportions, each shuffled anew in every epoch of its own."""

import functools
from collections.abc import Mapping

import grain
import numpy as np

from gptjax.data.batch import Batch
from gptjax.data.fim import FillInTheMiddle
from gptjax.data.packing import Windows, pack


def training_rows(
  parts: Mapping[str, Windows],
  weights: Mapping[str, float],
  *,
  seed: int,
  sequence_length: int,
  end_of_text: int,
  fim: FillInTheMiddle | None,
) -> grain.MapDataset[Batch]:
  """Returns rows without end; row i depends on the arguments and i alone.

  Args:
    parts: the windows of each corpus, none of them empty.
    weights: the share of rows from each corpus, in any unit, above 0.
    seed: decides the order of each part, and where `fim` cuts.
    sequence_length: T.
    end_of_text: id of the separator.
    fim: what reorders windows, or None.
  """
  datasets = []
  for name, child in zip(parts, np.random.SeedSequence(seed).spawn(len(parts)), strict=True):
    shuffle_seed, fim_seed = (int(word) for word in child.generate_state(2))
    dataset = grain.MapDataset.source(parts[name])
    if fim is not None:  # Before the shuffle: its randomness is of the row and the epoch.
      dataset = dataset.random_map(fim, seed=fim_seed)
    dataset = dataset.map(
      functools.partial(pack, sequence_length=sequence_length, end_of_text=end_of_text)
    )
    datasets.append(dataset.shuffle(shuffle_seed).repeat())
  return grain.MapDataset.mix(datasets, [weights[name] for name in parts])
