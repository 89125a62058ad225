"""Conversations as the text that a model was trained on, by the chat template it comes with."""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError, did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")

Message = Mapping[str, Any]  # {"role": one of ROLES, "content": text}


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """The template of a tokenizer, in Jinja, rendered in a sandbox with what `transformers` gives it.

  Raises:
    UserError: the tokenizer has no template.
  """

  tokenizer: Tokenizer

  def __post_init__(self):
    if self.tokenizer.chat_template is None:
      raise UserError(
        f"tokenizer {self.tokenizer.spec!r} has no chat template: its model was not made for chats."
      )

  def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
    """Returns the text of a conversation.

    Args:
      messages: each {"role": ..., "content": ...}, and what else the template reads.
      add_generation_prompt: whether the text ends where the assistant's answer begins.

    Raises:
      UserError: a message without a known role or without content, or a template that is wrong or
        refuses the messages.
    """
    for number, message in enumerate(messages):
      role = message.get("role")
      if role not in ROLES:
        raise UserError(f"message {number}: no role {role!r}. {did_you_mean(str(role), ROLES)}")
      if "content" not in message:
        raise UserError(f"message {number}: no 'content' (found: {', '.join(message)}).")
    try:
      return _compile(self.tokenizer.chat_template).render(
        messages=messages,
        tools=None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **self.tokenizer.roles,
      )
    except jinja2.TemplateSyntaxError as error:
      raise UserError(
        f"the chat template of {self.tokenizer.spec!r} is wrong in line {error.lineno}: {error}"
      ) from error
    except (jinja2.TemplateError, TypeError, ValueError) as error:
      raise UserError(
        f"the chat template of {self.tokenizer.spec!r} refuses these messages: {error}"
      ) from error

  def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
    """Returns the ids of `render`, special tokens parsed; arguments and errors are as there."""
    text = self.render(messages, add_generation_prompt=add_generation_prompt)
    return self.tokenizer.encode_with_specials(text)


@functools.lru_cache
def _compile(template: str):
  """Compiles as `transformers` does: its options, filters and functions."""

  class Generation(jinja2.ext.Extension):
    """{% generation %} marks what an assistant says, which adds no text."""

    tags = frozenset({"generation"})

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(("name:endgeneration",), drop_needle=True)

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Unlike Jinja's own, which escapes what means something in HTML.
    return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = tojson
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
  return environment.from_string(template)
