"""Reads conversations in several record formats into one: the messages of OpenAI's chat API.

    {"messages": [{"role": ..., "content": ...}, ...]}          OpenAI
    {"conversations": [{"from": ..., "value": ...}, ...]}       ShareGPT
    {"instruction": ..., "input": ..., "output": ...}           Alpaca; the input may be missing
    {"prompt": ..., "completion": ...}                          texts, or lists of messages

A format is recognised by its keys, the first of these that fits. 'system', a text that begins the
conversation, and 'tools', a list for the template, may be added; other keys are ignored.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from gptjax.data.sources import Source, documents
from gptjax.errors import UserError, did_you_mean
from gptjax.small_files import parse_json
from gptjax.templates.chat import ROLES, Message

_SHAREGPT_ROLES = {
  "human": "user",
  "gpt": "assistant",
  "chatgpt": "assistant",
  "observation": "tool",
  "function_response": "tool",
}
_SYSTEM = ("system", "developer")
_TOOL = ("tool", "function", "ipython")
# Roles that may come before each role; None is the start, before which only a system message is.
_MAY_FOLLOW = {
  "user": (None, "assistant"),
  "assistant": ("user", "tool"),
  "tool": ("assistant", "tool"),
}


@dataclasses.dataclass(frozen=True)
class Conversation:
  """A conversation from a record. messages: the first after a system's is a user's, and at least
  one is an assistant's. tools: a variable of templates. name: its origin, FILE:LINE."""

  messages: tuple[Message, ...]
  tools: tuple[Mapping[str, Any], ...]
  name: str

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self))

  @classmethod
  def from_json(cls, text: str) -> "Conversation":
    """Reads a conversation that `to_json` wrote."""
    fields = json.loads(text)
    return cls(tuple(fields["messages"]), tuple(fields["tools"]), fields["name"])


class Conversations:
  """Turns a source of records into a source of conversations, written by `Conversation.to_json`."""

  def __init__(self, records: Source):
    self._records = records

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> str:
    """A conversation as JSON, '' for an empty line; UserError if the record is no conversation."""
    record = self._records[index]
    return read(json.loads(record), self.name(index)).to_json() if record else ""

  def name(self, index: int) -> str:
    return self._records.name(index)

  def sizes(self) -> np.ndarray:
    return self._records.sizes()

  def fingerprint(self) -> str:
    return f"conversations {self._records.fingerprint()}"


def texts(source: Conversations, indices: Iterable[int] | None = None) -> Iterator[str]:
  """Yields the text of each conversation, all or those at `indices`, without a template."""
  for text in documents(source, indices):
    yield "\n".join(message["content"] for message in Conversation.from_json(text).messages)


def read(record: Mapping[str, Any], name: str) -> Conversation:
  """Makes a conversation of a record.

  Args:
    record: in one of the formats above. Keys with the value None count as missing, messages may be
      columns of a table, and arguments of tool calls may be JSON text, which is parsed.
    name: origin of the record.

  Raises:
    UserError: the format is not known; a message is malformed, empty, in the wrong place or has an
      unknown role; or none is the assistant's.
  """
  record = {key: value for key, value in record.items() if value is not None}
  try:
    system = record.get("system")
    said = ([{"role": "system", "content": system}] if system else []) + _messages(record)
    messages = [_message(number, message) for number, message in enumerate(said)]
    _check_order(messages)
    return Conversation(tuple(messages), tuple(_tools(record.get("tools") or [])), name)
  except UserError as error:
    raise UserError(f"{name}: {error}") from error


def _messages(record: Mapping[str, Any]) -> list[Any]:
  match record:
    case {"messages": messages}:
      return _rows(messages, "messages")
    case {"conversations": messages}:
      return [_of_sharegpt(message) for message in _rows(messages, "conversations")]
    case {"instruction": instruction, "output": output}:
      both = [part for part in (instruction, record.get("input")) if part]
      if not all(isinstance(part, str) for part in both):
        raise UserError("'instruction' and 'input' are not both strings.")
      # Alpaca's own template prints the two apart, other templates the content.
      user = {"role": "user", "content": "\n\n".join(both)}
      if len(both) == 2:
        user |= {"instruction": instruction, "input": both[1]}
      return [user, {"role": "assistant", "content": output}]
    case {"prompt": str(prompt), "completion": str(completion)}:
      return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
      ]
    case {"prompt": prompt, "completion": completion}:
      return [*_rows(prompt, "prompt"), *_rows(completion, "completion")]
  raise UserError(
    f"no conversation (found: {', '.join(map(repr, record)) or 'nothing'}). A record has "
    "'messages', 'conversations', 'instruction' and 'output', or 'prompt' and 'completion'."
  )


