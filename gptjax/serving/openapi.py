"""The description at /openapi.json, made from the tables by which requests are checked."""

import http
from collections.abc import Callable, Mapping
from typing import Any

from gptjax.serving.fields import STRING, Schema, array, record

_ERROR = {
  "type": "object",
  "properties": {
    "error": record(
      {
        "message": STRING,
        "type": STRING,
        "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]},
      },
      ["message", "type", "param", "code"],
    )
  },
  "required": ["error"],
}
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
    good = {"application/json": {"schema": {"type": "object"}}}
    if path in _STREAMS:
      good["text/event-stream"] = {"schema": STRING}
    paths[path] = {
      "post": {
        "operationId": path.strip("/").replace("/", "_"),
        "summary": answer.__doc__.split("\n")[0],
        "requestBody": {
          "required": True,
          "content": {"application/json": {"schema": _nullable(schema)}},
        },
        "responses": {"200": {"description": "The answer.", "content": good}, **_errors()},
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
  content = {"application/json": {"schema": {"type": "object", "properties": dict(properties)}}}
  return {
    "summary": summary,
    "responses": {"200": {"description": "The answer.", "content": content}, **_errors()},
  }


def _errors() -> dict[str, Any]:
  content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
  return {
    str(status): {"description": f"{http.HTTPStatus(status).phrase}.", "content": content}
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
