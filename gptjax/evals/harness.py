"""Runs a model in EleutherAI's lm-eval, with its tasks, prompts and metrics (Gao et al., A
framework for few-shot language model evaluation).

Importing this module imports lm-eval, which takes two seconds.
"""

import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from gptjax.errors import UserError, did_you_mean
from gptjax.evals.score import Pair, rolling_windows
from gptjax.evals.subject import Subject
from gptjax.inference.sampling import Sampling
from gptjax.templates.chat import ChatTemplate

# lm-eval's default of `max_gen_toks`.
_MAX_TOKENS = 256
_GENERATION_KEYS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p")


class HarnessModel(LM):
  """A model in lm-eval's interface, which passes all requests of a kind at once.

  Texts become tokens as in its own model of `transformers` (HFLM): special tokens are parsed, and
  only the tokenizer's own start tokens are put before a text.
  """

  def __init__(self, subject: Subject, seed: int = 0):
    super().__init__()
    self.subject = subject
    self.seed = seed

  def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    pairs = [self._encode_pair(*request.args) for request in requests]
    return [(one.log_likelihood, one.greedy) for one in self.subject.score(pairs)]

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    prefix, room = [self.subject.tokenizer.prefix], self.subject.context_length
    windows = [
      [*rolling_windows(prefix, self._encode_document(request.args[0]), room)]
      for request in requests
    ]
    scores = iter(self.subject.score([*itertools.chain(*windows)]))
    return [
      sum(one.log_likelihood for one in itertools.islice(scores, len(own))) for own in windows
    ]

  def _encode(self, text: str) -> list[int]:
    """Encodes a text after the tokenizer's start tokens, unless the text contains them already."""
    tokenizer = self.subject.tokenizer
    tokens = tokenizer.encode_with_specials(text)
    return tokens if tokens[:1] == [tokenizer.prefix] else [*tokenizer.start, *tokens]

  def _encode_pair(self, context: str, continuation: str) -> Pair:
    """Encodes a context and its continuation; white space between the two belongs to the latter,
    and the context has as many tokens as it has alone."""
    tokenizer = self.subject.tokenizer
    before = context.rstrip()
    continuation = context[len(before) :] + continuation
    if before:
      tokens = self._encode(before)
      return tokens, self._encode(before + continuation)[len(tokens) :]
    tokens = tokenizer.encode_with_specials(continuation)
    return (
      ([tokenizer.prefix], tokens) if tokens[0] != tokenizer.prefix else (tokens[:1], tokens[1:])
    )

  def _encode_document(self, text: str) -> list[int]:
    """The tokens of a text to predict. Like lm-eval's, they include a start token that a foreign
    tokenizer adds, though it comes after the same token."""
    tokenizer = self.subject.tokenizer
    return tokenizer.encode_with_specials(text) if tokenizer.is_own else self._encode(text)

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    answers = [""] * len(requests)
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
      groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
    for indices in groups.values():
      options = dict(requests[indices[0]].args[1])
      prompts = [requests[index].args[0] for index in indices]
      for index, text in zip(indices, self._write(prompts, options), strict=True):
        answers[index] = text
    return answers

  def _write(self, prompts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    for key in options:
      if key not in _GENERATION_KEYS:
        raise UserError(f"generation_kwargs: no {key!r}. {did_you_mean(key, _GENERATION_KEYS)}")
    until = options.get("until") or []
    temperature = float(options.get("temperature") or 0.0)
    sampling = Sampling(
      temperature=temperature if options.get("do_sample", temperature > 0) else 0.0,
      **{key: options[key] for key in ("top_k", "top_p", "min_p") if key in options},
    )
    tokenizer = self.subject.tokenizer
    rows = [self._encode(prompt) or [tokenizer.prefix] for prompt in prompts]
    return self.subject.write(
      rows,
      max_tokens=int(options.get("max_gen_toks", _MAX_TOKENS)),
      stop=[until] if isinstance(until, str) else list(until),
      sampling=sampling,
      # Repeated requests must have different samples.
      seeds=[(self.seed + number) % 2**32 for number in range(len(rows))],
    )

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    template = ChatTemplate(self.subject.tokenizer)
    return template.render(chat_history, add_generation_prompt=add_generation_prompt)

  @property
  def tokenizer_name(self) -> str:
    return self.subject.tokenizer.spec.replace("/", "__")

  def chat_template(self, chat_template: bool | str = False) -> str:
    return self.subject.tokenizer.chat_template or ""


def run(
  subject: Subject,
  tasks: Sequence[str],
  *,
  include: str = "",
  shots: int | None = None,
  seed: int = 0,
  limit: int = 0,
) -> dict[str, Any]:
  """Evaluates on tasks of lm-eval and returns its results.

  Args:
    subject: the model; with `chat`, its chat template is applied.
    tasks: names of tasks in lm-eval or in `include`.
    include: a folder with your own tasks (YAML).
    shots: worked examples before each question; None is the task's own number.
    seed: seed of their choice, and of sampling.
    limit: how many examples of each task, from its first on; 0 is all.

  Raises:
    UserError: a task is unknown.
  """
  logging.getLogger("lm_eval").setLevel(logging.WARNING)
  # lm-eval's bootstrap would fork this process, whose threads may hold locks.
  os.environ.setdefault("DISABLE_MULTIPROC", "1")
  if include and not Path(include).is_dir():
    raise UserError(f"--lm_eval_include={include} is no folder.")
  # Looking through the thousands of tasks that come with it takes seconds.
  manager = TaskManager(include_path=include or None, include_defaults=not include)
  if not set(tasks) <= set(manager.all_tasks) and include:
    manager = TaskManager(include_path=include)
  for task in tasks:
    if task not in manager.all_tasks:
      raise UserError(f"--lm_eval: no task {task!r}. {did_you_mean(task, manager.all_tasks)}")
  return evaluator.simple_evaluate(
    model=HarnessModel(subject, seed),
    tasks=list(tasks),
    task_manager=manager,
    num_fewshot=shots,
    limit=limit or None,
    apply_chat_template=subject.chat,
    fewshot_random_seed=seed,
    random_seed=seed,
    numpy_random_seed=seed,
    torch_random_seed=None,
    log_samples=False,
    bootstrap_iters=1000,
  )
