"""Evaluation tasks: a JSON file of settings, a template, and examples in JSON lines.

{"kind": "classification", "data": "test.jsonl", "train": "train.jsonl",
 "prompt": "sentiment.jinja", "text": "text", "target": "label",
 "labels": {"pos": " positive", "neg": " negative"}}

{"kind": "ranking", "data": "test.jsonl", "prompt": "recommendation.jinja",
 "candidates": "offered", "target": "next", "k": [5, 10]}

with such lines of test.jsonl:

{"titles": ["Alien", "Heat"], "offered": ["Ronin", "Bambi"], "next": "Ronin"}

{"kind": "code", "data": "HumanEval.jsonl", "prompt": "code.jinja", "max_tokens": 512,
 "stop": ["\\ndef ", "\\nclass ", "\\nif ", "\\nprint"], "program": "{{ prompt }}{{ completion }}",
 "check": "{{prompt}}    pass\\nfrom program import {{name}}\\n{{test}}\\ncheck({{name}})"}

with such lines of HumanEval.jsonl:

{"prompt": "def add(a, b):\\n", "name": "add", "test": "def check(f): assert f(1, 2) == 3"}
"""

import collections
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.data.files import find_files
from gptjax.errors import UserError, check_number, did_you_mean
from gptjax.small_files import parse_json, read_json
from gptjax.templates.prompts import Example, Template, open_template

# Required keys of each kind.
KINDS = {
  "classification": ("prompt", "target", "labels"),
  "question_answering": ("prompt", "target"),
  "summarization": ("prompt", "target"),
  "translation": ("prompt", "target"),
  "tagging": ("target", "prediction"),
  "ranking": ("prompt", "target", "candidates"),
  "code": ("prompt", "program", "check"),
}
METRICS = {
  "classification": ("accuracy", "f1_macro", "mcc", "majority_baseline"),
  "question_answering": ("exact_match", "f1"),
  "summarization": ("rouge1", "rouge2", "rougeL"),
  "translation": ("bleu", "chrf"),
  "tagging": ("precision", "recall", "f1"),
}
CHOICES = {
  "kind": tuple(KINDS),
  "by": ("likelihood", "generation"),
  "normalize": ("none", "tokens", "bytes"),
}


