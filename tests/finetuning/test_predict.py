"""Labels for new texts: in order, whatever is long, and as evaluation would give them."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from gptjax import config as config_lib
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from gptjax.evals import label_task
from gptjax.evals.subject import Subject
from gptjax.finetuning.predict import predict, windows_of_texts, write
from gptjax.interop.convert import convert
from gptjax.model.gpt import model_graph
from gptjax.training.checkpoints import Checkpoints
from gptjax.training.pretrained import CHECKPOINTS, TOKENIZER
from gptjax.training.resolve import resolve

ROOT = Path(__file__).parents[2]
BYTES = tokenizers.load("bytes")

LABELS = ("bad", "fine", "good")
TEXTS = ["so", "a text of more bytes than a row has, by far, and then some", "", "是", "so it is"]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
  """A file of texts and tags, labels among them and an empty line."""
  path = tmp_path_factory.mktemp("records") / "new.jsonl"
  lines = [
    json.dumps({"text": text, "label": LABELS[n % 3], "tokens": text.split(), "other": "x" * 9})
    if text
    else ""
    for n, text in enumerate(TEXTS)
  ]
  path.write_text("\n".join(lines))
  return path


@pytest.fixture
def subject_of(tiny_config, random_params, records):
  """Returns a function that makes (config of a run, a model with random weights) of a task."""

  def make(task, labels=LABELS, **changes):
    options = {"tokenizer": "bytes", "sequence_length": 24, "data.path": str(records)}
    if labels:
      options["task.labels"] = labels
    config = config_lib.load(
      f"{ROOT}/configs/finetune.py:task={task},model=debug", options | changes
    )
    config = resolve(config)
    model = tiny_config(
      vocab_size=264,
      **{"label_head.num_labels": config.model.label_head.num_labels, "position.kind": "rope"},
    )
    return config, nnx.merge(model_graph(model), random_params(model))

  return make


def predictions(subject, path, **options):
  return [*predict(str(path), *subject, BYTES, **options)]


def test_the_labels_are_those_of_evaluation(subject_of, records):
  config, model = subject_of("classification")
  subject = Subject(model, BYTES)
  found = label_task.evaluate(
    label_task.prepare(str(records), config, subject), subject, resamples=1
  )
  # Evaluation reads what training reads: the head of a long text.
  told = predictions((config, model), records, overlong="head", batch_size=2)
  assert [one.label for one in told] == [one["prediction"] for one in found.predictions]
  assert [one.texts for one in told] == [{"text": text} for text in TEXTS if text]
  assert [one.truncated for one in told] == [False, True, False, False]
  for one in told:
    assert max(one.probabilities, key=one.probabilities.get) == one.label
    assert sum(one.probabilities.values()) == pytest.approx(1)


def test_a_long_text_is_read_whole_in_windows(subject_of, tmp_path):
  """The probabilities are the mean of those of its windows as texts of their own."""
  subject = subject_of("classification")
  whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
  text = "".join(map(chr, range(40, 86)))  # 46 bytes, 23 in a row.
  whole.write_text(json.dumps({"text": text}))
  parts.write_text("".join(json.dumps({"text": one}) + "\n" for one in (text[:23], text[23:])))
  (one,) = predictions(subject, whole)
  assert (one.windows, one.truncated) == (2, False)
  expected = np.mean([[*p.probabilities.values()] for p in predictions(subject, parts)], axis=0)
  np.testing.assert_allclose([*one.probabilities.values()], expected, atol=1e-5)
  (one,) = predictions(subject, whole, overlong="head_tail")
  assert one.truncated
  (same,) = predictions(subject, parts, overlong="head_tail")[:1]
  assert not same.truncated


def test_windows_have_all_of_the_longer_text_and_the_shorter_one_each():
  long, short = np.arange(25), np.arange(100, 103)
  windows, truncated = windows_of_texts([long, short], 10, "windows")
  assert not truncated
  assert np.concatenate([first for first, _ in windows]).tolist() == long.tolist()
  assert all(second.tolist() == short.tolist() for _, second in windows)
  assert all(len(first) + len(second) <= 10 for first, second in windows)
  windows, truncated = windows_of_texts([long, long], 10, "windows")
  assert truncated
  assert all(len(first) + len(second) <= 10 for first, second in windows)


def test_each_word_of_a_long_text_has_a_tag(subject_of, records, tmp_path):
  told = predictions(subject_of("tagging", **{"data.text_key": "tokens"}), records)
  assert [len(one.label) for one in told] == [len(text.split()) for text in TEXTS if text]
  assert {tag for one in told for tag in one.label} <= {*LABELS}
  assert told[1].windows > 1
  assert all(0 < p <= 1 for one in told for p in one.probabilities)
  with pytest.raises(UserError, match="labels each word; use windows"):
    predictions(subject_of("tagging"), records, overlong="head_tail")


def test_numbers_and_several_labels(subject_of, records):
  told = predictions(subject_of("multi_label"), records)
  for one in told:
    assert one.label == [label for label, p in one.probabilities.items() if p > 0.5]
  told = predictions(subject_of("regression", labels=()), records)
  assert all(isinstance(one.label, float) and one.probabilities is None for one in told)


def test_pairs(subject_of, records):
  told = predictions(subject_of("classification", **{"task.pair_key": "other"}), records)[1:]
  assert told[0].texts.keys() == {"text", "other"}


def test_a_length_without_room_for_a_text_is_refused(subject_of, records):
  with pytest.raises(UserError, match=r"^--max_length is 1; it must be at least 2\."):
    predictions(subject_of("classification"), records, max_length=1)


@pytest.mark.parametrize("task", ["span", "preference"])
def test_a_task_without_labels_for_new_texts_is_refused(subject_of, records, task):
  with pytest.raises(UserError, match=f"task='{task}' labels no new texts"):
    predictions(subject_of(task, labels=()), records)


def test_a_table(subject_of, records, tmp_path):
  path = tmp_path / "out.csv"
  said = write(str(path), predictions(subject_of("classification"), records))
  assert "4 texts labelled; 1 were read in windows, 0 only in part" in said
  rows = [*csv.DictReader(path.open(newline=""))]
  assert [row["text"] for row in rows] == [text for text in TEXTS if text]
  assert {"label", "p(bad)", "p(fine)", "p(good)"} <= rows[0].keys()


@pytest.mark.slow
def test_the_program_labels_a_file(subject_of, records, tmp_path):
  config, model = subject_of("classification")
  run = tmp_path / "run"
  with config.unlocked():
    config.model = dataclasses.asdict(model.config)
  run.mkdir()
  (run / "config.json").write_text(config_lib.to_json(config))
  BYTES.save(run / TOKENIZER)
  with Checkpoints(run / CHECKPOINTS, keep=1) as checkpoints:
    checkpoints.save(0, {"params": nnx.to_pure_dict(nnx.state(model, nnx.Param))})
    checkpoints.wait()
  convert(str(run), tmp_path / "bare", to="gptjax")  # Of its config, the model and the labels.

  def call(checkpoint, output):
    command = [sys.executable, "-m", "gptjax.predict", f"--checkpoint={checkpoint}"]
    command += [f"--input={records}", f"--output={output}", "--max_length=24"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

  found = call(run, tmp_path / "out.jsonl")
  assert found.returncode == 0, found.stderr
  lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  assert [one["text"] for one in lines] == [text for text in TEXTS if text]
  assert [one.get("windows") for one in lines] == [None, 3, None, None]
  assert "Labels: 100%" in found.stderr
  found = call(run, tmp_path / "out.jsonl")
  assert found.stderr.startswith(f"error: --output={tmp_path}/out.jsonl is there already")
  found = call(tmp_path / "bare", tmp_path / "again.jsonl")
  assert found.returncode == 0, found.stderr
  assert len((tmp_path / "again.jsonl").read_text().splitlines()) == 4
