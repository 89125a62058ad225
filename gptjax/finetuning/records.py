"""Records with labels: texts and the labels that a model is to predict.

    {"text": ..., "label": "positive" | 1 | true}                                    classification
    {"text": ..., "label": ["joy", "love"]}                                          multi_label
    {"text": ..., "label": 3.5}                                                      regression
    {"text": ["John", "lives"], "label": ["B-PER", "O"]}                             tagging
    {"text": ..., "context": ..., "label": {"text": [...], "answer_start": [...]}}   span

The task decides which keys a record has, and what its label means (`Reader`).
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging

from gptjax.data import files, sources
from gptjax.data.options import PartOptions
from gptjax.data.sources import Source, Subset
from gptjax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
  """One record.

  Attributes:
    name: its origin, FILE:LINE.
    texts: one or two texts, or the words of one.
    label: its label, as the task parsed it.
  """

  name: str
  texts: tuple[str, ...]
  label: Any


class Reader(Protocol):
  """The part of a task that reads records.

  Attributes:
    between: text between a record's texts when they are shown together.
  """

  between: str

  def record_keys(self, text_key: str) -> Mapping[str, str]:
    """{option of the config: key} of the texts and then of the label, in order."""

  def read(self, fields: Mapping[str, Any]) -> tuple[Sequence[Any], Any]:
    """Parses {key: value} of a record to (texts, label); UserError if that is impossible."""

  def label_names(self, label: Any) -> list[str]:
    """The names of a record's labels, known or not."""


class LabelledTexts:
  """Turns a source of records into a source of their texts."""

  def __init__(self, source: Source, text_key: str, reader: Reader):
    self.source, self._reader, self._text_key = source, reader, text_key

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> str:
    """Returns the texts together; '' for an empty line."""
    record = self.all_records[index]
    return self._reader.between.join(record.texts) if record else ""

  def name(self, index: int) -> str:
    return self.source.name(index)

  @property
  def records(self) -> list[Record]:
    """All records, without empty lines; UserError for one that cannot be read."""
    return [record for record in self.all_records if record]

  @functools.cached_property
  def all_records(self) -> list[Record | None]:
    """A record for each line, None for an empty one."""
    return [self._read(index) for index in range(len(self))]

  def label_names(self) -> list[list[str]]:
    """The names of each record's labels, known to the task or not; [] for an empty line."""
    found = []
    for index in range(len(self)):
      fields = self._read_fields(index)
      try:
        found.append(self._reader.label_names([*fields.values()][-1]) if fields else [])
      except UserError as error:
        raise UserError(f"{self.name(index)}: {error}") from error
    return found

  def _read(self, index: int) -> Record | None:
    fields = self._read_fields(index)
    if fields is None:
      return None
    try:
      texts, label = self._reader.read(fields)
      for text in texts:
        _check_text(text)
      return Record(self.name(index), tuple(texts), label)
    except UserError as error:
      raise UserError(f"{self.name(index)}: {error}") from error

  def _read_fields(self, index: int) -> dict[str, Any] | None:
    text = self.source[index]
    if not text:
      return None
    record = {key: value for key, value in json.loads(text).items() if value is not None}
    keys = self._reader.record_keys(self._text_key)
    for option, key in keys.items():
      if key not in record:
        others = sorted(record, key=lambda other: other in keys.values())
        raise UserError(files.missing_key(self.name(index), key, others, option, keys.values()))
    return {key: record[key] for key in keys.values()}


def _check_text(text: Any) -> None:
  if not isinstance(text, str):
    raise UserError(f"a text is {type(text).__name__}, not a string.")
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f"a text has half a surrogate pair at character {error.start}, which is no Unicode text."
    ) from error


def check_not_empty(texts: Sequence[str]) -> None:
  """Raises UserError if one of the texts is blank."""
  if any(isinstance(text, str) and not text.strip() for text in texts):
    raise UserError("an empty text; fill it or leave the record out.")


