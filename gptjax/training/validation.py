"""Validations of a run, the best of them, and early stopping."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from tqdm import tqdm

from gptjax.data.pipeline import Dataset
from gptjax.devices import sharding
from gptjax.errors import UserError, did_you_mean
from gptjax.objectives.task import Task, metrics_of
from gptjax.training import step
from gptjax.training.checkpoints import Checkpoints, is_better
from gptjax.training.metrics import PLAIN_LINE_SECONDS, Sums, is_live, read_metrics
from gptjax.training.setup import Setup
from gptjax.training.step import TrainState

# A validation that takes longer shows how far it is.
_SECONDS_TO_WAIT = 5.0


def check(config: Any, task: Task) -> None:
  """Refuses a metric that the validation does not compute, or whose library is missing."""
  best = config.checkpoint.best_metric
  if best:
    check_metric("checkpoint.best_metric", best, task)
  if not best and (config.eval.patience or config.checkpoint.final == "best"):
    raise UserError("eval.patience and checkpoint.final='best' need checkpoint.best_metric.")
  if config.checkpoint.final not in ("best", "newest"):
    raise UserError(f"checkpoint.final={config.checkpoint.final!r} is neither 'best' nor 'newest'.")
  if config.eval.patience < 0:
    raise UserError(f"eval.patience={config.eval.patience} is negative; 0 never stops early.")
  task.check_libraries()


def check_metric(key: str, metric: str, task: type[Task] | Task) -> None:
  """Refuses a metric that the validation of a task does not compute; UserError names the key."""
  known = metrics_of(task)
  if metric not in known:
    hint = did_you_mean(metric, known)
    raise UserError(f"{key}: no metric {metric!r} of task={task.name!r}. {hint}")


def make_evaluate(setup: Setup, dataset: Dataset) -> Callable[[TrainState, Any], dict[str, float]]:
  """Returns (state, frozen) -> {'val/NAME': value}, exact over the whole validation set: the loss
  and the metrics of the task. The moving average of the weights is evaluated if there is one."""
  run = step.make_eval_step(setup.graph, setup.task)
  names = ("loss", *setup.task.metrics)

  def evaluate(state: TrainState, frozen: Any) -> dict[str, float]:
    params = state.params if state.ema is None else state.ema
    sums, outputs = Sums(), setup.task.outputs()
    quiet = jax.process_index() > 0
    batches = dataset.validation_batches()
    interval = 0.1 if is_live() else PLAIN_LINE_SECONDS  # What is drawn in a log file stays there.
    shown = {"disable": quiet, "delay": _SECONDS_TO_WAIT, "mininterval": interval}
    for batch in tqdm(batches, "Validating", leave=False, **shown):
      told, output = run(params, sharding.to_global(batch, setup.mesh), frozen)
      sums.add(told)
      if outputs is not None:
        outputs.add(jax.device_get(output))
    found = sums.finish(text_bytes=dataset.validation_bytes)
    if outputs is not None:
      found |= outputs.metrics()
    return {f"val/{name}": found[name] for name in names}

  return evaluate


def describe(validation: Mapping[str, float]) -> str:
  """Formats the results of a validation as one line."""
  shown = {"val/loss": "validation loss", "val/bits_per_byte": "bits per byte"}
  parts = []
  for name, value in validation.items():
    if name.startswith("val/") and value is not None:
      digits = 2 if name == "val/perplexity" else 4
      label = shown.get(name, name.removeprefix("val/").replace("_", " "))
      parts.append(f"{label} {value:.{digits}f}")
  return ", ".join(parts)


@dataclasses.dataclass
class History:
  """The validations of a run, oldest first, each with its `step`.

  Attributes:
    metric: decides which of them is the best.
    patience: how many in a row may be no better than the best before; 0 is any number.
    final: the validation that counts as the run's result, 'best' or 'newest'.
  """

  lines: list[Mapping[str, Any]]
  metric: str
  patience: int
  final: str = "newest"

  @classmethod
  def start(cls, config: Any) -> "History":
    """The history of a run before its first validation."""
    return cls([], config.checkpoint.best_metric, config.eval.patience, config.checkpoint.final)

  @classmethod
  def read(cls, workdir: epath.PathLike, config: Any, last_step: int) -> "History":
    """Reads the validations in metrics.jsonl up to a step."""
    lines = [line for line in read_metrics(workdir) if "val/loss" in line]
    history = cls.start(config)
    history.lines += [line for line in lines if line["step"] <= last_step]
    return history

  def add(self, step: int, validation: Mapping[str, float]) -> None:
    self.lines.append({"step": step, **validation})

  def tell(self, checkpoints: Checkpoints) -> None:
    """Records the metrics of older checkpoints again, in case a process died before doing so."""
    for line in self.lines:
      if line["step"] in checkpoints.steps() and line.get(self.metric) is not None:
        checkpoints.record_metrics(line["step"], line)

  @property
  def last(self) -> Mapping[str, Any]:
    return self.lines[-1] if self.lines else {}

  @property
  def best(self) -> Mapping[str, Any]:
    """The first of the best validations after a step; empty if there is none."""
    index = self._best_index
    return {} if index is None else self.lines[index]

  @property
  def result(self) -> Mapping[str, Any]:
    """The validation of the run's result; empty if there is none."""
    return (self.best if self.final == "best" else {}) or self.last

  @property
  def exhausted(self) -> bool:
    """Whether the patience has run out."""
    index = self._best_index
    return (
      bool(self.patience) and index is not None and (len(self.lines) - 1 - index >= self.patience)
    )

  @property
  def _best_index(self) -> int | None:
    best = None
    for index, line in enumerate(self.lines):
      if line["step"] == 0 or line.get(self.metric) is None:
        continue
      if best is None or is_better(self.metric, line[self.metric], self.lines[best][self.metric]):
        best = index
    return best
