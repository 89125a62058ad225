"""Models of all three kinds to use and to start from, and what does not fit."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import config as config_lib
from gptjax import tree
from gptjax.data.tokenizer import load
from gptjax.errors import UserError
from gptjax.interop.convert import convert
from gptjax.model.config import ModelConfig
from gptjax.training.datasets import open_dataset
from gptjax.training.loop import train
from gptjax.training.pretrained import (
  check_vocabulary,
  load_model,
  load_params_into,
  name_checkpoint,
  read_model_config,
  tokenizer_of,
)
from gptjax.training.resolve import resolve
from gptjax.training.setup import make_setup
from tests.gguf.test_model import SHAPE, Type, make_pair, write
from tests.interop.conftest import LLAMA
from tests.training.test_loop import ROOT

TEXT = "the quick brown fox jumps over the lazy dog, again and again. "


@pytest.fixture(scope="module")
def checkpoints(tiny_config, random_params, tmp_path_factory):
  """{kind: the name of the checkpoint} of one model as a folder, a GGUF file and a run."""
  folder = tmp_path_factory.mktemp("pretrained")
  config = tiny_config(**LLAMA | SHAPE)
  tensors = make_pair(folder / "hf", config, random_params(config), kinds=(Type.F32,))
  bpe = json.loads((folder / "hf" / "tokenizer.json").read_text())["model"]
  tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
  tokenizer = {
    "model": "gpt2",
    "pre": "llama-bpe",
    "tokens": tokens,
    "token_type": [3 if token.startswith("<|") else 1 for token in tokens],
    "merges": [" ".join(merge) for merge in bpe["merges"]],
    "eos_token_id": 0,
  }
  write(folder / "model.gguf", tensors, tokenizer=tokenizer)
  convert(f"hf:{folder / 'hf'}", folder / "run", to="gptjax")
  return {
    "hf": f"hf:{folder / 'hf'}",
    "gguf": f"gguf:{folder / 'model.gguf'}",
    "run": str(folder / "run"),
  }


@pytest.fixture(scope="module")
def expected(checkpoints):
  """(parameters by name, tokens of TEXT)."""
  model, tokenizer = load_model(checkpoints["run"])
  return tree.named_leaves(nnx.to_pure_dict(nnx.state(model))), tokenizer.encode(TEXT)


def test_a_folder_and_a_file_are_recognised_without_their_prefix(checkpoints):
  for named in checkpoints.values():
    bare = named.removeprefix("hf:").removeprefix("gguf:")
    assert name_checkpoint(bare) == name_checkpoint(named) == named
    assert read_model_config(bare) == read_model_config(named)
    assert tokenizer_of(bare) == tokenizer_of(named)


@pytest.mark.parametrize("kind", ["hf", "gguf", "run"])
def test_all_kinds_give_the_same_model_and_tokenizer(checkpoints, expected, kind):
  model, tokenizer = load_model(checkpoints[kind])
  loaded = tree.named_leaves(nnx.to_pure_dict(nnx.state(model)))
  assert loaded.keys() == expected[0].keys()
  for name, array in expected[0].items():
    assert array.devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(loaded[name], array, err_msg=name)
  assert tokenizer.encode(TEXT) == expected[1]
  assert read_model_config(checkpoints[kind]).differences(model.config) == []
  assert load(tokenizer_of(checkpoints[kind])).encode(TEXT) == expected[1]


@pytest.mark.parametrize(("kind", "told"), [("hf", "parameters: 100%"), ("run", "loading ")])
def test_progress_is_on_stderr_and_can_be_silent(checkpoints, capsys, kind, told):
  load_model(checkpoints[kind])
  printed = capsys.readouterr()
  assert told in printed.err
  assert printed.out == ""
  load_model(checkpoints[kind], progress=False)
  assert capsys.readouterr().err == ""


def test_foreign_files_have_no_moving_average(checkpoints):
  with pytest.raises(UserError, match="has no moving average"):
    load_model(checkpoints["hf"], ema=True)


def test_a_run_without_its_tokenizer_is_refused(checkpoints, tmp_path):
  shutil.copytree(checkpoints["run"], tmp_path / "run")
  (tmp_path / "run" / "tokenizer" / "gptjax_tokenizer.json").unlink()
  with pytest.raises(UserError, match="run/tokenizer: no whole tokenizer"):
    load_model(tmp_path / "run")


def test_what_is_no_run_is_refused(tmp_path):
  with pytest.raises(UserError, match="not the work directory of a run"):
    load_model(tmp_path)
  with pytest.raises(UserError, match="not the work directory of a run"):
    read_model_config(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_config):
  check_vocabulary(load("bytes"), tiny_config(vocab_size=260), "here")
  with pytest.raises(UserError, match=r"here: the tokenizer has 260 tokens, more than .* 259"):
    check_vocabulary(load("bytes"), tiny_config(vocab_size=259), "here")


def test_a_config_that_is_not_the_checkpoints_is_refused_by_its_fields(checkpoints):
  config = read_model_config(checkpoints["hf"])
  other = ModelConfig.from_config(config.architecture | {"rope.base": 500.0, "window": 4})
  with pytest.raises(
    UserError, match=r"model\.rope\.base=500\.0, not 10000\.0\. Choose .*init_from"
  ):
    load_params_into(checkpoints["hf"], other, {})


def test_a_tokenizer_of_nothing_is_refused():
  with pytest.raises(UserError, match="tokenizer='init_from' needs init_from"):
    tokenizer_of("")


@pytest.fixture(scope="module")
def make_config(checkpoints, tmp_path_factory):
  """Returns a function that makes the config of a run that starts from the folder."""
  folder = tmp_path_factory.mktemp("data")
  for number in range(8):
    (folder / f"{number}.txt").write_text((TEXT + f"{number} ") * 20)

  def make(argument="model=init_from,data=text,optim=adamw", **changes):
    values = {
      "init_from": checkpoints["hf"],
      "data.path": str(folder),
      "data.cache_dir": str(folder.parent / "cache"),
      "total_steps": 2,
      "batch_size": 4,
      "sequence_length": 16,
      "log.every_steps": 1,
      "log.tensorboard": False,
      "eval.every_steps": 0,
      "sample.every_steps": 0,
      "checkpoint.every_steps": 1,
    }
    return config_lib.load(f"{ROOT}/configs/pretrain.py:{argument}", values | changes)

  return make


def losses(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.slow
def test_a_run_starts_from_the_imported_model_and_goes_on(
  checkpoints, make_config, tmp_path, capsys
):
  train(make_config(), tmp_path / "run")
  assert f"{checkpoints['hf']}: all" in capsys.readouterr().out
  before = losses(tmp_path / "run")

  # The loss of the first step is that of the imported model on its batch.
  model, _ = load_model(checkpoints["hf"])
  config = make_setup(resolve(make_config())).config
  dataset = open_dataset(config, tmp_path / "run", process_index=0, process_count=1)
  batch = dataset.training_batch(0)

  @nnx.jit
  def mean_loss(model):
    logits = model(batch.inputs, segment_ids_BT=batch.segment_ids, positions_BT=batch.positions)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)
    return -(chosen[..., 0] * batch.weights).sum() / batch.weights.sum()

  assert before[1] == pytest.approx(float(mean_loss(model)), rel=1e-5)
  assert before[2] != before[1]

  # Without its last checkpoint, the run does its second step again, and not from the beginning.
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
  train(make_config(), tmp_path / "run")
  printed = capsys.readouterr().out
  assert "resuming at step 1" in printed
  assert "all 12 parameters" not in printed
  assert losses(tmp_path / "run") == before


@pytest.mark.parametrize(
  ("argument", "changes", "message"),
  [
    ("model=init_from,data=text", {"init_from": ""}, "tokenizer='init_from' needs init_from"),
    (
      "model=init_from,data=text",
      {"init_from": "", "tokenizer": "bytes"},
      "model=init_from needs init_from: a run, a folder of Hugging Face's or a GGUF file",
    ),
    ("model=init_from,data=text", {"init_from": "hf:/nowhere"}, "/nowhere: no folder of a model"),
    (
      "model=init_from,data=text",
      {"model.embed_dim": 40},
      r"model\.embed_dim=40, but init_from=hf:.* has \d+; leave it out",
    ),
  ],
)
def test_a_model_to_start_from_must_be_there(make_config, argument, changes, message):
  with pytest.raises(UserError, match=message):
    make_setup(resolve(make_config(argument, **changes)))


def test_the_plan_has_the_model_of_the_checkpoint(checkpoints, make_config):
  setup = make_setup(resolve(make_config()))
  assert setup.model.differences(read_model_config(checkpoints["hf"])) == []
  assert setup.config.tokenizer == checkpoints["hf"].removeprefix("hf:")


def test_a_web_address_is_no_checkpoint():
  with pytest.raises(UserError, match=r"https://a/b: a web address; name a folder"):
    name_checkpoint("https://a/b")