def label_text(label: Any) -> str:
  """The name of a label that a record gives as a string, a whole number or a boolean."""
  if isinstance(label, str):
    return label
  if isinstance(label, int):
    return json.dumps(label)  # A boolean as JSON writes it.
  raise UserError(f"a label is {label!r}, not a string, a boolean or a whole number.")


def label_index(label: Any, labels: Sequence[str]) -> int:
  """The index of a label, given by its name or its number; UserError if it is unknown."""
  text = label_text(label)
  if text in labels:
    return labels.index(text)
  if not isinstance(label, str) and 0 <= label < len(labels):
    return int(label)
  raise UserError(f"no label {text!r}. {did_you_mean(text, labels)}")


def check_list(values: Any, key: str, what: str) -> list[Any]:
  """Returns a list, or raises UserError for anything else under a key."""
  if not isinstance(values, list):
    raise UserError(f"{key!r} is {type(values).__name__}, not a list of {what}.")
  return values


def open_records(
  part: PartOptions, reader: Reader, *, stratified: bool = False
) -> tuple[Source, Source]:
  """Opens a corpus: (training records, validation records).

  If `stratified`, a validation fraction is taken from each label, to within one example, and
  training keeps at least one example of each.
  """

  def split_by_label(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    names = LabelledTexts(source, part.text_key, reader).label_names()
    return _stratified_split(source, names, fraction, seed)

  of_records = dataclasses.replace(part, text_key="")
  divide: Callable[..., tuple[Source, Source]] = split_by_label if stratified else sources.split
  return sources.open_pair(of_records, divide)


def _stratified_split(
  source: Source, labels: Sequence[Sequence[str]], fraction: float, seed: int
) -> tuple[Subset, Subset]:
  """Splits a source into (training, validation), stratified by the label of each record."""
  order = np.random.default_rng(seed).permutation([i for i, label in enumerate(labels) if label])
  names = np.array([labels[index][0] for index in order])
  by_name = np.argsort(names, kind="stable")
  order, names = order[by_name], names[by_name]
  # Spread evenly over all records, so that the share is right for each label and in sum.
  taken = np.diff(np.floor(np.arange(len(order) + 1) * fraction + 0.5)) > 0
  _, firsts = np.unique(names, return_index=True)
  for first, of_label in zip(firsts, np.split(taken, firsts[1:]), strict=True):
    taken[first] &= not of_label.all()
  if not taken.any():
    raise UserError(
      f"data.validation_fraction={fraction} of {len(order)} records, one of each label kept for "
      "training, is none to validate on. Raise it or set --config.data.validation_path=."
    )
  return Subset(source, order[~taken]), Subset(source, order[taken])


def few_of_each(texts: LabelledTexts, labels: Sequence[str], count: int, seed: int) -> Subset:
  """Draws `count` training records of each label by the seed.

  Raises:
    UserError: a label has fewer records.
  """
  members: list[list[int]] = [[] for _ in labels]
  for index, record in enumerate(texts.all_records):
    if record:
      members[record.label].append(index)
  for label, indices in zip(labels, members, strict=True):
    if len(indices) < count:
      raise UserError(
        f"task.examples_per_label={count}, but label {label!r} has {len(indices)} training "
        "examples; ask for no more than that."
      )
  rng = np.random.default_rng(seed)
  chosen = [rng.choice(indices, count, replace=False) for indices in members]
  return Subset(texts.source, np.concatenate(chosen))


def warn_of_duplicates(
  training: Mapping[str, LabelledTexts], validation: Mapping[str, LabelledTexts]
) -> None:
  """Warns how many validation texts are training texts too, ignoring case and white space."""
  known = {_folded(record): record.name for side in training.values() for record in side.records}
  records = [record for side in validation.values() for record in side.records]
  if again := [record for record in records if _folded(record) in known]:
    logging.warning(
      "%d of %d validation texts are training texts too, case and white space aside, so that the "
      "validation flatters; the first is %s, as %s.",
      *(len(again), len(records), again[0].name, known[_folded(again[0])]),
    )


def _folded(record: Record) -> tuple[str, ...]:
  return tuple(" ".join(text.split()).casefold() for text in record.texts)
