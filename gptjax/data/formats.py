"""What `data.format` decides: from a corpus to the rows of a model, one class a format."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gptjax.data import cache, chat, conversations, labels, prompts, sources
from gptjax.data.chat_encoding import ChatEncoder
from gptjax.data.chat_packing import PackedConversations
from gptjax.data.conversations import Conversations
from gptjax.data.label_encoding import Examples, LabelEncoder
from gptjax.data.label_packing import PackedExamples, pack_examples
from gptjax.data.labels import LabelledTexts
from gptjax.data.options import DataOptions, PartOptions
from gptjax.data.packing import Windows
from gptjax.data.prompts import PromptEncoder, Prompts
from gptjax.data.sources import Source
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError

Encoded = cache.TokenCache | Examples
Rows = Windows | PackedConversations | PackedExamples


class TextFormat:
  """Plain text, all of it to be learnt: a stream of tokens, cut into windows.

  whole: whether documents stay whole, so that the rows are finished `Batch`es, not windows.
  """

  whole = False

  def __init__(self, options: DataOptions):
    self.options = options

  def open_pair(self, part: PartOptions) -> tuple[Source, Source]:
    """Opens a corpus: (training documents, validation documents)."""
    return sources.open_pair(part)

  def texts(self, source: Source, indices: Iterable[int] | None = None) -> Iterator[str]:
    """Yields what is written in the documents, all or those at `indices`."""
    return sources.documents(source, indices)

  def settle(self, tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer that the run is to keep."""
    return tokenizer

  def encode(self, source: Source, tokenizer: Tokenizer, *, progress: bool) -> Encoded:
    """Makes tokens of documents, or opens those that were made before."""
    encoder = self.encoder(tokenizer)
    return cache.open_or_build(source, encoder, self.options.cache_dir, progress=progress)

  def encoder(self, tokenizer: Tokenizer) -> cache.Encoder:
    return tokenizer

  def pack(self, parts: Mapping[str, Encoded], length: int, *, training: bool) -> dict[str, Rows]:
    """Returns the rows of each part; UserError, which names the part, if there are none."""
    rows = {}
    for name, encoded in parts.items():
      try:
        rows[name] = self.rows(encoded, length, training=training)
      except UserError as error:
        raise UserError(f"data part {name!r}: {error}") from error
    return rows

  def rows(self, encoded: Encoded, length: int, *, training: bool) -> Rows:
    return Windows(encoded, length, drop_remainder=training)

  def warnings(self, rows: Rows) -> Iterator[str]:
    """Says what of the documents is not in the rows."""
    return iter(())

  def check(self, training: Mapping[str, Source], validation: Mapping[str, Source]) -> None:
    """Warns of what the two sides should not have in common."""


class _WholeFormat(TextFormat):
  """Records side by side in a row, none of which sees another."""

  whole = True

  def rows(self, encoded: Encoded, length: int, *, training: bool) -> Rows:
    return PackedConversations(encoded, length, self.options.overlong)

  def warnings(self, rows: Rows) -> Iterator[str]:
    if rows.truncated or rows.dropped:
      yield (
        f"of the records longer than a row of {self.options.sequence_length} tokens, "
        f"{rows.truncated} are truncated and {rows.dropped} dropped "
        f"(data.overlong={self.options.overlong})."
      )


class ChatFormat(_WholeFormat):
  """Conversations, of which the assistant's turns are to be learnt."""

  def open_pair(self, part: PartOptions) -> tuple[Source, Source]:
    return tuple(map(Conversations, super().open_pair(part)))

  def texts(self, source: Source, indices: Iterable[int] | None = None) -> Iterator[str]:
    return conversations.texts(source, indices)

  def settle(self, tokenizer: Tokenizer) -> Tokenizer:
    return chat.set_template(tokenizer, self.options.chat_template)

  def encoder(self, tokenizer: Tokenizer) -> cache.Encoder:
    return ChatEncoder(tokenizer, self.options.train_on)


class PromptFormat(_WholeFormat):
  """What templates make of records, of which the answers are to be learnt."""

  def open_pair(self, part: PartOptions) -> tuple[Source, Source]:
    prompt = prompts.open_template(self.options.prompt, Path(), "data.prompt")
    answer = prompts.Template("data.answer", self.options.answer)
    return tuple(Prompts(side, prompt, answer) for side in super().open_pair(part))

  def texts(self, source: Source, indices: Iterable[int] | None = None) -> Iterator[str]:
    return prompts.texts(source, indices)

  def encoder(self, tokenizer: Tokenizer) -> cache.Encoder:
    return PromptEncoder(tokenizer)


class LabelFormat(_WholeFormat):
  """Texts with labels, which are held in memory."""

  def open_pair(self, part: PartOptions) -> tuple[LabelledTexts, LabelledTexts]:
    return labels.open_pair(part, self.options)

  def encode(self, source: LabelledTexts, tokenizer: Tokenizer, *, progress: bool) -> Encoded:
    return LabelEncoder(tokenizer, self.options).encode(source, progress=progress)

  def pack(self, parts: Mapping[str, Encoded], length: int, *, training: bool) -> dict[str, Rows]:
    # A class is weighed by its examples in all parts together.
    return pack_examples(parts, self.options, training=training)

  def warnings(self, rows: Rows) -> Iterator[str]:
    yield from super().warnings(rows)
    if rows.empty_words:
      yield f"words without any token, and so without a tag: {rows.empty_words}."

  def check(self, training: Mapping[str, Any], validation: Mapping[str, Any]) -> None:
    labels.warn_of_duplicates(training, validation)


def make_format(options: DataOptions) -> TextFormat:
  kinds = {"chat": ChatFormat, "prompt": PromptFormat, "labels": LabelFormat}
  return kinds.get(options.format, TextFormat)(options)