def _rows(messages: Any, key: str) -> list[Any]:
  """Returns a list of messages; TFDS and older Hugging Face sets have a list for each key."""
  if isinstance(messages, dict) and all(isinstance(column, list) for column in messages.values()):
    if len({*map(len, messages.values())}) != 1:
      raise UserError(f"the columns of {key!r} are not of the same length.")
    rows = zip(*messages.values(), strict=True)
    messages = [dict(zip(messages, row, strict=True)) for row in rows]
  if not isinstance(messages, list):
    raise UserError(f"{key!r} is {type(messages).__name__}, not a list of messages.")
  return messages


def _of_sharegpt(message: Any) -> Any:
  if not isinstance(message, dict) or "from" not in message:
    return message
  role = message["from"]
  return {"role": _SHAREGPT_ROLES.get(str(role), role), "content": message.get("value")}


def _message(number: int, message: Any) -> dict[str, Any]:
  if not isinstance(message, dict):
    raise UserError(f"message {number} is {type(message).__name__}, not an object.")
  message = {key: value for key, value in message.items() if value is not None}
  role = message.get("role")
  if role not in ROLES:
    raise UserError(f"message {number}: no role {role!r}. {did_you_mean(str(role), ROLES)}")
  content = message.get("content", "")
  if isinstance(content, list):  # Parts; a language model reads only text.
    content = "".join(_text_of_part(number, part) for part in content)
  if not isinstance(content, str):
    raise UserError(f"message {number}: its content is {type(content).__name__}, not a string.")
  message["content"] = content
  if calls := message.pop("tool_calls", None):
    message["tool_calls"] = [_tool_call(number, call) for call in _rows(calls, "tool_calls")]
  # The answer of a tool may be empty.
  if not content.strip() and not calls and role not in _TOOL:
    raise UserError(f"message {number}, of role {role!r}, has no content.")
  return message


def _text_of_part(number: int, part: Any) -> str:
  match part:
    case {"type": "text", "text": str(text)}:
      return text
  raise UserError(f"message {number}: a part of its content is no text.")


def _tool_call(number: int, call: Any) -> Any:
  """A tool call whose arguments are an object, for templates; OpenAI's are JSON text."""
  match call:
    case {"function": {"name": str(name), "arguments": str() | dict() as arguments} as function}:
      if isinstance(arguments, str):
        arguments = parse_json(arguments, f"message {number}: the arguments of tool call {name!r}")
      return call | {"function": function | {"arguments": arguments}}
  raise UserError(f"message {number}: a tool call without a function's name and arguments.")


def _tools(tools: Any) -> list[Any]:
  tools = parse_json(tools, "'tools'") if isinstance(tools, str) else tools
  if not isinstance(tools, list):
    raise UserError(f"'tools' is {type(tools).__name__}, not a list.")
  return tools


def _check_order(messages: list[Message]) -> None:
  before = None
  for number, message in enumerate(messages):
    role = message["role"]
    if role in _SYSTEM:
      if number:
        raise UserError(f"message {number}: a {role!r} message, which can only be the first.")
      continue
    role = "tool" if role in _TOOL else role
    if before not in _MAY_FOLLOW[role]:
      place = "is the first" if before is None else f"follows one of {before!r}"
      allowed = " or ".join(repr(r) if r else "the start" for r in _MAY_FOLLOW[role])
      raise UserError(f"message {number}: one of {role!r} {place}; it must follow {allowed}.")
    before = role
  if not any(message["role"] == "assistant" for message in messages):
    raise UserError("no message is the assistant's, so that there is nothing to learn.")
