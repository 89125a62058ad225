"""What calibration says reaches a projection is what reaches it in the model."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax.compression.calibration import read_rows, walk
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from gptjax.model.gpt import model_graph

MODELS = {
  "gpt2": {},
  "gated": {"mlp.activation": "swiglu", "norm.kind": "rmsnorm", "position.kind": "rope"},
  "grouped and local": {
    "num_kv_heads": 2,
    "position.kind": "rope",
    "layer_pattern": ("local", "full"),
    "window": 4,
  },
  "t5 bias": {"position.kind": "t5"},
  "deep": {
    "transfer.parametrization": "completep",
    "transfer.base_num_layers": 1,
    "transfer.base_embed_dim": 8,
    "num_layers": 4,
  },
}
TOKENS = np.random.default_rng(0).integers(0, 32, (11, 12)).astype(np.int32)


@pytest.fixture
def make_model(tiny_config, random_params):
  def make(**changes):
    config = tiny_config(**changes)
    return nnx.merge(model_graph(config), random_params(config))

  return make


QUICK = ("gpt2", "grouped and local")


@pytest.mark.parametrize(
  "changes",
  [
    pytest.param(changes, marks=[] if name in QUICK else pytest.mark.slow, id=name)
    for name, changes in MODELS.items()
  ],
)
def test_layers_one_by_one_are_the_model(make_model, changes):
  model = make_model(**changes)
  for layer in walk(model, TOKENS):
    last = layer
  outputs = jnp.concatenate(last.outputs())
  if model.final_norm is not None:
    outputs = model.final_norm(outputs)
  expected, _ = model.hidden(TOKENS)
  np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_all_rows_inputs(make_model):
  model = make_model()
  first, second = (layer.measure(lambda x_MI: x_MI.T @ x_MI) for layer in walk(model, TOKENS))
  assert set(first) == {
    *(f"attention/{name}" for name in ("query", "key", "value", "out")),
    *("mlp/up", "mlp/down"),
  }
  layers = model.layers()
  normed = layers[0].attention_norm(model.embedded(TOKENS)).reshape(-1, 16)
  np.testing.assert_allclose(first["attention/query"], normed.T @ normed, rtol=1e-4, atol=1e-4)
  assert first["mlp/down"].shape == (32, 32)
  assert np.abs(first["mlp/up"] - second["mlp/up"]).max() > 1


def test_the_next_layer_reads_what_the_changed_one_writes(make_model):
  found = []
  for zero in (False, True):
    for layer in walk(make_model(), TOKENS):
      if zero and layer.index == 0:
        layer.params["mlp/down/kernel"] *= 0
      found.append(layer.measure(lambda x_MI: jnp.abs(x_MI).sum(0))["attention/key"])
  np.testing.assert_array_equal(found[0], found[2])
  assert np.abs(found[1] - found[3]).max() > 1


def test_a_model_whose_layers_read_more_is_refused(make_model):
  with pytest.raises(UserError, match="residual"):
    next(walk(make_model(**{"residual.values": True}), TOKENS))


def test_rows_are_whole_and_their_places_are_drawn(tmp_path):
  (tmp_path / "a.txt").write_text("".join(f"sentence number {i}. " for i in range(400)))
  (tmp_path / "b.txt").write_text("short")
  tokenizer = tokenizers.load("bytes")
  rows = read_rows(str(tmp_path), tokenizer, rows=6, length=32, seed=1)
  assert rows.shape == (6, 32)
  assert rows.dtype == np.int32
  other = read_rows(str(tmp_path), tokenizer, rows=6, length=32, seed=2)
  assert (rows != other).any()
  with pytest.raises(UserError, match="fewer than the 600 rows of 32"):
    read_rows(str(tmp_path), tokenizer, rows=600, length=32)
