"""Adapters from files, beside each other on the model that they were trained beside."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from starlette.testclient import TestClient

from gptjax import config as config_lib
from gptjax import tree
from gptjax.errors import UserError
from gptjax.inference.embed import embed
from gptjax.inference.engine import Engine
from gptjax.inference.generate import generate
from gptjax.inference.sampling import Sampling
from gptjax.interop.huggingface import HuggingFaceModel
from gptjax.peft import huggingface
from gptjax.peft.config import PeftConfig
from gptjax.peft.layers import Adapter
from gptjax.peft.load import load_adapters
from gptjax.peft.surgery import adapt
from gptjax.serving.app import make_app
from gptjax.serving.service import Service
from gptjax.training.checkpoints import Checkpoints, checksum
from gptjax.training.loop import train
from gptjax.training.pretrained import load_model
from tests.interop.conftest import LLAMA, save_folder

pytestmark = pytest.mark.slow

PROMPTS = ["the quick", "fox", "over the lazy", "a dog"]
GREEDY = Sampling(temperature=0)
# Of another rank than the run's, and on other projections.
OF_RUN = PeftConfig("lora", targets=("query|value",), rank=2)
LORA = PeftConfig("lora", targets=(("attention/out", {"rank": 3, "alpha": 7.0}), "mlp/down"))


@pytest.fixture(scope="module")
def base(tiny_config, random_params, tmp_path_factory):
  """A folder of Hugging Face's, beside which is a folder of a model with other weights."""
  folder = tmp_path_factory.mktemp("base")
  config = tiny_config(**LLAMA)
  for seed in (0, 1):
    save_folder(folder / f"model{seed}", config, random_params(config, seed))
  return folder / "model0"


@pytest.fixture(scope="module")
def run(base):
  """The work directory of a run that trained adapters, whose checkpoint has random ones."""
  folder, (model, tokenizer) = base.parent / "run", load_model(base, progress=False)
  folder.mkdir()
  config = {"model": dataclasses.asdict(model.config), "init_from": f"hf:{base}"}
  (folder / "config.json").write_text(json.dumps(config | {"peft": dataclasses.asdict(OF_RUN)}))
  tokenizer.save(folder / "tokenizer")
  found = np.uint32(checksum(nnx.to_pure_dict(nnx.state(model))))
  with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
    checkpoints.save(1, {"params": random_adapters(model, OF_RUN), "base_checksum": found})
    checkpoints.wait()
  return folder


def random_adapters(model, peft):
  """The values of adapters on a model, which is used up."""
  rng = np.random.default_rng(len(peft.targets))
  adapters = nnx.to_pure_dict(nnx.state(adapt(model, peft, nnx.Rngs(0)), Adapter))
  return tree.map_named(lambda _, x: 0.3 * rng.normal(size=x.shape).astype(np.float32), adapters)


@pytest.fixture(scope="module")
def make_folder(base):
  """Returns a function: the folder in which random adapters of a config were written."""

  def make(name, peft):
    opened, (model, _) = HuggingFaceModel(str(base)), load_model(base, progress=False)
    adapters = random_adapters(model, peft)
    (base.parent / name).mkdir()
    huggingface.write(base.parent / name, opened.config, peft, adapters, opened.family)
    return base.parent / name

  return make


@pytest.fixture(scope="module")
def folder(make_folder):
  return make_folder("folder", LORA)


def load(base, **paths):
  model, tokenizer = load_model(base, progress=False)
  paths = {name: str(path) for name, path in paths.items()}
  return load_adapters(model, str(base), paths), tokenizer


def write(model, tokenizer, prompts, adapters=None):
  options = {"max_tokens": 8, "sampling": GREEDY, "adapters": adapters}
  return [one.tokens for one in generate(model, tokenizer, prompts, **options)]


@pytest.fixture(scope="module")
def alone(base, run, folder):
  """The tokens of all prompts by the model itself, and with either adapter merged into it."""
  model, tokenizer = load_model(base, progress=False)
  plain = write(model, tokenizer, PROMPTS)
  merged = huggingface.merge_folder(model, folder, HuggingFaceModel(str(base)).family)
  by_run, _ = load_model(run, progress=False)
  found = [plain, write(by_run, tokenizer, PROMPTS), write(merged, tokenizer, PROMPTS)]
  assert found[0] != found[1] != found[2] != found[0]
  return found


def test_each_row_is_written_by_the_adapter_in_its_file(base, run, folder, alone):
  model, tokenizer = load(base, run=run, folder=folder)
  for rows in ([0, None, 1, 0], [None, 1, 0, 1]):
    expected = [alone[0 if i is None else i + 1][row] for row, i in enumerate(rows)]
    assert write(model, tokenizer, PROMPTS, rows) == expected


