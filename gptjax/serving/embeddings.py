"""/v1/embeddings: vectors of texts."""

import base64
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from gptjax.inference.embed import embed
from gptjax.serving.completions import encode_prompts
from gptjax.serving.errors import wrong
from gptjax.serving.service import Service


async def answer(service: Service, fields: Mapping[str, Any]) -> Response:
  """Makes a vector of each text."""
  reader = service.thread.engine.reader
  if service.adapter(fields["model"]) is not None:
    raise wrong("model", f"Vectors are made by {service.name!r}, without an adapter.")
  if reader.has_encoder:
    raise wrong("model", "Vectors of a model with an encoder are not supported.")
  rows = await encode_prompts(service, fields["input"], "input")
  for row in rows:
    service.check_length(row, 0, "input")
  data = []
  for index, row in enumerate(rows):  # One at a time: between two, others' answers grow.
    vector_D = await service.thread.call(embed, reader, row)
    as_text = fields.get("encoding_format") == "base64"
    shown = base64.b64encode(vector_D.tobytes()).decode() if as_text else vector_D.tolist()
    data.append({"object": "embedding", "index": index, "embedding": shown})
  tokens = sum(map(len, rows))
  usage = {"prompt_tokens": tokens, "total_tokens": tokens}
  return JSONResponse({"object": "list", "data": data, "model": fields["model"], "usage": usage})
