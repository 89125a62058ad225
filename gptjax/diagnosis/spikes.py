"""Finds the loss spikes of a run, and their batches."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.objectives.task import Task, make_task
from gptjax.training import step as step_lib
from gptjax.training.datasets import open_dataset
from gptjax.training.metrics import read_metrics
from gptjax.training.pretrained import load_checkpoint

# Logged steps that are needed before a step can be judged.
MIN_BEFORE = 10
# Spikes whose batches are shown, rows of each, and tokens of a row.
_SHOWN_SPIKES, _SHOWN_ROWS, _SHOWN_TOKENS = 5, 3, 40


@dataclasses.dataclass(frozen=True)
class Spike:
  """A logged step with an outlying loss, infinite if it was not finite. expected: the median of the
  steps before. excess: loss - expected, in median absolute deviations of those steps."""

  step: int
  loss: float
  expected: float
  excess: float
  grad_norm: float


def find(lines: Sequence[Mapping[str, Any]], window: int, threshold: float) -> list[Spike]:
  """Finds spikes among the lines of metrics.jsonl.

  A loss is a spike if it is above the median of the `window` logged losses before it by more than
  `threshold` times their median absolute deviation from that median. Losses that are not finite are
  always spikes, and are not part of later windows.
  """
  before: list[float] = []
  found = []
  for line in lines:
    if "loss" not in line:
      continue
    loss = math.inf if line["loss"] is None else line["loss"]
    if len(before) >= MIN_BEFORE or loss == math.inf:
      recent = np.array(before[-window:] or [math.nan])
      expected = float(np.median(recent))
      deviation = float(np.median(np.abs(recent - expected)))
      if loss == math.inf or loss - expected > threshold * deviation:
        excess = (loss - expected) / deviation if deviation else math.inf
        norm = line.get("grad_norm")
        found.append(
          Spike(line["step"], loss, expected, excess, math.nan if norm is None else norm)
        )
    if loss < math.inf:
      before.append(loss)
  return found


def report(workdir: epath.Path, window: int, threshold: float) -> list[Spike]:
  """Prints the spikes of a run, and for the largest the rows with the highest loss.

  Raises:
    UserError: there is no run with metrics and a checkpoint, or an argument is out of range.
  """
  if window < MIN_BEFORE or not threshold > 0:
    raise UserError(
      f"--window={window} --threshold={threshold:g}: at least {MIN_BEFORE} and above 0."
    )
  config = config_lib.open_saved(workdir)
  lines = read_metrics(workdir)
  steps = [line["step"] for line in lines if "loss" in line]
  if len(steps) <= MIN_BEFORE:
    raise UserError(
      f"{workdir}/metrics.jsonl: {len(steps)} logged steps; spikes show after {MIN_BEFORE}."
    )
  print(
    f"rule: loss - median of the {window} logged steps before > {threshold:g} x their median "
    "absolute deviation"
  )
  if (apart := int(np.median(np.diff(steps)))) > 1:
    print(f"only every {apart}th step was logged, and only those are seen: set log.every_steps=1")
  found = find(lines, window, threshold)
  print(f"{workdir}: {len(found)} spikes in {len(steps)} logged steps")
  for spike in found:
    print(
      f"step {spike.step}: loss {spike.loss:.4f}, expected {spike.expected:.4f} "
      f"({spike.excess:.1f} deviations), grad_norm {spike.grad_norm:.3g}"
    )
  if not found:
    return found
  dataset, task = open_dataset(config, workdir), make_task(config.task)
  for spike in sorted(found, key=lambda spike: -spike.excess)[:_SHOWN_SPIKES]:
    # The update of step N takes batch N - 1.
    batch = dataset.training_batch(spike.step - 1)
    model, at = load_checkpoint(workdir, near=spike.step)
    losses = row_losses(task, model, batch)
    print(
      f"batch of step {spike.step}, under the checkpoint of step {at}: mean loss of a row "
      f"{losses.mean():.3f}, the highest:"
    )
    for row in np.argsort(-losses)[:_SHOWN_ROWS]:
      text = dataset.tokenizer.decode(batch.inputs[row][:_SHOWN_TOKENS].tolist())
      print(f"  row {row}, loss {losses[row]:.3f}: {text!r}")
  return found


def row_losses(task: Task, model: Any, batch: Any) -> np.ndarray:
  """Mean loss of each row, in nats per token; NaN for a row without a valid target."""
  graph, params = nnx.split(model)
  eval_step = step_lib.make_eval_step(graph, task)
  losses = []
  for row in range(len(batch.inputs)):
    one = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
    nats, tokens = jax.device_get(eval_step(params, one)[0]["loss"])
    losses.append(nats / tokens if tokens else math.nan)
  return np.array(losses)