def test_an_adapter_is_a_model_of_the_server(base, run, folder, alone):
  model, tokenizer = load(base, run=run, folder=folder)
  engine = Engine(model, tokenizer, rows=4)
  service = Service(engine, "base", adapters={"run": 0, "folder": 1}, warm_up=False)
  with TestClient(make_app(service)) as client:
    names = [one["id"] for one in client.get("/v1/models").json()["data"]]
    assert names == ["base", "run", "folder"]
    fields = {"prompt": PROMPTS, "max_tokens": 8, "temperature": 0}
    for name, tokens in zip(names, alone, strict=True):
      told = client.post("/v1/completions", json=fields | {"model": name}).json()
      texts = [choice["text"] for choice in told["choices"]]
      assert texts == [tokenizer.decode(one) for one in tokens]
    told = client.post("/v1/embeddings", json={"model": "base", "input": PROMPTS[0]}).json()
    plain = Engine(load_model(base, progress=False)[0], tokenizer).reader
    vector = embed(plain, tokenizer.encode_prompt(PROMPTS[0]))
    np.testing.assert_allclose(told["data"][0]["embedding"], vector, atol=1e-6)
    told = client.post("/v1/completions", json=fields | {"model": "other"}).json()
    assert "this server has: base, run, folder" in told["error"]["message"]


def test_what_cannot_be_served_is_named(base, run, folder, make_folder, tmp_path):
  def refused(path, message, of=base):
    with pytest.raises(UserError, match=rf"^adapter bad={path}: .*{message}"):
      load(of, good=folder, bad=path)

  refused(tmp_path, r"no adapters; name a run .* config\.json, or .* an adapter_config\.json")
  dora = make_folder("dora", dataclasses.replace(LORA, method="dora"))
  refused(dora, r"peft\.method='dora'; only 'lora' .* gptjax\.convert")
  refused(make_folder("ia3", PeftConfig("ia3", targets=("value",))), "peft.method='ia3'")
  refused(make_folder("prompt", PeftConfig("prompt", virtual_tokens=2)), "peft.method='prompt'")
  refused(run, r"beside another model, that of init_from=hf:\S+model0", base.parent / "model1")

  def changed(name, **changes):
    shutil.copytree(run, tmp_path / name)
    config = json.loads((run / "config.json").read_text())
    for key, value in changes.items():
      config[key] = {**config[key], **value}
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path / name

  refused(changed("nf4", peft={"base": "nf4"}), "beside a model in nf4")
  refused(changed("wide", model={"embed_dim": 32}), r"another model: model\.embed_dim=32, not 16")
  labels = {"label_head": {"num_labels": 3, "bias": True, "pooling": "none"}}
  refused(changed("labels", model=labels), r"another model: .*num_labels=3, not 0")
  refused(changed("whole", peft={"method": "none"}), "a run that trained a whole model")
  shutil.copytree(folder, tmp_path / "other")
  tensors = load_file(folder / huggingface.WEIGHTS)
  cut = {name: np.copy(x[:, 1:]) if "lora_A" in name else x for name, x in tensors.items()}
  save_file(cut, tmp_path / "other" / huggingface.WEIGHTS)
  refused(tmp_path / "other", "the adapters are of another one")
  with pytest.raises(UserError, match="has adapters that are not to be merged; others need a base"):
    load_adapters(adapt(load_model(base)[0], OF_RUN, nnx.Rngs(0)), "x", {"good": str(folder)})


def test_adapters_of_a_training_run_are_read(base, tmp_path):
  (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 99)
  changes = {
    **{"total_steps": 2, "batch_size": 4, "sequence_length": 16, "log.tensorboard": False},
    **{"eval.every_steps": 0, "sample.every_steps": 0, "optim.learning_rate": 1.0},
    **{"init_from": f"hf:{base}", "data.path": str(tmp_path / "text.txt")},
    **{"data.cache_dir": str(tmp_path / "cache")},
  }
  config = config_lib.load("configs/pretrain.py:model=init_from,data=text,peft=lora", changes)
  train(config, tmp_path / "run")
  actual = write(*load(base, run=tmp_path / "run"), PROMPTS * 2, [0] * 4 + [None] * 4)
  expected = write(*load_model(tmp_path / "run"), PROMPTS)
  assert actual == expected + write(*load_model(base), PROMPTS)
  assert actual[:4] != actual[4:]
