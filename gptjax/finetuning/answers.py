"""Tasks whose answers are text: conversations, and records written by templates."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

from gptjax.data import cache, sources
from gptjax.data.cache import TokenCache
from gptjax.data.options import DataOptions, PartOptions, check_records
from gptjax.data.sources import Source
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError, check_choice
from gptjax.finetuning import conversations, prompts
from gptjax.finetuning.chat_encoding import ChatEncoder
from gptjax.finetuning.chat_templates import set_template
from gptjax.finetuning.conversations import Conversations
from gptjax.finetuning.prompts import PromptEncoder, Prompts
from gptjax.finetuning.record_packing import PackedConversations
from gptjax.model.config import ModelConfig
from gptjax.objectives.text import TokenTask
from gptjax.templates.prompts import Template, open_template

OVERLONG = ("truncate", "drop")


@dataclasses.dataclass(frozen=True)
class AnswerTask(TokenTask):
  """Learns to write answers. Whole records share a row without seeing each other.

  Attributes:
    overlong: handling of a record that is longer than a row: 'truncate' keeps the part that fits,
      if it has learnt tokens; 'drop' leaves the record out.
  """

  overlong: str = "truncate"

  metrics: ClassVar[tuple[str, ...]] = ("perplexity",)

  def __post_init__(self):
    super().__post_init__()
    check_choice("task.overlong", self.overlong, OVERLONG)

  def open_records(self, part: PartOptions, data: DataOptions) -> tuple[Source, Source]:
    """Opens a corpus as whole records: (training, validation)."""
    check_records(data.parts, self.name)
    return sources.open_pair(dataclasses.replace(part, text_key=""))

  def rows(self, encoded: TokenCache, data: DataOptions, *, training: bool) -> PackedConversations:
    return PackedConversations(encoded, data.sequence_length, self.overlong)

  def warnings(self, rows: PackedConversations) -> Iterator[str]:
    if rows.truncated or rows.dropped:
      yield (
        f"of the records longer than a row of {rows.sequence_length} tokens, {rows.truncated} are "
        f"truncated and {rows.dropped} dropped (task.overlong={self.overlong})."
      )

  def check_model(self, model: ModelConfig) -> None:
    if model.visibility != "causal" or model.encoder_layers:
      raise UserError(
        f"task={self.name!r} needs model.visibility='causal' and no encoder, not "
        f"{model.visibility!r} and model.encoder_layers={model.encoder_layers}."
      )


@dataclasses.dataclass(frozen=True)
class Chat(AnswerTask):
  """Learns the assistant's turns of conversations, in the formats of `finetuning.conversations`.

  Attributes:
    chat_template: 'chatml', 'llama3' or 'alpaca' (gptjax/finetuning/chat_templates.py); '' is the
      tokenizer's own.
    train_on: the tokens that count in the loss: 'assistant' for its turns alone, or 'all'.
  """

  chat_template: str = ""
  train_on: str = "assistant"

  name = "chat"

  def __post_init__(self):
    super().__post_init__()
    check_choice("task.train_on", self.train_on, ("assistant", "all"))

  def open_pair(self, part: PartOptions, data: DataOptions) -> tuple[Source, Source]:
    return tuple(map(Conversations, self.open_records(part, data)))

  def texts(self, source: Source, indices: Iterable[int] | None = None) -> Iterator[str]:
    return conversations.texts(source, indices)

  def settle_tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
    return set_template(tokenizer, self.chat_template)

  def encoder(self, tokenizer: Tokenizer) -> cache.Encoder:
    return ChatEncoder(tokenizer, self.train_on)


@dataclasses.dataclass(frozen=True)
class Prompt(AnswerTask):
  """Learns the answers of records after their prompts, both written by templates.

  Attributes:
    prompt: a file with a Jinja template of the prompt: your own, or one of the presets.
    answer: the text of a Jinja template of the answer, such as ' {{ label }}'.
  """

  prompt: str = ""
  answer: str = ""

  name = "prompt"

  def open_pair(self, part: PartOptions, data: DataOptions) -> tuple[Source, Source]:
    if not (self.prompt and self.answer):
      raise UserError("task='prompt' needs task.prompt, a template's file, and task.answer.")
    prompt = open_template(self.prompt, Path(), "task.prompt")
    answer = Template("task.answer", self.answer)
    return tuple(Prompts(side, prompt, answer) for side in self.open_records(part, data))

  def texts(self, source: Source, indices: Iterable[int] | None = None) -> Iterator[str]:
    return prompts.texts(source, indices)

  def encoder(self, tokenizer: Tokenizer) -> cache.Encoder:
    return PromptEncoder(tokenizer)
