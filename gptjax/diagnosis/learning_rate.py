"""The learning-rate range test (Smith 2017, arXiv:1506.01186, section 3.3): trains while the rate
rises, here exponentially, and finds the range in which the loss falls."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from gptjax.data.pipeline import Dataset
from gptjax.devices import sharding
from gptjax.errors import UserError
from gptjax.training import step as step_lib
from gptjax.training.setup import Setup

# The test ends when the moving average is at least so many nats above its best.
RISE = 0.2
_DECAY = 0.9
# Steps on each side over which the report averages a loss, so that the average has no lag.
_HALF_WINDOW = 5


def sweep(setup: Setup, dataset: Dataset, rates: np.ndarray) -> list[float]:
  """Trains with a learning rate for each step and returns the losses, up to the end of the test."""
  setup.require_whole_model()
  schedule = jnp.asarray(rates, jnp.float32)
  optimizer = dataclasses.replace(
    setup.make_optimizer(None), learning_rate=lambda step: schedule[step]
  )
  train_step = setup.make_train_step(optimizer)
  losses: list[float] = []
  with jax.set_mesh(setup.mesh):
    abstract = setup.abstract_state(optimizer)
    state = step_lib.init_state(setup.model, optimizer, setup.config.seed, abstract)
    for batch in map(dataset.training_batch, range(len(rates))):
      state, metrics = train_step(state, sharding.to_global(batch, setup.mesh))
      loss = float(metrics["loss"])
      if not math.isfinite(loss):
        break
      losses.append(loss)
      if has_turned(losses):
        break
  return losses


def has_turned(losses: Sequence[float]) -> bool:
  """Whether the moving average is above its best by `RISE` and by half of its descent."""
  average, averages = 0.0, []
  for i, loss in enumerate(losses, 1):
    average = _DECAY * average + (1 - _DECAY) * loss
    averages.append(average / (1 - _DECAY**i))  # unbiased from the first step on
  best = min(averages)
  return averages[-1] > best + max(RISE, (averages[0] - best) / 2)


def smooth(losses: Sequence[float]) -> np.ndarray:
  """The mean of each loss with `_HALF_WINDOW` on each side, or as many as there are on both."""
  halves = [min(i, len(losses) - 1 - i, _HALF_WINDOW) for i in range(len(losses))]
  return np.array([np.mean(losses[i - half : i + half + 1]) for i, half in enumerate(halves)])


def range_test(
  setup: Setup, dataset: Dataset, workdir: epath.Path, *, low: float, high: float, steps: int
) -> tuple[float, float]:
  """Runs the test, writes learning_rate.csv and .png, and prints the result.

  Returns:
    The learning rates where the loss fell fastest and where it was lowest.

  Raises:
    UserError: not 0 < low < high, too few steps to smooth over, or a loss that never fell.
  """
  if not 0 < low < high < math.inf:
    raise UserError(f"--low={low:g} --high={high:g}: give two rates above 0, the lower as --low.")
  if steps < 4 * _HALF_WINDOW:
    raise UserError(f"--steps={steps}: a range test needs at least {4 * _HALF_WINDOW}.")
  rates = np.geomspace(low, high, steps)
  losses = sweep(setup, dataset, rates)
  rates, smoothed = rates[: len(losses)], smooth(losses)
  turn = int(np.argmin(smoothed)) if losses else 0
  if turn < 2:
    raise UserError(f"--low={low:g}: the loss only rises from there; start lower.")
  fastest = int(np.argmin(np.gradient(smoothed, np.log(rates))[:turn]))
  lines = [f"{i + 1},{rates[i]},{losses[i]},{smoothed[i]}" for i in range(len(losses))]
  (workdir / "learning_rate.csv").write_text(
    "\n".join(["step,learning_rate,loss,smoothed", *lines, ""])
  )
  _draw(rates, losses, smoothed, (fastest, turn), workdir / "learning_rate.png")
  print(
    f"ended after step {len(losses)} of {steps}, learning rate {rates[-1]:.3g} (rule: the moving "
    f"average is above its best by {RISE} nats and by half of its descent, or not finite)"
  )
  print(f"steepest descent at learning rate {rates[fastest]:.3g}")
  print(f"the loss turned at learning rate {rates[turn]:.3g}, from {smoothed[turn]:.3f}")
  print(f"wrote {workdir / 'learning_rate.csv'} and {workdir / 'learning_rate.png'}")
  return float(rates[fastest]), float(rates[turn])


def _draw(rates, losses, smoothed, marks: tuple[int, int], path: epath.Path) -> None:
  from matplotlib.figure import Figure  # it takes a second to import

  figure = Figure(figsize=(6, 3.6), layout="constrained")
  axes = figure.subplots()
  axes.semilogx(rates, losses, color="0.7", linewidth=1)
  axes.semilogx(rates, smoothed, color="C0")
  for mark, label in zip(marks, ("steepest", "turned"), strict=True):
    axes.axvline(rates[mark], color="0.4", linestyle="--", linewidth=1)
    axes.annotate(
      f"{label} {rates[mark]:.2g}", (rates[mark], smoothed.max()), rotation=90, va="top"
    )
  axes.set(xlabel="learning rate", ylabel="training loss (nats a token)")
  axes.grid(alpha=0.3)
  with path.open("wb") as file:
    figure.savefig(file, dpi=120)
