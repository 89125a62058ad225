"""Evaluates a model on tasks, and prints and saves the results."""

import dataclasses
import importlib.metadata
import json
import platform
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.evals import answers, figures, label_task, sandbox
from gptjax.evals.answers import Documents, Questions, Result
from gptjax.evals.label_task import LabelledRecords
from gptjax.evals.subject import Subject
from gptjax.evals.task import load_task
from gptjax.scores.scores import RESAMPLES, Metric
from gptjax.small_files import write_atomically
from gptjax.training.pretrained import is_run

_PERPLEXITY = "perplexity:"
_LABELS = "labels:"
_PACKAGES = (
  *("gptjax", "jax", "flax", "numpy", "tokenizers"),
  *("scikit-learn", "sacrebleu", "rouge-score", "seqeval", "lm-eval"),
)
# Normal quantile of a 95 % interval.
_SIGMAS = 1.96


def evaluate(
  subject: Subject,
  tasks: Sequence[str],
  *,
  shots: int = 0,
  seed: int = 0,
  limit: int = 0,
  resamples: int = RESAMPLES,
  config: Any = None,
  run_code: bool = False,
  accept_weak_isolation: bool = False,
) -> list[Result]:
  """Evaluates a model on tasks, named as on the command line.

  Args:
    subject: the model.
    tasks: FILE.json, FILE.jsonl, perplexity:PATH or labels:FILE.
    shots: worked examples before each question; not used for perplexity.
    seed: seed of everything random.
    limit: examples of each task, chosen by the seed; 0 is all.
    resamples: draws of the bootstrap.
    config: config of the run, for labels.
    run_code: run the model's code, for tasks that need it.
    accept_weak_isolation: run it even if it could get out of its sandbox.

  Raises:
    UserError: a task cannot be read or may not be run, or two have the same name. Raised before the
      first task is run.
  """
  prepared, names = [], []
  for name in tasks:
    if name.startswith(_PERPLEXITY):
      path = name.removeprefix(_PERPLEXITY)
      prepared.append(answers.prepare_perplexity(path, seed=seed, limit=limit))
      names.append(name)
    elif name.startswith(_LABELS):
      path = name.removeprefix(_LABELS)
      if config is None or "data" not in config:  # As in a converted model.
        raise UserError(f"{name}: --checkpoint is no run, which would say what the labels are.")
      prepared.append(label_task.prepare(path, config, subject, seed=seed, limit=limit))
      names.append(name)
    else:
      task = load_task(name)
      runs = task.kind == "code" and run_code
      isolation = sandbox.require(accept_weak=accept_weak_isolation) if runs else None
      options = {"shots": shots, "seed": seed, "limit": limit, "isolation": isolation}
      prepared.append(answers.prepare(task, **options))
      names.append(task.name)
  for name in names:
    if names.count(name) > 1:
      raise UserError(f"--tasks: two tasks are named {name!r}; rename one of the files.")
  run = {
    Documents: answers.perplexity,
    Questions: answers.evaluate,
    LabelledRecords: label_task.evaluate,
  }
  return [run[type(one)](one, subject, resamples=resamples) for one in prepared]


def config_of_labels(checkpoint: str, tasks: Sequence[str]) -> Any:
  """The config of a run, for tasks with labels; None if there is no such task, or no run."""
  asked = any(name.startswith(_LABELS) for name in tasks)
  return config_lib.open_saved(checkpoint) if asked and is_run(checkpoint) else None


def table(rows: Sequence[tuple[str, str, Metric]]) -> str:
  """Formats rows of (task, name of the metric, metric) as lines."""
  shown = [("task", "metric", "value", "95 % interval", "n")]
  for task, name, metric in rows:
    interval = "-" if metric.low is None else f"{metric.low:.4f} to {metric.high:.4f}"
    shown.append((task, name, f"{metric.value:.4f}", interval, str(metric.n)))
  widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
  return "\n".join(
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for row in shown
  )


def save(folder: epath.Path, evaluation: dict[str, Any], results: Sequence[Result]) -> None:
  """Writes results.json, and each task's predictions and, for a classification, a picture."""
  folder.mkdir(parents=True, exist_ok=True)
  kept = {}
  for result in results:
    stem = re.sub(r"[^\w.-]+", "_", result.name)
    lines = (json.dumps(one, ensure_ascii=False) for one in result.predictions)
    write_atomically(folder / f"{stem}.predictions.jsonl", "".join(f"{line}\n" for line in lines))
    if "confusion" in result.details:
      figures.classification(
        folder / f"{stem}.png",
        result.details["labels"],
        result.details["confusion"],
        result.confidence,
        result.correct,
      )
    metrics = {name: dataclasses.asdict(metric) for name, metric in result.metrics.items()}
    kept[result.name] = {"metrics": metrics, **result.details}
  content = {**evaluation, "versions": versions(), "tasks": kept}
  # Written last: if it exists, the other files are complete.
  write_atomically(folder / "results.json", json.dumps(content, indent=2, ensure_ascii=False))


def versions() -> dict[str, str]:
  """The versions of Python and of the packages involved, as far as they are installed."""
  found = {"python": platform.python_version()}
  for package in _PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def harness_rows(results: dict[str, Any]) -> list[tuple[str, str, Metric]]:
  """Rows of `table` for lm-eval's results."""
  rows = []
  for task, metrics in results["results"].items():
    n = results["n-samples"].get(task, {}).get("effective", 0)
    for name, value in metrics.items():
      metric, _, kind = name.partition(",")
      if not isinstance(value, float) or metric.endswith("_stderr"):
        continue
      error = metrics.get(f"{metric}_stderr,{kind}")
      reach = _SIGMAS * error if isinstance(error, float) else None
      low, high = (None, None) if reach is None else (value - reach, value + reach)
      rows.append((task, name.removesuffix(",none"), Metric(value, low, high, n)))
  return rows
