import types

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.model.gpt import ParameterInfo
from gptjax.optim.layerwise import LayerwiseRates

PARAMETERS = {
  "blocks/mlp/up/kernel": ParameterInfo((3, 8, 16), ("layers", "embed", "mlp"), (1,), "hidden"),
  "blocks/norm/scale": ParameterInfo((3, 8), ("layers", "embed"), None, "norm"),
  "embed/embedding": ParameterInfo((16, 8), ("vocab", "embed"), None, "embedding"),
  "position/embedding": ParameterInfo((4, 8), ("positions", "embed"), None, "embedding"),
  "final_norm/scale": ParameterInfo((8,), ("embed",), None, "norm"),
  "label_head/kernel": ParameterInfo((8, 2), ("embed", "labels"), (0,), "head"),
}


def make(layer_decay=1.0, freeze_layers=0, unfreeze_steps=0):
  config = types.SimpleNamespace(layer_decay=layer_decay, freeze_layers=freeze_layers)
  return LayerwiseRates.from_config(config, PARAMETERS, unfreeze_steps)


def factors(layerwise, step=0):
  """{name: the multiplier of each layer, or of the whole}."""
  found = {name: layerwise.factor(name, jnp.int32(step)) for name in PARAMETERS}
  return {name: None if x is None else np.ravel(x).tolist() for name, x in found.items()}


def test_by_default_nothing_depends_on_depth():
  assert set(factors(make()).values()) == {None}


def test_each_layer_learns_in_parts_of_the_one_above():
  found = factors(make(layer_decay=0.5))
  assert found["label_head/kernel"] == found["final_norm/scale"] == [1]
  assert found["blocks/mlp/up/kernel"] == found["blocks/norm/scale"] == [0.125, 0.25, 0.5]
  assert found["embed/embedding"] == found["position/embedding"] == [0.0625]


def test_a_factor_broadcasts_over_its_layer():
  assert make(layer_decay=0.5).factor("blocks/mlp/up/kernel", jnp.int32(0)).shape == (3, 1, 1)


def test_the_lowest_layers_and_the_embeddings_freeze():
  found = factors(make(freeze_layers=2))
  assert found["embed/embedding"] == found["position/embedding"] == [0]
  assert found["blocks/norm/scale"] == [0, 0, 1]
  assert found["label_head/kernel"] == [1]


def test_layers_thaw_one_by_one_from_the_head_down():
  layerwise = make(unfreeze_steps=10)
  thawed = {
    step: [
      *factors(layerwise, step)["embed/embedding"],
      *factors(layerwise, step)["blocks/norm/scale"],
      *factors(layerwise, step)["label_head/kernel"],
    ]
    for step in (0, 9, 10, 20, 39, 40)
  }
  assert thawed == {
    0: [0, 0, 0, 0, 1],
    9: [0, 0, 0, 0, 1],
    10: [0, 0, 0, 1, 1],
    20: [0, 0, 1, 1, 1],
    39: [0, 1, 1, 1, 1],
    40: [1, 1, 1, 1, 1],
  }


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"layer_decay": 0.0}, "optim.layer_decay=0.0 is not above 0"),
    ({"layer_decay": 1.5}, "at most 1"),
    ({"freeze_layers": 4}, "optim.freeze_layers=4 is not from 0 to the 3 layers"),
  ],
)
def test_a_value_out_of_range_is_an_error(values, message):
  with pytest.raises(UserError, match=message):
    make(**values)
