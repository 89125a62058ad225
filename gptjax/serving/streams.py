"""Answers that are sent while they grow, as server-sent events."""

import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from starlette.responses import StreamingResponse

from gptjax.serving.engine_thread import Piece
from gptjax.serving.errors import ApiError, failed

logger = logging.getLogger(__name__)


class EventStream(StreamingResponse):
  """Events as they come; when the last is sent or the client is gone, what they tell of is left."""

  media_type = "text/event-stream"

  def __init__(
    self,
    asked: AbstractAsyncContextManager[AsyncIterator[Piece]],
    tell: Callable[[AsyncIterator[Piece]], AsyncIterator[Mapping[str, Any]]],
    *,
    named: bool = False,
  ):
    """Prepares the answer.

    Args:
      asked: gives the pieces of answers; what it raises when it is entered is told as an error.
      tell: makes what to send of them, each event as JSON.
      named: whether events are named by their 'type', as in /v1/responses, without '[DONE]'.
    """
    # What buffers answers on their way is asked not to.
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    super().__init__((), headers=headers)
    self._asked, self._tell, self._named = asked, tell, named

  async def __call__(self, scope, receive, send) -> None:
    async with self._asked as pieces:
      self.body_iterator = _lines(self._tell(pieces), self._named)
      await super().__call__(scope, receive, send)


async def _lines(events: AsyncIterator[Mapping[str, Any]], named: bool) -> AsyncIterator[str]:
  try:
    async for event in events:
      yield _line(event, named)
  except Exception as error:  # noqa: BLE001 (it is logged)
    yield _error(failed(logger, "in a stream", error), named)
  else:
    if not named:
      yield "data: [DONE]\n\n"


def _line(event: Mapping[str, Any], named: bool) -> str:
  text = json.dumps(event, ensure_ascii=False, allow_nan=False)
  return f"event: {event['type']}\ndata: {text}\n\n" if named else f"data: {text}\n\n"


def _error(error: ApiError, named: bool) -> str:
  body = error.body
  return _line({**body["error"], "type": "error"} if named else body, named)
