"""What stands around all routes: errors, measures, keys, rates, and headers for browsers."""

import hashlib
import hmac
import logging
import time
from collections.abc import Sequence

import limits
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptjax.errors import UserError
from gptjax.serving.errors import ApiError, failed
from gptjax.serving.metrics import Metrics

logger = logging.getLogger(__name__)

# What a browser may do with the pages: nothing but talk to this server.
_POLICY = (
  "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
  "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
  "Content-Security-Policy": _POLICY,
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
}
# What needs a key if there are any; the page and the health of the server need none.
_PROTECTED = ("/v1/", "/tokenize", "/detokenize", "/metrics")


class Outermost:
  """Gives every answer its headers, measures it, and turns errors into answers."""

  def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[str]):
    self._app = app
    self._metrics = metrics
    self._routes = frozenset(routes)

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    start, status = time.perf_counter(), 0

    async def send_with_headers(message: Message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
        headers = MutableHeaders(scope=message)
        for name, value in _HEADERS.items():
          headers.setdefault(name, value)
      await send(message)

    try:
      await self._app(scope, receive, send_with_headers)
    except Exception as error:
      told = failed(logger, f"at {scope['path']}", error)
      if status:
        raise
      await told.response(scope, receive, send_with_headers)
    finally:
      path = scope["path"]
      # A model's name or nonsense in a path would make a new series each.
      path = path if path in self._routes else "/v1/models/" * path.startswith("/v1/models/")
      route = path or "other"
      self._metrics.requests.labels(route, str(status or 499)).inc()
      self._metrics.duration.labels(route).observe(time.perf_counter() - start)


class Keys:
  """Lets in who has a key, at the rate that a key may ask."""

  def __init__(self, app: ASGIApp, keys: Sequence[str] = (), rate: str = ""):
    self._app = app
    # Of one length, so that comparing tells nothing of it.
    self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    self._rate = parse_rate(rate) if rate else None
    self._limiter = limits.strategies.MovingWindowRateLimiter(limits.storage.MemoryStorage())

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http" and scope["path"].startswith(_PROTECTED):
      client = self._client(scope)
      if self._rate is not None and scope["path"] != "/metrics":
        self._count(client)
    await self._app(scope, receive, send)

  def _client(self, scope: Scope) -> str:
    """Names a client by its key or, without keys, by its address; ApiError if its key is wrong."""
    if not self._digests:
      return (scope.get("client") or ("",))[0]
    kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    digest = hashlib.sha256(key.strip().encode()).digest()
    # All are compared, so that the time does not tell which one was near.
    known = sum(hmac.compare_digest(digest, one) for one in self._digests)
    if kind.lower() != "bearer" or not known:
      raise ApiError(
        401,
        "The API key is missing or wrong; send the header 'Authorization: Bearer KEY'.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
      )
    return digest.hex()

  def _count(self, client: str) -> None:
    if not self._limiter.hit(self._rate, client):
      reset = self._limiter.get_window_stats(self._rate, client).reset_time
      seconds = max(int(reset - time.time()) + 1, 1)
      raise ApiError(
        429,
        f"More than {self._rate} requests; try again in {seconds} s.",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
      )


def parse_rate(rate: str) -> limits.RateLimitItem:
  """Reads a rate such as '60/minute'; UserError if it is none."""
  try:
    return limits.parse(rate)
  except ValueError as error:
    raise UserError(f"--rate_limit={rate!r} is no rate; write one like 60/minute.") from error