@dataclasses.dataclass(frozen=True)
class Task:
  """The settings of a task. Every field but `file` is a key of its file.

  Attributes:
    kind: one of KINDS, which decides the metrics.
    data: JSON lines to evaluate on, relative to the file.
    train: JSON lines to take worked examples from, relative to the file.
    prompt: a Jinja template with an example's keys as variables, beside the task's file or in
      configs/prompts. The rendered text ends where the answer begins.
    instruction: text before all examples; in a chat, the system message.
    separator: text between examples.
    text: key of the classified text, which calibration replaces.
    target: key of the right answer: a label or a text; for question_answering a text or a list of
      texts; for tagging a list of tags; for ranking one or several of the candidates, or the index
      of one, from 0.
    candidates: for ranking, key of the texts to choose from (possible next purchases, or the
      answers of a multiple choice question as in HellaSwag or ARC), ranked by their log-likelihood
      after the prompt.
    domain_premise: a text such as 'Next:'; the log-likelihood of a label or a candidate after it
      alone is subtracted (PMI_DC of Holtzman et al. 2021, arXiv:2104.08315).
    end_of_text: whether to score it after a label or a candidate, as in training with
      task='prompt'; without it, 'Heat' is at least as likely as 'Heat 2', which begins with it.
    labels: for classification, each label and its text, with a leading space.
    by: classification by the 'likelihood' of these texts, or by the text that the model writes.
    normalize: divides log-likelihoods by the 'tokens' or 'bytes' of a label's or candidate's text.
    calibrate: contextual calibration (Zhao et al. 2021, arXiv:2102.09690).
    language: 'zh' scores Chinese by characters, and sacreBLEU by its tokenizer 'zh'.
    max_tokens: the most tokens that the model writes.
    stop: strings that end the model's text.
    temperature: temperature of sampling, for code.
    samples: programs per problem, for code.
    k: pass@k for code; for ranking hit@k for each above 1; hit@1 is the accuracy.
    program: for code, a Jinja template of the program, which defines functions, with the example's
      keys, `prompt` (rendered) and `completion`.
    check: for code, a template with the same keys but `completion`. Another process runs it to
      check the functions, such as 'from program import add; assert add(1, 2) == 3'. It sees only
      their results, as plain data, and must define everything else itself.
    timeout_seconds: limit for one program and its check.
    prediction: key of existing predictions; the model is not asked.
    metrics: names of the metrics to report; () is all.
  """

  file: Path
  kind: str
  data: str
  train: str = ""
  prompt: str = ""
  instruction: str = ""
  separator: str = "\n\n"
  text: str = "text"
  target: str = ""
  candidates: str = ""
  domain_premise: str = ""
  end_of_text: bool = False
  labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
  by: str = "likelihood"
  normalize: str = "none"
  calibrate: bool = False
  language: str = "en"
  max_tokens: int = 64
  stop: tuple[str, ...] = ("\n",)
  temperature: float = 0.0
  samples: int = 1
  k: tuple[int, ...] = (1,)
  program: str = ""
  check: str = ""
  timeout_seconds: float = 10.0
  prediction: str = ""
  metrics: tuple[str, ...] = ()

  def __post_init__(self):
    for name, choices in CHOICES.items():
      value = getattr(self, name)
      if value not in choices:
        raise UserError(f"{self.file}: {name}: no {value!r}. {did_you_mean(str(value), choices)}")
    for name in KINDS[self.kind]:
      if not getattr(self, name) and not (name == "prompt" and self.prediction):
        raise UserError(f"{self.file}: a task of kind {self.kind!r} needs the key {name!r}.")
    if self.prediction and (self.calibrate or self.kind in ("code", "ranking")):
      raise UserError(f"{self.file}: prediction: the model has to be asked for this task.")
    if self.kind == "classification" and len(self.labels) < 2:
      raise UserError(f"{self.file}: labels: a classification has at least 2 labels.")
    if not all(isinstance(text, str) and text.strip() for text in self.labels.values()):
      raise UserError(f"{self.file}: labels: each label needs a text that is not empty.")
    bounds = {"max_tokens": 1, "samples": 1, "temperature": 0, "timeout_seconds": 0}
    for name, least in bounds.items():
      check_number(f"{self.file}: {name}", getattr(self, name), at_least=least)
    for text in self.stop:
      if not isinstance(text, str) or not text:
        raise UserError(f"{self.file}: stop: {text!r} is not a text that could end an answer.")
    for k in self.k:
      if not isinstance(k, int) or k < 1:
        raise UserError(f"{self.file}: k: {k!r} is not a whole number from 1.")
      if self.kind == "code" and k > self.samples:
        raise UserError(f"{self.file}: k: {k} is not from 1 to samples={self.samples}.")
    if self.calibrate and (self.kind, self.by) != ("classification", "likelihood"):
      raise UserError(f"{self.file}: calibrate is of classification by likelihood alone.")
    if self.kind == "ranking" and self.by != "likelihood":
      raise UserError(f"{self.file}: by: candidates are ranked by their likelihood alone.")
    for name in ("domain_premise", "end_of_text"):
      if getattr(self, name) and not (self.by_likelihood or self.kind == "ranking"):
        raise UserError(f"{self.file}: {name} is of what is chosen by its likelihood alone.")

    for name in self.metrics:
      if name not in self.known_metrics:
        hint = did_you_mean(name, self.known_metrics)
        raise UserError(f"{self.file}: metrics: no metric {name!r} of this task. {hint}")

  @property
  def by_likelihood(self) -> bool:
    return self.kind == "classification" and self.by == "likelihood" and not self.prediction

  @property
  def known_metrics(self) -> tuple[str, ...]:
    """The names of all metrics of this task."""
    if self.kind == "code":
      return tuple(f"pass@{k}" for k in self.k)
    if self.kind == "ranking":
      hits = (f"hit@{k}" for k in self.k if k > 1)
      return ("accuracy", *hits, "mrr", "ndcg", "accuracy_of_chance")
    names = METRICS[self.kind]
    if self.by_likelihood:
      numbers = all(re.fullmatch(r"-?\d+(\.\d+)?", label) for label in self.labels)
      names += ("ece", *(["spearman"] if numbers else []))
    return names

  @property
  def name(self) -> str:
    return self.file.stem

  def path(self, name: str) -> Path:
    return self.file.parent / name

  @property
  def question(self) -> Template:
    """The template of the prompt."""
    return open_template(self.prompt, self.file.parent, f"{self.file}: prompt")

  def answer(self, example: Example) -> str:
    """The right answer as text in a prompt."""
    value = self.gold(example)
    if self.kind == "classification":
      return self.labels[value]
    return self.after_prompt(value[0] if isinstance(value, list) else value)

  def after_prompt(self, text: str) -> str:
    """A text as it follows a prompt, after a space if the language has spaces."""
    return text if text[:1].isspace() or self.language == "zh" else f" {text}"

  def candidates_of(self, example: Example) -> list[str]:
    """The texts to rank; UserError if there are fewer than 2, or one is empty or repeated."""
    texts = example.get(self.candidates)
    listed = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    if not listed or len(texts) < 2 or not all(map(str.strip, texts)):
      raise UserError(
        f"{example.place}: {self.candidates!r} is not a list of at least 2 texts, none empty."
      )
    text, count = collections.Counter(map(str.strip, texts)).most_common(1)[0]
    if count > 1:
      raise UserError(
        f"{example.place}: {self.candidates!r} has {text!r} {count} times; give each text once."
      )
    return texts

  def gold(self, example: Example) -> Any:
    """The value of `target`, checked; for ranking, the list of the right candidates.

    Raises:
      UserError: it is missing, of the wrong type, or not one of the labels or candidates.
    """
    value = example.get(self.target)
    if self.kind == "ranking":
      return self._right_candidates(example, value)
    if self.kind == "classification":
      label = value if isinstance(value, str) else json.dumps(value)
      if label not in self.labels:
        raise UserError(
          f"{example.place}: {self.target!r} is {label!r}, which is not one of the labels "
          f"{', '.join(map(repr, self.labels))} of {self.file}."
        )
      return label
    listed = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
    allowed = {"question_answering": listed or isinstance(value, str), "tagging": listed}
    if not allowed.get(self.kind, isinstance(value, str)):
      kinds = {"question_answering": "a text or a list of texts", "tagging": "a list of tags"}
      raise UserError(f"{example.place}: {self.target!r} is not {kinds.get(self.kind, 'a text')}.")
    return value

  def _right_candidates(self, example: Example, value: Any) -> list[str]:
    candidates = self.candidates_of(example)
    if type(value) is int and 0 <= value < len(candidates):
      return [candidates[value]]
    right = value if isinstance(value, list) and value else [value]
    for text in right:
      if text not in candidates:
        raise UserError(
          f"{example.place}: {self.target!r} is {text!r}, which is not one of the "
          f"{len(candidates)} texts of {self.candidates!r}."
        )
    return right


