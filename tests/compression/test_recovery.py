"""Training goes on from a pruned model, and what was pruned stays away."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from gptjax import config as config_lib
from gptjax import tree
from gptjax.compression.models import params_of
from gptjax.compression.prune import Sparsity, check_mask, prune_model
from gptjax.compression.recovery import SparseModel
from gptjax.errors import UserError
from gptjax.model.gpt import describe_parameters
from gptjax.optim import optimizer as optim
from gptjax.presets.parts import optim as optim_presets
from gptjax.presets.parts.peft import DEFAULTS
from gptjax.training.loop import train
from gptjax.training.pretrained import load_model
from tests.compression.saved import LLAMA, TEXT, VOCAB_SIZE, merge, save

SMALL = {
  "total_steps": 2,
  "batch_size": 4,
  "sequence_length": 16,
  "log.tensorboard": False,
  "eval.every_steps": 0,
  "sample.every_steps": 0,
  "optim.learning_rate": 0.01,
  "optim.ema_decay": 0.5,
  "peft.method": "sparse",
}


def read(**changes):
  return SparseModel.from_config(ConfigDict(DEFAULTS | {"method": "sparse"} | changes))


@pytest.fixture(scope="module")
def folder(tiny_config, random_params, tmp_path_factory):
  """A folder with a model, 'whole', the same pruned to 2:4, 'pruned', and text."""
  folder = tmp_path_factory.mktemp("recovery")
  config = tiny_config(**LLAMA | {"vocab_size": VOCAB_SIZE})
  model = merge(config, random_params(config))
  pruned = prune_model(model, "magnitude", Sparsity.parse("2:4"))
  save(folder / "whole", config, params_of(model))
  save(folder / "pruned", config, params_of(pruned))
  (folder / "text.txt").write_text(TEXT)
  return folder


def run(folder, workdir, **changes):
  source = {"data.path": str(folder / "text.txt"), "data.cache_dir": str(folder / "cache")}
  source["init_from"] = str(folder / "pruned")
  config = config_lib.load(
    "configs/pretrain.py:model=init_from,data=text", SMALL | source | changes
  )
  return train(config, workdir)


@pytest.mark.slow
def test_zeros_stay_and_the_rest_is_trained(folder, tmp_path):
  run(folder, tmp_path / "run", **{"peft.targets": (("role:hidden", {"pattern": "2:4"}),)})
  before = params_of(load_model(folder / "pruned")[0])
  for ema in (False, True):
    model, _ = load_model(tmp_path / "run", ema=ema)
    check_mask(model, "2:4")
    for name, x in params_of(model).items():
      kept = before[name] != 0
      assert (x[kept] != before[name][kept]).any(), name
      if name.startswith("blocks/") and name.endswith("/kernel"):
        assert not x[~kept].any(), name


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"init_from": "whole"}, "'blocks/attention/key/kernel' has none: set init_from to a pruned"),
    ({"peft.targets": (("mlp/up", {"pattern": "1:4"}),)}, "'blocks/mlp/up/kernel' is not 1:4"),
  ],
)
def test_a_model_without_such_zeros_is_refused(folder, changes, sentence, tmp_path):
  if "init_from" in changes:
    changes = {"init_from": str(folder / changes["init_from"])}
  with pytest.raises(UserError, match=sentence):
    run(folder, tmp_path / "run", **changes)


@pytest.mark.parametrize("algorithm", ["adamw", "muon", "sgd"])
def test_an_update_is_that_of_the_weights_that_are_there(tiny_config, random_params, algorithm):
  """Zeros take no part: not in the norm that is clipped, nor where an algorithm mixes rows."""
  parameters = describe_parameters(tiny_config())
  rng = np.random.default_rng(0)
  params = {
    name: jnp.asarray(x) for name, x in tree.named_leaves(random_params(tiny_config())).items()
  }
  name = "blocks/mlp/up/kernel"
  keep = rng.random(parameters[name].shape) < 0.5
  params[name] = params[name] * keep
  grads = {n: jnp.asarray(rng.normal(size=x.shape), "float32") for n, x in params.items()}
  masked = grads | {name: grads[name] * keep}
  rules = [("role:hidden", {"algorithm": algorithm}), (".*", {"algorithm": "adamw"})]
  values = optim_presets.DEFAULTS | {"rules": rules, "weight_decay": 0.1, "clip_norm": 1.0}
  plain = optim.make_optimizer(
    types.SimpleNamespace(**values), parameters, optax.constant_schedule(0.1)
  )
  sparse = read(targets=("mlp/up",)).wrap(plain, parameters, None)
  updates = [
    jax.jit(one.update)(of, one.init(params), params, jnp.int32(0))
    for one, of in ((sparse, grads), (plain, masked))
  ]
  (new, _, norm), (expected, _, expected_norm) = updates
  np.testing.assert_allclose(norm, expected_norm, rtol=1e-6)
  assert not new[name][~keep].any()
  assert (new[name][keep] != params[name][keep]).any()
  for other in params:
    wanted = jnp.where(params[other] == 0, 0, expected[other]) if other == name else expected[other]
    np.testing.assert_allclose(new[other], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"base": "int8"}, "peft.base='int8' is of a frozen model"),
    ({"targets": (("mlp", {"rank": 2}),)}, "the rule 'mlp' of method 'sparse' .*: rank"),
    ({"targets": (("mlp", {"pattern": "4:2"}),)}, "peft.targets: pattern=4:2 is neither"),
  ],
)
def test_what_cannot_be_is_named(changes, sentence):
  with pytest.raises(UserError, match=sentence):
    read(**changes)


def test_a_rule_for_nothing_is_named(tiny_config):
  parameters = describe_parameters(tiny_config())
  with pytest.raises(UserError, match="the rule 'mlp/gate' is the first for no kernel"):
    read(targets=("mlp", "mlp/gate")).check_start({}, parameters)
