"""Runs that learn labels: what stops them, what they make, and that kills do not matter."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util

from gptjax import config as config_lib
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from gptjax.evals.evaluate import evaluate
from gptjax.evals.subject import Subject
from gptjax.inference.generate import generate
from gptjax.interop import huggingface
from gptjax.interop.convert import convert
from gptjax.interop.huggingface import HuggingFaceModel
from gptjax.interop.labels import Labels
from gptjax.model.gpt import describe_parameters
from gptjax.training.loop import train
from gptjax.training.metrics import read_metrics
from gptjax.training.pretrained import (
  labels_of,
  load_checkpoint,
  load_model,
  load_params_into,
  on_one_device,
)
from gptjax.training.resolve import resolve
from gptjax.training.setup import make_setup
from tests.training.test_loop import ROOT

SMALL = {
  "total_epochs": 8.0,
  "batch_size": 4,
  "sequence_length": 64,
  "tokenizer": "bytes",
  "model.num_layers": 2,
  "model.embed_dim": 16,
  "model.num_heads": 2,
  "model.mlp_dim": 32,
  "model.dropout.residual": 0.1,
  "model.dropout.label": 0.1,
  "optim.learning_rate": 0.01,
  "optim.layer_decay": 0.9,
  "optim.freeze_layers": 1,
  "optim.unfreeze_every_epochs": 0.5,
  "task.label_smoothing": 0.1,
  "task.r_drop": 1.0,
  "log.every_steps": 1,
  "log.tensorboard": False,
  "eval.patience": 2,
  "checkpoint.keep": 1,
}


# Of a model that is not made here.
START = {
  "tokenizer": "init_from",
  "model.num_layers": 0,
  "model.embed_dim": 0,
  "model.num_heads": 0,
  "model.mlp_dim": 0,
}


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
  """A folder of texts that are shouted or not, of which some are labelled wrongly."""
  folder, rng = tmp_path_factory.mktemp("records"), random.Random(0)
  for name, count in (("train", 64), ("validation", 40)):
    lines = []
    for _ in range(count):
      loud = rng.random() < 0.5
      text = " ".join(rng.choices(["yes", "no", "so", "it", "is"], k=rng.randint(1, 4)))
      label = "loud" if loud != (rng.random() < 0.2) else "quiet"
      lines.append(json.dumps({"text": text.upper() if loud else text, "label": label}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
  return folder


def overrides(records: Path, **changes):
  paths = {
    "data.path": str(records / "train.jsonl"),
    "data.validation_path": str(records / "validation.jsonl"),
  }
  return SMALL | paths | changes


def load(records: Path, argument="task=classification,model=debug", **changes):
  return config_lib.load(f"{ROOT}/configs/finetune.py:{argument}", overrides(records, **changes))


@pytest.fixture(scope="module")
def finished(records, tmp_path_factory):
  """(work directory, what the training returned, what it said)."""
  workdir, said = tmp_path_factory.mktemp("finished"), []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("gptjax.training.metrics.Writer.message", lambda _, text: said.append(text))
    result = train(load(records), workdir)
  return workdir, result, said


def validations(workdir: Path) -> list[dict]:
  keys = ("step", "val/loss", "val/accuracy", "val/ece", "val/mcc")
  lines = [line for line in read_metrics(workdir) if "val/loss" in line]
  return [{key: line[key] for key in keys} for line in lines]


def test_it_stops_when_it_gets_no_better_and_has_made_the_best(finished):
  workdir, result, said = finished
  lines = validations(workdir)
  after = lines[1:]
  best = max(after, key=lambda line: line["val/accuracy"])
  assert after.index(best) == len(after) - 3
  assert max(line["step"] for line in lines) < 8 * (after[0]["step"])  # Of 8 epochs.
  assert result["val/accuracy"] == best["val/accuracy"] > 0.6
  assert any("2 validations, none better" in text for text in said)
  _, step = load_checkpoint(workdir)
  assert step == best["step"]


def test_the_layers_that_are_frozen_are_those_of_the_start(finished):
  workdir, _, _ = finished
  model, _ = load_checkpoint(workdir)
  fresh = nnx.state(type(model)(model.config, nnx.Rngs(0)), nnx.Param)
  trained = nnx.state(model, nnx.Param)
  before, after = (
    np.asarray(nnx.to_pure_dict(state)["blocks"]["mlp"]["up"]["kernel"])
    for state in (fresh, trained)
  )
  # Compiled, the draw is rounded otherwise.
  np.testing.assert_allclose(after[0], before[0], atol=1e-7)
  assert np.abs(after[1] - before[1]).max() > 1e-3


def test_it_is_evaluated_as_it_was_validated(finished, records):
  workdir, result, _ = finished
  model, tokenizer = load_model(workdir)
  subject = Subject(model, tokenizer, batch_size=3)
  path = f"labels:{records / 'validation.jsonl'}"
  (found,) = evaluate(subject, [path], resamples=10, config=config_lib.open_saved(workdir))
  for name, metric in found.metrics.items():
    assert metric.value == pytest.approx(result[f"val/{name}"], abs=1e-6)
  lines = [json.loads(line) for line in (records / "validation.jsonl").read_text().splitlines()]
  for prediction in found.predictions:
    number = int(prediction["place"].rsplit(":", 1)[1])
    assert prediction["target"] == lines[number - 1]["label"]
  right = sum(one["target"] == one["prediction"] for one in found.predictions)
  assert right / len(lines) == found.metrics["accuracy"].value
  options = {"resamples": 10, "limit": 5, "config": config_lib.open_saved(workdir)}
  (few,) = evaluate(subject, [path], **options)
  assert len(few.predictions) == 5 < len(lines)
  assert all(one in found.predictions for one in few.predictions)


def test_a_model_of_labels_writes_no_text(finished):
  model, tokenizer = load_model(finished[0])
  with pytest.raises(
    UserError, match=r"scores 2 labels \(model\.label_head\.num_labels\) and writes no text"
  ):
    generate(model, tokenizer, ["yes"], max_tokens=1)


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
  folder = tmp_path_factory.mktemp("exported") / "model"
  convert(str(finished[0]), folder, to="hf")
  return folder


@nnx.jit
def score(model, tokens):
  return model.label_logits(model.hidden(tokens)[0])


def logits_of(checkpoint):
  model, tokenizer = load_model(checkpoint)
  tokens = [*tokenizer.encode("YES no"), tokenizer.end_of_text]
  return np.asarray(score(model, np.array([tokens], np.int32)))


def test_its_labels_survive_the_files_of_transformers(finished, exported, tmp_path):
  labels = Labels("classification", ("loud", "quiet"))
  convert(f"hf:{exported}", tmp_path / "run", to="gptjax")
  convert(str(tmp_path / "run"), tmp_path / "again", to="hf")
  expected = logits_of(finished[0])
  assert labels_of(finished[0]) == labels_of(f"hf:{tmp_path / 'again'}") == labels
  for checkpoint in (f"hf:{exported}", tmp_path / "run"):
    np.testing.assert_allclose(logits_of(checkpoint), expected, atol=1e-4)
  config = config_lib.open_saved(tmp_path / "run")
  subject = Subject(*load_model(tmp_path / "run"))
  with pytest.raises(UserError, match="is no run, which would say what the labels are"):
    evaluate(subject, ["labels:x.jsonl"], config=config)
  first, again = (
    json.loads((x / "config.json").read_text()) for x in (exported, tmp_path / "again")
  )
  assert first == again


def test_padding_is_told_as_the_checkpoint_names_it(exported, tmp_path):
  specials = tokenizers.load(str(exported)).specials
  path = tmp_path / "source" / "tokenizer_config.json"
  shutil.copytree(exported, path.parent)
  settings = json.loads(path.read_text())
  # What a run of ours exports has no padding that would be taken for the end of a text.
  assert json.loads((exported / "config.json").read_text())["pad_token_id"] is None
  for pad in ("<|fim_prefix|>", settings["eos_token"]):
    path.write_text(json.dumps(settings | {"pad_token": pad}))
    convert(f"hf:{path.parent}", tmp_path / pad, to="hf")
    assert json.loads((tmp_path / pad / "config.json").read_text())["pad_token_id"] == specials[pad]


@pytest.mark.parametrize(
  ("fields", "changes", "wanted", "new"),
  [
    ({}, {}, ("loud", "quiet"), ""),
    ({"id2label": {"0": "quiet", "1": "loud"}}, {}, ("quiet", "loud"), ""),
    ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, {}, ("loud", "quiet"), ""),
    ({"id2label": {"0": "a", "1": "b"}}, {}, ("loud", "quiet"), "task.labels=loud,quiet, not a,b"),
    (
      {},
      {"task.labels": "quiet,loud"},
      ("quiet", "loud"),
      "task.labels=quiet,loud, not loud,quiet",
    ),
    (
      {},
      {"model.label_head.pooling": "mean"},
      ("loud", "quiet"),
      "model.label_head.pooling='mean', not 'none'",
    ),
    (
      {},
      {"task.labels": "loud,quiet,x"},
      ("loud", "quiet", "x"),
      "model.label_head.num_labels=3, not 2",
    ),
  ],
)
def test_a_head_is_kept_where_it_is_of_the_same_labels(
  records, exported, tmp_path, fields, changes, wanted, new
):
  folder = tmp_path / "model"
  shutil.copytree(exported, folder)
  config = json.loads((folder / "config.json").read_text()) | fields
  (folder / "config.json").write_text(json.dumps(config))
  changes = START | {"init_from": f"hf:{folder}"} | changes
  setup = make_setup(resolve(load(records, "task=classification", **changes)))
  assert setup.task.labels == wanted
  abstract = setup.abstract_state(setup.make_optimizer(setup.run_length)).params
  loaded, report = load_params_into(setup.config.init_from, setup.model, abstract, wanted)
  # Its bias went into that of the last norm, and a new one is 0.
  assert loaded.get("label_head", {}).keys() == ({"kernel"} if not new else set())
  assert report.endswith(f"; the head of labels is new ({new})" if new else " parameters")


def test_what_scores_labels_is_not_taken_for_what_writes(exported, tmp_path):
  config = HuggingFaceModel(str(exported)).config
  plain = config.replace({"label_head.num_labels": 0, "head.tied": False})
  fields = json.loads((exported / "config.json").read_text()) | {"tie_word_embeddings": False}
  shutil.copytree(exported, tmp_path / "model")
  (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
  with pytest.raises(UserError, match="lacks 'head/kernel' of the model of this config"):
    load_params_into(f"hf:{tmp_path / 'model'}", plain, on_device(plain))


def test_the_head_of_a_vocabulary_is_left_out(tiny_config, random_params, tmp_path):
  base = tiny_config(**{"head.tied": False})
  huggingface.save(tmp_path, base, random_params(base), huggingface.find_family(base))
  config = base.replace({"label_head.num_labels": 2})
  loaded, report = load_params_into(f"hf:{tmp_path}", config, on_device(config))
  assert "head" not in loaded
  assert "label_head" not in loaded
  assert report.endswith("; the head of labels is new (model.label_head.num_labels=2, not 0)")


def on_device(config):
  described = describe_parameters(config)
  shardings = on_one_device(described)
  abstract = {
    name: jax.ShapeDtypeStruct(info.shape, np.float32, sharding=shardings[name])
    for name, info in described.items()
  }
  return traverse_util.unflatten_dict(abstract, sep="/")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_adapters_are_trained_with_a_new_head(
  method, records, tiny_config, random_params, tmp_path
):
  base = tiny_config(vocab_size=260, **{"position.max_positions": 128})
  tokenizers.train("bpe:260", ["yes"]).save(tmp_path / "base")
  family = huggingface.find_family(base)
  huggingface.save(tmp_path / "base", base, random_params(base), family)
  source = START | {
    "init_from": f"hf:{tmp_path / 'base'}",
    "total_epochs": 1.0,
    "optim.freeze_layers": 0,
    "optim.unfreeze_every_epochs": 0,
    "task.r_drop": 0.0,
  }
  config = load(records, f"task=classification,peft={method}", **source)
  result = train(config, tmp_path / "run")
  manifest = json.loads(
    next((tmp_path / "run/checkpoints").glob("*/manifest/metadata")).read_text()
  )
  params = {name for name in manifest["arrays"] if name.startswith("params/")}
  assert {"params/label_head/kernel", "params/label_head/bias"} < params
  assert not any("embed" in name or "mlp/up/kernel" in name for name in params)
  model, tokenizer = load_model(tmp_path / "run")
  path = f"labels:{records / 'validation.jsonl'}"
  subject = Subject(model, tokenizer)
  (found,) = evaluate(subject, [path], resamples=10, config=config_lib.open_saved(tmp_path / "run"))
  assert found.metrics["accuracy"].value == pytest.approx(result["val/accuracy"])


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_as_if_it_had_not_been(records, cpu_devices, tmp_path):
  environment = os.environ | cpu_devices(1)
  flags = [f"--config.{key}={value}" for key, value in overrides(records).items()]
  program = [sys.executable, "-m", "gptjax.train", *flags]
  program.append("--config=configs/finetune.py:task=classification,model=debug")

  def start(workdir):
    command = [*program, f"--workdir={workdir}"]
    return subprocess.Popen(
      command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

  whole = start(tmp_path / "whole")
  output, _ = whole.communicate()
  assert whole.returncode == 0, output
  rng, kills = random.Random(0), 0
  while kills < 10:
    # So many lines more, and then a moment within the next step, save or evaluation.
    process, lines = start(tmp_path / "killed"), rng.randrange(6)
    begun = len(read_metrics(tmp_path / "killed"))
    while process.poll() is None and len(read_metrics(tmp_path / "killed")) < begun + lines:
      time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.5))
    if process.poll() is not None:  # It came to its end: from the beginning again.
      assert validations(tmp_path / "killed") == validations(tmp_path / "whole")
      shutil.rmtree(tmp_path / "killed")
      continue
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kills += 1
  last = start(tmp_path / "killed")
  output, _ = last.communicate()
  assert last.returncode == 0, output
  assert validations(tmp_path / "killed") == validations(tmp_path / "whole")
  models = [load_checkpoint(tmp_path / name) for name in ("killed", "whole")]
  assert models[0][1] == models[1][1]
  states = [nnx.to_flat_state(nnx.state(model, nnx.Param)) for model, _ in models]
  for (name, a), (_, b) in zip(*states, strict=True):
    assert np.array_equal(a[...], b[...]), name
