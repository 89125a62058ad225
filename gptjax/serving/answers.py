"""From the fields of a request to the engine's requests, and from its answers to what is told."""

import codecs
import dataclasses
import math
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gptjax.data.tokenizer import Tokenizer
from gptjax.inference.constraints import LanguageConstraint
from gptjax.inference.request import Request, TokenScore
from gptjax.inference.sampling import Sampling
from gptjax.serving.errors import blaming, wrong
from gptjax.serving.service import Result, Service

# What is told in the place of the logarithm of 0, which JSON does not have.
_NEVER = -9999.0


def make_requests(
  service: Service,
  fields: Mapping[str, Any],
  prompts: Sequence[Sequence[int]],
  *,
  count: int = 1,
  max_tokens: int,
  log_probs: int | None = None,
  scores_prompt: bool = False,
  constraint: LanguageConstraint | None = None,
) -> list[Request]:
  """Makes `count` requests of each prompt, one after the other, with seeds that count up."""
  names = {field.name for field in dataclasses.fields(Sampling)}
  with blaming("temperature"):
    sampling = Sampling(**{key: value for key, value in fields.items() if key in names})
  stop = fields.get("stop", ())
  request = Request(
    (),
    max_tokens,
    sampling,
    stop=(stop,) if isinstance(stop, str) else tuple(stop),
    log_probs=log_probs,
    scores_prompt=scores_prompt,
    logit_bias=_biases(service.tokenizer, fields.get("logit_bias", {})),
    adapter=service.adapter(fields["model"]),
    ignore_end=fields.get("ignore_eos", False),
  )
  seed = fields.get("seed", secrets.randbits(32))
  return [
    dataclasses.replace(
      request,
      tokens=prompt,
      seed=(seed + number) % 2**32,
      constraint=constraint and constraint.copy(),
    )
    for prompt in prompts
    for number in range(count)
  ]


def _biases(tokenizer: Tokenizer, biases: Mapping[str, float]) -> dict[int, float]:
  found = {}
  for name, bias in biases.items():
    if not (name.isascii() and name.isdecimal() and len(name) < 9):
      raise wrong("logit_bias", f"logit_bias: {name[:40]!r} is no id of a token.")
    if int(name) >= tokenizer.vocab_size:
      message = f"logit_bias: the tokens are below {tokenizer.vocab_size}, not {name}."
      raise wrong("logit_bias", message)
    found[int(name)] = bias
  return found


def make_head(prefix: str, kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
  """What an answer and each of its chunks begin with: `usage` too if the last chunk has it."""
  name, now = f"{prefix}-{secrets.token_hex(12)}", int(time.time())
  counts = fields.get("stream_options", {}).get("include_usage", False)
  head = {"id": name, "object": kind, "created": now, "model": fields["model"]}
  return head | ({"usage": None} if counts else {})


def usage(requests: Sequence[Request], results: Sequence[Result], count: int) -> dict[str, Any]:
  """Counts tokens; a prompt with `count` answers is counted once."""
  prompts = sum(len(request.tokens) for request in requests[::count])
  cached = sum(result.answer.cached_tokens for result in results[::count])
  written = sum(len(one.answer.tokens) - one.answer.prompt_length for one in results)
  return {
    "prompt_tokens": prompts,
    "completion_tokens": written,
    "total_tokens": prompts + written,
    "prompt_tokens_details": {"cached_tokens": cached},
  }


def finite(log_prob: float | None) -> float | None:
  return log_prob if log_prob is None or math.isfinite(log_prob) else _NEVER


class CompletionScores:
  """Log-probabilities in the form of /v1/completions, of one answer as it grows."""

  def __init__(self, service: Service, start: int = 0):
    """Begins at `start` characters into the text."""
    self._names = service.names
    self._tokenizer = service.tokenizer
    self._offset = start
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

  def tell(self, scores: Iterable[TokenScore]) -> dict[str, list]:
    told: dict[str, list] = {
      key: [] for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    for score in scores:
      name = self._names.text(score.token)
      told["tokens"].append(name)
      told["token_logprobs"].append(finite(score.log_prob))
      told["top_logprobs"].append(self._top(score, name))
      told["text_offset"].append(self._offset)
      self._offset += len(self._decoder.decode(self._tokenizer.decode_bytes([score.token])))
    return told

  def _top(self, score: TokenScore, name: str) -> dict[str, float | None] | None:
    if score.log_prob is None:
      return None
    top: dict[str, float | None] = {}
    for token, log_prob in score.candidates:  # Falling: of two tokens with one text, the likelier.
      top.setdefault(self._names.text(token), finite(log_prob))
    top.setdefault(name, finite(score.log_prob))
    return top


def chat_scores(service: Service, scores: Iterable[TokenScore]) -> list[dict[str, Any]]:
  """Log-probabilities in the form of chats."""
  names = service.names

  def told(token: int, log_prob: float | None) -> dict[str, Any]:
    raw = names.bytes(token)
    return {"token": names.text(token), "logprob": finite(log_prob), "bytes": list(raw)}

  return [
    told(score.token, score.log_prob)
    | {"top_logprobs": [told(token, log_prob) for token, log_prob in score.candidates]}
    for score in scores
  ]
