"""Errors as clients of OpenAI's API read them: a status, a sentence, and the parameter to blame."""

import contextlib
import logging
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.responses import JSONResponse

from gptjax.errors import UserError

_KINDS = {
  401: "authentication_error",
  403: "permission_error",
  404: "not_found_error",
  429: "rate_limit_error",
}


class ApiError(Exception):
  """An answer that is an error.

  Attributes:
    status: of HTTP.
    message: one sentence that says what would be right.
    param: the field of the request, such as 'messages[0].content'.
    code: a word for programs.
    headers: more headers of the answer.
  """

  def __init__(
    self,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
  ):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code
    self.headers = dict(headers or {})

  @property
  def body(self) -> dict[str, Any]:
    kind = "server_error" if self.status >= 500 else "invalid_request_error"
    error = {"message": self.message, "type": _KINDS.get(self.status, kind)}
    return {"error": error | {"param": self.param, "code": self.code}}

  @property
  def response(self) -> JSONResponse:
    return JSONResponse(self.body, self.status, self.headers)


def wrong(param: str, message: str, code: str | None = "invalid_value") -> ApiError:
  """An error of the client's in one field."""
  return ApiError(400, message, param=param, code=code)


def busy(message: str, seconds: int = 1) -> ApiError:
  """The server cannot take the request now, but may be able to after some seconds."""
  return ApiError(503, message, code="overloaded", headers={"Retry-After": str(seconds)})


def failed(logger: logging.Logger, where: str, error: Exception) -> ApiError:
  """What the client is told of an error: the name under which a fault of the server is logged."""
  if isinstance(error, ApiError):
    return error
  name = secrets.token_hex(8)
  logger.error("error %s %s", name, where, exc_info=error)
  return ApiError(500, f"The server failed; its log has error {name}.", code=name)


@contextlib.contextmanager
def blaming(param: str) -> Iterator[None]:
  """Turns what a user can correct into an error of a field."""
  try:
    yield
  except UserError as error:
    raise wrong(param, str(error)) from error
