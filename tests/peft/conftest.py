"""Models to adapt. The references are those of the tests of conversion."""

import jax
import numpy as np
import pytest
from flax import nnx

from gptjax.model.gpt import model_graph
from gptjax.peft.layers import Adapter
from gptjax.peft.surgery import adapt
from tests.interop.conftest import load_params, make_reference, reference  # noqa: F401

TOKENS = np.random.default_rng(0).integers(0, 32, (2, 6)).astype(np.int32)


@pytest.fixture(scope="session")
def model_config(tiny_config):
  return tiny_config(
    num_kv_heads=2, position="rope", norm="rmsnorm", activation="swiglu", scan_layers=True
  )


@pytest.fixture(scope="session")
def make_model(model_config, random_params):
  """Returns a function that makes the model, its every parameter of a value that matters."""

  def make(config=None):
    config = config or model_config
    params = jax.tree.map(np.asarray, random_params(config))
    return nnx.merge(model_graph(config), params)

  return make


@pytest.fixture(scope="session")
def make_adapted(make_model):
  """Returns a function that puts adapters on the model and moves them from where they start."""

  def make(peft, config=None, by=0.2):
    model = adapt(make_model(config), peft, nnx.Rngs(1))
    rng = np.random.default_rng(2)
    moved = jax.tree.map(
      lambda x: x + by * rng.normal(size=x.shape).astype(np.float32), nnx.state(model, Adapter)
    )
    nnx.update(model, moved)
    return model

  return make


@pytest.fixture(scope="session")
def logits():
  """Returns a function: model, tokens and what else it is called with -> logits."""

  def run(model, tokens=TOKENS, **kwargs):
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state: nnx.merge(graph, state)(tokens, **kwargs))(state))

  return run
