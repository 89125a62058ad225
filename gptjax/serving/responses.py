"""/v1/responses: answers the last item of a conversation, of which the server keeps nothing."""

import copy
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from gptjax.serving.answers import chat_scores, usage
from gptjax.serving.conversation import Plan, Turn, make_plan, read_arguments
from gptjax.serving.engine_thread import Piece
from gptjax.serving.fields import check
from gptjax.serving.prompts import plain_text
from gptjax.serving.schemas import FUNCTION_TOOL, ITEMS
from gptjax.serving.service import Result, Service
from gptjax.serving.streams import EventStream
from gptjax.serving.tools import Arguments, ToolCall

_PARAMS = {
  "messages": "input",
  "tools": "tools",
  "tool_choice": "tool_choice",
  "format": "text.format",
  "schema": "schema",
}
_TELLS_SCORES = "message.output_text.logprobs"
# What a response repeats of its request.
_REPEATED = {
  "instructions": None,
  "max_output_tokens": None,
  "metadata": {},
  "parallel_tool_calls": True,
  "temperature": 1.0,
  "tool_choice": "auto",
  "tools": [],
  "top_p": 1.0,
}


async def answer(service: Service, fields: Mapping[str, Any]) -> Response:
  """Answers the last item of a conversation."""
  told = _TELLS_SCORES in fields.get("include", ()) or "top_logprobs" in fields
  plan = await make_plan(
    service,
    fields,
    _turn(fields),
    count=1,
    max_tokens=fields.get("max_output_tokens"),
    log_probs=fields.get("top_logprobs", 0) if told else None,
  )
  output = _Output(service, fields, plan, told)
  if fields.get("stream"):
    return EventStream(service.ask(plan.requests, plan.shown), output.stream, named=True)
  async with service.ask(plan.requests, plan.shown) as pieces:
    events = [event async for event in output.stream(pieces)]
  return JSONResponse(events[-1]["response"])


def _turn(fields: Mapping[str, Any]) -> Turn:
  chosen = fields.get("tool_choice", "auto")
  tools = []
  for index, tool in enumerate(fields.get("tools", ())):
    # Other kinds, such as a search of the web, are tools that this server does not have.
    if tool["type"] == "function":
      check(tool, FUNCTION_TOOL, f"tools[{index}]")
      tools.append(tool)
  keys = ("name", "description", "parameters")
  return Turn(
    messages=_messages(fields),
    tools=[{key: tool[key] for key in keys if tool.get(key) is not None} for tool in tools],
    tool_choice=chosen if isinstance(chosen, str) else [chosen["name"]],
    several_calls=fields.get("parallel_tool_calls", True),
    format=fields.get("text", {}).get("format"),
    params=_PARAMS,
  )


