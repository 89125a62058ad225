import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from gptjax.inference.generate import generate
from gptjax.inference.sampling import Sampling
from gptjax.peft.config import PeftConfig
from gptjax.peft.layers import Adapter
from gptjax.peft.several import choose, put_several_on
from gptjax.peft.surgery import merge, put_on
from gptjax.presets.parts.peft import DEFAULTS, PEFT

BYTES = tokenizers.load("bytes")
# Of other ranks and, but for the queries, on other projections.
TARGETS = (("attention/query", {"rank": 6, "alpha": 8.0}), "attention/out")
TOKENS = np.random.default_rng(1).integers(0, 32, (4, 6)).astype(np.int32)
ROWS = [1, None, 0, 1]


def preset(name, **changes):
  return PeftConfig.from_config(DEFAULTS | PEFT[name] | {"rank": 4} | changes)


CONFIGS = {
  "float32": (preset("lora"), preset("rslora", targets=TARGETS, rank=2)),
  "nf4": (preset("lora", base="nf4"), preset("rslora", targets=TARGETS, rank=2, base="nf4")),
}


@pytest.fixture(scope="module")
def trained(make_adapted):
  """Returns a function that makes the values of an adapter, all of which matter."""

  def make(config, model_config=None, by=0.3):
    return nnx.to_pure_dict(nnx.state(make_adapted(config, model_config, by), Adapter))

  return make


@pytest.mark.parametrize(
  ("base", "changes"),
  [
    ("float32", {"execution.scan_layers": True}),
    pytest.param("nf4", {"execution.scan_layers": False}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_each_row_is_that_of_the_model_with_its_adapter_alone(
  base, changes, make_model, model_config, trained, logits
):
  config = model_config.replace(changes)
  adapters = [(peft, trained(peft, config)) for peft in CONFIGS[base]]
  several = put_several_on(make_model(config), adapters)
  choose(several, ROWS)
  actual = logits(several, TOKENS)
  alone = [put_on(make_model(config), *adapter) for adapter in adapters]
  with_adapter = [logits(model, TOKENS) for model in alone]
  nnx.update(alone[0], jax.tree.map(np.zeros_like, adapters[0][1]))
  without = logits(alone[0], TOKENS)
  for row, i in enumerate(ROWS):
    expected = without if i is None else with_adapter[i]
    np.testing.assert_allclose(actual[row], expected[row], atol=1e-5)
  # The rows would not pass for each other's.
  assert np.abs(with_adapter[0] - with_adapter[1]).max(axis=(1, 2)).min() > 0.1
  assert np.abs(with_adapter[1] - without).max(axis=(1, 2)).min() > 0.1


def test_each_row_is_written_by_its_adapter(make_model, model_config, trained):
  config = dataclasses.replace(model_config, vocab_size=BYTES.vocab_size)
  adapters = [(peft, trained(peft, config)) for peft in CONFIGS["float32"]]
  prompts = ["one", "three", "two", "a longer one"]

  def write(model, prompts, adapters=None):
    options = {"max_tokens": 8, "sampling": Sampling(temperature=0), "adapters": adapters}
    return [completion.tokens for completion in generate(model, BYTES, prompts, **options)]

  several = put_several_on(make_model(config), adapters)
  actual = write(several, prompts, ROWS)
  models = [merge(put_on(make_model(config), *adapter)) for adapter in adapters]
  alone = [write(model, prompts) for model in (*models, make_model(config))]
  assert actual == [alone[2 if i is None else i][row] for row, i in enumerate(ROWS)]
  assert alone[0][0] != alone[1][0] != alone[2][0]
  others = write(several, prompts, [None, 1, 0, None])
  assert others == [alone[2][0], alone[1][1], alone[0][2], alone[2][3]]
  with pytest.raises(UserError, match=r"no adapter 2; the model has 2, counted from 0"):
    write(several, prompts, [0, 1, 2, 0])


def test_what_cannot_be_chosen_is_named(make_model, trained, logits):
  config = CONFIGS["float32"][0]
  model = put_several_on(make_model(), [(config, trained(config))])
  np.testing.assert_allclose(logits(model), logits(make_model()), atol=1e-6)
  choose(model, [0, 0, None])
  with pytest.raises(UserError, match="adapters are chosen for 3 rows, the batch has 2"):
    logits(model)
  for wrong in (1, -1):
    with pytest.raises(UserError, match=f"row 1: no adapter {wrong}; the model has 1"):
      choose(model, [0, wrong])
  with pytest.raises(UserError, match="no adapter 0; the model has 0"):
    choose(make_model(), [0])
  with pytest.raises(UserError, match="several adapters are not to be merged"):
    merge(model)


def test_what_does_not_go_together_is_named(make_model, trained):
  (config, _), (quantised, _) = CONFIGS.values()
  values = trained(config)
  with pytest.raises(UserError, match=r"of different peft\.base, float32 and nf4"):
    put_several_on(make_model(), [(config, values), (quantised, values)])
  with pytest.raises(UserError, match=r"adapter 1: peft\.method='dora'; only 'lora'"):
    put_several_on(make_model(), [(config, values), (preset("dora"), values)])
  with pytest.raises(UserError, match=r"adapter 0: peft\.unfrozen=.*all rows share the model"):
    put_several_on(make_model(), [(preset("lora", unfrozen=("embed",)), values)])
  with pytest.raises(UserError, match=r"query/lora_a' is \[2, 16, 4\], the model makes it \[2, 16"):
    put_several_on(make_model(), [(preset("lora", rank=8), values)])
  with pytest.raises(UserError, match="at least one adapter"):
    put_several_on(make_model(), [])
