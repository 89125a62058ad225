"""Conversations as tokens that know whether they are to be learnt."""

import dataclasses
import datetime
from collections.abc import Sequence

import numpy as np

from gptjax.data.chat import ChatTemplate
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.finetuning.conversations import Conversation

_VERSION = 1
# A template may tell the date, and the same conversation is to have the same tokens every day. This
# is the one that Llama 3's templates tell where there is no clock.
_TODAY = datetime.date(2024, 7, 26)


@dataclasses.dataclass(frozen=True)
class FlaggingEncoder:
  """What the token cache asks of a tokenizer, for documents that are not all to be learnt.

  It stores 2 * token + 1 for a token that is to be learnt, 2 * token for another.
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
  """For documents that are `Conversation.to_json`.

  Attributes:
    tokenizer: has the chat template.
    train_on: 'assistant' for what the assistant writes, its end of turn included; 'all'.
  """

  train_on: str

  def fingerprint(self) -> str:
    return f"chat {_VERSION} {self.train_on} {self.tokenizer.fingerprint()}"

  def encode_batch(self, texts: Sequence[str]) -> list[list[np.ndarray]]:
    """Encodes each conversation to uint32 [its tokens], of each of `ChatTemplate.examples`;
    UserError for one that the template refuses, by its name."""
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
        # Whoever reads the answer stops there, so that the model never writes what follows.
        ends = np.flatnonzero(np.isin(tokens, list(self.tokenizer.stops)))
        flags[ends[-1] + 1 if len(ends) else len(tokens) :] = False
      stored.append(2 * tokens + flags)
    return np.concatenate(stored).astype(np.uint32)


def encode_pieces(
  tokenizer: Tokenizer, pieces: Sequence[str], *, parse_specials: bool = True
) -> list[np.ndarray]:
  """Encodes a text by pieces: int64 [tokens] for each.

  A piece ends where its tokens do, as a prompt does when a model goes on from it. Where a tokenizer
  puts a space before a text, a piece alone would get one, so the whole is encoded and cut after
  the tokens that the text up to the cut has in common with it.
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
  """Returns what was stored as int32 tokens and whether each is to be learnt, bool."""
  return (stored >> 1).astype(np.int32), (stored & 1).astype(bool)
