"""The gradient noise scale, which predicts the largest efficient batch size.

McCandlish et al. 2018 (arXiv:1812.06162): with G the gradient of the true loss and Sigma the
covariance of the gradient of one token, B_simple = tr(Sigma) / |G|^2 (equation 2.9) predicts the
batch at which twice the fewest steps and twice the fewest tokens reach the same loss. Tokens of a
row are not independent: Sigma here is the noise of rows, per token.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from scipy import stats

from gptjax import config as config_lib
from gptjax.data.batch import Batch
from gptjax.data.pipeline import Dataset
from gptjax.errors import UserError
from gptjax.objectives.task import Task, make_task
from gptjax.training.datasets import open_dataset
from gptjax.training.pretrained import load_checkpoint

MIN_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class NoiseScale:
  """An estimate. gradient_square: unbiased |G|^2. noise_trace: unbiased tr(Sigma) of a token.
  tokens: B_simple, NaN if |G|^2 is lost in noise. low, high: 95 % interval, (0, inf) if unknown."""

  gradient_square: float
  noise_trace: float
  tokens: float
  low: float
  high: float


def estimate(squares_N: np.ndarray, dots_N: np.ndarray, weights_N: np.ndarray) -> NoiseScale:
  """Estimates the noise scale from N micro-batches of any sizes.

  Unbiased as in appendix A.1, with B_small the tokens of a micro-batch and B_big the tokens of all:
  E |mean gradient of B tokens|^2 = |G|^2 + tr(Sigma) / B holds for both. The interval comes from
  the jackknife over micro-batches, of log B_simple (Efron and Tibshirani 1993, chapter 11).

  Args:
    squares_N: |g|^2, g being the gradient summed over the tokens of a micro-batch.
    dots_N: product of each g with the sum of all.
    weights_N: tokens of each micro-batch.
  """

  def moments(squares, dots, weights, total):
    """|G|^2 and tr(Sigma); `total` is the square of the sum."""
    tokens = weights.sum()
    noise = (np.sum(squares / weights) - total / tokens) / (len(weights) - 1)
    return total / tokens**2 - noise / tokens, noise

  squares_N, dots_N, weights_N = (np.asarray(x, np.float64) for x in (squares_N, dots_N, weights_N))
  total, count = dots_N.sum(), len(weights_N)
  square, noise = moments(squares_N, dots_N, weights_N, total)
  logs = []
  for i in range(count):
    rest = np.arange(count) != i
    total_of_rest = total - 2 * dots_N[i] + squares_N[i]
    one, other = moments(squares_N[rest], dots_N[rest], weights_N[rest], total_of_rest)
    logs.append(math.log(other / one) if min(one, other) > 0 else math.nan)
  if min(square, noise) <= 0 or not np.isfinite(logs).all():
    tokens = noise / square if square > 0 else math.nan
    return NoiseScale(square, noise, tokens, 0.0, math.inf)
  error = math.sqrt((count - 1) * np.var(logs))
  factor = math.exp(stats.t.ppf(0.975, count - 1) * error)
  tokens = noise / square
  return NoiseScale(square, noise, tokens, tokens / factor, tokens * factor)


def measure(
  task: Task, graph: nnx.GraphDef, params: nnx.State, batches: Callable[[], Iterator[Batch]]
) -> NoiseScale:
  """Measures the noise scale in two passes over the micro-batches, so that memory holds only two
  gradients."""

  @jax.jit
  def gradient(params, batch: Batch):
    return jax.grad(lambda p: task.loss(nnx.merge(graph, p), batch).total)(params)

  @jax.jit
  def dot(a, b) -> jax.Array:
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

  total, squares, weights = None, [], []
  for batch in batches():
    one = gradient(params, batch)
    squares.append(float(dot(one, one)))
    weights.append(float(batch.weights.sum()))
    total = one if total is None else jax.tree.map(jnp.add, total, one)
  dots = [float(dot(gradient(params, batch), total)) for batch in batches()]
  return estimate(np.array(squares), np.array(dots), np.array(weights))


def report(workdir: epath.Path, count: int) -> NoiseScale:
  """Measures a run at its newest checkpoint, on the batches that come next, and prints it.

  Raises:
    UserError: there are too few micro-batches, or there is no run with a checkpoint.
  """
  if count < MIN_BATCHES:
    raise UserError(f"--batches={count}: an interval needs at least {MIN_BATCHES} micro-batches.")
  config = config_lib.open_saved(workdir)
  model, step = load_checkpoint(workdir)
  dataset = open_dataset(config, workdir)
  parts = config.grad_accumulation
  found = measure(
    make_task(config.task),
    *nnx.split(model),
    lambda: _micro_batches(dataset, step, parts, count),
  )
  tokens = dataset.tokens_per_step
  print(f"{workdir} at step {step}, {count} micro-batches, {parts} to a batch:")
  print(
    f"  |G|^2 {found.gradient_square:.4g}, tr(Sigma) {found.noise_trace:.4g} a token (unbiased)"
  )
  if not found.high < math.inf or not found.tokens > 0:
    print("  the gradient is lost in the noise, or the noise in the gradient: raise --batches")
    return found
  print(
    f"  noise scale B_simple {found.tokens:,.0f} tokens "
    f"(95 % by jackknife: {found.low:,.0f} to {found.high:,.0f})"
  )
  # Their trade-off (section 2): steps / fewest = 1 + B / batch, tokens / fewest = 1 + batch / B.
  print(
    f"  batch_size={config.batch_size} is {tokens:,} tokens a step: "
    f"{1 + tokens / found.tokens:.2f} times the fewest tokens, "
    f"{1 + found.tokens / tokens:.2f} times the fewest steps"
  )
  if tokens < found.low:
    print("  a larger batch would save steps for few more tokens")
  elif tokens > found.high:
    print("  a smaller batch would save tokens for few more steps")
  else:
    print("  the batch is what the noise scale suggests")
  return found


def _micro_batches(dataset: Dataset, step: int, parts: int, count: int) -> Iterator[Batch]:
  """Yields `count` micro-batches of the batches from `step` on, `parts` of each."""

  def micro_batches():
    for later in itertools.count(step):
      batch = dataset.training_batch(later)
      rows = len(batch.inputs) // parts
      for start in range(0, len(batch.inputs), rows):
        yield jax.tree.map(lambda x, start=start, rows=rows: x[start : start + rows], batch)

  return itertools.islice(micro_batches(), count)
