"""What all routes share: the engine's thread, the tokenizer, limits, and the way of an answer."""

import asyncio
import contextlib
import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import anyio.to_thread

from gptjax.inference.constraints import Languages
from gptjax.inference.engine import Engine
from gptjax.inference.request import Answer, Request, TokenScore
from gptjax.serving.engine_thread import Call, EngineThread, Piece
from gptjax.serving.errors import ApiError, blaming
from gptjax.serving.filters import Filter, FilteredAnswer
from gptjax.serving.metrics import Metrics
from gptjax.serving.token_names import TokenNames
from gptjax.templates.chat import ChatTemplate


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a client may ask of the server.

  Attributes:
    max_queue: answers that wait beside those that run.
    max_body: bytes of a request.
    read_seconds: in which a request has to arrive.
    timeout: seconds of a whole answer.
    drain_seconds: in which answers may end when the server is told to.
    rate: requests of a key or, without keys, of an address, such as '60/minute'; empty is any.
  """

  max_queue: int = 64
  max_body: int = 4 << 20
  read_seconds: float = 30
  timeout: float = 600
  drain_seconds: float = 30
  rate: str = ""


@dataclasses.dataclass
class Result:
  """A finished answer to one request."""

  text: str = ""
  scores: list[TokenScore] = dataclasses.field(default_factory=list)
  end_score: TokenScore | None = None
  finish_reason: str = ""
  answer: Answer | None = None


class Service:
  """A model that is served.

  Attributes:
    name: the model's, in requests.
    adapters: numbers of the model's adapters by their names, which are names of models too.
    created: when the server started, in Unix time.
    thread: the engine's.
    tokenizer: the model's.
    limits: for all clients.
    judge: sees prompts and answers, or None.
    metrics: for Prometheus.
  """

  def __init__(
    self,
    engine: Engine,
    name: str,
    *,
    limits: Limits = Limits(),
    adapters: Mapping[str, int] | None = None,
    judge: Filter | None = None,
    warm_up: bool = True,
  ):
    self.name = name
    self.adapters = dict(adapters or {})
    self.created = int(time.time())
    self.thread = EngineThread(engine, max_queue=limits.max_queue, warm_up=warm_up)
    self.tokenizer = engine.tokenizer
    self.limits = limits
    self.judge = judge
    self.metrics = Metrics(self.thread)

  @functools.cached_property
  def template(self) -> ChatTemplate:
    """The chat template; UserError if the model has none."""
    return ChatTemplate(self.tokenizer)

  @functools.cached_property
  def names(self) -> TokenNames:
    return TokenNames(self.tokenizer)

  @functools.cached_property
  def languages(self) -> Languages:
    return Languages(self.tokenizer)

  def adapter(self, model: str) -> int | None:
    """The number of the adapter that a model's name means; ApiError if there is no such model."""
    if model != self.name and model not in self.adapters:
      message = f"no model {model[:80]!r}; this server has: {', '.join(self.models)}."
      raise ApiError(404, message, param="model", code="model_not_found")
    return self.adapters.get(model)

  @property
  def models(self) -> list[str]:
    return [self.name, *self.adapters]

  async def encode(self, text: str, param: str) -> list[int]:
    """The ids of a prompt, whose encoding may take long and so does not hold up the others."""
    with blaming(param):
      return await in_thread(self.tokenizer.encode_prompt, text)

  def check_prompt(self, text: str, param: str) -> None:
    """Raises ApiError if the filter refuses a prompt."""
    if self.judge is not None and (reason := self.judge.refuses(text)):
      message = f"The prompt is not answered here: {reason}"
      raise ApiError(400, message, param=param, code="content_filter")

  def check_length(self, prompt: Sequence[int], max_tokens: int, param: str) -> None:
    """Raises ApiError if there is no room for a prompt and its answer."""
    room = self.thread.room
    if len(prompt) + max_tokens > room:
      message = (
        f"This model's context has {room} tokens; the prompt has {len(prompt)}, and {max_tokens} "
        "are asked for. Shorten the prompt, or ask for fewer."
      )
      raise ApiError(400, message, param=param, code="context_length_exceeded")

  @contextlib.asynccontextmanager
  async def ask(
    self, requests: Sequence[Request], shown: Mapping[int, str] | None = None
  ) -> AsyncIterator[AsyncIterator[Piece]]:
    """Has the engine take requests, and gives the pieces of their answers."""
    start = asyncio.get_running_loop().time()
    async with self.thread.ask(requests, shown) as call:
      yield self._pieces(call, start)

  async def results(
    self, requests: Sequence[Request], shown: Mapping[int, str] | None = None
  ) -> list[Result]:
    """Answers requests and waits for the end."""
    results = [Result() for _ in requests]
    async with self.ask(requests, shown) as pieces:
      async for piece in pieces:
        result = results[piece.index]
        result.text += piece.text
        result.scores += piece.scores
        result.end_score = piece.end_score
        result.finish_reason, result.answer = piece.finish_reason, piece.answer
    return results

  async def _pieces(self, call: Call, start: float) -> AsyncIterator[Piece]:
    """Measures and filters the pieces of a call."""
    clock = asyncio.get_running_loop().time
    before: dict[int, float] = {}
    filtered = [FilteredAnswer(self.judge) for _ in call.requests if self.judge is not None]
    cut: set[int] = set()
    async for piece in call.pieces(start + self.limits.timeout):
      index, now = piece.index, clock()
      if index in before:
        self.metrics.between_tokens.observe(now - before[index])
      else:
        self.metrics.first_token.observe(now - start)
      before[index] = now
      if filtered:
        if index in cut:  # It came before the answer was ended.
          continue
        was_open = not piece.finish_reason
        piece = filtered[index].add(piece)
        if was_open and piece.finish_reason:
          cut.add(index)
          self.thread.drop(call, index)
          piece = dataclasses.replace(piece, answer=call.answers[index])
      constraint = call.requests[index].constraint
      if piece.finish_reason and constraint is not None and constraint.error:
        message = f"The answer's format became too complex to follow: {constraint.error}"
        raise ApiError(400, message, param="response_format", code="too_complex")
      yield piece


async def in_thread(function: Callable, *arguments: Any, **named: Any) -> Any:
  """Runs what takes long in another thread."""
  return await anyio.to_thread.run_sync(functools.partial(function, *arguments, **named))
