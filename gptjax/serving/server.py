"""Runs the application on uvicorn: impatient with clients, patient with running answers."""

import asyncio
import logging
import signal
import time

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptjax.serving.service import Service

logger = logging.getLogger(__name__)
# In which a connection has to send the head of its next request.
_HEAD_SECONDS = 20.0


class ImpatientProtocol(H11Protocol):
  """HTTP/1.1 that closes a connection whose next request does not begin in time: one that is idle,
  and one that sends its head byte by byte. uvicorn itself waits for them for ever."""

  head_seconds = _HEAD_SECONDS

  def connection_made(self, transport: asyncio.Transport) -> None:
    self._timer: asyncio.TimerHandle | None = None
    super().connection_made(transport)
    self._wait()

  def handle_events(self) -> None:
    before = self.cycle
    super().handle_events()
    if self.cycle is not before and not self.cycle.response_complete:
      self._timer.cancel()

  def on_response_complete(self) -> None:
    self._wait()
    super().on_response_complete()

  def connection_lost(self, exc: Exception | None) -> None:
    self._timer.cancel()
    super().connection_lost(exc)

  def _wait(self) -> None:
    if self._timer is not None:
      self._timer.cancel()
    self._timer = self.loop.call_later(self.head_seconds, self._close)

  def _close(self) -> None:
    if self.cycle is None or self.cycle.response_complete:
      self.transport.close()


class Server(uvicorn.Server):
  """Ends in two steps: at the first signal new requests are refused and running ones may end, after
  that, or at the second signal, all is closed."""

  def __init__(self, app: Starlette, service: Service, *, host: str, port: int):
    super().__init__(
      uvicorn.Config(
        app,
        host=host,
        port=port,
        http=ImpatientProtocol,
        ws="none",
        lifespan="on",
        log_level="info",
        access_log=False,
        server_header=False,
        # What is left after the drain is cut off.
        timeout_graceful_shutdown=1,
        backlog=512,
      )
    )
    self._service = service
    self._deadline = 0.0

  def handle_exit(self, sig: int, frame) -> None:
    if self._service.thread.draining:
      super().handle_exit(sig, frame)
      return
    self._service.thread.draining = True
    self._deadline = time.monotonic() + self._service.limits.drain_seconds
    name = signal.Signals(sig).name
    logger.warning("%s: %d answers are still running", name, self._service.thread.open)

  async def on_tick(self, counter: int) -> bool:
    thread = self._service.thread
    over = time.monotonic() > self._deadline
    # Whoever got an answer a moment ago is still reading it.
    if thread.draining and (over or (not thread.open and not self.server_state.tasks)):
      self.should_exit = True
    return await super().on_tick(counter)