def _messages(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The input as chat templates take it."""
  messages: list[dict[str, Any]] = []
  if "instructions" in fields:
    messages.append({"role": "system", "content": fields["instructions"]})
  given = fields["input"]
  if isinstance(given, str):
    return [*messages, {"role": "user", "content": given}]
  for index, item in enumerate(given):
    at = f"input[{index}]"
    item = {"type": "message", **item}
    check(item, ITEMS, at)
    match item["type"]:
      case "message":
        role = "system" if item["role"] == "developer" else item["role"]
        messages.append({"role": role, "content": plain_text(item["content"])})
      case "function_call":
        arguments = read_arguments(item["arguments"], f"{at}.arguments")
        function = {"name": item["name"], "arguments": arguments}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        if not messages or messages[-1]["role"] != "assistant":
          messages.append({"role": "assistant", "content": None})
        messages[-1].setdefault("tool_calls", []).append(call)
      case "function_call_output":
        content = plain_text(item["output"])
        messages.append({"role": "tool", "content": content, "tool_call_id": item.get("call_id")})
  return messages


class _Output:
  """A response as it grows, and the events that tell of it."""

  def __init__(self, service: Service, fields: Mapping[str, Any], plan: Plan, told: bool):
    self._service, self._plan, self._told = service, plan, told
    repeated = {key: fields.get(key, value) for key, value in _REPEATED.items()}
    self._response = {
      "id": f"resp_{secrets.token_hex(16)}",
      "object": "response",
      "created_at": int(time.time()),
      "status": "in_progress",
      "model": fields["model"],
      "error": None,
      "incomplete_details": None,
      "output": [],
      "previous_response_id": None,
      "store": False,
      "usage": None,
      **repeated,
      "text": {"format": {"type": "text"}, **fields.get("text", {})},
    }
    self._events = 0
    self._item: dict[str, Any] | None = None  # What grows.

  def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
    self._events += 1
    return {"type": f"response.{kind}", "sequence_number": self._events - 1, **fields}

  async def stream(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[dict[str, Any]]:
    """All events; the last one has the whole response."""
    for kind in ("created", "in_progress"):
      yield self._event(kind, response={**self._response, "output": []})
    reader = self._plan.reader()
    async for piece in pieces:
      ended = piece.finish_reason
      found = reader.feed(piece.text, final=bool(ended)) if reader else [piece.text]
      scores = chat_scores(self._service, piece.scores) if self._told else []
      if ended and not any(found) and not self._response["output"]:
        found = [""]  # An answer of no text is a message of none.
      for one in found:
        if one or (ended and not self._response["output"]):
          for event in self._grow(one, scores):
            yield event
          scores = []
      if ended:
        status = "completed" if ended == "stop" else "incomplete"
        for event in [*self._close(status), self._end(piece, status)]:
          yield event

  def _grow(
    self, one: str | ToolCall | Arguments, scores: list[dict[str, Any]]
  ) -> Iterator[dict[str, Any]]:
    """Tells a piece of the answer, which may begin an item."""
    match one:
      case ToolCall():
        yield from self._close("completed")
        yield self._begin("fc", type="function_call", call_id=one.id, name=one.name, arguments="")
      case Arguments():
        self._item["arguments"] += one.text
        yield self._event("function_call_arguments.delta", **self._place(), delta=one.text)
      case _:
        if not self._item or self._item["type"] != "message":
          yield from self._close("completed")
          yield self._begin("msg", type="message", role="assistant", content=[])
          part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
          yield self._event("content_part.added", **self._place(0), part={**part})
          self._item["content"].append(part)
        (part,) = self._item["content"]
        part["text"] += one
        part["logprobs"] = part["logprobs"] + scores
        yield self._event("output_text.delta", **self._place(0), delta=one, logprobs=scores)

  def _begin(self, prefix: str, **fields: Any) -> dict[str, Any]:
    self._item = {"id": f"{prefix}_{secrets.token_hex(16)}", **fields, "status": "in_progress"}
    self._response["output"].append(self._item)
    index = len(self._response["output"]) - 1
    return self._event("output_item.added", output_index=index, item=copy.deepcopy(self._item))

  def _close(self, status: str) -> Iterator[dict[str, Any]]:
    """Ends the item that grows, if there is one."""
    if self._item and self._item["type"] == "message":
      (part,) = self._item["content"]
      told = {"text": part["text"], "logprobs": part["logprobs"]}
      yield self._event("output_text.done", **self._place(0), **told)
      yield self._event("content_part.done", **self._place(0), part=part)
    elif self._item:
      told = {"name": self._item["name"], "arguments": self._item["arguments"]}
      yield self._event("function_call_arguments.done", **self._place(), **told)
    if self._item:
      self._item["status"] = status
      index = len(self._response["output"]) - 1
      yield self._event("output_item.done", output_index=index, item=self._item)
    self._item = None

  def _place(self, part: int | None = None) -> dict[str, Any]:
    place = {"item_id": self._item["id"], "output_index": len(self._response["output"]) - 1}
    return place if part is None else place | {"content_index": part}

  def _end(self, piece: Piece, status: str) -> dict[str, Any]:
    counts = usage(self._plan.requests, [Result(answer=piece.answer)], 1)
    self._response["usage"] = {
      "input_tokens": counts["prompt_tokens"],
      "input_tokens_details": counts["prompt_tokens_details"],
      "output_tokens": counts["completion_tokens"],
      "output_tokens_details": {"reasoning_tokens": 0},
      "total_tokens": counts["total_tokens"],
    }
    self._response["status"] = status
    if status == "incomplete":
      reason = {"length": "max_output_tokens"}.get(piece.finish_reason, piece.finish_reason)
      self._response["incomplete_details"] = {"reason": reason}
    return self._event(status, response=self._response)
