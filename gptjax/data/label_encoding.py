"""Records with labels as tokens with labels."""

import dataclasses
import itertools

import numpy as np
import tqdm

from gptjax.data.labels import LabelledTexts, Record
from gptjax.data.options import DataOptions
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError

_RECORDS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
  """What a model reads, and what it is to say where.

  Attributes:
    name: where it comes from, FILE:LINE.
    tokens: int32 [n].
    second: where among them the second text starts and stops, its end_of_text included, as BERT
      has it; (0, 0) without one.
    targets: (place among the tokens, index of its label, or 0) where the loss counts.
    values: (place among the tokens, column, value) of the values that are not 0.
  """

  name: str
  tokens: np.ndarray
  second: tuple[int, int]
  targets: tuple[tuple[int, int], ...]
  values: tuple[tuple[int, int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Examples:
  """Those of one side of a corpus.

  Attributes:
    examples: in the order of the records.
    truncated: how many of them are longer than a row and lose what is beyond.
    dropped: how many others are longer, or what is to be learnt of them is beyond.
    empty_words: how many words have no token, and so no tag.
  """

  examples: list[Example]
  truncated: int
  dropped: int
  empty_words: int

  @property
  def num_tokens(self) -> int:
    return sum(len(example.tokens) for example in self.examples)


class LabelEncoder:
  """Encodes a record to [start] text [end_of_text], with a second text and [end_of_text] after it.

  For BERT, [CLS] and [SEP]. What reads from left to right and would start as it ends does without
  the start, as classifiers on GPT-2 do. RoBERTa's family has two separators between texts.
  """

  def __init__(self, tokenizer: Tokenizer, options: DataOptions):
    """Prepares the encoding; UserError if a row has no room for any text."""
    self._tokenizer, self._options = tokenizer, options
    end = tokenizer.end_of_text
    self._start = list(tokenizer.start)
    if options.label_at == "last" and end in self._start:
      self._start = []
    self._between = [end] * (2 if tokenizer.roles.get("sep_token") == "</s>" else 1)
    specials = len(self._start) + bool(options.pair_key) * len(self._between) + 1
    self._room = options.sequence_length - specials
    smallest = specials + 1 + bool(options.pair_key)
    if options.sequence_length < smallest:
      raise UserError(
        f"sequence_length={options.sequence_length} has no room for a text beside {specials} "
        f"special tokens. Set --config.sequence_length={smallest} or more."
      )

  def encode(self, texts: LabelledTexts, *, progress: bool = False) -> Examples:
    """Encodes all records, with a progress bar if asked for.

    Raises:
      UserError: a record cannot be read, or none fits a row.
    """
    records, examples = texts.records, []
    truncated = dropped = empty_words = 0
    with tqdm.tqdm(desc="Tokenising", total=len(records), disable=not progress) as bar:
      for begin in range(0, len(records), _RECORDS_AT_ONCE):
        chunk = records[begin : begin + _RECORDS_AT_ONCE]
        pieces = [self._pieces(record) for record in chunk]
        encoded = iter(self._tokenizer.encode_batch([*itertools.chain(*pieces)]))
        for record, own in zip(chunk, pieces, strict=True):
          tokens = [*itertools.islice(encoded, len(own))]
          if self._options.objective == "tagging":
            empty_words += sum(not len(word) for word in tokens)
          overlong = sum(map(len, tokens)) > self._room
          example = self._example(record, tokens)
          if (overlong and self._options.overlong == "drop") or not example.targets:
            dropped += 1
            continue
          truncated += overlong
          examples.append(example)
        bar.update(len(chunk))
    if not examples:
      raise UserError(
        f"none of {len(records)} records from {texts.name(0)} on fits a row of "
        f"{self._options.sequence_length} tokens with what is to be learnt of it "
        f"(data.overlong={self._options.overlong!r}). Raise --config.sequence_length."
      )
    return Examples(examples, truncated, dropped, empty_words)

  def _pieces(self, record: Record) -> list[str]:
    match self._options.objective:
      case "tagging":
        separator = self._options.word_separator
        first, *others = record.texts
        return [first, *(self._after(separator, word) for word in others)]
      case "span":
        question, context = record.texts
        start, stop = record.label
        # A space is part of the token after it.
        before, answer = context[:start].removesuffix(" "), context[start:stop]
        space = context[len(before) : start]
        return [question, before, self._after(space, answer), self._after("", context[stop:])]
    return list(record.texts)

  def _after(self, separator: str, text: str) -> str:
    """A text that is to follow another, which some tokenizers put a space before anyway."""
    text = separator + text
    return text.removeprefix(" ") if self._tokenizer.adds_space else text

  def _example(self, record: Record, pieces: list[np.ndarray]) -> Example:
    """Without targets if what is to be learnt does not fit."""
    objective = self._options.objective
    if objective == "tagging":
      texts = [np.concatenate(pieces)]
    elif objective == "span":
      texts = [pieces[0], np.concatenate(pieces[1:])]
    else:
      texts = pieces
    first, *others = self._cut(texts)
    tokens, second = [*self._start, *first], (0, 0)
    for other in others:
      tokens += [*self._between, *other]
      second = (len(tokens) - len(other), len(tokens) + 1)
    tokens.append(self._tokenizer.end_of_text)
    place = len(tokens) - 1 if self._options.label_at == "last" else 0
    targets, values = ((place, 0),), ()
    match objective:
      case "classification":
        targets = ((place, record.label),)
      case "multi_label":
        values = tuple((place, label, 1.0) for label in record.label)
      case "regression":
        values = ((place, 0, record.label),)
      case "tagging":
        targets = self._tags(record, pieces, len(self._start) + len(first))
      case "span":
        start, stop = (second[0] + place for place in self._answer(pieces))
        values = ((start, 0, 1.0), (stop - 1, 1, 1.0))
        if not start < stop < second[1]:
          targets = ()
    return Example(record.name, np.array(tokens, np.int32), second, targets, values)

  def _cut(self, texts: list[np.ndarray]) -> list[np.ndarray]:
    """Takes from the end of the longer text until both fit, as the `tokenizers` library does."""
    if len(texts) == 1:
      return [texts[0][: self._room]]
    first, second = texts
    half = (self._room + (len(first) > len(second))) // 2
    first = first[: max(self._room - len(second), half)]
    return [first, second[: self._room - len(first)]]

  def _tags(
    self, record: Record, words: list[np.ndarray], stop: int
  ) -> tuple[tuple[int, int], ...]:
    ends = np.cumsum([len(word) for word in words]) + len(self._start)
    tags = []
    for word, end, label in zip(words, ends.tolist(), record.label, strict=True):
      place = end - 1 if self._options.label_at == "last" else end - len(word)
      if len(word) and place < stop:
        tags.append((place, label))
    return tuple(tags)

  def _answer(self, pieces: list[np.ndarray]) -> tuple[int, int]:
    """Where among the context's tokens the answer's start and stop."""
    _, before, answer, _ = pieces
    # A tokenizer may have the space before the answer as a token of its own.
    blank = itertools.takewhile(lambda one: self._tokenizer.decode_bytes([one]).isspace(), answer)
    return len(before) + len(list(blank)), len(before) + len(answer)
