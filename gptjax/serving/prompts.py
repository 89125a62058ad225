"""Conversations as prompts: a chat template is rendered so that what people wrote stays text."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.data.tokenizer import Tokenizer
from gptjax.serving.errors import blaming, wrong
from gptjax.serving.service import Service, in_thread
from gptjax.templates.chat import ChatTemplate

# Put around what looks like a special token in a message. Unicode reserves these for programs.
_OPEN, _CLOSE = "\ufdd2", "\ufdd3"
_MARKED = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")


async def encode_chat(
  service: Service,
  messages: Sequence[Mapping[str, Any]],
  tools: Sequence[Mapping[str, Any]] = (),
  *,
  param: str = "messages",
  add_generation_prompt: bool = True,
) -> list[int]:
  """The ids of a conversation, up to where an answer begins.

  Args:
    service: with a chat template.
    messages: as the template takes them.
    tools: the same.
    param: the field that they came in.
    add_generation_prompt: whether an answer is to begin.

  Raises:
    ApiError: there is no template, or it refuses the messages.
  """
  with blaming("model"):
    template = service.template
  for message in messages:
    service.check_prompt(message.get("content") or "", param)
  with blaming(param):
    return await in_thread(
      _encode, template, messages, tools, add_generation_prompt=add_generation_prompt
    )


def _encode(
  template: ChatTemplate,
  messages: Sequence[Mapping[str, Any]],
  tools: Sequence[Mapping[str, Any]],
  *,
  add_generation_prompt: bool,
) -> list[int]:
  tokenizer = template.tokenizer
  mark = _marker(tokenizer)
  text = template.render(
    mark(messages), tools=mark(tools), add_generation_prompt=add_generation_prompt
  )
  ids: list[int] = []
  for number, piece in enumerate(_MARKED.split(text)):
    # A template may have cut something out between the marks.
    piece = piece.replace(_OPEN, "").replace(_CLOSE, "")
    ids += tokenizer.encode(piece) if number % 2 else tokenizer.encode_with_specials(piece)
  return ids


def _marker(tokenizer: Tokenizer):
  """A function that marks special tokens in all strings of a value."""
  names = sorted(filter(None, tokenizer.specials), key=len, reverse=True)
  special = re.compile("|".join(map(re.escape, names)))

  def mark(value):
    if isinstance(value, str):
      if _OPEN in value or _CLOSE in value:
        raise wrong("messages", "A message has U+FDD2 or U+FDD3, which are no characters.")
      return special.sub(lambda found: f"{_OPEN}{found[0]}{_CLOSE}", value)
    if isinstance(value, Mapping):
      return {mark(key): mark(one) for key, one in value.items()}
    return [mark(one) for one in value] if isinstance(value, list | tuple) else value

  return mark


def plain_text(content: str | Sequence[Mapping[str, Any]] | None) -> str:
  """The text of a message's content, which may be in parts."""
  if content is None or isinstance(content, str):
    return content or ""
  return "\n".join(part.get("text") or part.get("refusal") or "" for part in content)
