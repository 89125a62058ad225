"""Labels new texts with a fine-tuned model, in their order, however long they are."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from gptjax import config as config_lib
from gptjax.data import files
from gptjax.data.options import read_options
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError, check_choice, check_number
from gptjax.finetuning.label_encoding import Example, LabelEncoder
from gptjax.finetuning.labels import LabelTask
from gptjax.finetuning.records import LabelledTexts, Record
from gptjax.model.gpt import GPT
from gptjax.objectives.task import make_task
from gptjax.small_files import write_atomically
from gptjax.training.pretrained import is_run, labels_of
from gptjax.training.resolve import resolve

# What becomes of a text that is longer than a row.
OVERLONG = ("windows", "head_tail", "head")
# The share of the beginning under 'head_tail': 128 of 510 tokens in Sun et al. 2019
# (arXiv:1905.05583), section 5.3.1.
_HEAD = 0.25


@dataclasses.dataclass(frozen=True)
class Prediction:
  """The label that a model gives a record.

  Attributes:
    texts: {key: text, or words} of the record.
    label: the label, the labels, the number, or the tag of each word, None
      of a word without tokens.
    probabilities: of the labels, or of each word's tag; None where there are none.
    windows: how many rows the text was read in.
    truncated: whether a part of it was not read.
  """

  texts: Mapping[str, Any]
  label: Any
  probabilities: Any
  windows: int
  truncated: bool

  def as_json(self) -> dict[str, Any]:
    fields = {**self.texts, "label": self.label}
    if self.probabilities is not None:
      fields["probabilities"] = self.probabilities
    if self.windows > 1:
      fields["windows"] = self.windows
    return fields | ({"truncated": True} if self.truncated else {})


class _Unlabelled:
  """Reads the texts of records for a task, and no label."""

  def __init__(self, task: LabelTask):
    self._task, self.between = task, task.between

  def record_keys(self, text_key: str) -> dict[str, str]:
    keys = self._task.record_keys(text_key)
    return {option: key for option, key in keys.items() if option != "task.label_key"}

  def read(self, fields: Mapping[str, Any]) -> tuple[Sequence[Any], Any]:
    texts = self._task.read_texts(fields)
    return texts, self._task.blank_label(texts)

  def label_names(self, label: Any) -> list[str]:
    return []


def config_of(checkpoint: str) -> ConfigDict:
  """The config of a run that learnt labels, or one for another checkpoint with a head of labels.

  Raises:
    UserError: the model has no such head.
  """
  if is_run(checkpoint) and "data" in (saved := config_lib.open_saved(epath.Path(checkpoint))):
    return saved
  if (labels := labels_of(checkpoint)) is None:
    raise UserError(f"--checkpoint={checkpoint}: the model writes text; it has no labels to give.")
  overrides = {"init_from": checkpoint}
  if hasattr(make_task({"name": labels.task}), "labels"):
    overrides["task.labels"] = labels.names
  return resolve(config_lib.load(f"finetune.py:task={labels.task}", overrides))


def predict(
  path: str,
  config: Any,
  model: GPT,
  tokenizer: Tokenizer,
  *,
  overlong: str = "windows",
  max_length: int = 0,
  batch_size: int = 32,
  text_key: str = "",
  progress: bool = False,
) -> Iterator[Prediction]:
  """Yields what a model says of each record of a file, in its order.

  Args:
    path: records, as `files.open_by_suffix` takes them; a label that they have is not read.
    config: of the run (`config_of`).
    model: of it.
    tokenizer: of it.
    overlong: what is read of a text that is longer than a row: all of it, in 'windows' of one
      length, whose probabilities are averaged (of tagging, each word is in one of them); its
      'head_tail'; or its 'head', as in training.
    max_length: tokens of a row; 0 is that of the run.
    batch_size: examples of a batch.
    text_key: where the text of a record is; '' is where it was in training.
    progress: show bars on stderr.

  Raises:
    UserError: a record cannot be read, before anything is predicted, or the task has no labels.
  """
  task, data = make_task(config.task), read_options(config)
  if not isinstance(task, LabelTask):
    raise UserError(f"task={task.name!r} writes text; it has no labels to give.")
  task.blank_label([])
  check_choice("--overlong", overlong, OVERLONG)
  position = model.config.position
  room = position.room if position.kind == "learned" else math.inf
  if max_length:
    smallest = LabelEncoder(tokenizer, data, task).smallest
    check_number("--max_length", max_length, at_least=smallest, at_most=room)
    data = dataclasses.replace(data, sequence_length=max_length)
  if task.is_by_word and overlong == "head_tail":
    raise UserError(f"--overlong=head_tail: task={task.name!r} labels each word; use windows.")
  text_key = text_key or next(iter(data.parts.values())).text_key
  reader = _Unlabelled(task)
  records = LabelledTexts(files.open_by_suffix(path, "", "error"), text_key, reader).records
  encoder = LabelEncoder(tokenizer, data, task)
  laid_out = [
    _lay_out(record, encoder, task, overlong)
    for record in tqdm(records, desc="Tokenising", unit="text", disable=not progress)
  ]
  examples = [example for one in laid_out for example in one.examples if example.targets]
  answers = task.ask(model, examples, data, batch_size=batch_size)
  keys = [*reader.record_keys(text_key).values()]
  for record, one in zip(
    records, tqdm(laid_out, desc="Labels", unit="text", disable=not progress), strict=True
  ):
    yield _make_prediction(record, keys, one, answers, task)


@dataclasses.dataclass(frozen=True)
class _LaidOut:
  """The windows of a record as examples; whether a part is in none; which words have tokens."""

  examples: list[Example]
  truncated: bool
  words: list[bool]


def _lay_out(record: Record, encoder: LabelEncoder, task: LabelTask, overlong: str) -> _LaidOut:
  pieces = encoder.tokenizer.encode_batch(task.pieces(record, encoder))
  if task.is_by_word:
    windows, truncated = _windows_of_words(pieces, encoder.room, overlong)
  else:
    windows, truncated = windows_of_texts(pieces, encoder.room, overlong)
  examples = []
  for window in windows:
    part = dataclasses.replace(record, label=task.blank_label(window))
    examples.append(task.example(part, window, encoder))
  return _LaidOut(examples, truncated, [len(piece) > 0 for piece in pieces])


def _make_prediction(
  record: Record, keys: Sequence[str], one: _LaidOut, answers: Iterator[Any], task: LabelTask
) -> Prediction:
  own = [next(answers) for example in one.examples if example.targets]
  texts = dict(zip(keys, [[*record.texts]] if task.is_by_word else record.texts, strict=True))
  label = probabilities = None
  if own:
    answer = own[0] if len(own) == 1 else task.join(own)
    label, probabilities = task.say(answer.predicted), task.say_probabilities(answer)
  if task.is_by_word:  # A word without tokens has no tag; nor has one that was not read.
    label, probabilities = (_spread(values or [], one.words) for values in (label, probabilities))
  return Prediction(texts, label, probabilities, len(own), one.truncated)


def _spread(values: Sequence[Any], filled: Sequence[bool]) -> list[Any]:
  """The values at the places that are filled, in order, and None elsewhere."""
  left = iter(values)
  return [next(left, None) if place else None for place in filled]


def windows_of_texts(
  texts: Sequence[np.ndarray], room: int, overlong: str
) -> tuple[list[list[np.ndarray]], bool]:
  """Cuts one text, or the longer of two, into windows of about one length that fit a row.

  The shorter of two texts is in each window; of one that has more than half of the room, only its
  head and tail fit there.

  Returns:
    The texts of each window, and whether a part is in none.
  """
  if sum(map(len, texts)) <= room:
    return [[*texts]], False
  longest = int(np.argmax([len(text) for text in texts]))
  others = {
    place: _shorten(text, room // 2, overlong)
    for place, text in enumerate(texts)
    if place != longest
  }
  space = room - sum(map(len, others.values()))
  if overlong == "windows":
    parts = np.array_split(texts[longest], -(-len(texts[longest]) // space))
  else:
    parts = [_shorten(texts[longest], space, overlong)]
  windows = [[others.get(place, part) for place in range(len(texts))] for part in parts]
  read = sum(map(len, parts)) + sum(map(len, others.values()))
  return windows, read < sum(map(len, texts))


def _shorten(text: np.ndarray, room: int, overlong: str) -> np.ndarray:
  if len(text) <= room:
    return text
  head = room if overlong == "head" else round(room * _HEAD)
  return np.concatenate([text[:head], text[len(text) - (room - head) :]])


def _windows_of_words(
  words: Sequence[np.ndarray], room: int, overlong: str
) -> tuple[list[list[np.ndarray]], bool]:
  """Cuts words into windows that fit a row, each word whole in one of them."""
  windows, used = [[]], 0
  for word in words:
    word = word[:room]  # The tag of what is longer still is read off a part of it.
    if used + len(word) > room:
      windows.append([])
      used = 0
    windows[-1].append(word)
    used += len(word)
  return (windows, False) if overlong == "windows" else (windows[:1], len(windows) > 1)


def write(path: str, predictions: Iterable[Prediction]) -> str:
  """Writes predictions as JSON lines, or as CSV to FILE.csv, and says how they were read."""
  predictions = [*predictions]
  fields = [one.as_json() for one in predictions]
  if path.endswith(".csv"):
    content = _as_csv(fields)
  else:
    content = "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in fields)
  write_atomically(epath.Path(path).expanduser(), content)
  windows, truncated = (
    sum(one.windows > 1 for one in predictions),
    sum(one.truncated for one in predictions),
  )
  return (
    f"{path}: {len(predictions):,} texts labelled; {windows:,} were read in windows, "
    f"{truncated:,} only in part"
  )


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
  """A column for each key and for each label's probability; lists are written as JSON."""
  flat = []
  for row in rows:
    cells = {}
    for key, value in row.items():
      if isinstance(value, Mapping):
        cells |= {f"p({label})": p for label, p in value.items()}
      else:
        is_list = isinstance(value, list)
        cells[key] = json.dumps(value, ensure_ascii=False) if is_list else value
    flat.append(cells)
  columns = dict.fromkeys(column for cells in flat for column in cells)
  stream = io.StringIO()
  writer = csv.DictWriter(stream, [*columns], lineterminator="\n")
  writer.writeheader()
  writer.writerows(flat)
  return stream.getvalue()
