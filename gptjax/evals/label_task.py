"""Evaluates a model that scores labels on records."""

import dataclasses
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from gptjax.data import files
from gptjax.data.options import DataOptions, read_options
from gptjax.data.sources import Subset
from gptjax.errors import UserError
from gptjax.evals.answers import Result
from gptjax.evals.subject import Subject
from gptjax.evals.task import choose
from gptjax.objectives.task import Task, make_task
from gptjax.scores import scores


@dataclasses.dataclass(frozen=True)
class LabelledRecords:
  """Encoded records of a file, and the task that they are for."""

  path: str
  task: Task
  data: DataOptions
  examples: Any
  seed: int


def prepare(
  path: str, config: Any, subject: Subject, *, seed: int = 0, limit: int = 0
) -> LabelledRecords:
  """Reads JSON lines with the keys and the labels that a run was trained with.

  Args:
    path: the file of records.
    config: config of the run.
    subject: its model and tokenizer.
    seed: seed of the bootstrap, and of `limit`.
    limit: how many lines to take; 0 is all.

  Raises:
    UserError: the model writes text, or a record cannot be read.
  """
  if subject.model.label_head is None:
    raise UserError(f"labels:{path}: the model writes text; give it a task (gptjax/evals/task.py).")
  task, data = make_task(config.task), read_options(config)
  task.check_libraries()
  if subject.max_length is not None:
    data = dataclasses.replace(data, sequence_length=subject.max_length)
  text_key = next(iter(data.parts.values())).text_key
  lines = files.open_by_suffix(path, "", "error")
  chosen = Subset(lines, np.array(choose([*range(len(lines))], limit, seed)))
  texts = task.read_records(chosen, text_key)
  examples = task.encode(texts, subject.tokenizer, data, progress=subject.progress)
  return LabelledRecords(path, task, data, examples, seed)


def evaluate(
  records: LabelledRecords, subject: Subject, *, resamples: int = scores.RESAMPLES
) -> Result:
  """Asks the model, and measures its answers, with `resamples` draws of the bootstrap."""
  start = time.perf_counter()
  task, examples = records.task, records.examples
  answers = task.ask(subject.model, examples.examples, records.data, batch_size=subject.batch_size)
  progress = {"total": len(examples), "disable": not subject.progress}
  outputs = task.outputs()
  outputs.answers = [*tqdm(answers, desc="labels", unit="text", **progress)]
  measures = task.measures(outputs)
  metrics = {
    name: scores.bootstrap(measures[name], len(examples), resamples=resamples, seed=records.seed)
    for name in task.metrics
    if name in measures  # Others are of training, such as what a student has of its teacher.
  }
  golds, predicted = (
    [task.say(answer) for answer in answers] for answers in (outputs.golds, outputs.predicted)
  )
  details: dict[str, Any] = {
    "task": task.name,
    "truncated": examples.truncated,
    "left_out": examples.dropped,
  }
  confidence = correct = None
  if (confidence := outputs.confidence) is not None:
    correct = np.array(outputs.golds) == np.array(outputs.predicted)
    details |= scores.classification_report(golds, predicted, task.labels)
  details["seconds"] = time.perf_counter() - start
  predictions = [
    {"place": example.name, "target": gold, "prediction": answer}
    for example, gold, answer in zip(examples.examples, golds, predicted, strict=True)
  ]
  return Result(
    f"labels:{records.path}",
    metrics,
    details,
    predictions,
    confidence,
    correct,
    report=task.report(outputs),
  )
