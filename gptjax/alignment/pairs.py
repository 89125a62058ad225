"""Pairs of answers to one prompt, a better and a worse one: records, tokens and rows.

    {"prompt": ..., "chosen": ..., "rejected": ...}             texts, or lists of messages (TRL)
    {"chosen": [...], "rejected": [...]}                        whole conversations (TRL); 'prompt',
                                                                their first message, may be added
                                                                (UltraFeedback)
    {"conversations": [...], "chosen": {...}, "rejected": {...}}    ShareGPT
    {"info": {"post": ...}, "summaries": [{"text": ...}, ...], "choice": 0}     OpenAI's summaries

'system' and 'tools' are as in `finetuning.conversations`; other keys are ignored.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.data.batch import Batch
from gptjax.data.cache import TokenCache
from gptjax.data.packing import pad
from gptjax.data.sources import documents
from gptjax.errors import UserError
from gptjax.finetuning.chat_encoding import ChatEncoder, FlaggingEncoder, decode_flags
from gptjax.finetuning.conversations import Conversation, Conversations, read
from gptjax.finetuning.record_packing import document_spans, pack_whole

_VERSION = 1


class Pairs(Conversations):
  """Turns a source of records into a source of pairs, each the JSON of its two conversations."""

  def __getitem__(self, index: int) -> str:
    """A pair as JSON, '' for an empty line; UserError if the record is no pair."""
    record = self._records[index]
    if not record:
      return ""
    pair = read_pair(json.loads(record), self.name(index))
    return json.dumps([one.to_json() for one in pair])

  def fingerprint(self) -> str:
    return f"pairs {self._records.fingerprint()}"


def texts(source: Pairs, indices: Iterable[int] | None = None) -> Iterator[str]:
  """Yields the text of each pair, all or those at `indices`, without a template."""
  for text in documents(source, indices):
    chosen, rejected = map(Conversation.from_json, json.loads(text))
    messages = [*chosen.messages, rejected.messages[-1]]
    yield "\n".join(message["content"] for message in messages)


def read_pair(record: Mapping[str, Any], name: str) -> tuple[Conversation, Conversation]:
  """Makes the better and the worse conversation of a record.

  Args:
    record: in one of the formats above.
    name: origin of the record.

  Raises:
    UserError: the format is not known, a conversation cannot be read or does not end with an
      answer, the two have other prompts, or the answers are the same.
  """
  shared = {key: record[key] for key in ("system", "tools") if record.get(key)}
  sides = []
  for told in _sides(record, name):
    conversation = read(shared | told, name)
    if conversation.messages[-1]["role"] != "assistant":
      raise UserError(f"{name}: a conversation of the pair does not end with an answer.")
    sides.append(conversation)
  chosen, rejected = sides
  if chosen.messages[:-1] != rejected.messages[:-1]:
    raise UserError(f"{name}: 'chosen' and 'rejected' answer other prompts.")
  if chosen.messages[-1] == rejected.messages[-1]:
    raise UserError(f"{name}: 'chosen' and 'rejected' are the same answer.")
  return chosen, rejected


def _sides(record: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
  """The better and the worse side of a record, each as `conversations.read` takes it."""
  match record:
    case {"info": {"post": str(post)}, "summaries": [first, second], "choice": int(choice)}:
      if choice not in (0, 1):
        raise UserError(f"{name}: 'choice' is {choice}, not 0 or 1, one of the two summaries.")
      answers = [first, second] if choice == 0 else [second, first]
      return [{"prompt": post, "completion": answer.get("text")} for answer in answers]
    case {"conversations": list(before), "chosen": dict(chosen), "rejected": dict(rejected)}:
      return [{"conversations": [*before, answer]} for answer in (chosen, rejected)]
    case {
      "chosen": [{"role": "user" | "system" | "developer"}, *_] as chosen,
      "rejected": rejected,
    }:
      return [{"messages": whole} for whole in (chosen, rejected)]
    case {"prompt": prompt, "chosen": chosen, "rejected": rejected} if chosen and rejected:
      return [{"prompt": prompt, "completion": answer} for answer in (chosen, rejected)]
  missing = [key for key in ("prompt", "chosen", "rejected") if not record.get(key)]
  raise UserError(
    f"{name}: no pair of answers: {', '.join(map(repr, missing))} "
    f"{'is' if len(missing) == 1 else 'are'} missing or empty (found: "
    f"{', '.join(map(repr, record)) or 'nothing'})."
  )


@dataclasses.dataclass(frozen=True)
class PairEncoder(FlaggingEncoder):
  """Encodes the documents of `Pairs`: the better conversation, a mark, and the worse one. Only
  their last answers are learnt."""

  @property
  def mark(self) -> int:
    """What separates the two: no token of the tokenizer."""
    return 2 * self.tokenizer.vocab_size

  @property
  def vocab_size(self) -> int:
    return self.mark + 1

  def fingerprint(self) -> str:
    chats = ChatEncoder(self.tokenizer, "assistant")
    return f"pairs {_VERSION} {chats.fingerprint()}"

  def encode_batch(self, texts: Sequence[str]) -> list[list[np.ndarray]]:
    """Encodes each pair to one array, uint32 [tokens]; UserError, with its name, for one that the
    chat template refuses."""
    conversations = [side for text in texts for side in json.loads(text)]
    encoded = ChatEncoder(self.tokenizer, "assistant").encode_batch(conversations)
    sides = [_last_answer(examples[-1]) for examples in encoded]
    mark = np.array([self.mark], np.uint32)
    pairs = zip(sides[::2], sides[1::2], strict=True)
    return [[np.concatenate([chosen, mark, rejected])] for chosen, rejected in pairs]


def _last_answer(stored: np.ndarray) -> np.ndarray:
  """Stored tokens of which only those of the last answer are still flagged."""
  flags = stored & 1
  before = np.flatnonzero(flags == 0)
  last = np.flatnonzero(flags)[-1]
  # The last token before the answer that is not flagged.
  start = before[before < last][-1] + 1 if (before < last).any() else 0
  kept = np.arange(len(stored)) >= start
  return stored - flags * ~kept


class PackedPairs:
  """Rows of T positions with every pair once, except dropped ones; a pair is in one row.

  The conversations of a pair are two segments, the better one first; they do not see each other.
  A row is a `Batch` whose `weights` are 1 at the first learnt target of each pair, and whose
  `values` [T, 1] are 1 at the learnt targets of better answers and -1 at those of worse ones.

  Attributes:
    sequence_length: length of a row, T.
    truncated: how many pairs have a conversation that was cut.
    dropped: how many were left out.
  """

  def __init__(self, cache: TokenCache, mark: int, sequence_length: int, overlong: str):
    """Packs what a `PairEncoder` encoded.

    Args:
      cache: the pairs.
      mark: the encoder's.
      sequence_length: length of a row, T.
      overlong: of a pair that is longer than a row, 'truncate' keeps the first T / 2 positions of
        each conversation, if both still have learnt targets; 'drop' keeps none.

    Raises:
      UserError: no pair is left.
    """
    self._tokens, self._mark, self.sequence_length = cache.tokens, mark, sequence_length
    self._starts, self._stops = document_spans(cache)
    # Without the mark, and a token of each conversation that is a target alone.
    places = self._stops - self._starts - 3
    fits, shortest = places <= sequence_length, places.min()
    kept = fits.copy()
    if overlong == "truncate":
      for one in np.flatnonzero(~fits):
        sides = self._read(one)
        kept[one] = all(learnt[1:].any() for _, learnt in sides)
        places[one] = sum(len(tokens) - 1 for tokens, _ in sides)
    self.truncated, self.dropped = int((kept & ~fits).sum()), int((~kept).sum())
    if not kept.any():
      raise UserError(
        f"none of {cache.num_documents} pairs fits a row of {sequence_length} tokens "
        f"(task.overlong={overlong!r}); the shortest takes {shortest}. "
        f"Set --config.sequence_length={shortest} or more."
      )
    kept = np.flatnonzero(kept)
    self._members, self._row_ends = pack_whole(kept, places, sequence_length)

  def __len__(self) -> int:
    return len(self._row_ends)

  def __getitem__(self, index: int) -> Batch:
    """Returns a row, each field [T] but for `values`."""
    if not 0 <= index < len(self):
      raise IndexError(index)
    first = self._row_ends[index - 1] if index else 0
    fields: list[list[np.ndarray]] = [[] for _ in range(6)]
    for number, one in enumerate(self._members[first : self._row_ends[index]]):
      for side, (tokens, learnt) in enumerate(self._read(one)):
        targets, size = learnt[1:], len(tokens) - 1
        weights = np.zeros(size, np.float32)
        if not side:
          weights[np.argmax(targets)] = 1
        segment = np.full(size, 2 * number + side + 1, np.int32)
        positions = np.arange(size, dtype=np.int32)
        signs = targets.astype(np.float32) * (-1 if side else 1)
        of_side = (tokens[:-1], tokens[1:], weights, segment, positions, signs)
        for field, part in zip(fields, of_side, strict=True):
          field.append(part)
    *whole, signs = (pad(np.concatenate(field), self.sequence_length) for field in fields)
    return Batch(*whole, values=signs[:, None])

  def _read(self, one: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and which are learnt, of the better and the worse conversation, as they fit a row."""
    stored = self._tokens[self._starts[one] : self._stops[one]]
    at = int(np.flatnonzero(stored == self._mark)[0])
    sides = [stored[:at], stored[at + 1 :]]
    if sum(len(side) - 1 for side in sides) > self.sequence_length:
      sides = [side[: self.sequence_length // 2 + 1] for side in sides]
    return [decode_flags(side) for side in sides]
