"""/v1/chat/completions: answers the last message of a conversation."""

import functools
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

from gptjax.serving.answers import chat_scores, make_head, usage
from gptjax.serving.conversation import Plan, Turn, make_plan, read_arguments
from gptjax.serving.engine_thread import Piece
from gptjax.serving.errors import wrong
from gptjax.serving.prompts import plain_text
from gptjax.serving.service import Result, Service
from gptjax.serving.streams import EventStream
from gptjax.serving.tools import Arguments, ToolCall

_PARAMS = {
  "messages": "messages",
  "tools": "tools",
  "tool_choice": "tool_choice",
  "format": "response_format",
  "schema": "json_schema.schema",
}


async def answer(service: Service, fields: Mapping[str, Any]) -> Response:
  """Answers the last message of a conversation."""
  told = fields.get("logprobs", False)
  if "top_logprobs" in fields and not told:
    raise wrong("top_logprobs", "top_logprobs needs logprobs=true.")
  count = fields.get("n", 1)
  plan = await make_plan(
    service,
    fields,
    _turn(fields),
    count=count,
    max_tokens=fields.get("max_completion_tokens", fields.get("max_tokens")),
    log_probs=fields.get("top_logprobs", 0) if told else None,
  )
  kind = "chat.completion.chunk" if fields.get("stream") else "chat.completion"
  head = make_head("chatcmpl", kind, fields)
  if fields.get("stream"):
    tell = functools.partial(_events, service, fields, plan, head)
    return EventStream(service.ask(plan.requests, plan.shown), tell)
  results = await service.results(plan.requests, plan.shown)
  choices = [
    {"index": index, **_choice(service, plan, result, told)} for index, result in enumerate(results)
  ]
  return JSONResponse({**head, "choices": choices, "usage": usage(plan.requests, results, count)})


def _turn(fields: Mapping[str, Any]) -> Turn:
  chosen = fields.get("tool_choice", "auto")
  form = fields.get("response_format")
  if form is not None:
    form = {**form, **form.get("json_schema", {})}
  return Turn(
    messages=template_messages(fields["messages"]),
    tools=[tool["function"] for tool in fields.get("tools", ())],
    tool_choice=chosen if isinstance(chosen, str) else [chosen["function"]["name"]],
    several_calls=fields.get("parallel_tool_calls", True),
    format=form,
    params=_PARAMS,
  )


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Messages as chat templates take them: contents are text, arguments of calls are objects."""
  made = []
  for index, message in enumerate(messages):
    role = "system" if message["role"] == "developer" else message["role"]
    calls = message.get("tool_calls")
    content = message.get("content")
    if content is None and not calls and not message.get("refusal"):
      at = f"messages[{index}].content"
      raise wrong(at, f"{at} is missing; it may be null where there are tool_calls.")
    text = plain_text(content) or message.get("refusal") or ""
    one = {"role": role, "content": None if content is None and calls else text}
    one |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
    if calls:
      one["tool_calls"] = [
        {**call, "type": "function", "function": _function(call["function"], index, number)}
        for number, call in enumerate(calls)
      ]
    made.append(one)
  return made


def _function(function: Mapping[str, Any], message: int, call: int) -> dict[str, Any]:
  at = f"messages[{message}].tool_calls[{call}].function.arguments"
  return {**function, "arguments": read_arguments(function["arguments"], at)}


def _choice(service: Service, plan: Plan, result: Result, told: bool) -> dict[str, Any]:
  reader = plan.reader()
  found = reader.feed(result.text, final=True) if reader else [result.text]
  text, calls = "", []
  for one in found:
    match one:
      case ToolCall():
        calls.append(_begin(one))
      case Arguments():
        calls[-1]["function"]["arguments"] += one.text
      case _:
        text += one
  message = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
  if calls:
    message["tool_calls"] = calls
  scores = {"content": chat_scores(service, result.scores), "refusal": None} if told else None
  reason = _reason(result.finish_reason, bool(calls))
  return {"message": message, "logprobs": scores, "finish_reason": reason}


def _begin(call: ToolCall) -> dict[str, Any]:
  return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}


def _reason(reason: str, called: bool) -> str:
  return "tool_calls" if called and reason == "stop" else reason


async def _events(
  service: Service,
  fields: Mapping[str, Any],
  plan: Plan,
  head: Mapping[str, Any],
  pieces: AsyncIterator[Piece],
) -> AsyncIterator[dict[str, Any]]:
  told = fields.get("logprobs", False)

  def event(index: int, delta: Mapping[str, Any], reason: str | None = None, scores: Any = None):
    logprobs = {"content": scores, "refusal": None} if scores is not None else None
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
    return {**head, "choices": [choice]}

  readers = [plan.reader() for _ in plan.requests]
  calls = [0] * len(readers)
  results = [Result() for _ in readers]
  for index, _ in enumerate(readers):
    yield event(index, {"role": "assistant", "content": ""})
  async for piece in pieces:
    index, reader, ended = piece.index, readers[piece.index], bool(piece.finish_reason)
    found = reader.feed(piece.text, final=ended) if reader else [piece.text]
    scores = chat_scores(service, piece.scores) if told else None
    for one in found:
      match one:
        case ToolCall():
          calls[index] += 1
          delta = {"tool_calls": [{"index": calls[index] - 1, **_begin(one)}]}
        case Arguments():
          function = {"arguments": one.text}
          delta = {"tool_calls": [{"index": calls[index] - 1, "function": function}]}
        case _:
          delta = {"content": one}
      if one:
        yield event(index, delta, scores=scores)
        scores = None
    if scores:  # Of tokens whose text is not certain yet.
      yield event(index, {"content": ""}, scores=scores)
    if ended:
      results[index].answer = piece.answer
      yield event(index, {}, _reason(piece.finish_reason, bool(calls[index])))
  if "usage" in head:
    numbers = usage(plan.requests, results, len(plan.requests))
    yield {**head, "choices": [], "usage": numbers}
