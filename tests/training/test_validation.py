import dataclasses
import json
import time
import types

import pytest

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.objectives.task import make_task
from gptjax.training import validation
from gptjax.training.validation import History


def history(values, patience=2, metric="val/accuracy", first_step=0):
  lines = [
    {"step": first_step + 10 * number, "val/loss": 1.0, metric: value}
    for number, value in enumerate(values)
  ]
  return History(lines, metric, patience)


@pytest.mark.parametrize(
  ("values", "exhausted"),
  [
    ([0.1, 0.5, 0.6, 0.6, 0.55], True),  # Equal is not better.
    ([0.1, 0.5, 0.6, 0.6], False),
    ([0.1, 0.5, 0.4, 0.6, 0.5], False),
    ([0.9, 0.5, 0.4], False),  # What the model was before does not count.
    ([0.9, 0.5, 0.4, 0.3], True),
    ([0.1, 0.5, None, None], True),  # What is not finite is not better.
    ([0.1, None, None, None], False),
    ([0.1], False),
  ],
)
def test_patience_ends_when_so_many_validations_are_not_better(values, exhausted):
  assert history(values).exhausted == exhausted
  assert not history(values, patience=0).exhausted


def test_the_best_is_the_first_of_the_highest_or_of_the_lowest():
  assert history([0.9, 0.5, 0.7, 0.7]).best["step"] == 20
  assert history([0.1, 0.5, 0.3, 0.3], metric="val/loss").best["step"] == 20
  assert history([0.1]).best == {}


@pytest.mark.parametrize(("final", "step"), [("best", 20), ("newest", 30)])
def test_the_result_is_of_what_the_run_has_made(final, step):
  assert dataclasses.replace(history([0.9, 0.5, 0.7, 0.6]), final=final).result["step"] == step
  # Not finite but at the start: there is no best, so it is the last one.
  assert dataclasses.replace(history([0.9, None]), final=final).result["step"] == 10
  assert History([], "val/accuracy", 2, final).result == {}


def test_only_validations_up_to_the_step_count(tmp_path):
  lines = [{"step": 1, "loss": 3.0}, *history([0.1, 0.2, 0.3]).lines]
  (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  config = types.SimpleNamespace(
    checkpoint=types.SimpleNamespace(best_metric="val/accuracy", final="best"),
    eval=types.SimpleNamespace(patience=1),
  )
  assert [line["step"] for line in History.read(tmp_path, config, 10).lines] == [0, 10]
  assert History.read(tmp_path / "none", config, 10).last == {}


@pytest.mark.parametrize(
  ("task", "changes", "message"),
  [
    ("chat", {"checkpoint.best_metric": "val/bits_per_byte"}, "no metric 'val/bits_per_byte'"),
    ("classification", {"checkpoint.best_metric": "val/acuracy"}, "Did you mean 'val/accuracy'"),
    ("classification", {"checkpoint.best_metric": ""}, "need checkpoint.best_metric"),
    ("classification", {"checkpoint.final": "last"}, "'last' is neither 'best' nor 'newest'"),
    ("classification", {"eval.patience": -1}, "eval.patience=-1 is negative"),
  ],
)
def test_what_cannot_be_judged_is_an_error(task, changes, message):
  config = config_lib.load(f"configs/finetune.py:task={task},model=tiny", changes)
  with pytest.raises(UserError, match=message):
    validation.check(config, make_task(config.task))


def test_the_line_of_a_validation_names_what_it_tells():
  told = {"step": 3, "val/loss": 0.5, "val/perplexity": 1.648, "val/f1_macro": 0.25, "loss": 1.0}
  assert validation.describe(told) == "validation loss 0.5000, perplexity 1.65, f1 macro 0.2500"


def test_a_long_validation_takes_few_lines_of_a_log_file(monkeypatch, capsys):
  class Sums:
    def add(self, told):
      time.sleep(0.01)

    def finish(self, *, text_bytes):
      return {"loss": 1.0}

  monkeypatch.setattr(validation, "Sums", Sums)
  monkeypatch.setattr(validation, "_SECONDS_TO_WAIT", 0.0)
  monkeypatch.setattr(validation.step, "make_eval_step", lambda *_: lambda *_: ({}, None))
  monkeypatch.setattr(validation.sharding, "to_global", lambda batch, mesh: batch)
  task = types.SimpleNamespace(metrics=(), outputs=lambda: None)
  dataset = types.SimpleNamespace(validation_batches=lambda: range(100), validation_bytes=1)
  evaluate = validation.make_evaluate(
    types.SimpleNamespace(graph=None, task=task, mesh=None), dataset
  )
  state = types.SimpleNamespace(params=None, ema=None)
  assert evaluate(state, None) == {"val/loss": 1.0}
  assert capsys.readouterr().err.count("Validating") <= 2
