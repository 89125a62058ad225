"""/v1/models, and how the model's tokenizer splits a text: /tokenize and /detokenize."""

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gptjax.serving.chat_completions import template_messages
from gptjax.serving.errors import blaming, wrong
from gptjax.serving.prompts import encode_chat
from gptjax.serving.service import Service, in_thread


def _model(service: Service, name: str) -> dict[str, Any]:
  shown = {"id": name, "object": "model", "created": service.created, "owned_by": "gptjax"}
  return shown | {"max_model_len": service.thread.room}


async def list_all(service: Service, _: Request) -> Response:
  data = [_model(service, name) for name in service.models]
  return JSONResponse({"object": "list", "data": data})


async def show(service: Service, request: Request) -> Response:
  name = request.path_params["name"]
  service.adapter(name)
  return JSONResponse(_model(service, name))


async def tokenize(service: Service, fields: Mapping[str, Any]) -> Response:
  """The ids of a text, or of a conversation."""
  service.adapter(fields.get("model", service.name))
  if ("prompt" in fields) == ("messages" in fields):
    raise wrong("prompt", "Give either a prompt or messages.")
  if "messages" in fields:
    messages = template_messages(fields["messages"])
    begins = fields.get("add_generation_prompt", True)
    ids = await encode_chat(service, messages, add_generation_prompt=begins)
  elif fields.get("add_special_tokens", True):
    ids = await service.encode(fields["prompt"], "prompt")
  else:
    with blaming("prompt"):
      ids = await in_thread(service.tokenizer.encode, fields["prompt"])
  return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.thread.room})


async def detokenize(service: Service, fields: Mapping[str, Any]) -> Response:
  """The text of ids."""
  service.adapter(fields.get("model", service.name))
  size = service.tokenizer.vocab_size
  if (most := max(fields["tokens"], default=0)) >= size:
    raise wrong("tokens", f"tokens: those of the model are below {size}, not {most}.")
  return JSONResponse({"prompt": await in_thread(service.tokenizer.decode, fields["tokens"])})
