"""What a model that scores labels says of records, and how good that is."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from gptjax.data import files
from gptjax.data.batch import Batch
from gptjax.data.label_encoding import Examples, LabelEncoder
from gptjax.data.label_packing import PackedExamples
from gptjax.data.labels import LabelledTexts
from gptjax.data.options import DataOptions, read_options
from gptjax.data.sources import Subset
from gptjax.errors import UserError
from gptjax.evals.answers import Result
from gptjax.evals.subject import Subject
from gptjax.evals.task import choose
from gptjax.objectives import scores
from gptjax.objectives.label_losses import LabelLoss
from gptjax.objectives.label_outputs import LIBRARIES, METRICS, LabelOutputs
from gptjax.training import step


@dataclasses.dataclass(frozen=True)
class LabelledRecords:
  """Encoded records of a file, and what the run says of labels."""

  path: str
  options: DataOptions
  examples: Examples
  seed: int


def prepare(
  path: str, config: Any, subject: Subject, *, seed: int = 0, limit: int = 0
) -> LabelledRecords:
  """Reads JSON lines with the keys and the labels that a run was trained with.

  Args:
    path: the records.
    config: of the run.
    subject: its model and tokenizer.
    seed: of the bootstrap, and of `limit`.
    limit: how many lines to take; 0 is all.

  Raises:
    UserError: the model writes text, or a record cannot be read.
  """
  if subject.model.label_head is None:
    raise UserError(f"labels:{path}: the model writes text; give it a task (gptjax/evals/task.py).")
  scores.need(LIBRARIES[config.objective])
  options = dataclasses.replace(read_options(config), examples_per_label=0)
  if subject.max_length is not None:
    options = dataclasses.replace(options, sequence_length=subject.max_length)
  text_key = next(iter(options.parts.values())).text_key
  lines = files.open_jsonl(path, "", "error")
  chosen = Subset(lines, np.array(choose([*range(len(lines))], limit, seed)))
  texts = LabelledTexts(chosen, text_key, options)
  examples = LabelEncoder(subject.tokenizer, options).encode(texts, progress=subject.progress)
  return LabelledRecords(path, options, examples, seed)


def evaluate(
  records: LabelledRecords, subject: Subject, *, resamples: int = scores.RESAMPLES
) -> Result:
  """Asks the model, and measures its answers with a bootstrap of so many `resamples`."""
  start = time.perf_counter()
  options, labels = records.options, records.options.labels
  rows = PackedExamples(records.examples, options, np.ones(max(len(labels), 1), np.float32))
  outputs = _ask(rows, subject, options.objective)
  measures = outputs.measures(labels)
  n = len(outputs.golds)
  metrics = {
    name: scores.bootstrap(measures[name], n, resamples=resamples, seed=records.seed)
    for name in METRICS[options.objective]
  }
  golds, predicted = (
    [_say(answer, options) for answer in answers] for answers in (outputs.golds, outputs.predicted)
  )
  details: dict[str, Any] = {
    "objective": options.objective,
    "truncated": records.examples.truncated,
    "left_out": records.examples.dropped,
  }
  confidence = correct = None
  if options.objective == "classification":
    confidence = np.max(outputs.probabilities, axis=1)
    correct = np.array(outputs.golds) == np.array(outputs.predicted)
    details |= scores.classification_report(golds, predicted, labels)
  details["seconds"] = time.perf_counter() - start
  predictions = [
    {"place": place, "target": gold, "prediction": answer}
    for place, gold, answer in zip(rows.names, golds, predicted, strict=True)
  ]
  return Result(f"labels:{records.path}", metrics, details, predictions, confidence, correct)


def _ask(rows: PackedExamples, subject: Subject, objective: str) -> LabelOutputs:
  graph, params = nnx.split(subject.model)
  label_step = step.make_label_step(graph, LabelLoss(objective))
  outputs = LabelOutputs(objective)
  size = min(subject.batch_size, len(rows))
  bar = tqdm(total=len(rows), desc="labels", unit="row", disable=not subject.progress)
  with bar:
    for first in range(0, len(rows), size):
      batch = [rows[index] for index in range(first, min(first + size, len(rows)))]
      bar.update(len(batch))
      batch += [jax.tree.map(np.zeros_like, batch[0])] * (size - len(batch))
      _, *whole = label_step(params, Batch.stack(batch))
      outputs.add(*jax.device_get(whole))
  return outputs


def _say(answer: Any, options: DataOptions) -> Any:
  """A label by its name, as JSON has it."""
  match options.objective:
    case "classification":
      return options.labels[answer]
    case "tagging":
      return _names(answer, options.labels)
    case "multi_label":
      return _names(np.flatnonzero(answer), options.labels)
    case "regression":
      return float(answer[0])
  return [int(place) for place in answer]


def _names(indices: Sequence[int], labels: Sequence[str]) -> list[str]:
  return [labels[index] for index in indices]
