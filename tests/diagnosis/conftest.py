"""A small corpus, a config for it, and a run that was trained on it."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.training.loop import train

ROOT = Path(__file__).parents[2]
SMALL = {
  "batch_size": 8,
  "sequence_length": 32,
  "tokenizer": "bytes",
  "model.num_layers": 1,
  "log.every_steps": 1,
  "log.tensorboard": False,
  "eval.every_steps": 0,
  "sample.every_steps": 0,
}


@pytest.fixture(scope="module", autouse=True)
def _one_device():
  # What is compiled for one device compiles in half the time.
  first = jax.devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "devices", lambda *_: first)
    yield


@pytest.fixture(scope="session")
def make_config(tmp_path_factory):
  """Returns a function that makes a locked config of a tiny model and real text."""
  folder = tmp_path_factory.mktemp("corpus")
  words = np.array(["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "rat"])
  rng = np.random.default_rng(0)
  for number in range(8):
    (folder / f"{number}.txt").write_text(" ".join(rng.choice(words, 500)))

  def make(**changes):
    paths = {"data.path": str(folder), "data.cache_dir": str(folder.parent / "cache")}
    spec = f"{ROOT}/configs/pretrain.py:model=debug,data=text"
    return config_lib.load(spec, SMALL | paths | changes)

  return make


@pytest.fixture(scope="session")
def trained(make_config, tmp_path_factory):
  """The work directory of a run of 12 steps, with checkpoints of step 8 and 12."""
  workdir = tmp_path_factory.mktemp("run")
  length = {"total_steps": 12, "checkpoint.every_steps": 8}
  train(make_config(grad_accumulation=2, **length), workdir)
  return workdir


@pytest.fixture
def write_losses():
  """Returns a function that writes metrics.jsonl of steps 1, 2 ... with these losses."""

  def write(workdir, losses):
    lines = [{"step": step, "loss": loss, "grad_norm": 1.5} for step, loss in enumerate(losses, 1)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

  return write
