import jax
import numpy as np
import pytest
from flax import nnx

from gptjax.diagnosis import noise_scale
from gptjax.errors import UserError
from gptjax.objectives.text import NextToken
from gptjax.training.datasets import open_dataset
from gptjax.training.pretrained import load_checkpoint

# Tokens of the micro-batches: unequal, so that a mean of means would be another.
WEIGHTS = np.tile([4.0, 16.0, 64.0], 8)
G = np.array([0.5, -1.0, 0.25, 0.0])
SIGMA = np.array([1.0, 4.0, 9.0, 36.0])  # the diagonal; of the gradient of one token


def sample(rng):
  """The figures of gradient sums of micro-batches whose tokens are independent."""
  noise = rng.normal(size=(len(WEIGHTS), 4)) * np.sqrt(SIGMA * WEIGHTS[:, None])
  sums = WEIGHTS[:, None] * G + noise
  return noise_scale.estimate(np.square(sums).sum(1), sums @ sums.sum(0), WEIGHTS)


def test_the_estimates_are_unbiased_and_the_interval_covers():
  rng = np.random.default_rng(0)
  samples = [sample(rng) for _ in range(2000)]
  squares = [one.gradient_square for one in samples]
  traces = [one.noise_trace for one in samples]
  for values, true in ((squares, np.square(G).sum()), (traces, SIGMA.sum())):
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - true) < 3 * error
    assert error < 0.02 * true  # enough samples to see a bias
  true = SIGMA.sum() / np.square(G).sum()
  covered = np.mean([one.low < true < one.high for one in samples])
  assert 0.9 < covered < 0.99


def test_a_gradient_without_noise_has_no_interval():
  sums = WEIGHTS[:, None] * G
  found = noise_scale.estimate(np.square(sums).sum(1), sums @ sums.sum(0), WEIGHTS)
  assert found.gradient_square == pytest.approx(np.square(G).sum())
  assert abs(found.noise_trace) < 1e-9
  assert (found.low, found.high) == (0.0, np.inf)


@pytest.mark.slow
def test_a_run_is_measured_on_the_batches_that_come_next(trained, make_config, capsys):
  found = noise_scale.report(trained, 6)
  model, step = load_checkpoint(trained)
  graph, params = nnx.split(model)
  dataset = open_dataset(make_config(), trained)

  @jax.jit
  def gradient(params, batch):
    return jax.grad(lambda p: NextToken().loss(nnx.merge(graph, p), batch).total)(params)

  sums, weights = [], []
  for batch in map(dataset.training_batch, range(step, step + 3)):
    for start in (0, 4):  # two micro-batches of four rows
      part = jax.tree.map(lambda x, start=start: x[start : start + 4], batch)
      leaves = jax.tree.leaves(gradient(params, part))
      sums.append(np.concatenate([np.ravel(leaf) for leaf in leaves]))
      weights.append(part.weights.sum())
  sums, weights = np.array(sums, np.float64), np.array(weights)
  mean = sums.sum(0) / weights.sum()
  noise = (weights * np.square(sums / weights[:, None] - mean).sum(1)).sum() / 5
  assert found.noise_trace == pytest.approx(noise, rel=1e-3)
  expected = np.square(mean).sum() - noise / weights.sum()
  assert found.gradient_square == pytest.approx(expected, rel=1e-3)
  printed = capsys.readouterr().out
  assert f"at step {step}, 6 micro-batches, 2 to a batch:" in printed
  assert "batch_size=8 is 256 tokens a step" in printed


def test_bad_arguments_are_refused(tmp_path):
  with pytest.raises(UserError, match="--batches=2"):
    noise_scale.report(tmp_path, 2)
  with pytest.raises(UserError, match="not the work directory of a run"):
    noise_scale.report(tmp_path, 8)
