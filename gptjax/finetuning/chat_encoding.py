"""Encodes conversations to tokens with a flag for those that are learnt."""

import dataclasses
import datetime
from collections.abc import Sequence

import numpy as np

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.finetuning.conversations import Conversation
from gptjax.templates.chat import ChatTemplate

_VERSION = 1
# A template may print the date, but a conversation must have the same tokens every day. This is the
# default date of Llama 3's templates.
_TODAY = datetime.date(2024, 7, 26)


@dataclasses.dataclass(frozen=True)
class FlaggingEncoder:
  """An encoder for the token cache that flags the tokens to learn.

  It stores 2 * token + 1 for a token that is learnt, 2 * token for any other.
  """

  tokenizer: Tokenizer

  @property
  def vocab_size(self) -> int:
    return 2 * self.tokenizer.vocab_size

  @property
  def end_of_text(self) -> int:
    return 2 * self.tokenizer.end_of_text

  @property
  def adds_space(self) -> bool:
    return self.tokenizer.adds_space


@dataclasses.dataclass(frozen=True)
class ChatEncoder(FlaggingEncoder):
  """Encodes documents that `Conversation.to_json` made.

  Attributes:
    tokenizer: has the chat template.
    train_on: 'assistant' for the assistant's tokens, its end of turn included, or 'all'.
  """

  train_on: str

  def fingerprint(self) -> str:
    return f"chat {_VERSION} {self.train_on} {self.tokenizer.fingerprint()}"

  def encode_batch(self, texts: Sequence[str]) -> list[list[np.ndarray]]:
    """Encodes each conversation to uint32 [tokens] for each of its `ChatTemplate.examples`;
    UserError, with its name, for one that the template refuses."""
    template = ChatTemplate(self.tokenizer, _TODAY)
    return [self._encode(template, Conversation.from_json(text)) for text in texts]

  def _encode(self, template: ChatTemplate, conversation: Conversation) -> list[np.ndarray]:
    messages, tools = conversation.messages, conversation.tools
    try:
      if self.train_on == "all":
        text = template.render(messages, add_generation_prompt=False, tools=tools)
        return [self._store([(text, True)])]
      return [self._store(pieces) for pieces in template.examples(messages, tools)]
    except UserError as error:
      raise UserError(f"{conversation.name}: {error}") from error

  def _store(self, pieces: Sequence[tuple[str, bool]]) -> np.ndarray:
    stored = []
    tokens_of = encode_pieces(self.tokenizer, [text for text, _ in pieces])
    for (_, learnt), tokens in zip(pieces, tokens_of, strict=True):
      flags = np.full(len(tokens), learnt)
      if learnt and self.train_on == "assistant":
        # Generation stops at the end of a turn, so the model never writes what follows.
        ends = np.flatnonzero(np.isin(tokens, list(self.tokenizer.stops)))
        flags[ends[-1] + 1 if len(ends) else len(tokens) :] = False
      stored.append(2 * tokens + flags)
    return np.concatenate(stored).astype(np.uint32)


def encode_pieces(
  tokenizer: Tokenizer, pieces: Sequence[str], *, parse_specials: bool = True
) -> list[np.ndarray]:
  """Encodes each piece of a text: int64 [tokens] for each.

  Pieces are encoded separately, as a prompt is for generation. But if a tokenizer puts a space
  before each text, the whole text is encoded, and cut after the tokens that it shares with the
  encoded text up to the cut.
  """
  encode = tokenizer.encode_with_specials if parse_specials else tokenizer.encode
  if not tokenizer.adds_space:
    return [np.array(encode(piece), np.int64) for piece in pieces]
  text = "".join(pieces)
  whole = np.array(encode(text), np.int64)
  cuts = []
  for end in np.cumsum([len(piece) for piece in pieces])[:-1]:
    start = np.array(encode(text[:end]), np.int64)
    length = min(len(start), len(whole))
    differs = np.flatnonzero(start[:length] != whole[:length])
    cuts.append(int(differs[0]) if len(differs) else length)
  return np.split(whole, np.maximum.accumulate(cuts) if cuts else [])


def decode_flags(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Splits stored values into int32 tokens and bool, whether each is learnt."""
  return (stored >> 1).astype(np.int32), (stored & 1).astype(bool)
