"""Adapters that we write adapt the same projections in the `peft` library."""

import json
import warnings

import jax
import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.peft import huggingface
from gptjax.peft.config import PeftConfig
from gptjax.peft.surgery import initial_adapters
from tests.peft.conftest import our_logits, their_logits


@pytest.fixture
def write_and_load(bases, tmp_path):
  """Returns a function that writes adapters of random values, and returns the logits of ours and
  those of the library."""
  import peft
  import torch

  def run(base, config):
    model, opened, params = bases(base)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
      lambda x: np.asarray(x) + 0.3 * rng.normal(size=x.shape).astype(np.float32),
      initial_adapters(opened.config, config, params, 0),
    )
    huggingface.write(tmp_path, opened.config, config, adapters, opened.family)
    with warnings.catch_warnings():
      # It warns of adapters that it has made and found no tensors for.
      warnings.filterwarnings("error", message=".*missing adapter keys.*")
      loaded = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    return our_logits(opened, params, config, adapters), their_logits(torch, loaded)

  return run


CASES = {
  "lora of encoder and decoder": (
    "t5",
    PeftConfig(
      "lora",
      (
        (r"^encoder/.*attention/query", {"rank": 2, "alpha": 3.0}),
        (r"attention/(query|value)", {"rank": 4, "alpha": 16.0}),
      ),
    ),
  ),
  "adalora of encoder and decoder": (
    "t5",
    PeftConfig(
      "adalora",
      (
        (r"^encoder/.*attention/query", {"rank": 2, "alpha": 3.0}),
        (r"attention/(query|value)", {"rank": 4, "alpha": 16.0}),
      ),
      target_rank=1,
    ),
  ),
  "lora of the decoder alone": ("t5", PeftConfig("lora", ("^blocks/attention/query",))),
  "ia3 of encoder and decoder": (
    "t5",
    PeftConfig("ia3", (("^encoder/.*/value", {"scale_input": True}), "value", "mlp/down")),
  ),
  "a name that ends as another": (
    "bert",
    PeftConfig("lora", (("mlp/down", {"rank": 2}), ("attention/out", {"rank": 3}))),
  ),
  "one of two such names": ("bert", PeftConfig("lora", ("mlp/down",))),
  "ia3 of such a name": (
    "bert",
    PeftConfig("ia3", (("mlp/down", {"scale_input": True}), "attention/out")),
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_projections_are_adapted(name, write_and_load):
  ours, theirs = write_and_load(*CASES[name])
  np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize(
  ("base", "unfrozen"),
  [
    ("gpt2", ("final_norm",)),
    ("gpt2", ("bias$", "^position")),
    ("gpt2", ("attention/(query|key|value)/bias",)),
    ("tied", ("^embed/",)),
  ],
)
def test_what_is_trained_whole_goes_along(base, unfrozen, write_and_load):
  config = PeftConfig("lora", (r"query/kernel$",), unfrozen=unfrozen)
  ours, theirs = write_and_load(base, config)
  np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize(
  ("unfrozen", "sentence"),
  [
    ("final_norm/scale", "'final_norm/scale' is trained and 'final_norm/bias' is not"),
    ("attention/query/bias", "'blocks/attention/query/bias' is trained"),
  ],
)
def test_a_part_of_a_module_cannot_be_said_there(unfrozen, sentence, write_and_load):
  with pytest.raises(UserError, match=sentence):
    write_and_load("gpt2", PeftConfig("lora", ("query/kernel$",), unfrozen=(unfrozen,)))


def test_an_embedding_that_is_trained_apart_from_the_tied_head_is_refused(bases, tmp_path):
  import peft

  model, opened, _ = bases("tied")
  config = peft.LoraConfig(
    task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens"]
  )
  peft.get_peft_model(model, config).save_pretrained(tmp_path)
  assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
  with pytest.raises(UserError, match=r"'model\.embed_tokens\.weight' is trained apart from"):
    huggingface.read(tmp_path, opened.config, opened.family)


def test_layers_without_a_magnitude_are_named(bases, tmp_path):
  import peft

  model, opened, _ = bases("llama")
  config = peft.LoraConfig(
    task_type="CAUSAL_LM", target_modules=["q_proj"], use_dora=True, layers_to_transform=[0]
  )
  peft.get_peft_model(model, config).save_pretrained(tmp_path)
  with pytest.raises(UserError, match="use_dora with layers_to_transform"):
    huggingface.read(tmp_path, opened.config, opened.family)
