"""The application: routes, and how a request is read and answered."""

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import prometheus_client
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from gptjax.serving import (
  chat_completions,
  completions,
  embeddings,
  models,
  openapi,
  responses,
  schemas,
)
from gptjax.serving.errors import ApiError, busy
from gptjax.serving.fields import Schema, read
from gptjax.serving.middleware import Keys, Outermost
from gptjax.serving.service import Service

logger = logging.getLogger(__name__)
_PAGE = Path(__file__).parent / "page"

Answer = Callable[[Service, Mapping[str, Any]], Awaitable[Response]]
# Route -> what answers it, the fields that it takes, and those that it refuses.
POSTS: dict[str, tuple[Answer, Schema, Mapping[str, str]]] = {
  "/v1/completions": (completions.answer, schemas.COMPLETION, schemas.REFUSED["completions"]),
  "/v1/chat/completions": (
    chat_completions.answer,
    schemas.CHAT_COMPLETION,
    schemas.REFUSED["chat_completions"],
  ),
  "/v1/responses": (responses.answer, schemas.RESPONSE, schemas.REFUSED["responses"]),
  "/v1/embeddings": (embeddings.answer, schemas.EMBEDDING, schemas.REFUSED["embeddings"]),
  "/tokenize": (models.tokenize, schemas.TOKENIZE, {}),
  "/detokenize": (models.detokenize, schemas.DETOKENIZE, {}),
}


def make_app(
  service: Service,
  *,
  keys: Sequence[str] = (),
  origins: Sequence[str] = (),
  hosts: Sequence[str] = (),
) -> Starlette:
  """Makes the application that serves a model.

  Args:
    service: the model; its thread starts and ends with the application.
    keys: one of which a client has to send; if there are none, everyone may ask.
    origins: web pages of other servers that may ask (CORS); none by default.
    hosts: names under which the server may be asked; if there are none, any.
  """

  @contextlib.asynccontextmanager
  async def lifespan(_: Starlette) -> AsyncIterator[None]:
    service.thread.start()
    yield
    service.thread.stop()

  routes = [
    Route(path, functools.partial(_answer, service, *how), methods=["POST"], name=path)
    for path, how in POSTS.items()
  ]
  routes += [
    Route("/v1/models", functools.partial(models.list_all, service)),
    Route("/v1/models/{name:path}", functools.partial(models.show, service)),
    Route("/healthz", functools.partial(_healthz, service)),
    Route("/readyz", functools.partial(_readyz, service)),
    Route("/metrics", functools.partial(_metrics, service)),
    Route("/openapi.json", functools.partial(_description, openapi.describe(POSTS))),
  ]
  for file in sorted(_PAGE.iterdir()):
    path = "/" if file.name == "index.html" else f"/{file.name}"
    routes.append(Route(path, functools.partial(_file, file)))
  known = [route.path for route in routes]
  middleware = [Middleware(Outermost, service.metrics, known)]
  if hosts:
    middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)))
  if origins:
    headers = ["authorization", "content-type"]
    middleware.append(
      Middleware(
        CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=headers
      )
    )
  middleware.append(Middleware(Keys, keys=keys, rate=service.limits.rate))
  handlers = {HTTPException: _http_error, ApiError: _api_error}
  return Starlette(
    routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan
  )


async def _answer(
  service: Service, answer: Answer, schema: Schema, refused: Mapping[str, str], request: Request
) -> Response:
  """Reads a request and answers it, unless the client goes away before."""
  kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
  if kind != "application/json":
    # Also, a foreign web page cannot send this type without being asked for its origin first.
    message = "The body must be JSON, with the header 'Content-Type: application/json'."
    raise ApiError(415, message, code="unsupported_media_type")
  fields = read(await _body(request, service), schema, refused)
  if not service.thread.ready.is_set():
    raise busy("The server is starting.", 5)
  return await _unless_gone(request, answer(service, fields))


async def _body(request: Request, service: Service) -> bytes:
  limits = service.limits
  message = f"The body is larger than the {limits.max_body} bytes that this server reads."
  # What is not read any more, a client may still be sending.
  too_large = ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
  length = request.headers.get("content-length", "0")
  if length.isdecimal() and int(length) > limits.max_body:
    raise too_large
  body = bytearray()
  try:
    async with asyncio.timeout(limits.read_seconds):
      async for chunk in request.stream():
        body += chunk
        if len(body) > limits.max_body:
          raise too_large
  except TimeoutError as error:
    message = f"The body did not arrive within {limits.read_seconds:g} s."
    headers = {"Connection": "close"}
    raise ApiError(408, message, code="timeout", headers=headers) from error
  return bytes(body)


async def _unless_gone(request: Request, answer: Awaitable[Response]) -> Response:
  """Waits for an answer, and gives it up when the client is gone."""
  answering = asyncio.ensure_future(answer)
  gone = asyncio.ensure_future(_disconnect(request))
  try:
    await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
    if not answering.done():
      return Response(status_code=499)  # Which nobody reads.
    return answering.result()
  finally:
    gone.cancel()
    answering.cancel()
    await asyncio.wait({answering, gone})


async def _disconnect(request: Request) -> None:
  while (await request.receive())["type"] != "http.disconnect":
    pass


async def _healthz(service: Service, _: Request) -> Response:
  alive = service.thread.alive
  return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)


async def _readyz(service: Service, _: Request) -> Response:
  if service.thread.draining:
    raise busy("The server is shutting down.", 5)
  if not (service.thread.alive and service.thread.ready.is_set()):
    raise busy("The server is starting.", 5)
  return JSONResponse({"status": "ready"})


async def _metrics(service: Service, _: Request) -> Response:
  text = prometheus_client.generate_latest(service.metrics.registry)
  return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)


async def _description(description: Mapping[str, Any], _: Request) -> Response:
  return JSONResponse(description)


async def _file(file: Path, _: Request) -> Response:
  return FileResponse(file)


async def _api_error(_: Request, error: Exception) -> Response:
  return error.response


async def _http_error(request: Request, error: Exception) -> Response:
  match error.status_code:
    case 404:
      message = f"There is nothing at {request.url.path[:80]}."
    case 405:
      message = f"{request.url.path[:80]} takes no {request.method}."
    case _:
      message = str(error.detail)
  return ApiError(error.status_code, message, headers=error.headers).response