def load_task(path: str) -> Task:
  """Reads a task: FILE.json, or FILE.jsonl, whose task is the FILE.json beside it.

  Raises:
    UserError: the file is not there, is no JSON object, or has a key that is unknown or missing.
  """
  file = Path(path).expanduser()
  settings: dict[str, Any] = {}
  if file.suffix == ".jsonl":
    settings, file = {"data": file.name}, file.with_suffix(".json")
  if not file.exists():
    raise UserError(f"{file}: no such task file, which {path} needs.")
  try:
    settings = read_json(file) | settings
  except TypeError as error:
    raise UserError(f"{file}: not a JSON object.") from error
  fields = {field.name: field for field in dataclasses.fields(Task) if field.name != "file"}
  for key, value in settings.items():
    if key not in fields:
      raise UserError(f"{file}: no key {key!r} in a task. {did_you_mean(key, fields)}")
    if not isinstance(value, _json_type(fields[key])):
      raise UserError(f"{file}: {key!r} is {type(value).__name__}, as in {value!r}.")
    if isinstance(value, list):
      settings[key] = tuple(value)
  for key in ("kind", "data"):
    if key not in settings:
      raise UserError(f"{file}: no key {key!r}, which every task needs.")
  return Task(file=file, **settings)


def _json_type(field: dataclasses.Field) -> type | tuple[type, ...]:
  kinds = {str: str, bool: bool, int: int, float: (int, float), Mapping[str, str]: dict}
  return kinds.get(field.type, list)


