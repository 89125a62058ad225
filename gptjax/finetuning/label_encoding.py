"""Encodes records with labels to tokens with labels."""

import dataclasses
import itertools
import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import tqdm

from gptjax.data.options import DataOptions
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.finetuning.records import LabelledTexts, Record

_RECORDS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
  """A position among the tokens where the loss counts: `label` is an index or 0."""

  place: int
  label: int = 0
  weight: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
  """Tokens of a record and their targets.

  Attributes:
    name: origin of the record, FILE:LINE.
    tokens: int32 [n].
    targets: positions where the loss counts; without any, nothing can be learnt.
    second: start and stop of the second text among the tokens, its end_of_text included, as in
      BERT; (0, 0) without one.
    values: (position among the tokens, column, value) of the values that are not 0.
    truncated: whether it was longer than a row and cut.
    segments: lengths of parts of the tokens that do not see each other; () is one part.
    empty_words: how many of its words have no token, and so no tag.
  """

  name: str
  tokens: np.ndarray
  targets: tuple[Target, ...]
  second: tuple[int, int] = (0, 0)
  values: tuple[tuple[int, int, float], ...] = ()
  truncated: bool = False
  segments: tuple[int, ...] = ()
  empty_words: int = 0


@dataclasses.dataclass(frozen=True)
class Examples:
  """The training or validation examples of a corpus.

  Attributes:
    examples: in the order of the records.
    truncated: how many of them were longer than a row and cut.
    dropped: how many others were longer than a row, or had all targets beyond it.
    empty_words: how many words have no token, and so no tag.
  """

  examples: list[Example]
  truncated: int
  dropped: int
  empty_words: int

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, index: int) -> Example:
    return self.examples[index]

  @property
  def num_tokens(self) -> int:
    return sum(len(example.tokens) for example in self.examples)

  @property
  def checksum(self) -> int:
    """CRC-32 of tokens and targets, independent of the records' origin."""
    checksum = 0
    for example in self.examples:
      learnt = repr((example.second, example.targets, example.values))
      checksum = zlib.crc32(learnt.encode(), zlib.crc32(example.tokens, checksum))
    return checksum


@dataclasses.dataclass(frozen=True)
class Layout:
  """The tokens of one or two texts between special tokens.

  Attributes:
    tokens: all tokens.
    first: (start, stop) of the first text.
    second: the same, with its end_of_text, of the second; (0, 0) without one.
    place: position at which a model scores the whole.
    truncated: whether the texts were cut to fit.
  """

  tokens: np.ndarray
  first: tuple[int, int]
  second: tuple[int, int]
  place: int
  truncated: bool


class Assembler(Protocol):
  """The part of a task that makes examples.

  Attributes:
    num_texts: how many texts an example has, 1 or 2, between special tokens.
    overlong: 'truncate' or 'drop'.
  """

  num_texts: int
  overlong: str

  def pieces(self, record: Record, encoder: "LabelEncoder") -> list[str]:
    """The texts to tokenise separately."""

  def example(self, record: Record, pieces: list[np.ndarray], encoder: "LabelEncoder") -> Example:
    """Makes an example of the tokens of the pieces, without targets if none fit."""


class LabelEncoder:
  """Encodes a record to [start] text [end_of_text], with a second text and [end_of_text] after it.

  In BERT these are [CLS] and [SEP]. A causal model whose start and end are the same token omits the
  start, like classifiers on GPT-2. RoBERTa's family has two separators between texts.

  Attributes:
    tokenizer: the tokenizer.
    scores_at: see `DataOptions`.
    sequence_length: tokens of a row.
    room: tokens of a row without the special ones.
    smallest: tokens of a row that has room for one token of each text.
  """

  def __init__(self, tokenizer: Tokenizer, data: DataOptions, assembler: Assembler):
    """Prepares the encoding; UserError if a row has no room for any text."""
    self.tokenizer, self.scores_at = tokenizer, data.scores_at
    self._assembler, self.sequence_length = assembler, data.sequence_length
    end = tokenizer.end_of_text
    self._start = list(tokenizer.start)
    if data.scores_at == "last" and end in self._start:
      self._start = []
    self._between = [end] * (2 if tokenizer.roles.get("sep_token") == "</s>" else 1)
    pairs = assembler.num_texts == 2
    specials = len(self._start) + pairs * len(self._between) + 1
    self.room = data.sequence_length - specials
    self.smallest = specials + 1 + pairs
    if data.sequence_length < self.smallest:
      raise UserError(
        f"sequence_length={data.sequence_length} has no room for a text beside {specials} "
        f"special tokens. Set --config.sequence_length={self.smallest} or more."
      )

  def encode(self, texts: LabelledTexts, *, progress: bool = False) -> Examples:
    """Encodes all records, with a progress bar if asked for.

    Raises:
      UserError: a record cannot be read, or none fits a row.
    """
    assembler, records, examples = self._assembler, texts.records, []
    truncated = dropped = empty_words = 0
    with tqdm.tqdm(desc="Tokenising", total=len(records), disable=not progress) as bar:
      for begin in range(0, len(records), _RECORDS_AT_ONCE):
        chunk = records[begin : begin + _RECORDS_AT_ONCE]
        pieces = [assembler.pieces(record, self) for record in chunk]
        encoded = iter(self.tokenizer.encode_batch([*itertools.chain(*pieces)]))
        for record, own in zip(chunk, pieces, strict=True):
          tokens = [*itertools.islice(encoded, len(own))]
          example = assembler.example(record, tokens, self)
          empty_words += example.empty_words
          if (example.truncated and assembler.overlong == "drop") or not example.targets:
            dropped += 1
            continue
          truncated += example.truncated
          examples.append(example)
        bar.update(len(chunk))
    if not examples:
      raise UserError(
        f"none of {len(records)} records from {texts.name(0)} on fits a row of "
        f"{self.sequence_length} tokens with what is to be learnt of it "
        f"(task.overlong={assembler.overlong!r}). Raise --config.sequence_length."
      )
    return Examples(examples, truncated, dropped, empty_words)

  def after(self, separator: str, text: str) -> str:
    """A text to put after another; some tokenizers put a space before it anyway."""
    text = separator + text
    return text.removeprefix(" ") if self.tokenizer.adds_space else text

  def lay_out(self, texts: Sequence[np.ndarray]) -> Layout:
    """Puts special tokens around one or two texts, cut to fit a row."""
    first, *others = self._cut(texts)
    start = len(self._start)
    tokens, second = [*self._start, *first], (0, 0)
    for other in others:
      tokens += [*self._between, *other]
      second = (len(tokens) - len(other), len(tokens) + 1)
    tokens.append(self.tokenizer.end_of_text)
    return Layout(
      tokens=np.array(tokens, np.int32),
      first=(start, start + len(first)),
      second=second,
      place=len(tokens) - 1 if self.scores_at == "last" else 0,
      truncated=sum(map(len, texts)) > self.room,
    )

  def _cut(self, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Takes from the end of the longer text until both fit, as the `tokenizers` library does."""
    if len(texts) == 1:
      return [texts[0][: self.room]]
    first, second = texts
    half = (self.room + (len(first) > len(second))) // 2
    first = first[: max(self.room - len(second), half)]
    return [first, second[: self.room - len(first)]]
