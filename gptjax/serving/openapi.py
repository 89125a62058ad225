"""The description at /openapi.json, made from the tables by which requests are checked."""

import http
from collections.abc import Callable, Mapping
from typing import Any

from gptjax.serving.fields import STRING, Schema, array, record

_MAYBE = {"type": ["string", "null"]}
_ABOUT = {"message": STRING, "type": STRING, "param": _MAYBE, "code": _MAYBE}
_ERROR = record({"error": record(_ABOUT, list(_ABOUT))}, ["error"], closed=False)
_ERRORS = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
_STREAMS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


def describe(posts: Mapping[str, tuple[Callable, Schema, Mapping[str, str]]]) -> dict[str, Any]:
  """Describes the server for programs that make requests from it."""
  paths: dict[str, Any] = {
    "/v1/models": {"get": _get("Lists the models", {"object": STRING, "data": array({})})},
    "/v1/models/{name}": {
      "get": _get("Describes a model", {"id": STRING, "object": STRING})
      | {"parameters": [{"name": "name", "in": "path", "required": True, "schema": STRING}]}
    },
    "/healthz": {"get": _get("Whether the server lives", {"status": STRING})},
    "/readyz": {"get": _get("Whether the server answers requests", {"status": STRING})},
  }
  for path, (answer, schema, _) in posts.items():
    streamed = {"text/event-stream": {"schema": STRING}} if path in _STREAMS else {}
    paths[path] = {
      "post": {
        "operationId": path.strip("/").replace("/", "_"),
        "summary": answer.__doc__.split("\n")[0],
        "requestBody": {"required": True, "content": _json(_nullable(schema))},
        "responses": _responses(_json({"type": "object"}) | streamed),
      }
    }
  return {
    "openapi": "3.1.0",
    "info": {"title": "gptjax", "version": "1"},
    "paths": paths,
    "components": {
      "schemas": {"Error": _ERROR},
      "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    },
    "security": [{}, {"key": []}],
  }


def _get(summary: str, properties: Mapping[str, Schema]) -> dict[str, Any]:
  content = _json({"type": "object", "properties": dict(properties)})
  return {"summary": summary, "responses": _responses(content)}


def _json(schema: Schema) -> dict[str, Any]:
  return {"application/json": {"schema": schema}}


def _responses(content: Mapping[str, Any]) -> dict[str, Any]:
  """An answer, and the errors that may come in its place."""
  error = _json({"$ref": "#/components/schemas/Error"})
  return {"200": {"description": "The answer.", "content": content}} | {
    str(status): {"description": f"{http.HTTPStatus(status).phrase}.", "content": error}
    for status in _ERRORS
  }


def _nullable(schema: Schema) -> Schema:
  """A request's schema, whose fields may be null where they may be missing."""
  need = schema.get("required", ())
  properties = {
    name: one if name in need or not one else {"anyOf": [one, {"type": "null"}]}
    for name, one in schema["properties"].items()
  }
  return {**schema, "properties": properties}
