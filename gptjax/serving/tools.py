"""Calls of tools: how models write them, how they are read, and a grammar for those that must come.

The reader takes a text in pieces of any length, and finds the same whatever the pieces are: a
streamed answer has the calls of one that is not streamed, and their arguments as they are written.
"""

import dataclasses
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.data.tokenizer import Tokenizer
from gptjax.inference.constraints import LanguageConstraint, Languages

# What comes before the arguments of a call that is an object, and of one in Mistral's newer form.
_HEAD = re.compile(
  r'\{\s*(?:"(?:id|type)"\s*:\s*"[\w.-]*"\s*,\s*)*"name"\s*:\s*"([\w.-]+)"\s*,\s*'
  r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_NAMED = re.compile(r"([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?(?=\{)")
_SPACE, _LIST = re.compile(r"\s*"), re.compile(r"\s*\[?\s*")
_BETWEEN = " \t\r\n-+.,:"  # Beside letters and digits, what JSON has outside strings and brackets.
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
  """The beginning of a call that a model wrote; its arguments follow."""

  name: str
  id: str = dataclasses.field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


@dataclasses.dataclass(frozen=True)
class Arguments:
  """The next piece of the last call's arguments, as the model writes them."""

  text: str


class CallReader:
  """Tells text and calls apart in a growing answer.

  What opens like a call is one as soon as its name is that of a given function and its arguments
  begin as an object, whatever comes then: the answer may end before they do. Other calls, such as
  of other functions or with the arguments before the name, are told when they are whole.
  """

  def __init__(self, style: Style, names: Sequence[str]):
    """Reads calls in a style; where nothing opens them, those of the given functions alone."""
    self._style = style
    self._names = tuple(names)
    self._rest = ""
    # The text before what is left, since the last call, was it empty?
    self._at_start = True
    self._called = False
    self._read = self._read_text
    self._opening = ""  # What is text if no call follows.
    self._listed = False  # Are the calls in an array?
    # A value that is being read, whether it is arguments, and whether it is not within an object.
    self._value, self._is_told, self._is_named = _Value(), False, False

  def feed(self, text: str, *, final: bool = False) -> list[str | ToolCall | Arguments]:
    """Takes the next text, and returns what is certain: pieces of text and of calls."""
    self._rest += text
    found: list[str | ToolCall | Arguments] = []
    while True:
      before = len(self._rest), self._read
      self._read(found, final)
      if before == (len(self._rest), self._read):
        return found

  def _read_text(self, found: list, final: bool) -> None:
    rest, opening = self._rest, self._style.opening
    at = rest.find(opening) if opening else self._find_object()
    if at >= 0:
      end = len(rest[:at].rstrip()) if opening else 0
      self._tell(found, rest[:end])
      self._opening, self._rest = rest[end : at + len(opening)], rest[at + len(opening) :]
      self._read = self._read_head
      return
    end = len(rest) - (0 if final else self._held())
    self._rest = rest[end:]
    self._tell(found, rest[:end])

  def _tell(self, found: list, text: str) -> None:
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

  def _read_head(self, found: list, final: bool) -> None:
    """Reads what comes before a call's arguments, or a whole call."""
    rest = self._rest
    start = (_SPACE if self._listed else _LIST).match(rest).end()
    listed = self._listed or "[" in rest[:start]
    is_named = self._style.listed and not listed and rest[start : start + 1] != "{"
    if is_named and "{" not in rest and not final:
      return
    head = (_NAMED if is_named else _HEAD).match(rest, start)
    if head and head[1] in self._names:
      call, end, self._read = [ToolCall(head[1])], head.end(), self._read_value
      self._value, self._is_told, self._is_named = _Value(), True, is_named
    else:
      value, at = _Value(), head.end() if head and is_named else start
      end = at + value.take(rest[at:])
      if not value.ended and not final:
        return
      call = self._whole(rest[at:end], head[1] if head and is_named else None)
      self._read = self._read_after
    if call:
      found += call
      self._rest, self._opening, self._listed = rest[end:], "", listed
      self._called = self._at_start = True
    else:  # What opened like a call is the text that it is.
      self._tell(found, self._opening)
      self._at_start = self._called = self._listed = False
      self._read = self._read_text

  def _whole(self, text: str, name: str | None) -> list[ToolCall | Arguments]:
    """A call that is an object, or the arguments of a named one; empty if it is none."""
    try:
      value = json.loads(text)
      call = {"name": name, "arguments": value} if name else value
      given = call.get("arguments", call.get("parameters", {})) if isinstance(call, dict) else None
      arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
      if not isinstance(json.loads(arguments), dict) or not isinstance(call.get("name"), str):
        return []
    except (ValueError, RecursionError):
      return []
    is_known = self._style.opening or call["name"] in self._names
    return [ToolCall(call["name"]), Arguments(arguments)] if is_known else []

  def _read_value(self, found: list, final: bool) -> None:
    """Reads a call's arguments, and what else its object has, such as an id, to its end."""
    del final
    size = self._value.take(self._rest)
    text, self._rest = self._rest[:size], self._rest[size:]
    if text and self._is_told:
      found.append(Arguments(text))
    if self._value.ended:
      if self._is_told and not self._is_named:
        self._value, self._is_told = _Value(depth=1), False
      else:
        self._read = self._read_after

  def _read_after(self, found: list, final: bool) -> None:
    """Reads what is between two calls, or ends them."""
    del found
    text, closing = self._rest.lstrip(), self._style.closing
    if self._listed and text[:1] == ",":
      self._rest, self._read = text[1:], self._read_head
    elif self._listed and text[:1] == "]":
      self._rest, self._listed = text[1:], False
    elif final or (text and (text == closing or not closing.startswith(text))):
      self._rest, self._listed, self._read = text.removeprefix(closing), False, self._read_text


class _Value:
  """Follows a JSON object or array, which may come in pieces, to its end."""

  def __init__(self, depth: int = 0):
    """Begins within so many brackets."""
    self.ended = False
    self._depth = depth
    self._in_string = False
    self._escaped = False

  def take(self, text: str) -> int:
    """How much of the next text belongs to the value."""
    for at, char in enumerate(text):
      if self._escaped:
        self._escaped = False
      elif self._in_string:
        self._escaped, self._in_string = char == "\\", char != '"'
      elif char == '"':
        self._in_string = True
      elif char in "[{]}":
        self._depth += 1 if char in "[{" else -1
      elif not char.isalnum() and char not in _BETWEEN:
        self.ended = True  # Such as what closes a call of which a bracket is missing.
        return at
      if self._depth <= 0:
        self.ended = True
        return at + 1
    return len(text)


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
  nothing = {"type": "object", "properties": {}, "additionalProperties": False}
  rules, bodies = [], []
  for index, one in enumerate(functions):
    head = f'{{"name": {json.dumps(one["name"])}, "{style.arguments}": '
    rules.append(f"args{index}: %json {languages.styled(one.get('parameters') or nothing)}")
    bodies.append(f'{json.dumps(head)} args{index} "}}"')
  body = f"({' | '.join(bodies)})"
  opening, closing = (_mark(text, tokenizer) for text in (style.opening, style.closing))
  call = body if style.listed or not style.opening else f'{opening} "\\n" {body} "\\n" {closing}'
  calls = f"call ({json.dumps(style.separator)} call)*" if several else "call"
  if style.listed:
    calls = f'{opening} "[" {calls} "]"'
  rules.append(f"call: {call}")
  rules.append(f"start: {calls}" + (" | answer" if answer is not None else ""))
  if answer is not None:
    rules.append(f"answer: %json {languages.styled(answer)}")
  return languages.lark("\n".join(rules), "tools")


def _mark(text: str, tokenizer: Tokenizer) -> str:
  """A mark in a grammar: a special token or plain text."""
  return f"<[{tokenizer.specials[text]}]>" if text in tokenizer.specials else json.dumps(text)
