"""Calls of tools: how models write them, how they are read, and a grammar for those that must come.

The reader takes a text in pieces of any length, and finds the same whatever the pieces are: a
streamed answer has the calls of one that is not streamed. A call is told when it is whole.
"""

import dataclasses
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.data.tokenizer import Tokenizer
from gptjax.inference.constraints import LanguageConstraint, Languages

_DECODER = json.JSONDecoder()
# A name with its arguments, in Mistral's newer form.
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?(?=\{)")
# Special tokens that belong to calls, and have to be seen in the text.
_MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>")


@dataclasses.dataclass(frozen=True)
class Style:
  """How a family of models writes calls.

  Attributes:
    opening: what a call, or a list of calls, begins with; if empty, calls are the whole answer.
    closing: what ends it; may be empty.
    arguments: the key of a call's arguments, beside its 'name'.
    separator: what is between two calls.
    listed: whether all calls are one JSON array after the opening.
  """

  opening: str
  closing: str
  arguments: str
  separator: str
  listed: bool = False


HERMES = Style("<tool_call>", "</tool_call>", "arguments", "\n")
MISTRAL = Style("[TOOL_CALLS]", "", "arguments", ", ", listed=True)
LLAMA = Style("", "", "parameters", "; ")


def find_style(template: str) -> Style | None:
  """The style that a chat template asks for; None if it takes no tools or is in no known style."""
  if not re.search(r"\btools\b", template) or "<function=" in template:
    return None
  for style in (HERMES, MISTRAL):
    if style.opening in template:
      return style
  return LLAMA if re.search(r"\bparameters\b|python_tag", template) else None


def shown_marks(tokenizer: Tokenizer) -> dict[int, str]:
  """The special tokens of calls, and their texts."""
  return {tokenizer.specials[text]: text for text in _MARKS if text in tokenizer.specials}


@dataclasses.dataclass(frozen=True)
class ToolCall:
  """A call that a model wrote; `arguments` is JSON."""

  name: str
  arguments: str
  id: str = dataclasses.field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


class CallReader:
  """Tells text and calls apart in a growing answer."""

  def __init__(self, style: Style, names: Sequence[str]):
    """Reads calls in a style; where nothing opens them, those of the given functions alone."""
    self._style = style
    self._names = set(names)
    self._rest = ""
    # The text before what is left, since the last call, was it empty?
    self._at_start = True
    self._in_call = False
    self._called = False

  def feed(self, text: str, *, final: bool = False) -> list[str | ToolCall]:
    """Takes the next text, and returns what is certain: pieces of text, and whole calls."""
    self._rest += text
    found: list[str | ToolCall] = []
    while True:
      before = len(self._rest), self._in_call
      (self._read_call if self._in_call else self._read_text)(found, final)
      if before == (len(self._rest), self._in_call) or not self._rest:
        return found

  def _read_text(self, found: list[str | ToolCall], final: bool) -> None:
    opening = self._style.opening
    at = self._rest.find(opening) if opening else self._find_object()
    if at >= 0:
      if opening:
        self._tell(found, self._rest[:at].rstrip())
      self._rest, self._in_call = self._rest[at + len(opening) :], True
      return
    held = 0 if final else self._held()
    text, self._rest = self._rest[: len(self._rest) - held], self._rest[len(self._rest) - held :]
    self._tell(found, text)

  def _tell(self, found: list[str | ToolCall], text: str) -> None:
    # The white space between calls is theirs.
    if self._called and self._at_start:
      text = text.lstrip()
    if text:
      self._at_start = False
      found.append(text)

  def _find_object(self) -> int:
    """Where the answer is a JSON object from its start on; -1 if it is text."""
    text = self._rest.removeprefix("<|python_tag|>").lstrip()
    if self._called:
      text = text.removeprefix(";").lstrip()
    return len(self._rest) - len(text) if self._at_start and text[:1] == "{" else -1

  def _held(self) -> int:
    """How much of the end of the text may belong to a call."""
    rest, opening = self._rest, self._style.opening
    if not opening:
      undecided = self._at_start and "<|python_tag|>".startswith(rest.strip() or "<")
      return len(rest) if undecided or (self._called and rest.strip() in ("", ";")) else 0
    sizes = range(min(len(opening) - 1, len(rest)), 0, -1)
    held = next((size for size in sizes if opening.startswith(rest[-size:])), 0)
    return len(rest) - len(rest[: len(rest) - held].rstrip())

  def _read_call(self, found: list[str | ToolCall], final: bool) -> None:
    style = self._style
    named = _NAMED.match(self._rest) if style.listed else None
    start = named.end() if named else len(self._rest) - len(self._rest.lstrip())
    try:
      value, end = _DECODER.raw_decode(self._rest, start)
    except (ValueError, RecursionError):
      closed = self._rest.find(style.closing) if style.closing else -1
      if closed >= 0:
        self._give_up(found, closed + len(style.closing))
      elif final:
        self._give_up(found, len(self._rest))
      return
    after = self._rest[end:]
    space = len(after) - len(after.lstrip())
    if not final and style.closing.startswith(after.lstrip()) and style.closing != after.lstrip():
      return  # The closing is on its way.
    if style.closing and after.lstrip().startswith(style.closing):
      end += space + len(style.closing)
    values = [{"name": named[1], style.arguments: value}] if named else value
    values = values if isinstance(values, list) else [values]
    calls = [self._call(value) for value in values]
    if not calls or None in calls:
      self._give_up(found, end)
      return
    found += calls
    self._rest, self._in_call = self._rest[end:], False
    self._called = self._at_start = True

  def _give_up(self, found: list[str | ToolCall], end: int) -> None:
    """Tells what opened like a call as the text that it is."""
    text = self._style.opening + self._rest[:end]
    self._at_start = self._called = False
    self._rest, self._in_call = self._rest[end:], False
    self._tell(found, text)

  def _call(self, value: Any) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
      return None
    given = value.get("arguments", value.get("parameters", {}))
    if isinstance(given, str):
      arguments = given
    elif isinstance(given, dict):
      arguments = json.dumps(given, ensure_ascii=False)
    else:
      return None
    if not self._style.opening and value["name"] not in self._names:
      return None
    return ToolCall(value["name"], arguments)


def constrain_calls(
  languages: Languages,
  style: Style,
  tokenizer: Tokenizer,
  functions: Sequence[Mapping[str, Any]],
  *,
  several: bool,
  answer: Mapping[str, Any] | None = None,
) -> LanguageConstraint:
  """The language of calls of the given functions.

  Args:
    languages: makes the constraint.
    style: of the calls.
    tokenizer: the model's, in which marks may be special tokens.
    functions: of which one, or several after each other, is called.
    several: whether there may be more calls than one.
    answer: the JSON Schema of an answer that may come instead.

  Raises:
    UserError: the parameters of a function cannot be enforced.
  """
  rules = [f"args{index}: {_json_rule(one)}" for index, one in enumerate(functions)]
  bodies = [
    f'{_literal(_head(one, style))} args{index} "}}"' for index, one in enumerate(functions)
  ]
  body = f"({' | '.join(bodies)})"
  opening, closing = (_mark(text, tokenizer) for text in (style.opening, style.closing))
  call = body if style.listed or not style.opening else f'{opening} "\\n" {body} "\\n" {closing}'
  calls = f"call ({_literal(style.separator)} call)*" if several else "call"
  if style.listed:
    calls = f'{opening} "[" {calls} "]"'
  rules.append(f"call: {call}")
  rules.append(f"start: {calls}" + (" | answer" if answer is not None else ""))
  if answer is not None:
    rules.append(f"answer: %json {languages.styled(answer)}")
  return languages.lark("\n".join(rules), "tools")


def _json_rule(function: Mapping[str, Any]) -> str:
  nothing = {"type": "object", "properties": {}, "additionalProperties": False}
  return f"%json {Languages.styled(function.get('parameters') or nothing)}"


def _head(function: Mapping[str, Any], style: Style) -> str:
  return f'{{"name": {json.dumps(function["name"])}, "{style.arguments}": '


def _literal(text: str) -> str:
  return json.dumps(text)


def _mark(text: str, tokenizer: Tokenizer) -> str:
  """A mark in a grammar: a special token or plain text."""
  return f"<[{tokenizer.specials[text]}]>" if text in tokenizer.specials else _literal(text)
