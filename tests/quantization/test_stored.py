"""A stored model computes with the weights that it stands for, wherever it is used."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from gptjax.inference import form
from gptjax.inference.engine import Engine
from gptjax.inference.request import Request
from gptjax.inference.sampling import Sampling
from gptjax.interop.convert import convert
from gptjax.model.gpt import model_graph
from gptjax.quantization.formats import Format
from gptjax.quantization.kernel import (
  DecodedMatrix,
  GroupedMatrix,
  StoredKernel,
  round_matrix,
)
from gptjax.quantization.stored import KEY, Stored, is_stored
from gptjax.training.pretrained import load_model, load_params_into, save_model

BYTES = tokenizers.load("bytes")
TOKENS = np.random.default_rng(0).integers(0, 264, (3, 16)).astype(np.int32)
LLAMA = {
  **{"position.kind": "rope", "norm.kind": "rmsnorm", "bias": False, "mlp.activation": "swiglu"},
  **{"num_kv_heads": 2, "head.tied": True},
}
GPT2 = {"position.max_positions": 64}
EXPERTS = LLAMA | {"experts.count": 4, "experts.per_token": 2}
PLANS = {
  "int8": Stored(Format("int8"), Format("int8")),
  "int4 in groups": Stored(Format("int4", 32), Format("int4", 32)),
  "int4 with zeros": Stored(Format("int4", 64, False), Format("int8", 32)),
  "int8 in groups": Stored(Format("int8", 32, False)),
  "nf4": Stored(Format("nf4", 32), Format("float8")),
  "scaled": Stored(Format("int4", 32), None, None, scales_inputs=True),
}


@pytest.fixture
def make(tiny_config, random_params):
  def make(**changes):
    shape = {"vocab_size": 264, "embed_dim": 64, "mlp_dim": 128} | GPT2 | changes
    config = tiny_config(**shape)
    return nnx.merge(model_graph(config), random_params(config))

  return make


def stored(model, plan):
  """A stored copy, with input scales that matter if there are any."""
  copy = plan.store(nnx.merge(*nnx.split(model)))
  for _, module in nnx.iter_modules(copy):
    if getattr(module, "input_scales", None) is not None:
      shape = module.input_scales.shape
      # Projections of the same input have the same.
      module.input_scales[...] = np.broadcast_to(np.exp(np.sin(np.arange(shape[-1]))), shape)
  return copy


@pytest.mark.parametrize(
  "changes",
  [
    LLAMA,
    pytest.param(GPT2, marks=pytest.mark.slow, id="gpt2"),
    pytest.param(EXPERTS, marks=pytest.mark.slow, id="experts"),
  ],
)
@pytest.mark.parametrize(
  "plan",
  [pytest.param(PLANS["int4 in groups"], marks=pytest.mark.slow), PLANS["scaled"]],
  ids=["int4", "scaled"],
)
def test_logits_are_those_of_the_weights_that_it_stands_for(make, plan, changes):
  model = make(**changes)
  small = stored(model, plan)
  plain = plan.plain(small)
  assert is_stored(small)
  assert not is_stored(plain)
  np.testing.assert_allclose(small(TOKENS), plain(TOKENS), rtol=1e-4, atol=1e-4)
  change = np.abs(plain(TOKENS) - model(TOKENS)).max()
  assert change > 1e-3


@pytest.mark.parametrize(
  "name", [one if one == "scaled" else pytest.param(one, marks=pytest.mark.slow) for one in PLANS]
)
def test_the_engine_writes_what_the_weights_say(make, name):
  small = stored(make(**LLAMA), PLANS[name])
  requests = [
    Request(BYTES.encode(text), max_tokens=8, sampling=Sampling(0), log_probs=1, ignore_end=True)
    for text in ("a", "Several words of a prompt.", "def main")
  ]
  told = []
  for model, rows in ((small, 1), (small, 4), (PLANS[name].plain(small), 4)):
    engine = Engine(model, BYTES, rows=rows, length=64)
    told.append(engine.run(requests))
  for alone, together, plain in zip(*told, strict=True):
    assert alone.tokens == together.tokens == plain.tokens
    own, theirs = ([score.log_prob for score in answer.scores] for answer in (alone, together))
    np.testing.assert_array_equal(own, theirs)
    expected = [score.log_prob for score in plain.scores]
    np.testing.assert_allclose(own, expected, rtol=1e-3, atol=1e-3)


ROUNDED_INPUTS = Stored(Format("int8"), Format("int8"), scales_inputs=True, activations="int8")


def test_inputs_are_rounded_by_each_tokens_largest():
  rng = np.random.default_rng(0)
  x_MI = (rng.normal(size=(5, 64)) * np.exp(rng.normal(size=(5, 1)))).astype(np.float32)
  matrix_OI, scales_I = rng.normal(size=(12, 64)).astype(np.float32), np.exp(rng.normal(size=64))
  kernel = StoredKernel(
    round_matrix(jnp.asarray(matrix_OI), Format("int8")), (4, 16), (3, 4), scales_I, "int8"
  )
  scaled_MI = (x_MI * scales_I).astype(np.float32)
  largest_M1 = np.abs(scaled_MI).max(-1, keepdims=True) / 127
  whole_OI = np.round(matrix_OI / (np.abs(matrix_OI).max(-1, keepdims=True) / 127))
  expected_MO = np.round(scaled_MI / largest_M1) @ whole_OI.T
  expected_MO = expected_MO * largest_M1 * np.abs(matrix_OI).max(-1) / 127
  found = kernel.product(jnp.asarray(x_MI).reshape(5, 4, 16), 2, ())
  np.testing.assert_allclose(np.reshape(found, (5, 12)), expected_MO, rtol=1e-4, atol=1e-4)


TEXT = [BYTES.end_of_text, *BYTES.encode("Several words of a prompt.")]


def score(engine, text):
  """Log probabilities of the tokens of a text but for the first, by an engine."""
  (answer,) = engine.run([Request(text, max_tokens=0, log_probs=0, scores_prompt=True)])
  return np.array([one.log_prob for one in answer.prompt_scores[1:]])


def log_probs(model):
  """The same of `TEXT` by the forward pass."""
  found = jax.nn.log_softmax(model(np.array([TEXT[:-1]]))[0])
  return np.take_along_axis(found, np.array(TEXT[1:])[:, None], 1)[:, 0]


@pytest.mark.slow
def test_the_engine_rounds_inputs_as_the_forward_pass_does(make):
  small = stored(make(**LLAMA), ROUNDED_INPUTS)
  whole = stored(make(**LLAMA), dataclasses.replace(ROUNDED_INPUTS, activations="none"))
  own = score(Engine(small, BYTES, rows=1, length=64), TEXT)
  expected, plain = log_probs(small), log_probs(whole)
  # A number between two that is rounded the other way is a small part of what rounding changes.
  assert np.abs(own - expected).mean() < 0.2 * np.abs(plain - expected).mean()


@pytest.mark.parametrize(
  "weights", [Format("int4"), Format("int8", 32), Format("int8", symmetric=False)]
)
def test_inputs_are_not_rounded_beside_other_formats(weights):
  with pytest.raises(UserError, match="activations='int8' is of weights in int8, without groups"):
    Stored(weights, activations="int8")


@pytest.mark.parametrize(
  "name",
  [one if one == "int4 with zeros" else pytest.param(one, marks=pytest.mark.slow) for one in PLANS],
)
def test_the_form_for_accelerators_multiplies_by_the_same_weights(make, name, monkeypatch):
  monkeypatch.setattr(form.kernels, "available", lambda: False)
  small = stored(make(**LLAMA), PLANS[name])
  engine = Engine(small, BYTES, rows=1, length=64)
  model = engine.reader.form.model(engine.reader.arrays)
  decoded = [m for _, m in nnx.iter_modules(model) if isinstance(m, DecodedMatrix)]
  assert bool(decoded) == (name not in ("int8", "int8 in groups", "scaled"))
  own = score(engine, TEXT)
  np.testing.assert_allclose(own, log_probs(PLANS[name].plain(small)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [Format("int4", 32), Format("int8", 64, False), Format("int4")])
@pytest.mark.parametrize("tokens", [3, 300])
def test_groups_are_multiplied_one_by_one_or_together(kind, tokens):
  rng = np.random.default_rng(0)
  x_MI, matrix_OI = (jnp.asarray(rng.normal(size=(n, 128)), jnp.float32) for n in (tokens, 12))
  matrix = round_matrix(matrix_OI + 0.2, kind)
  found = GroupedMatrix(matrix).product(x_MI)
  np.testing.assert_allclose(found, x_MI @ matrix.weights().T, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_is_loaded_continued_and_converted(make, tmp_path):
  plan, model = PLANS["int4 in groups"], make(**LLAMA)
  small = stored(model, plan)
  run, plain, hf = tmp_path / "small", tmp_path / "plain", tmp_path / "hf"
  save_model(run, small, BYTES, None, {KEY: plan.to_config()})
  loaded, _ = load_model(run)
  assert is_stored(loaded)
  leaves = [jax.tree.leaves(nnx.state(one)) for one in (loaded, small)]
  for own, theirs in zip(*leaves, strict=True):
    assert own.dtype == theirs.dtype
    np.testing.assert_array_equal(np.asarray(own, np.float32), np.asarray(theirs, np.float32))
  expected = plan.plain(small)
  # As init_from does, into a model of float32 parameters.
  params = nnx.to_pure_dict(nnx.state(expected, nnx.Param))
  where = SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), params)
  found, _ = load_params_into(run, model.config, abstract)
  jax.tree.map(np.testing.assert_array_equal, found, params)
  for target, kind in ((plain, "gptjax"), (hf, "hf")):
    convert(str(run), target, to=kind)
    again, _ = load_model(str(target))
    assert not is_stored(again)
    np.testing.assert_allclose(again(TOKENS), expected(TOKENS), rtol=1e-4, atol=1e-4)


def test_its_weights_are_not_rounded_again(make):
  with pytest.raises(UserError, match="stores its weights in few bits already"):
    Engine(stored(make(), PLANS["int8"]), BYTES, weights="bfloat16")


def test_its_layers_are_no_draft(make):
  with pytest.raises(UserError, match="take lookup or a checkpoint"):
    Engine(stored(make(), PLANS["int8"]), BYTES, draft="layers:1")


def test_a_matrix_that_does_not_fit_is_named(make):
  with pytest.raises(UserError, match="group=40 does not divide the 64 inputs of 'blocks/"):
    Stored(Format("int4", 40)).store(make())
