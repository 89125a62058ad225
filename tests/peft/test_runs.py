"""Runs that train adapters: what they print, keep, resume from and become."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from gptjax import config as config_lib
from gptjax import tree
from gptjax.diagnosis.dry_run import dry_run
from gptjax.errors import UserError
from gptjax.inference.generate import generate
from gptjax.model.gpt import GPT
from gptjax.peft.layers import Adapter
from gptjax.training.loop import train
from gptjax.training.pretrained import load_checkpoint, load_model
from gptjax.training.resolve import resolve
from gptjax.training.setup import make_setup
from tests.interop.conftest import LLAMA, save_folder

SMALL = {
  "total_steps": 4,
  "batch_size": 4,
  "sequence_length": 16,
  "log.every_steps": 1,
  "log.tensorboard": False,
  "eval.every_steps": 0,
  "sample.every_steps": 0,
  "checkpoint.every_steps": 2,
  "optim.learning_rate": 0.05,
  "model.execution.scan_layers": True,
}


@pytest.fixture(scope="module")
def make_config(tiny_config, random_params, tmp_path_factory):
  """Returns a function that makes the config of a run on a small Llama."""
  folder = tmp_path_factory.mktemp("peft")
  config = tiny_config(**LLAMA)
  for seed in (0, 1):
    save_folder(folder / f"base{seed}", config, random_params(config, seed))
  (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)

  def make(peft, **changes):
    source = {
      "init_from": f"hf:{folder / 'base0'}",
      "data.path": str(folder / "text.txt"),
      "data.cache_dir": str(folder / "cache"),
    }
    argument = f"configs/pretrain.py:model=init_from,data=text,peft={peft}"
    config = config_lib.load(argument, SMALL | source | changes)
    return config

  return make


@pytest.fixture(scope="module")
def lora(make_config, tmp_path_factory):
  """(work directory, what was printed) of a run of 4 steps."""
  workdir = tmp_path_factory.mktemp("lora")
  printed = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("gptjax.training.metrics.Writer.message", lambda _, text: printed.append(text))
    train(make_config("lora"), workdir)
  return workdir, printed


def logged(workdir, name):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [line[name] for line in lines if name in line]


def test_what_is_trained_is_told_and_the_loss_falls(lora):
  workdir, printed = lora
  # Of two layers, queries 16 x 16 and values 16 x 8, of rank 8.
  trained = f"of which {2 * 8 * (32 + 24)} are trained"
  assert any(text.startswith("parameters: ") and trained in text for text in printed)
  assert logged(workdir, "val/loss")[-1] < logged(workdir, "val/loss")[0]


def test_a_checkpoint_holds_adapters_alone(lora):
  manifest = json.loads((lora[0] / "checkpoints/4/manifest/metadata").read_text())["arrays"]
  params = {name for name in manifest if name.startswith("params/")}
  assert len(params) == 4
  assert all("/lora_" in name for name in params)
  sizes = sum(int(np.prod(entry["shape"], dtype=int)) for entry in manifest.values())
  assert sizes < 3 * 896 + 10  # The adapters and two moments of each.


@pytest.mark.slow
def test_a_budget_of_ranks_is_kept_and_it_goes_on_bit_for_bit(make_config, tmp_path):
  """AdaLoRA's estimates of importance are a part of the state."""
  phases = {f"peft.budget_{name}_steps": 1 for name in ("initial", "final", "every")}
  few = {"peft.targets": ("query", "value"), "peft.rank": 4, "peft.target_rank": 2}
  config = make_config("adalora", **phases, **few)
  whole = tmp_path / "whole"
  train(config, whole)
  assert logged(whole, "val/loss")[-1] < logged(whole, "val/loss")[0]
  shutil.copytree(whole, tmp_path / "run")
  shutil.rmtree(tmp_path / "run/checkpoints/4")
  train(config, tmp_path / "run")
  expected, _ = load_checkpoint(whole)
  actual, step = load_checkpoint(tmp_path / "run")
  assert step == 4
  adapters = tree.named_leaves(nnx.to_pure_dict(nnx.state(actual, Adapter)))
  values = [x for name, x in adapters.items() if name.endswith("singular_values")]
  assert sum(np.count_nonzero(x) for x in values) == 2 * 2 * 2  # Of 2 matrices in 2 layers.
  for a, b in zip(
    *(jax.tree.leaves(nnx.state(m, Adapter)) for m in (actual, expected)), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_a_run_is_loaded_with_its_adapters_merged(lora, make_forward):
  merged, tokenizer = load_model(lora[0])
  adapted, _ = load_checkpoint(lora[0])
  assert type(merged) is GPT
  tokens = np.arange(12).reshape(2, 6).astype(np.int32)
  graph, state = nnx.split(adapted)
  expected = jax.jit(lambda state: nnx.merge(graph, state)(tokens))(state)
  actual = make_forward(merged.config)(nnx.to_pure_dict(nnx.state(merged)), tokens)
  np.testing.assert_allclose(actual, expected, atol=1e-4)
  assert generate(merged, tokenizer, ["the"], max_tokens=2)[0].tokens


def test_another_base_is_an_error_that_says_so(lora, make_config, tmp_path):
  shutil.copytree(lora[0], tmp_path / "run")
  base = make_config("lora").init_from
  other = base.replace("base0", "base1")
  config = make_config("lora", init_from=other, tokenizer=base.removeprefix("hf:"))
  with pytest.raises(UserError, match="beside another frozen model than init_from names now"):
    train(config, tmp_path / "run")
  saved = json.loads((tmp_path / "run/config.json").read_text())
  (tmp_path / "run/config.json").write_text(json.dumps(saved | {"init_from": other}))
  with pytest.raises(UserError, match=r"names now \(checksum \d+, not \d+\)"):
    load_model(tmp_path / "run")


def test_adapters_need_a_model_to_adapt(make_config, tmp_path):
  changes = {"init_from": "", "tokenizer": "bytes", "model.num_layers": 1, "model.embed_dim": 8}
  shape = {"model.num_heads": 1, "model.mlp_dim": 8}
  with pytest.raises(UserError, match=r"peft\.method='lora' needs init_from, the model to adapt"):
    train(make_config("lora", **changes, **shape), tmp_path)


# AdaLoRA also keeps how important each is, and how sure that is.
@pytest.mark.parametrize(("method", "copies", "rank"), [("lora", 3, 8), ("adalora", 5, 12)])
def test_adapters_and_their_moments_are_split_over_the_mesh(method, copies, rank, make_config):
  setup = make_setup(resolve(make_config(method, **{"mesh.data": 1, "mesh.fsdp": 4})))
  state = setup.abstract_state(setup.make_optimizer(None))
  named = tree.named_leaves((state.params, state.opt_state))
  split = [leaf for name, leaf in named.items() if name.endswith("query/lora_a")]
  assert len(split) == copies
  assert all(leaf.sharding.shard_shape(leaf.shape) == (2, 4, rank) for leaf in split)


def test_frozen_matrices_count_two_thirds_of_the_flops_and_a_dry_run_tells_what_is_trained(
  make_config, capsys
):
  lora, full = (make_setup(resolve(make_config(name))) for name in ("lora", "none"))
  matrices = sum(np.prod(i.shape) for i in full.parameters.values() if i.fan_in_axes is not None)
  expected = full.flops_per_token - 2 * matrices + 6 * 896
  assert lora.flops_per_token == pytest.approx(expected)
  dry_run(make_config("lora"))
  assert "trained: 896" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_starts_from_one_that_trained_adapters(lora, make_config, tmp_path):
  changes = {"init_from": str(lora[0]), "total_steps": 1, "mesh.data": 1, "mesh.fsdp": 4}
  train(make_config("houlsby", **changes), tmp_path)
  first, last = logged(tmp_path, "val/loss")[0], logged(lora[0], "val/loss")[-1]
  assert first == pytest.approx(last, abs=1e-4)
  # A bottleneck cannot be merged, and stays.
  model, tokenizer = load_model(tmp_path)
  assert model.blocks.mlp.down.adapter.up.shape == (2, 64, 16)
  assert generate(model, tokenizer, ["the"], max_tokens=2)[0].tokens
