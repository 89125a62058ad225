"""A turn of a conversation: the prompt, the format of its answer, and the calls of tools in it.

/v1/chat/completions and /v1/responses say the same in two forms; this is what they share.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.errors import did_you_mean
from gptjax.inference.constraints import LanguageConstraint
from gptjax.inference.request import Request
from gptjax.serving.answers import make_requests
from gptjax.serving.errors import blaming, wrong
from gptjax.serving.prompts import encode_chat
from gptjax.serving.service import Service, in_thread
from gptjax.serving.tools import CallReader, Style, constrain_calls, find_style, shown_marks

_ANY_OBJECT = {"type": "object"}


@dataclasses.dataclass(frozen=True)
class Turn:
  """What is asked of a model in a conversation.

  Attributes:
    messages: as chat templates take them.
    tools: functions that may be called.
    tool_choice: 'none', 'auto', 'required' or, in a list of one, the name of the function to call.
    several_calls: whether one answer may have several calls.
    format: the fields of the answer's format, None for free text.
    params: the names of these fields in the request, for errors.
  """

  messages: Sequence[Mapping[str, Any]]
  tools: Sequence[Mapping[str, Any]]
  tool_choice: str | list[str]
  several_calls: bool
  format: Mapping[str, Any] | None
  params: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Plan:
  """A turn as the engine takes it.

  Attributes:
    requests: one for each answer.
    style: how calls of tools are written; None if there are none to be read.
    names: of the functions.
    shown: special tokens that belong to calls.
  """

  requests: list[Request]
  style: Style | None
  names: tuple[str, ...]
  shown: Mapping[int, str]

  def reader(self) -> CallReader | None:
    return CallReader(self.style, self.names) if self.style else None


async def make_plan(
  service: Service,
  fields: Mapping[str, Any],
  turn: Turn,
  *,
  count: int,
  max_tokens: int | None,
  log_probs: int | None,
) -> Plan:
  """Prepares a turn.

  Args:
    service: the model.
    fields: of the request, with the settings of sampling.
    turn: what is asked.
    count: how many answers.
    max_tokens: of an answer; None is what there is room for.
    log_probs: how many are told at each token, or None.

  Raises:
    ApiError: a field is wrong, or there is no room for the answer.
  """
  service.adapter(fields["model"])  # First of all, is there such a model?
  style = _style(service, turn)
  tools = [{"type": "function", "function": tool} for tool in turn.tools] if style else []
  prompt = await encode_chat(service, turn.messages, tools, param=turn.params["messages"])
  constraint = await in_thread(_constraint, service, turn, style)
  service.check_length(prompt, max_tokens or 1, turn.params["messages"])
  requests = make_requests(
    service,
    fields,
    [prompt],
    count=count,
    max_tokens=max_tokens or service.thread.room - len(prompt),
    log_probs=log_probs,
    constraint=constraint,
  )
  names = tuple(tool["name"] for tool in turn.tools)
  return Plan(requests, style, names, shown_marks(service.tokenizer) if style else {})


def _style(service: Service, turn: Turn) -> Style | None:
  """The style of calls that are to be read; None if no function is to be called."""
  chosen, at = turn.tool_choice, turn.params["tool_choice"]
  names = [tool["name"] for tool in turn.tools]
  if isinstance(chosen, list) and chosen[0] not in names:
    near = did_you_mean(chosen[0], names) if names else "There are no tools."
    raise wrong(at, f"{at}: no function {chosen[0][:80]!r} among the tools. {near}")
  if not names:
    if chosen == "required":
      raise wrong(at, f"{at}='required' needs tools.")
    return None
  if chosen == "none":
    return None
  with blaming("model"):
    template = service.template.tokenizer.chat_template
  if (style := find_style(template)) is None:
    message = "The chat template of this model takes no tools, or in no form that is known here."
    raise wrong(turn.params["tools"], message, "unsupported_parameter")
  return style


def _constraint(service: Service, turn: Turn, style: Style | None) -> LanguageConstraint | None:
  """The language of the answer, if it is to be in one."""
  at, answer, kind = turn.params["format"], None, "text"
  if turn.format is not None:
    kind = turn.format["type"]
    answer = turn.format.get("schema", _ANY_OBJECT) if kind.startswith("json") else None
  if style is not None and (turn.tool_choice != "auto" or kind != "text"):
    if turn.tool_choice == "auto" and answer is None:
      raise wrong(at, f"{at}={kind!r} and tools cannot be asked for at once.")
    chosen = turn.tool_choice if isinstance(turn.tool_choice, list) else None
    functions = [tool for tool in turn.tools if chosen is None or tool["name"] in chosen]
    with blaming(turn.params["tools"]):
      return constrain_calls(
        service.languages,
        style,
        service.tokenizer,
        functions,
        several=turn.several_calls and chosen is None,
        answer=answer if turn.tool_choice == "auto" else None,
      )
  with blaming(at):
    match kind:
      case "text":
        return None
      case "regex":
        return service.languages.regex(turn.format["pattern"], f"{at}.pattern")
      case "grammar":
        return service.languages.lark(turn.format["grammar"], f"{at}.grammar")
      case _:
        return service.languages.json_schema(answer, f"{at}.{turn.params['schema']}")


def read_arguments(text: str, param: str) -> dict[str, Any]:
  """The arguments of a call that a client sends back; templates take them as objects."""
  try:
    arguments = json.loads(text or "{}")
  except (ValueError, RecursionError) as error:
    raise wrong(param, f"{param} is no JSON: {error}.") from error
  if not isinstance(arguments, dict):
    raise wrong(param, f"{param} must be a JSON object.")
  return arguments