def read_examples(path: Path) -> list[Example]:
  """Reads JSON lines, skipping empty ones.

  Raises:
    UserError: the file cannot be read or has no example, or a line is not a JSON object.
  """
  examples = []
  find_files(str(path))  # Refuses a pipe, reading which might wait for ever.
  try:
    with path.open(encoding="utf-8") as lines:
      for number, line in enumerate(lines, 1):
        if not line.strip():
          continue
        record = parse_json(line, f"{path}:{number}")
        if not isinstance(record, dict):
          raise UserError(f"{path}:{number}: a JSON {type(record).__name__}, not an object.")
        examples.append(Example(record, f"{path}:{number}"))
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path}: cannot be read ({error}).") from error
  if not examples:
    raise UserError(f"{path}: no examples.")
  return examples


def evaluated_examples(task: Task, limit: int = 0, seed: int = 0) -> list[Example]:
  """The examples of `data`, or `limit` of them chosen by the seed, in their order.

  Raises:
    UserError: as `read_examples`; a target is wrong, or a label has no example.
  """
  examples = read_examples(task.path(task.data))
  if task.kind != "code":
    golds = [task.gold(example) for example in examples]
    for label in task.labels:
      if label not in golds:
        raise UserError(
          f"{task.path(task.data)}: no example of the label {label!r} of {task.file}; add some, or "
          "take the label out."
        )
  return choose(examples, limit, seed)


def choose(items: list, limit: int, seed: int) -> list:
  """Chooses `limit` of the items by the seed, in their order; 0 is all."""
  if not limit or limit >= len(items):
    return items
  chosen = np.random.default_rng([seed, 0]).choice(len(items), limit, replace=False)
  return [items[index] for index in sorted(chosen)]


def choose_shots(
  task: Task, count: int, seed: int, evaluated: Sequence[Example]
) -> tuple[list[Example], int]:
  """Chooses worked examples from `train` by the seed, balanced over labels as far as possible.

  Examples with the same prompt as an evaluated one are left out.

  Returns:
    The examples, in random order, and how many were left out.

  Raises:
    UserError: there is no training file, it is the evaluated one, or it has too few examples.
  """
  if not count:
    return [], 0
  if not task.train:
    raise UserError(
      f"{task.file}: --shots={count} needs the key 'train', a file to take them from."
    )
  if not task.target:
    raise UserError(f"{task.file}: --shots={count} needs the key 'target', the answers to show.")
  train, data = task.path(task.train), task.path(task.data)
  if train.resolve() == data.resolve():
    raise UserError(f"{task.file}: 'train' is the evaluated file {data}; give another one.")
  question = task.question
  seen = {question.render(example) for example in evaluated}
  examples = read_examples(train)
  fresh = [example for example in examples if question.render(example) not in seen]
  rng = np.random.default_rng([seed, 1])
  groups: dict[str, list[Example]] = {label: [] for label in task.labels}
  for index in rng.permutation(len(fresh)):
    label = task.gold(fresh[index]) if task.labels else ""
    groups.setdefault(label, []).append(fresh[index])
  order = [list(groups)[index] for index in rng.permutation(len(groups))]
  wanted = collections.Counter(order[number % len(order)] for number in range(count))
  for label, number in wanted.items():
    if len(groups[label]) < number:
      of = f" of the label {label!r}" if label else ""
      raise UserError(
        f"{train}: {len(groups[label])} examples{of} that are not evaluated, "
        f"--shots={count} needs {number}."
      )
  shots = [shot for label, number in wanted.items() for shot in groups[label][:number]]
  return [shots[index] for index in rng.permutation(count)], len(examples) - len(fresh)
