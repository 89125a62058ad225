"""Records with labels: texts, and what a model is to say of them.

    {"text": ..., "label": "positive" | 1 | true}                                    classification
    {"text": ..., "label": ["joy", "love"]}                                          multi_label
    {"text": ..., "label": 3.5}                                                      regression
    {"text": ["John", "lives"], "label": ["B-PER", "O"]}                             tagging
    {"text": ..., "context": ..., "label": {"text": [...], "answer_start": [...]}}   span

data.text_key, label_key and pair_key, of a second text, name the keys; the last line has a
pair_key of 'context'.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from gptjax.data import files, sources
from gptjax.data.options import DataOptions, PartOptions
from gptjax.data.sources import Source, Subset
from gptjax.errors import UserError, did_you_mean

_WITH_CLASSES = ("classification", "tagging")  # A text or a word has one label of a set.
_WITH_LABELS = (*_WITH_CLASSES, "multi_label")


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
  """One record.

  Attributes:
    name: where it comes from, FILE:LINE.
    texts: the text, and the second one if there is any; of tagging the words.
    label: of classification an index into the labels; of multi_label any number of them, of tagging
      one a word; of regression a number; of span where in the context the answer starts and stops.
  """

  name: str
  texts: tuple[str, ...]
  label: int | float | tuple[int, ...]


class LabelledTexts:
  """A source of records as one whose documents are their texts."""

  def __init__(self, source: Source, text_key: str, options: DataOptions):
    self._source, self._options = source, options
    self._text_key = text_key
    self._indices = {label: index for index, label in enumerate(options.labels)}

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> str:
    """Returns the texts together; '' for an empty line."""
    record = self._records[index]
    between = self._options.word_separator if self._options.objective == "tagging" else "\n"
    return between.join(record.texts) if record else ""

  def name(self, index: int) -> str:
    return self._source.name(index)

  @property
  def records(self) -> list[Record]:
    """All of them, without empty lines; UserError for one that cannot be read."""
    return [record for record in self._records if record]

  def labels_by_name(self) -> list[list[str]]:
    """Returns the labels of each record, whether or not the options have them; none of an empty
    line."""
    found = []
    for index in range(len(self)):
      fields = self._read_fields(index)
      try:
        found.append([_label_text(one) for one in self._label_list(fields[-1])] if fields else [])
      except UserError as error:
        raise UserError(f"{self.name(index)}: {error}") from error
    return found

  @functools.cached_property
  def _records(self) -> list[Record | None]:
    return [self._read(index) for index in range(len(self))]

  def _read(self, index: int) -> Record | None:
    fields = self._read_fields(index)
    if fields is None:
      return None
    *texts, label = fields
    try:
      if self._options.objective == "tagging":
        texts = self._listed(texts[0], self._text_key, "words")
      for text in texts:
        _check_text(text)
      blank = [not text.strip() for text in texts]
      if all(blank) or (any(blank) and self._options.objective != "tagging"):
        raise UserError("an empty text; fill it or leave the record out.")
      return Record(self.name(index), tuple(texts), self._read_label(label, texts))
    except UserError as error:
      raise UserError(f"{self.name(index)}: {error}") from error

  def _read_fields(self, index: int) -> list[Any] | None:
    """The text, the second one if there is to be any, and the label of a record."""
    text = self._source[index]
    if not text:
      return None
    record = {key: value for key, value in json.loads(text).items() if value is not None}
    options = self._options
    keys = {
      "text_key": self._text_key,
      "pair_key": options.pair_key,
      "label_key": options.label_key,
    }
    for option, key in keys.items():
      if key and key not in record:
        others = sorted(record, key=lambda other: other in keys.values())
        raise UserError(files.missing_key(self.name(index), key, others, option))
    return [record[key] for key in keys.values() if key]

  def _read_label(self, label: Any, texts: Sequence[str]) -> int | float | tuple[int, ...]:
    match self._options.objective:
      case "classification":
        return self._index(label)
      case "regression":
        if (
          isinstance(label, bool) or not isinstance(label, int | float) or not math.isfinite(label)
        ):
          raise UserError(f"{self._options.label_key!r} is {label!r}, not a number.")
        return float(label)
      case "span":
        return _read_answer(label, texts[1])
    indices = tuple(map(self._index, self._label_list(label)))
    if self._options.objective == "tagging" and len(indices) != len(texts):
      raise UserError(f"{len(indices)} tags for {len(texts)} words; each word needs one.")
    return indices

  def _label_list(self, label: Any) -> list[Any]:
    if self._options.objective == "classification":
      return [label]
    return self._listed(label, self._options.label_key, "labels")

  def _listed(self, values: Any, key: str, what: str) -> list[Any]:
    if not isinstance(values, list):
      raise UserError(f"{key!r} is {type(values).__name__}, not a list of {what}.")
    return values

  def _index(self, label: Any) -> int:
    text = _label_text(label)
    if text in self._indices:
      return self._indices[text]
    if not isinstance(label, str) and 0 <= label < len(self._indices):
      return int(label)
    raise UserError(f"no label {text!r}. {did_you_mean(text, self._indices)}")


def _check_text(text: Any) -> None:
  if not isinstance(text, str):
    raise UserError(f"a text is {type(text).__name__}, not a string.")
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f"a text has half a surrogate pair at character {error.start}, which is no Unicode text."
    ) from error


def _label_text(label: Any) -> str:
  if isinstance(label, str):
    return label
  if isinstance(label, int):
    return json.dumps(label)  # A boolean as it is written there.
  raise UserError(f"a label is {label!r}, not a string, a boolean or a whole number.")


def _read_answer(answers: Any, context: str) -> tuple[int, int]:
  """Where the first of SQuAD's answers (Rajpurkar et al. 2016) starts and stops."""
  match answers:
    case {"text": [str(text), *_], "answer_start": [int(start), *_]}:
      if not text or start < 0 or not context.startswith(text, start):
        raise UserError(
          f"the answer {text!r} is not at character {start} of the context, where there is "
          f"{context[max(start, 0) :][: len(text)]!r}."
        )
      return start, start + len(text)
  raise UserError('the answer is not of the form {"text": [TEXT, ...], "answer_start": [N, ...]}.')


