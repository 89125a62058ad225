"""/v1/completions: continues prompts, and tells the log-probabilities of texts."""

import functools
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

from gptjax.inference.request import Request
from gptjax.serving.answers import CompletionScores, make_head, make_requests, usage
from gptjax.serving.engine_thread import Piece
from gptjax.serving.errors import wrong
from gptjax.serving.service import Result, Service
from gptjax.serving.streams import EventStream

_MAX_TOKENS = 16  # OpenAI's default.


async def answer(service: Service, fields: Mapping[str, Any]) -> Response:
  """Continues prompts, or tells how likely they are."""
  prompts = await encode_prompts(service, fields["prompt"], "prompt")
  n, echo = fields.get("n", 1), fields.get("echo", False)
  best_of, log_probs = fields.get("best_of", n), fields.get("logprobs")
  max_tokens = fields.get("max_tokens", _MAX_TOKENS)
  stream = fields.get("stream", False)
  if best_of < n:
    raise wrong("best_of", f"best_of={best_of} must be at least n={n}.")
  if stream and best_of > n:
    raise wrong("best_of", "The best of several answers is known at their end: not with stream.")
  if stream and echo and log_probs is not None:
    raise wrong("stream", "The log-probabilities of a prompt (echo) cannot be streamed.")
  if not max_tokens and not echo:
    raise wrong("max_tokens", "max_tokens=0 needs echo, or there is nothing to tell.")
  for prompt in prompts:
    service.check_length(prompt, max_tokens, "prompt")
  requests = make_requests(
    service,
    fields,
    prompts,
    count=best_of,
    max_tokens=max_tokens,
    log_probs=0 if log_probs is None and best_of > n else log_probs,
    scores_prompt=echo and (log_probs is not None or not max_tokens),
  )
  echoed = [service.tokenizer.decode(prompt) if echo else "" for prompt in prompts]
  head = make_head("cmpl", "text_completion", fields)
  if stream:
    tell = functools.partial(_events, service, fields, requests, echoed, head)
    return EventStream(service.ask(requests), tell)
  results = await service.results(requests)
  choices = []
  for number, text in enumerate(echoed):
    own = results[number * best_of : (number + 1) * best_of]
    if best_of > n:
      own = sorted(own, key=_mean_log_prob, reverse=True)[:n]
    choices += [_choice(service, text, result, log_probs is not None, echo) for result in own]
  choices = [{"index": index, **choice} for index, choice in enumerate(choices)]
  return JSONResponse({**head, "choices": choices, "usage": usage(requests, results, best_of)})


async def encode_prompts(service: Service, given: str | list, param: str) -> list[list[int]]:
  """The ids of one prompt or several, as text or ids, which came in a field."""
  if isinstance(given, str) or isinstance(given[0], int):
    given = [given]
  prompts = []
  for index, prompt in enumerate(given):
    if isinstance(prompt, str):
      service.check_prompt(prompt, param)
      prompts.append(await service.encode(prompt, param))
      continue
    size = service.tokenizer.vocab_size
    if (most := max(prompt)) >= size:
      where = param if len(given) == 1 else f"{param}[{index}]"
      raise wrong(where, f"{where}: the tokens are below {size}, not {most}.")
    service.check_prompt(service.tokenizer.decode(prompt), param)
    prompts.append(prompt)
  return prompts


def _mean_log_prob(result: Result) -> float:
  scores = [score.log_prob for score in result.answer.scores]
  return sum(scores) / len(scores)


def _choice(
  service: Service, prompt: str, result: Result, told: bool, echo: bool
) -> dict[str, Any]:
  scores = None
  if told:
    ends = [] if result.end_score is None else [result.end_score]
    before = result.answer.prompt_scores if echo else []
    scores = CompletionScores(service).tell([*before, *result.scores, *ends])
  text = prompt + result.text
  return {"text": text, "logprobs": scores, "finish_reason": result.finish_reason}


async def _events(
  service: Service,
  fields: Mapping[str, Any],
  requests: Sequence[Request],
  echoed: Sequence[str],
  head: Mapping[str, Any],
  pieces: AsyncIterator[Piece],
) -> AsyncIterator[dict[str, Any]]:
  n, told = fields.get("n", 1), fields.get("logprobs") is not None

  def event(index: int, text: str, reason: str | None, scores: Any) -> dict[str, Any]:
    choice = {"index": index, "text": text, "logprobs": scores, "finish_reason": reason}
    return {**head, "choices": [choice]}

  scorers = [CompletionScores(service) for _ in requests]
  results = [Result() for _ in requests]
  for index, _ in enumerate(requests):
    if echoed[index // n]:
      yield event(index, echoed[index // n], None, None)
  async for piece in pieces:
    scores = None
    if told:
      ends = [] if piece.end_score is None else [piece.end_score]
      scores = scorers[piece.index].tell([*piece.scores, *ends])
    results[piece.index].answer = piece.answer
    yield event(piece.index, piece.text, piece.finish_reason or None, scores)
  if "usage" in head:
    yield {**head, "choices": [], "usage": usage(requests, results, n)}
