"""Training with rounded weights: what the forward pass sees, and where the gradient goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import config as config_lib
from gptjax.compression.rounding import Rounded, straight_through
from gptjax.errors import UserError
from gptjax.model.gpt import describe_parameters, model_graph
from gptjax.quantization.formats import Format
from gptjax.quantization.kernel import StoredKernel
from gptjax.quantization.stored import Stored
from gptjax.training.adaptation import NOT_ROUNDED
from gptjax.training.loop import train
from gptjax.training.pretrained import load_model

TOKENS = np.random.default_rng(0).integers(0, 32, (3, 12)).astype(np.int32)
INT4 = {"format": "int4", "group": 8}


@pytest.fixture
def config(tiny_config):
  return tiny_config()


def rounded(config, params, **changes):
  adaptation = Rounded.from_config(NOT_ROUNDED | INT4 | changes)
  return adaptation, nnx.merge(nnx.graphdef(adaptation.abstract_model(config)), params)


def test_the_forward_pass_is_that_of_what_will_be_stored(config, random_params):
  params = random_params(config)
  adaptation, model = rounded(config, params)
  stored = Stored(Format("int4", 8)).store(nnx.merge(model_graph(config), params))
  np.testing.assert_allclose(model(TOKENS), stored(TOKENS), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(adaptation.merge(model)(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
  plain = nnx.merge(model_graph(config), params)
  assert np.abs(plain(TOKENS) - model(TOKENS)).max() > 1e-2
  assert set(adaptation.trained(config)) == set(describe_parameters(config))
  assert isinstance(stored.blocks.mlp.up.kernel, StoredKernel)


def test_the_gradient_goes_straight_through():
  x = jnp.linspace(-2.0, 2.0, 9)
  values, pull = jax.vjp(lambda x: straight_through(x, jnp.round(x)), x)
  np.testing.assert_array_equal(values, jnp.round(x))
  np.testing.assert_array_equal(pull(jnp.arange(9.0))[0], jnp.arange(9.0))


def test_activations_are_rounded_only_if_asked(config, random_params):
  params = random_params(config)
  _, plain = rounded(config, params)
  _, both = rounded(config, params, activations="int8")
  change = np.abs(plain(TOKENS) - both(TOKENS)).max()
  assert 1e-4 < change < 0.2 * np.abs(plain(TOKENS)).max()


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"quantize.group": 32}, "quantize.format='none' rounds nothing"),
    ({"quantize.format": "int5"}, "quantize.format: no choice 'int5'"),
    ({"quantize.format": "int4", "quantize.group": 7}, "group=7 does not divide"),
    ({"quantize.format": "int4", "quantize.activations": "int4"}, "quantize.activations"),
    ({"quantize.format": "int4", "peft.method": "bitfit", "init_from": "x"}, "set peft.base"),
    (
      {"quantize.format": "int4", "model.experts.count": 2, "model.experts.per_token": 1},
      "experts cannot be rounded",
    ),
  ],
)
def test_what_cannot_be_trained_so_is_refused_in_a_sentence(changes, sentence, tmp_path):
  run = {"data.path": str(tmp_path), "tokenizer": "bytes", "log.tensorboard": False} | changes
  loaded = config_lib.load("configs/pretrain.py:model=debug,data=text", run)
  with pytest.raises(UserError) as error:
    train(loaded, tmp_path / "run")
  assert sentence in str(error.value)


@pytest.mark.slow
def test_a_run_learns_with_rounded_weights_and_is_used_with_them(tmp_path):
  for number in range(4):
    text = f"The same few words, again and again, {number}.\n" * 20
    (tmp_path / f"{number}.txt").write_text(text)
  run = {
    "total_steps": 30,
    "batch_size": 4,
    "sequence_length": 32,
    "tokenizer": "bytes",
    "model.num_layers": 2,
    "model.embed_dim": 32,
    "model.num_heads": 2,
    "model.mlp_dim": 64,
    "data.path": str(tmp_path),
    "data.cache_dir": str(tmp_path / "cache"),
    "log.tensorboard": False,
    "sample.every_steps": 30,
    "optim.learning_rate": 1e-2,
    "quantize.format": "int4",
    "quantize.group": 32,
  }
  loaded = config_lib.load("configs/pretrain.py:model=debug,data=text", run)
  result = train(loaded, tmp_path / "run")
  assert result["val/loss"] < 4
  model, _ = load_model(tmp_path / "run")
  again = Stored(Format("int4", 32)).store(nnx.merge(*nnx.split(model)))
  # What is on the grid stays there.
  np.testing.assert_allclose(again(TOKENS), model(TOKENS), rtol=1e-3, atol=1e-3)