def open_pair(part: PartOptions, options: DataOptions) -> tuple[LabelledTexts, LabelledTexts]:
  """Opens a corpus: (training records, validation records).

  Where a fraction is for validation, it is so of each label of a classification: the share of none
  differs by more than one example, and training keeps one.

  Raises:
    UserError: the options contradict each other, or a record cannot be read, among others.
  """
  _check_options(options)
  training, validation = _open_sources(part, options)
  if options.examples_per_label:
    training = _few_examples(LabelledTexts(training, part.text_key, options), training, options)
  return tuple(LabelledTexts(side, part.text_key, options) for side in (training, validation))


def find_labels(options: DataOptions) -> tuple[str, ...]:
  """Returns the labels of the training records, sorted, as numbers if all are whole numbers.

  There are none of regression and span.

  Raises:
    UserError: a record cannot be read.
  """
  if options.objective not in _WITH_LABELS:
    return ()
  found = set()
  for part in options.parts.values():
    training, _ = _open_sources(part, options)
    found.update(*LabelledTexts(training, part.text_key, options).labels_by_name())
  whole = all(re.fullmatch("-?[0-9]+", label) for label in found)
  return tuple(sorted(found, key=int if whole else str))


def _check_options(options: DataOptions) -> None:
  objective = options.objective
  if (objective == "span") > bool(options.pair_key):
    raise UserError("objective='span' needs data.pair_key, the key of the context.")
  if objective == "tagging" and options.pair_key:
    raise UserError("objective='tagging' has no second text. Set --config.data.pair_key=''.")
  if objective not in _WITH_CLASSES and options.class_weights != "none":
    raise UserError(
      f"data.class_weights={options.class_weights!r} needs objective='classification' or "
      f"'tagging', not {objective!r}."
    )
  if options.examples_per_label and (objective != "classification" or len(options.parts) > 1):
    raise UserError(
      f"data.examples_per_label={options.examples_per_label} needs objective='classification' and "
      f"a single corpus, not {objective!r} and {len(options.parts)}."
    )
  if len(set(options.labels)) < len(options.labels):
    raise UserError(f"data.labels has a label twice: {', '.join(options.labels)}.")


def _open_sources(part: PartOptions, options: DataOptions) -> tuple[Source, Source]:
  def split_by_label(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    labels = LabelledTexts(source, part.text_key, options).labels_by_name()
    return _stratified_split(source, labels, fraction, seed)

  by_label = options.objective == "classification"
  of_records = dataclasses.replace(part, text_key="")
  return sources.open_pair(of_records, split_by_label if by_label else sources.split)


def _stratified_split(
  source: Source, labels: Sequence[Sequence[str]], fraction: float, seed: int
) -> tuple[Subset, Subset]:
  """Splits a source into (training, validation) by the one label of each record."""
  order = np.random.default_rng(seed).permutation([i for i, label in enumerate(labels) if label])
  names = np.array([labels[index][0] for index in order])
  by_name = np.argsort(names, kind="stable")
  order, names = order[by_name], names[by_name]
  # Evenly spread over all: so much for any label, and in sum.
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


def _few_examples(texts: LabelledTexts, source: Source, options: DataOptions) -> Subset:
  """The same number of examples of each label, drawn by the seed."""
  count, rng = options.examples_per_label, np.random.default_rng(options.seed)
  members: list[list[int]] = [[] for _ in options.labels]
  for index, record in enumerate(texts._records):
    if record:
      members[record.label].append(index)
  for label, indices in zip(options.labels, members, strict=True):
    if len(indices) < count:
      raise UserError(
        f"data.examples_per_label={count}, but label {label!r} has {len(indices)} training "
        "examples; ask for no more than that."
      )
  chosen = [rng.choice(indices, count, replace=False) for indices in members]
  return Subset(source, np.concatenate(chosen))


def warn_of_duplicates(
  training: Mapping[str, LabelledTexts], validation: Mapping[str, LabelledTexts]
) -> None:
  """Says how many validation texts, case and white space aside, are training texts too."""
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
