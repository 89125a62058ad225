"""Reports of labels: how often each occurs, and how well it is predicted."""

import numpy as np
import pytest
from flax import nnx

from gptjax.data import tokenizer as tokenizers
from gptjax.evals import label_task
from gptjax.evals.subject import Subject
from gptjax.model.gpt import model_graph
from tests.data.conftest import open_dataset


@pytest.fixture
def make(make_label_config, tmp_path):
  """Returns a function that makes a config with records of some labels, and their path."""

  def make(golds, task="classification", **changes):
    key, text_key = ("tags", "tokens") if task == "tagging" else ("label", "text")
    records = [
      {"text": f"text {n}", "tokens": ["a", "b"], key: label} for n, label in enumerate(golds)
    ]
    config = make_label_config(records, task, text_key=text_key, **changes)
    return config, str(tmp_path / "records.jsonl")

  return make


def test_a_run_says_how_often_each_label_is_there(make, tmp_path, caplog):
  config, _ = make(["good"] * 7 + ["bad"] * 2 + ["godo"])
  open_dataset(config, tmp_path)
  assert "training: labels: good 7 (70.0%), bad 2 (20.0%), godo 1 (10.0%)." in caplog.text
  assert "labels with a single training example: 'godo'." in caplog.text


@pytest.mark.parametrize(
  ("task", "labels", "golds", "words"),
  [
    ("classification", ("bad", "good"), ["bad", "good", "good"], ("bad", "macro avg", "f1-score")),
    ("multi_label", ("bad", "good"), [["bad"], [], ["bad", "good"]], ("bad", "micro avg")),
    ("tagging", ("B-LOC", "B-PER"), [["B-LOC", "B-PER"]] * 2, ("LOC", "PER", "macro avg")),
  ],
)
def test_evaluation_has_a_line_for_each_label(
  make, tiny_config, random_params, task, labels, golds, words
):
  config, path = make(golds, task, labels=labels)
  model = tiny_config(
    vocab_size=264,
    **{"label_head.num_labels": 2, "position.kind": "rope", "position.max_positions": 64},
  )
  model = nnx.merge(model_graph(model), random_params(model))
  subject = Subject(model, tokenizers.load("bytes"))
  result = label_task.evaluate(label_task.prepare(path, config, subject), subject, resamples=1)
  for word in words:
    assert word in result.report
  assert np.isfinite([*(metric.value for metric in result.metrics.values())]).all()
