"""The one thread that owns the engine, and the queues between it and the event loop.

Requests go in through an inbox of functions that the thread runs between two steps; what becomes of
them comes out in a queue of each call. The thread sleeps while there is nothing to do.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from gptjax.inference.engine import Counts, Engine, Update
from gptjax.inference.request import Answer, Request, TokenScore
from gptjax.inference.warm_up import warm_up
from gptjax.serving.errors import ApiError, busy, failed

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Piece:
  """News of one answer of a call.

  Attributes:
    index: which request of the call it answers.
    text: what became certain.
    scores: of the tokens since the last piece, where they were asked for.
    end_score: of the token that ended the answer, which has no text.
    finish_reason: as an `Answer`'s, or 'content_filter'; empty while it grows.
    answer: the whole answer, which does not change any more, once it is finished.
  """

  index: int
  text: str
  scores: tuple[TokenScore, ...] = ()
  end_score: TokenScore | None = None
  finish_reason: str = ""
  answer: Answer | None = None


class Call:
  """Requests that a client asked at once, and the queue of their news."""

  def __init__(self, requests: Sequence[Request], shown: Mapping[int, str]):
    self.requests = requests
    self.answers: list[Answer] = []
    self.left = len(requests)
    self._shown = shown
    self._told = [0] * len(requests)
    self._loop = asyncio.get_running_loop()
    self._news: asyncio.Queue[Piece | Exception] = asyncio.Queue()

  async def pieces(self, deadline: float) -> AsyncIterator[Piece]:
    """Gives the news until all answers are finished; raises what went wrong in a step.

    Args:
      deadline: when to give up, in the loop's time.
    """
    while self.left:
      try:
        rest = max(deadline - self._loop.time(), 0)
        piece = await asyncio.wait_for(self._news.get(), rest)
      except TimeoutError as error:
        message = "The answer took longer than the server's limit; ask for fewer tokens."
        raise ApiError(504, message, code="timeout") from error
      if isinstance(piece, Exception):
        raise piece
      self.left -= bool(piece.finish_reason)
      yield piece

  # --- Called by the engine's thread -------------------------------------------------------------

  def tell(self, index: int, text: str) -> None:
    """Puts what is new of an answer into the queue."""
    answer, start = self.answers[index], self._told[index]
    written, ended = answer.tokens[answer.prompt_length :], answer.finish_reason
    end = len(answer.completion) if ended else len(written)
    self._told[index] = len(written)
    # Special tokens have no text, but some of them begin a call of tools.
    marks = "".join(self._shown.get(token, "") for token in written[start:end])
    one_more = ended == "stop" and end == len(written) - 1 and end < len(answer.scores)
    self.put(
      Piece(
        index,
        marks + text,
        tuple(answer.scores[start:end]),
        answer.scores[end] if one_more else None,
        ended,
        answer if ended else None,
      )
    )

  def put(self, news: Piece | Exception) -> None:
    # A loop that is closed has nobody who waits.
    with contextlib.suppress(RuntimeError):
      self._loop.call_soon_threadsafe(self._news.put_nowait, news)


class EngineThread:
  """Runs an engine, to which only its own thread speaks.

  Attributes:
    engine: whose counts and lengths other threads may read.
    max_open: the most answers that run and wait at the same time.
    draining: whether new requests are refused.
    ready: whether what usual requests need is compiled.
  """

  def __init__(self, engine: Engine, *, max_queue: int, warm_up: bool = True):
    self.engine = engine
    self.max_open = engine.rows + max_queue
    self.draining = False
    self.ready = threading.Event()
    self.open = 0
    self._warm_up = warm_up
    self._places: dict[int, tuple[Call, int]] = {}  # By the id of an answer.
    self._inbox: queue.SimpleQueue[tuple[concurrent.futures.Future, Callable] | None]
    self._inbox = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  @property
  def alive(self) -> bool:
    return self._thread.is_alive()

  @property
  def room(self) -> int:
    """Tokens of a prompt with its answer, at most."""
    return self.engine.room

  def start(self) -> None:
    self._thread.start()

  def stop(self) -> None:
    """Ends the thread after the step it is in, and waits for that."""
    self._inbox.put(None)
    self._thread.join()

  async def call(self, function: Callable, *arguments: Any) -> Any:
    """Runs a function in the thread, between two steps, and returns what it returns."""
    future: concurrent.futures.Future = concurrent.futures.Future()
    self._inbox.put((future, lambda: function(*arguments)))
    return await asyncio.wrap_future(future)

  @contextlib.asynccontextmanager
  async def ask(
    self, requests: Sequence[Request], shown: Mapping[int, str] | None = None
  ) -> AsyncIterator[Call]:
    """Has the engine take requests, all or none; whoever leaves the context cancels the rest.

    Args:
      requests: what to answer.
      shown: texts of special tokens that are to be seen in the answers.

    Raises:
      ApiError: there are too many requests now, or the server ends.
      UserError: the engine refuses one.
    """
    if self.draining:
      raise busy("The server is shutting down.", 5)
    if len(requests) > self.max_open:
      message = f"{len(requests)} answers are more than the {self.max_open} that are taken at once."
      raise ApiError(400, message, code="too_many_answers")
    if self.open + len(requests) > self.max_open:
      raise busy(f"{self.open} answers are running or waiting already; try again later.")
    call = Call(requests, shown or {})
    self.open += len(requests)
    try:
      await self.call(self._submit, call)
      yield call
    finally:
      self.open -= len(requests)
      if call.left:
        self._inbox.put((concurrent.futures.Future(), lambda: self._cancel(call)))

  def drop(self, call: Call, index: int) -> None:
    """Ends one answer of a call, of which nothing more is told."""
    call.left -= 1
    answer = call.answers[index]
    self._inbox.put((concurrent.futures.Future(), lambda: self._end(answer)))

  # --- In the thread -----------------------------------------------------------------------------

  def _run(self) -> None:
    if self._warm_up:
      self._compile()
    self.ready.set()
    while True:
      try:
        command = self._inbox.get(block=self.engine.idle)
      except queue.Empty:
        self._step()
        continue
      if command is None:
        return
      future, function = command
      if future.set_running_or_notify_cancel():
        try:
          future.set_result(function())
        except Exception as error:  # noqa: BLE001 (whoever asked gets it)
          future.set_exception(error)

  def _step(self) -> None:
    try:
      # An answer may have two updates in a step: of its prompt's last token, and of its next.
      news: dict[int, list[Update]] = {}
      for update in self.engine.step():
        news.setdefault(id(update.answer), []).append(update)
      for key, updates in news.items():
        call, index = self._places[key]
        if updates[0].answer.finish_reason:
          del self._places[key]
        call.tell(index, "".join(update.text for update in updates))
    except Exception as error:  # noqa: BLE001 (it is logged, and told to those concerned)
      self._fail(error)

  def _fail(self, error: Exception) -> None:
    """Answers with an error those who were in a step that failed; who waits still waits."""
    told = failed(logger, "in a step of the engine", error)
    waiting = {id(answer) for answer in self.engine.waiting}
    calls = {id(call): call for key, (call, _) in self._places.items() if key not in waiting}
    for call in calls.values():
      self._cancel(call)
      call.put(told)

  def _submit(self, call: Call) -> None:
    try:
      for index, request in enumerate(call.requests):
        answer = self.engine.submit(request)
        call.answers.append(answer)
        self._places[id(answer)] = call, index
    except Exception:
      self._cancel(call)
      raise

  def _cancel(self, call: Call) -> None:
    for answer in call.answers:
      self._end(answer)

  def _end(self, answer: Answer) -> None:
    self.engine.cancel(answer)
    self._places.pop(id(answer), None)

  def _compile(self) -> None:
    """Compiles what answers need; a failure leaves it to those who ask."""
    engine = self.engine
    try:
      for done, total in warm_up(engine):
        if self.draining:
          return
        if done % 5 == 0 or done == total:
          logger.info("compiled %d of %d programs", done, total)
    except Exception:
      logger.exception("what requests need could not be compiled ahead")
      for answer in [*engine.running, *engine.waiting]:
        engine.cancel(answer)
      engine.reader.clear()
    engine.counts = Counts()
