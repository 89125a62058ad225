"""Conversations as text, by a model's chat template, and which part of it the assistant writes."""

import dataclasses
import datetime
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError, did_you_mean
from gptjax.templates.sandbox import ERRORS, BoundedEnvironment

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")

Message = Mapping[str, Any]  # {"role": one of ROLES, "content": text}

# Put around the text that {% generation %} marks. Unicode reserves these two for programs.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_HAS_MARKS = re.compile(r"\{%[-+]?\s*generation\b")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A tokenizer's Jinja template, rendered in a sandbox with the variables of `transformers`.

  Attributes:
    tokenizer: has the template.
    today: the date for templates that print one; None for today's.

  Raises:
    UserError: the tokenizer has no template.
  """

  tokenizer: Tokenizer
  today: datetime.date | None = None

  def __post_init__(self):
    if self.tokenizer.chat_template is None:
      raise UserError(
        f"tokenizer {self.tokenizer.spec!r} has no chat template: its model was not made for chats."
      )

  def render(
    self,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] = (),
  ) -> str:
    """Returns the text of a conversation.

    Args:
      messages: each {"role": ..., "content": ...}, and any other keys that the template reads.
      add_generation_prompt: whether the text ends where the assistant's answer begins.
      tools: the template's variable `tools`.

    Raises:
      UserError: a message has no known role or no content, the template cannot write a tool call,
        or the template is wrong or refuses the messages.
    """
    template = self.tokenizer.chat_template
    for number, message in enumerate(messages):
      role = message.get("role")
      if role not in ROLES:
        raise UserError(f"message {number}: no role {role!r}. {did_you_mean(str(role), ROLES)}")
      if "content" not in message:
        raise UserError(f"message {number}: no 'content' (found: {', '.join(message)}).")
      calls = message.get("tool_calls")
      if message["content"] is None and not calls:
        raise UserError(
          f"message {number}: its 'content' is null, which only a call of tools may be."
        )
      if calls and "tool_calls" not in template:
        raise UserError(
          f"message {number} has 'tool_calls', for which the chat template of "
          f"{self.tokenizer.spec!r} has no form."
        )
    return self._render(messages, tools, add_generation_prompt=add_generation_prompt)

  def _render(
    self,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    marked: bool = False,
  ) -> str:
    day = self.today or datetime.datetime.now()
    try:
      return _compile(self.tokenizer.chat_template, marked).render(
        messages=list(messages),
        tools=list(tools) or None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        strftime_now=day.strftime,
        **self.tokenizer.roles,
      )
    except jinja2.TemplateSyntaxError as error:
      raise UserError(
        f"the chat template of {self.tokenizer.spec!r} is wrong in line {error.lineno}: {error}"
      ) from error
    except ERRORS as error:
      raise UserError(
        f"the chat template of {self.tokenizer.spec!r} refuses these messages: {error}"
      ) from error

  def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
    """Returns the token ids of `render`, special tokens parsed; same arguments and errors."""
    text = self.render(messages, add_generation_prompt=add_generation_prompt)
    return self.tokenizer.encode_with_specials(text)

  def examples(
    self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
  ) -> list[list[tuple[str, bool]]]:
    """Returns the texts to learn a conversation from, in pieces (text, whether the assistant writes
    it). Each answer is learnt once, after its prompt.

    Answers are the text between {% generation %} and {% endgeneration %}, all in one example. In a
    template without these marks, an answer is the difference between the conversation that ends
    with it and its prompt. An answer that changes when later messages follow, as Qwen 3's loses its
    thoughts, gets an example of its own. Text after the end of a turn may be part of the answer.

    Raises:
      UserError: as `render`; the text up to an answer does not begin with its prompt, so that the
        answer cannot be found; or nothing is marked.
    """
    whole = self.render(messages, add_generation_prompt=False, tools=tools)
    if _HAS_MARKS.search(self.tokenizer.chat_template):
      return [self._marked_pieces(messages, tools, whole)]
    examples: list[tuple[str, list[int]]] = [(whole, [])]  # Texts, and where their pieces end.
    for number, message in reversed([*enumerate(messages)]):
      if message["role"] != "assistant":
        continue
      prompt = self._render(messages[:number], tools, add_generation_prompt=True)
      answered = self._render(messages[: number + 1], tools)
      if not answered.startswith(prompt):
        raise UserError(
          f"the chat template of {self.tokenizer.spec!r} does not write message {number} behind "
          "what asks for it, so that its tokens cannot be told from the rest; set "
          "--config.task.chat_template= to another, or train_on=all."
        )
      text, ends = examples[-1]
      before = text[: ends[0]] if ends else text
      # Some, as Phi-3's, put this behind whatever comes last.
      bare = answered.removesuffix(self.tokenizer.roles.get("eos_token", ""))
      same = next((one for one in (answered, bare) if before.startswith(one)), None)
      if same is None:
        examples.append((answered, [len(prompt), len(answered)]))
      else:
        ends[:0] = [len(prompt), len(same)]
    return [_cut(text, ends) for text, ends in reversed(examples) if ends]

  def _marked_pieces(
    self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], whole: str
  ) -> list[tuple[str, bool]]:
    parts = re.split(f"{_BEGIN}(.*?){_END}", self._render(messages, tools, marked=True), flags=re.S)
    if len(parts) == 1 or "".join(parts) != whole:
      raise UserError(
        f"the chat template of {self.tokenizer.spec!r} has {{% generation %}}, but what it marks "
        "in these messages is nothing, or not one piece of text for each."
      )
    return [(text, number % 2 == 1) for number, text in enumerate(parts) if text]


@functools.lru_cache
def _compile(template: str, marked: bool):
  """Compiles a template with the options, filters and functions of `transformers`. If `marked`,
  generated text is put between `_BEGIN` and `_END`."""

  class Generation(jinja2.ext.Extension):
    """The block {% generation %} around an assistant's text, which prints nothing else."""

    tags = frozenset({"generation"})

    def parse(self, parser):
      next(parser.stream)
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return [_literal(_BEGIN), *body, _literal(_END)] if marked else body

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter escapes HTML; this one does not.
    return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  def blank_if_null(value):
    """Prints '' and not 'None' for the content of a tool call, which is null."""
    return "" if value is None else value

  def trim(value, *how, **named):
    return jinja2.filters.do_trim(blank_if_null(value), *how, **named)

  environment = BoundedEnvironment(
    filters={"tojson": tojson, "trim": trim},
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[Generation, jinja2.ext.loopcontrols],
    finalize=blank_if_null,
  )
  environment.globals["raise_exception"] = raise_exception
  return environment.from_string(template)


def _cut(text: str, ends: Sequence[int]) -> list[tuple[str, bool]]:
  """Cuts a text into pieces, alternately prompt and answer; empty pieces are left out."""
  pairs = itertools.pairwise([0, *ends, len(text)])
  return [(text[i:j], n % 2 == 1) for n, (i, j) in enumerate(pairs) if i < j]


def _literal(text: str) -> jinja2.nodes.Output:
  return jinja2.nodes.Output([jinja2.nodes.TemplateData(text)])
