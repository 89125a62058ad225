"""Examples with labels as rows: whole ones side by side, none of which sees another."""

import collections
from collections.abc import Iterable, Mapping

import numpy as np

from gptjax.data.batch import Batch
from gptjax.data.chat_packing import first_fit_decreasing
from gptjax.data.label_encoding import Examples
from gptjax.data.options import DataOptions
from gptjax.errors import UserError


class PackedExamples:
  """Rows of T tokens with every example once. Which share a row depends on their lengths alone.

  Attributes:
    truncated, dropped, empty_words: as of `Examples`.
  """

  def __init__(self, examples: Examples, options: DataOptions, class_weights: np.ndarray):
    """Packs what a `LabelEncoder` encoded.

    Args:
      examples: none of them longer than T.
      options: sequence_length is T.
      class_weights: float32 [labels], what a target counts in the loss.
    """
    self.truncated, self.dropped = examples.truncated, examples.dropped
    self.empty_words = examples.empty_words
    self._examples, self._class_weights = examples.examples, class_weights
    self._sequence_length = options.sequence_length
    self._has_pairs = bool(options.pair_key)
    self._columns = {"multi_label": len(options.labels), "regression": 1, "span": 2}.get(
      options.objective
    )
    lengths = [len(example.tokens) for example in examples.examples]
    self._rows = first_fit_decreasing(lengths, options.sequence_length)

  def __len__(self) -> int:
    return len(self._rows)

  @property
  def names(self) -> list[str]:
    """Where the examples come from, in the order of the rows and in each from left to right."""
    return [self._examples[member].name for row in self._rows for member in row]

  def __getitem__(self, index: int) -> Batch:
    """Returns a row, each field [T]; token_types are there with pairs, and values [T, K] where an
    example has not one label of a set."""
    T = self._sequence_length
    inputs, targets, segment_ids, positions, token_types = np.zeros((5, T), np.int32)
    weights = np.zeros(T, np.float32)
    values = np.zeros((T, self._columns or 0), np.float32)
    start = 0
    for segment, member in enumerate(self._rows[index], start=1):
      example = self._examples[member]
      stop = start + len(example.tokens)
      inputs[start:stop] = example.tokens
      segment_ids[start:stop] = segment
      positions[start:stop] = np.arange(stop - start)
      token_types[start + example.second[0] : start + example.second[1]] = 1
      for place, label in example.targets:
        targets[start + place] = label
        weights[start + place] = self._class_weights[label]
      for place, column, value in example.values:
        values[start + place, column] = value
      start = stop
    return Batch(
      inputs,
      targets,
      weights,
      segment_ids,
      positions,
      token_types=token_types if self._has_pairs else None,
      values=values if self._columns else None,
    )


def pack_examples(
  parts: Mapping[str, Examples], options: DataOptions, *, training: bool
) -> dict[str, PackedExamples]:
  """Packs each part; in training the classes have their weights, over all parts.

  Raises:
    UserError: in training, a label has no example.
  """
  weights = np.ones(max(len(options.labels), 1), np.float32)
  if training and options.labels:
    weights = _class_weights(parts.values(), options)
  return {name: PackedExamples(examples, options, weights) for name, examples in parts.items()}


def _class_weights(parts: Iterable[Examples], options: DataOptions) -> np.ndarray:
  """1, or for 'balanced' n / (K n_k) (King & Zeng 2001, as in scikit-learn): float32 [K]."""
  found = collections.Counter()
  for example in (example for part in parts for example in part.examples):
    if options.objective == "multi_label":
      found.update(column for _, column, _ in example.values)
    else:
      found.update(label for _, label in example.targets)
  counts = np.array([found[index] for index in range(len(options.labels))])
  if not counts.all():
    missing = options.labels[int(np.argmin(counts))]
    raise UserError(
      f"data.labels: label {missing!r} has no training example; leave it out or add one."
    )
  if options.class_weights == "none":
    return np.ones(len(counts), np.float32)
  return (counts.sum() / (len(counts) * counts)).astype(np.float32)
