"""Asks a model the examples of a task, and measures its answers.

Axes: N examples, L labels, C candidates.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import json
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.data import files
from gptjax.errors import UserError
from gptjax.evals import sandbox
from gptjax.evals.sandbox import Isolation
from gptjax.evals.subject import Prompt, Subject
from gptjax.evals.task import Task, choose, choose_shots, evaluated_examples
from gptjax.inference.sampling import Sampling
from gptjax.scores import scores
from gptjax.scores.scores import Measure, Metric
from gptjax.templates.prompts import Example, Template

# Content-free texts for calibration (Zhao et al. 2021, section 5).
CONTENT_FREE = ("N/A", "[MASK]", "")
UNANSWERED = "(none)"


@dataclasses.dataclass(frozen=True)
class Result:
  """Results of a task. metrics: by name. details: other entries of the results file. predictions:
  one per example, with its `place`. confidence, correct: [N], of classification by likelihood.
  report: table of each label for the terminal."""

  name: str
  metrics: dict[str, Metric]
  details: dict[str, Any]
  predictions: list[dict[str, Any]]
  confidence: np.ndarray | None = None
  correct: np.ndarray | None = None
  report: str = ""


@dataclasses.dataclass(frozen=True)
class _Answers:
  measures: dict[str, Measure]
  predictions: list[Any]
  details: dict[str, Any] = dataclasses.field(default_factory=dict)
  confidence: np.ndarray | None = None
  correct: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Questions:
  """A task with its files read and its templates rendered.

  asked: the question of each example. shots: worked examples (question, answer). isolation: sandbox
  for the model's code, if that is run.
  """

  task: Task
  examples: list[Example]
  asked: list[str]
  shots: list[tuple[str, str]]
  seed: int
  details: dict[str, Any]
  isolation: Isolation | None = None

  def prompts(self, subject: Subject, asked: Sequence[str]) -> list[Prompt]:
    instruction, separator = self.task.instruction, self.task.separator
    return [subject.prompt(instruction, self.shots, text, separator) for text in asked]


def prepare(
  task: Task,
  *,
  shots: int = 0,
  seed: int = 0,
  limit: int = 0,
  isolation: Isolation | None = None,
) -> Questions:
  """Reads a task's questions, so that its errors are known before a model runs.

  Args:
    task: the task.
    shots: number of worked examples before each question, from the training file.
    seed: seed of their choice, of `limit`, and of sampling.
    limit: how many examples to take; 0 is all.
    isolation: sandbox in which to run the model's code; None does not run it.

  Raises:
    UserError: a file of the task is missing or wrong, the library of its metrics is missing, or
      the task needs the model's code to be run without an `isolation`.
  """
  if task.kind == "code" and isolation is None:
    raise UserError(
      f"{task.file}: a task of kind 'code' runs what the model writes, which has to be asked for: "
      "--run_code."
    )
  if task.kind in scores.LIBRARIES:
    scores.need(scores.LIBRARIES[task.kind])
  examples = evaluated_examples(task, limit, seed)
  if task.prediction:
    return Questions(task, examples, [""] * len(examples), [], seed, {})
  chosen, left_out = choose_shots(task, shots, seed, examples)
  question = task.question
  if task.kind == "code":
    for example in examples:
      _template(task, "program").render(example, prompt="", completion="")
      _template(task, "check").render(example, prompt="")
  return Questions(
    task,
    examples,
    [question.render(example) for example in examples],
    [(question.render(shot), task.answer(shot)) for shot in chosen],
    seed,
    {"shots": [shot.place for shot in chosen], "training_examples_left_out": left_out},
    isolation,
  )


def evaluate(
  questions: Questions, subject: Subject, *, resamples: int = scores.RESAMPLES
) -> Result:
  """Asks a model, and measures its answers, with `resamples` draws of the bootstrap."""
  start = time.perf_counter()
  task, examples = questions.task, questions.examples
  ask = {"classification": _classify, "ranking": _rank, "tagging": _tag, "code": _program}
  found = ask.get(task.kind, _write)(questions, subject)
  metrics = {
    name: scores.bootstrap(measure, len(examples), resamples=resamples, seed=questions.seed)
    for name, measure in found.measures.items()
    if name in (task.metrics or found.measures)
  }
  details = {
    "settings": dataclasses.asdict(task) | {"file": str(task.file)},
    "seconds": time.perf_counter() - start,
    **questions.details,
    **found.details,
  }
  predictions = [
    {"place": example.place, "target": example.record.get(task.target), "prediction": prediction}
    for example, prediction in zip(examples, found.predictions, strict=True)
  ]
  return Result(task.name, metrics, details, predictions, found.confidence, found.correct)


@dataclasses.dataclass(frozen=True)
class Documents:
  """Texts to predict, as (place, text), and the path that they come from."""

  path: str
  documents: list[tuple[str, str]]
  seed: int


def prepare_perplexity(path: str, *, seed: int = 0, limit: int = 0) -> Documents:
  """Reads text files, or the key 'text' of records; `limit` of them are chosen by the seed.

  Raises:
    UserError: there is no text.
  """
  source = files.open_texts(path)
  documents = [(source.name(index), source[index]) for index in range(len(source))]
  documents = [(place, text) for place, text in documents if text]
  if not documents:
    raise UserError(f"{path}: no text to evaluate on.")
  return Documents(path, choose(documents, limit, seed), seed)


def perplexity(
  documents: Documents, subject: Subject, *, resamples: int = scores.RESAMPLES
) -> Result:
  """Measures how well a model predicts documents, each from its start."""
  start = time.perf_counter()
  places, texts = zip(*documents.documents, strict=True)
  found = subject.score_documents(texts)
  nats, tokens = [-one.log_likelihood for one in found], [one.tokens for one in found]
  measures = scores.language_modelling(nats, tokens, texts)
  return Result(
    f"perplexity:{documents.path}",
    {
      name: scores.bootstrap(measure, len(texts), resamples=resamples, seed=documents.seed)
      for name, measure in measures.items()
    },
    {"tokens": sum(tokens), "seconds": time.perf_counter() - start},
    [
      {"place": place, "nats": one_nats, "tokens": one_tokens}
      for place, one_nats, one_tokens in zip(places, nats, tokens, strict=True)
    ],
  )


# --- One function a kind -----------------------------------------------------------------------


def _classify(questions: Questions, subject: Subject) -> _Answers:
  task, labels = questions.task, [*questions.task.labels]
  gold = [task.gold(example) for example in questions.examples]
  confidence = None
  details: dict[str, Any] = {}
  if task.by_likelihood:
    p_NL, details = _label_probabilities(questions, subject)
    predicted = [labels[index] for index in p_NL.argmax(axis=1)]
    confidence = p_NL.max(axis=1)
    predictions = [
      {"label": label, "probabilities": dict(zip(labels, row.tolist(), strict=True))}
      for label, row in zip(predicted, p_NL, strict=True)
    ]
  else:
    texts = _texts(questions, subject)
    predicted = [_read_label(task, text) for text in texts]
    predictions = [
      {"label": label, "text": text} for label, text in zip(predicted, texts, strict=True)
    ]
    details["unanswered"] = predicted.count(UNANSWERED)
  measures = scores.classification(gold, predicted)
  correct = np.array(gold) == np.array(predicted)
  if confidence is not None:
    measures["ece"] = scores.calibration_error(confidence, correct)
  if "spearman" in task.known_metrics:
    measures["spearman"] = scores.spearman(np.array(gold, float), p_NL @ np.array(labels, float))
  shown = labels + [UNANSWERED] * (UNANSWERED in predicted)
  details |= scores.classification_report(gold, predicted, shown)
  return _Answers(measures, predictions, details, confidence, correct)


def _label_probabilities(
  questions: Questions, subject: Subject
) -> tuple[np.ndarray, dict[str, Any]]:
  """Probabilities [N, L] of the labels, which add up to 1, and those that calibrated them."""
  task, N = questions.task, len(questions.examples)
  asked = list(questions.asked)
  if task.calibrate:
    # Other keys of the template are taken from the first example.
    first = questions.examples[0]
    first.get(task.text)
    for text in CONTENT_FREE:
      asked.append(task.question.render(Example({**first.record, task.text: text}, first.place)))
  prompts, texts = questions.prompts(subject, asked), [*task.labels.values()]
  pairs = [(prompt, text) for prompt in prompts for text in texts]
  logits_NL = _log_likelihoods(task, subject, pairs).reshape(len(prompts), len(texts))
  p_NL = _normalize(np.exp(logits_NL - logits_NL.max(axis=1, keepdims=True)))
  if not task.calibrate:
    return p_NL, {}
  # W = diag(p_cf)^-1 and b = 0 (section 5); the result is normalised.
  content_free_L = p_NL[N:].mean(axis=0)
  details = {"content_free": dict(zip(task.labels, content_free_L.tolist(), strict=True))}
  return _normalize(p_NL[:N] / content_free_L[None]), details


def _log_likelihoods(
  task: Task, subject: Subject, pairs: Sequence[tuple[Prompt, str]]
) -> np.ndarray:
  """The log-likelihood of each text after its prompt, [pairs], adjusted by the task's
  `domain_premise`, `end_of_text` and `normalize`."""
  found = subject.likelihoods(pairs, end_of_text=task.end_of_text)
  nats = np.array([score.log_likelihood for score in found])
  if task.domain_premise:
    premise = subject.prompt("", [], task.domain_premise, "")
    texts = [*dict.fromkeys(text for _, text in pairs)]
    after_premise = [(premise, text) for text in texts]
    alone = subject.likelihoods(after_premise, end_of_text=task.end_of_text)
    prior = {text: one.log_likelihood for text, one in zip(texts, alone, strict=True)}
    nats -= [prior[text] for _, text in pairs]
  match task.normalize:
    case "tokens":
      nats /= [score.tokens for score in found]
    case "bytes":
      nats /= [len(text.strip().encode()) for _, text in pairs]
  return nats


def _normalize(p_NL: np.ndarray) -> np.ndarray:
  return p_NL / p_NL.sum(axis=1, keepdims=True)


def _rank(questions: Questions, subject: Subject) -> _Answers:
  task, examples = questions.task, questions.examples
  candidates = [task.candidates_of(example) for example in examples]
  prompts = questions.prompts(subject, questions.asked)
  pairs = [
    (prompt, task.after_prompt(text))
    for prompt, texts in zip(prompts, candidates, strict=True)
    for text in texts
  ]
  starts = np.cumsum([len(texts) for texts in candidates])[:-1]
  found = np.split(_log_likelihoods(task, subject, pairs), starts)
  right, predictions = [], []
  for example, texts, scores_C in zip(examples, candidates, found, strict=True):
    gold = task.gold(example)
    right_C = np.array([text in gold for text in texts])
    order_C = scores.ranking_order(scores_C, right_C)
    right.append(right_C[order_C])
    ranking = [texts[index] for index in order_C]
    predictions.append({"ranking": ranking, "scores": scores_C[order_C].tolist()})
  return _Answers(scores.ranking(right, task.k), predictions)


def _read_label(task: Task, text: str) -> str:
  """The label whose text an answer starts with; the longest if there are several."""
  answer = text.strip().casefold()
  found = [
    (len(shown), label)
    for label, shown in ((label, text.strip().casefold()) for label, text in task.labels.items())
    if answer.startswith(shown) and not re.match(r"[a-z0-9]", answer[len(shown) :])
  ]
  return max(found, default=(0, UNANSWERED))[1]


def _write(questions: Questions, subject: Subject) -> _Answers:
  task = questions.task
  golds = [task.gold(example) for example in questions.examples]
  texts = [text.strip() for text in _texts(questions, subject)]
  measures = getattr(scores, task.kind)(golds, texts, task.language)
  translates = task.kind == "translation"
  details = {"signatures": scores.translation_signatures(task.language)} if translates else {}
  return _Answers(measures, texts, details)


def _tag(questions: Questions, subject: Subject) -> _Answers:
  task, examples = questions.task, questions.examples
  golds = [task.gold(example) for example in examples]
  predicted = [example.get(task.prediction) for example in examples]
  for example, gold, tags in zip(examples, golds, predicted, strict=True):
    if not isinstance(tags, list) or len(tags) != len(gold):
      raise UserError(
        f"{example.place}: {task.prediction!r} is no list of as many tags as {task.target!r} has, "
        f"{len(gold)}."
      )
  return _Answers(scores.tagging(golds, predicted), predicted)


def _program(questions: Questions, subject: Subject) -> _Answers:
  task, n = questions.task, questions.task.samples
  asked = [text for text in questions.asked for _ in range(n)]
  examples = [example for example in questions.examples for _ in range(n)]
  seeds = np.random.default_rng([questions.seed, 2]).integers(2**32, size=len(asked))
  completions = subject.write(
    questions.prompts(subject, asked),
    max_tokens=task.max_tokens,
    stop=task.stop,
    sampling=Sampling(temperature=task.temperature),
    seeds=seeds.tolist(),
  )
  program, check = _template(task, "program"), _template(task, "check")
  programs = [
    program.render(example, prompt=prompt, completion=completion)
    for example, prompt, completion in zip(examples, asked, completions, strict=True)
  ]
  checks = [
    check.render(example, prompt=prompt) for example, prompt in zip(examples, asked, strict=True)
  ]
  options = {"limits": sandbox.Limits(task.timeout_seconds), "isolation": questions.isolation}
  run = functools.partial(sandbox.run, **options)
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    outcomes = list(pool.map(run, programs, checks))
  samples = [
    {"completion": text, "passed": outcome.passed, "reason": outcome.reason}
    for text, outcome in zip(completions, outcomes, strict=True)
  ]
  by_problem = [samples[start : start + n] for start in range(0, len(samples), n)]
  passed = [[sample["passed"] for sample in problem] for problem in by_problem]
  reasons = collections.Counter(outcome.reason for outcome in outcomes if not outcome.passed)
  isolation = dataclasses.asdict(questions.isolation)
  details = {"failures": dict(reasons), "isolation": isolation}
  return _Answers(scores.code(passed, task.k), by_problem, details)


def _template(task: Task, key: str) -> Template:
  return Template(f"{task.file}: {key}", getattr(task, key))


def _texts(questions: Questions, subject: Subject) -> list[str]:
  """The texts that the model writes, or given predictions."""
  task = questions.task
  if not task.prediction:
    prompts = questions.prompts(subject, questions.asked)
    return subject.write(prompts, max_tokens=task.max_tokens, stop=task.stop)
  found = [example.get(task.prediction) for example in questions.examples]
  for example, text in zip(questions.examples, found, strict=True):
    if not isinstance(text, str):
      raise UserError(f"{example.place}: {task.prediction!r} is {json.dumps(text)}, not a text.")
  return found
