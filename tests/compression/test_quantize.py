"""GPTQ and AWQ against plain implementations of their papers, and what they gain on a model."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax.compression.awq import CLIPS, awq, clipped_grid
from gptjax.compression.gptq import gptq
from gptjax.compression.quantize import measure_inputs, quantize, quantized
from gptjax.compression.report import measure_quality
from gptjax.compression.smoothquant import largest_inputs, smooth
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from gptjax.model.gpt import model_graph
from gptjax.quantization.formats import Format, from_codes, make_grid, to_codes
from gptjax.quantization.stored import Stored, is_stored
from gptjax.training.pretrained import load_model, save_model

BYTES = tokenizers.load("bytes")
INT4 = Format("int4", 32)


def correlated(inputs, tokens=500, seed=0):
  """Inputs of which some are large, and that depend on each other, as activations do."""
  rng = np.random.default_rng(seed)
  mixed = rng.normal(size=(tokens, inputs // 4)) @ rng.normal(size=(inputs // 4, inputs))
  sizes = np.exp(rng.normal(size=inputs))
  return ((mixed + rng.normal(size=(tokens, inputs))) * sizes).astype(np.float32)


def plain_gptq(weights_OI, gram_II, form, damping=0.01):
  """Algorithm 1 of Frantar et al. 2023 in float64, one column after another in their order."""
  weights_OI = weights_OI.astype(np.float64)
  gram_II = gram_II.astype(np.float64)
  gram_II = gram_II + damping * np.diag(gram_II).mean() * np.eye(len(gram_II))
  inverse_II = np.linalg.cholesky(np.linalg.inv(gram_II)).T
  grid = make_grid(weights_OI.astype(np.float32), form)
  scales_OI = np.repeat(np.asarray(grid.scales), form.group or len(gram_II), axis=1)
  rounded_OI = np.zeros_like(weights_OI)
  for i in range(len(gram_II)):
    number = np.clip(np.round(weights_OI[:, i] / scales_OI[:, i]), -8, 7)
    rounded_OI[:, i] = number * scales_OI[:, i]
    error = (weights_OI[:, i] - rounded_OI[:, i]) / inverse_II[i, i]
    weights_OI[:, i:] -= np.outer(error, inverse_II[i, i:])
  return rounded_OI


@pytest.mark.parametrize("form", [Format("int4"), INT4], ids=["outputs", "groups"])
def test_gptq_is_that_of_the_paper(form):
  x_MI = correlated(96)
  weights_OI = np.random.default_rng(1).normal(size=(24, 96)).astype(np.float32)
  gram_II = x_MI.T @ x_MI
  codes, grid = gptq(weights_OI, gram_II, form, by_size=False)
  found = np.asarray(from_codes(codes, grid, form))
  expected = plain_gptq(weights_OI, gram_II, form)
  # A number half way between two may fall on the other side in float32, and moves what follows.
  assert (np.abs(found - expected) < 1e-4).mean() > 0.97
  errors = [np.square(x_MI @ (one - weights_OI).T).sum() for one in (found, expected)]
  assert abs(errors[0] / errors[1] - 1) < 0.02


@pytest.mark.parametrize("by_size", [False, True])
def test_gptq_changes_products_less_than_rounding_to_the_nearest(by_size):
  x_MI = correlated(256)
  weights_OI = np.random.default_rng(1).normal(size=(32, 256)).astype(np.float32)
  grid = make_grid(weights_OI, INT4)
  nearest = from_codes(to_codes(weights_OI, grid, INT4), grid, INT4)
  codes, grid = gptq(weights_OI, x_MI.T @ x_MI, INT4, by_size=by_size)
  found = from_codes(codes, grid, INT4)
  own, theirs = (float(np.square(x_MI @ (one - weights_OI).T).sum()) for one in (found, nearest))
  assert own < 0.6 * theirs


def test_an_input_that_never_occurs_decides_nothing():
  x_MI = correlated(64)
  x_MI[:, 3] = 0
  weights_OI = np.random.default_rng(1).normal(size=(8, 64)).astype(np.float32)
  codes, grid = gptq(weights_OI, x_MI.T @ x_MI, INT4)
  assert np.isfinite(from_codes(codes, grid, INT4)).all()


def test_awq_scales_are_those_of_the_paper():
  x_MI = correlated(64)
  rng = np.random.default_rng(1)
  matrices = [rng.normal(size=(size, 64)).astype(np.float32) for size in (16, 24)]
  size_I = np.abs(x_MI).mean(0)

  def rounded(weights_OI):
    groups = weights_OI.reshape(len(weights_OI), -1, 32)
    at = np.abs(groups).argmax(-1, keepdims=True)
    scales = np.take_along_axis(groups, at, -1) / -8
    return (np.clip(np.round(groups / scales), -8, 7) * scales).reshape(weights_OI.shape)

  best = np.inf
  for exponent in np.arange(20) / 20:
    factors = np.maximum(size_I**exponent, 1e-4)
    factors /= np.sqrt(factors.max() * factors.min())
    # Equation 4: || Q(W diag(s)) (diag(s)^-1 X) - W X ||.
    error = sum(
      np.square(x_MI / factors @ rounded(one * factors).T - x_MI @ one.T).sum() for one in matrices
    )
    if error < best:
      best, expected = error, factors
  found = awq(matrices, x_MI.T @ x_MI, size_I, INT4)
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  assert found.max() > 1.5


def test_clipping_takes_the_range_of_each_group_that_changes_products_least():
  x_MI = correlated(64)
  weights_OI = np.random.default_rng(1).normal(size=(24, 64)).astype(np.float32)
  weights_OI[:, 5] *= 4
  found = clipped_grid(weights_OI, x_MI.T @ x_MI, INT4)
  whole = make_grid(weights_OI, INT4)
  for output in (0, 7, 23):
    for group in (0, 1):
      part = slice(32 * group, 32 * group + 32)
      errors = {}
      for share in (1.0, *CLIPS):
        scale = float(whole.scales[output, group]) * share
        rounded = np.clip(np.round(weights_OI[output, part] / scale), -8, 7) * scale
        errors[scale] = np.square(x_MI[:, part] @ (rounded - weights_OI[output, part])).sum()
      assert float(found.scales[output, group]) == pytest.approx(min(errors, key=errors.get))
  assert (found.scales != whole.scales).any()


def test_smoothquant_factors_are_those_of_the_paper():
  x_MI = correlated(64)
  matrices = [np.random.default_rng(i).normal(size=(8 + i, 64)).astype(np.float32) for i in (0, 1)]
  largest_I = np.abs(x_MI).max(0)
  expected = np.sqrt(largest_I / np.abs(np.concatenate(matrices)).max(0))
  np.testing.assert_allclose(largest_inputs(jnp.asarray(x_MI)), largest_I)
  np.testing.assert_allclose(smooth(matrices, largest_I), expected, rtol=1e-5)
  assert smooth(matrices, largest_I * (np.arange(64) != 3))[3] == 1


@pytest.fixture
def model(tiny_config, random_params):
  config = tiny_config(
    vocab_size=264, embed_dim=64, mlp_dim=96, num_layers=3, **{"position.max_positions": 64}
  )
  return nnx.merge(model_graph(config), random_params(config))


def text(rows, seed):
  """Rows of few words, which the model reads in contexts of its own."""
  rng = np.random.default_rng(seed)
  words = [b"alpha ", b"beta ", b"gamma, ", b"delta. ", b"\n"]
  drawn = b"".join(words[i] for i in rng.integers(0, 5, 40 * rows))
  return np.frombuffer(drawn, np.uint8)[: rows * 48].reshape(rows, 48).astype(np.int32)


def copy(model):
  return nnx.merge(*nnx.split(model))


@pytest.mark.slow
def test_calibrated_methods_stay_nearer_to_the_model(model):
  kl = {}
  for method in ("nearest", "gptq", "awq", "awq+gptq"):
    small, _ = quantized(copy(model), Stored(INT4), method=method, tokens_RT=text(16, 0))
    kl[method] = measure_quality(small, model, text(8, 1)).kl.value
  assert kl["gptq"] < 0.8 * kl["nearest"]
  assert kl["awq+gptq"] < 0.8 * kl["nearest"]
  assert kl["awq"] < kl["nearest"]


@pytest.mark.slow
def test_smoothquant_costs_less_where_some_inputs_are_large(model):
  """A norm that makes some inputs a hundred times larger, as large models do, and weights that
  make up for it."""
  shape = model.blocks.mlp_norm.scale.shape
  factors = np.where(np.arange(shape[-1]) % 16 == 3, 100.0, 1.0).astype(np.float32)
  for part in ("scale", "bias"):
    x = getattr(model.blocks.mlp_norm, part)
    x[...] = x[...] * factors
  up = model.blocks.mlp.up.kernel
  up[...] = up[...] / factors[:, None]
  plan, kl = Stored(Format("int8"), activations="int8"), {}
  for method in ("nearest", "smoothquant"):
    small, told = quantized(copy(model), plan, method=method, tokens_RT=text(16, 0))
    kl[method] = measure_quality(small, model, text(8, 1)).kl.value
    assert told.scales_inputs == (method == "smoothquant")
  assert kl["smoothquant"] < 0.5 * kl["nearest"]


def test_smoothquant_needs_inputs_that_are_rounded(tmp_path):
  with pytest.raises(UserError, match="add --activations=int8"):
    quantize("run", tmp_path / "x", Stored(Format("int8")), method="smoothquant", data="text")


def test_quality_of_the_model_itself_is_perfect(model):
  found = measure_quality(model, copy(model), text(8, 1))
  assert found.ratio.value == pytest.approx(1, abs=1e-5)
  assert found.kl.value == pytest.approx(0, abs=1e-5)
  assert found.agreement.value == pytest.approx(1)
  logits = np.asarray(model(text(8, 1)[:, :-1]), np.float64)
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nats = -np.take_along_axis(log_probs, text(8, 1)[:, 1:, None], -1).mean()
  assert found.perplexity.value == pytest.approx(np.exp(nats), rel=1e-4)


def test_a_quantised_checkpoint_is_written_once_and_not_quantised_again(model, tmp_path):
  save_model(tmp_path / "run", model, BYTES, None)
  run, small = str(tmp_path / "run"), tmp_path / "small"
  found = quantize(run, small, Stored(INT4, Format("int8")), progress=False)
  assert found["after"] < 0.3 * found["before"]
  assert is_stored(load_model(small)[0])
  with pytest.raises(UserError, match="there already"):
    quantize(run, small, Stored(INT4))
  with pytest.raises(UserError, match="quantised already"):
    quantize(str(small), tmp_path / "again", Stored(INT4))
  assert not (tmp_path / "again").exists()


def test_experts_are_not_calibrated(tiny_config, random_params):
  config = tiny_config(**{"experts.count": 4, "experts.per_token": 2})
  model = nnx.merge(model_graph(config), random_params(config))
  tokens = np.zeros((2, 8), np.int32)
  with pytest.raises(UserError, match="take --method=nearest"):
    quantized(model, Stored(Format("int8")), method="gptq", tokens_RT=tokens)


def test_statistics_add_up_over_batches():
  x_MI = jnp.asarray(correlated(8, 10))
  whole = measure_inputs(x_MI)
  parts = [measure_inputs(part) for part in (x_MI[:3], x_MI[3:])]
  for name, value in whole.items():
    np.testing.assert_allclose(parts[0][name] + parts[1][name], value, rtol=1e-5)
