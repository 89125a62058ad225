"""Continues prompts: the function behind the command, the notebooks and the samples of training."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.inference.engine import Engine, check_writes
from gptjax.inference.lengths import round_up
from gptjax.inference.request import Request
from gptjax.inference.sampling import Sampling
from gptjax.inference.speculation import Drafter
from gptjax.model.gpt import GPT
from gptjax.templates.chat import ChatTemplate


@dataclasses.dataclass(frozen=True)
class Completion:
  """A completion of one prompt. `finish_reason` is 'stop' (the model ended the text or its turn, or
  wrote a stop string) or 'length'."""

  prompt: str
  completion: str
  tokens: list[int]
  finish_reason: str


def generate(
  model: GPT,
  tokenizer: Tokenizer,
  prompts: Sequence[str | Sequence[int]],
  *,
  max_tokens: int = 128,
  sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
  stop: Sequence[str] = (),
  seed: int | Sequence[int] = 0,
  adapters: Sequence[int | None] | None = None,
  on_text: Callable[[int, str], None] | None = None,
  rows: int = 32,
  weights: str | None = None,
  cache: str | None = None,
  draft: str | Drafter | None = None,
) -> list[Completion]:
  """Continues each prompt; a completion does not depend on the rest of the batch.

  An `Engine` that is kept answers again without preparing the model again.

  Args:
    model: any GPT that is not bidirectional; its parameters may be sharded. If there is an encoder,
      it reads the prompt.
    tokenizer: the model's.
    prompts: texts, encoded by `Tokenizer.encode_prompt`, or complete token ids.
    max_tokens: the most tokens to add to a prompt.
    sampling: how tokens are chosen.
    stop: strings that end a completion, themselves left out.
    seed: seed of the random choices, one for all prompts or one for each; a prompt and a seed
      decide the completion.
    adapters: the adapter of each prompt, in a model that has several; None is none.
    on_text: called with (prompt index, new text) as text becomes certain.
    rows: prompts that are continued at the same time, at most.
    weights, cache, draft: as for `Engine`.

  Raises:
    UserError: there are no prompts, one has no ids, one and `max_tokens` do not fit the learned
      positions, or the tokenizer has more tokens than the model.
  """
  starts, length = fit_prompts(model, tokenizer, prompts, max_tokens)
  seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
  chosen = [None] * len(prompts) if adapters is None else list(adapters)
  for name, values in (("seed", seeds), ("adapters", chosen)):
    if len(values) != len(prompts):
      raise UserError(f"{name}: {len(values)} for {len(prompts)} prompts; give one for each.")
  rows = min(rows, len(prompts))
  options = {"weights": weights, "cache": cache, "draft": draft}
  engine = Engine(model, tokenizer, rows=rows, length=length, **options)
  answers = [
    engine.submit(Request(start, max_tokens, sampling, one, stop, adapter=adapter))
    for start, one, adapter in zip(starts, seeds, chosen, strict=True)
  ]
  numbers = {id(answer): i for i, answer in enumerate(answers)}
  while not engine.idle:
    for update in engine.step():
      if update.text and on_text is not None:
        on_text(numbers[id(update.answer)], update.text)
  return [
    Completion(
      prompt if isinstance(prompt, str) else tokenizer.decode(prompt),
      answer.text,
      answer.completion,
      answer.finish_reason,
    )
    for prompt, answer in zip(prompts, answers, strict=True)
  ]


def fit_prompts(
  model: GPT, tokenizer: Tokenizer, prompts: Sequence[str | Sequence[int]], max_tokens: int
) -> tuple[list[list[int]], int]:
  """Returns the ids of each prompt, and the tokens of the longest with its completion, rounded up.

  Raises:
    UserError: as `generate`.
  """
  if not prompts or max_tokens < 1:
    raise UserError("generate needs at least one prompt and max_tokens of at least 1.")
  check_writes(model, tokenizer)
  starts = [_ids(tokenizer, prompt) for prompt in prompts]
  longest = 1 if model.encoder is not None else max(map(len, starts))
  position = model.config.position
  room = position.room if position.kind == "learned" else None
  if room is not None and longest + max_tokens > room:
    raise UserError(
      f"a prompt of {longest} tokens and max_tokens={max_tokens} exceed the model's {room} learned "
      "positions."
    )
  # Few shapes, as each is compiled.
  return starts, round_up(longest + max_tokens, 128, room)


def _ids(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
  if isinstance(prompt, str):
    return tokenizer.encode_prompt(prompt)
  if not len(prompt):
    raise UserError("a prompt given as ids needs at least one.")
  return list(prompt)


def continue_prompts(model: GPT, tokenizer: Tokenizer, config: Mapping[str, Any]) -> list[str]:
  """Continues each prompt of `config.sample`, for a training run to show."""
  completions = generate(
    model,
    tokenizer,
    list(config.prompts),
    max_tokens=config.max_tokens,
    sampling=Sampling(temperature=config.temperature, top_p=config.top_p),
    seed=range(len(config.prompts)),
  )
  return [one.prompt + one.completion for one in completions]


def chat_prompts(tokenizer: Tokenizer, texts: Sequence[str], system: str | None) -> list[list[int]]:
  """Returns the ids that ask a chat model for its answer to each text.

  Raises:
    UserError: the model has no chat template, or its template refuses a system's message.
  """
  template = ChatTemplate(tokenizer)
  before = [] if system is None else [{"role": "system", "content": system}]
  return [template.encode([*before, {"role": "user", "content": text}]) for text in texts]
