"""The entry point, from a checkpoint and files of tasks to a table and results.json."""

import json

import pytest
from absl import flags
from flax import nnx

from gptjax import evaluate as command
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from gptjax.evals import evaluate as evaluating
from gptjax.evals.subject import Subject
from gptjax.model.gpt import model_graph
from gptjax.scores.scores import Metric


@pytest.fixture(scope="module")
def subject(tiny_config, random_params):
  config = tiny_config(
    vocab_size=264, num_layers=1, **{"position.kind": "rope", "position.max_positions": 64}
  )
  model = nnx.merge(model_graph(config), random_params(config))
  return Subject(model, tokenizers.load("bytes"), batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tasks")
  records = [{"text": f"This is number {i}.", "label": ("pos", "neg")[i % 2]} for i in range(6)]
  for name, lines in (("reviews", records), ("train", [{**one, "text": "x"} for one in records])):
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
  settings = {"kind": "classification", "prompt": "sentiment.jinja", "target": "label"}
  settings |= {"labels": {"pos": " good", "neg": " bad"}, "train": "train.jsonl"}
  (folder / "reviews.json").write_text(json.dumps(settings))
  return folder


@pytest.fixture
def run(subject, monkeypatch):
  """Returns a function that runs the program on the tiny model."""
  monkeypatch.setattr(
    command, "load_model", lambda checkpoint, ema: (subject.model, subject.tokenizer)
  )

  def run(*arguments):
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(command, "FLAGS", values)
    with monkeypatch.context() as patch:
      for kind in ("string", "list", "bool", "integer"):
        define = getattr(flags, f"DEFINE_{kind}")
        patch.setattr(
          flags,
          f"DEFINE_{kind}",
          lambda *args, define=define, **kwargs: define(*args, flag_values=values, **kwargs),
        )
      command._define_flags()
    values(["evaluate", "--checkpoint=runs/tiny", *arguments])
    command.main({})

  return run


def test_a_table_and_a_file_of_results(run, folder, tmp_path, capsys):
  tasks = f"--tasks={folder}/reviews.jsonl,perplexity:{folder}/train.jsonl"
  run(tasks, "--shots=1", "--seed=3", "--limit=5", "--resamples=20", f"--output={tmp_path}/out")
  shown = capsys.readouterr().out.splitlines()
  assert shown[0].split() == ["task", "metric", "value", "95", "%", "interval", "n"]
  results = json.loads((tmp_path / "out/results.json").read_text())
  assert results["evaluation"]["seed"] == 3
  assert results["versions"]["jax"]
  task = results["tasks"]["reviews"]
  assert task["settings"]["labels"] == {"pos": " good", "neg": " bad"}
  accuracy = task["metrics"]["accuracy"]
  assert accuracy["n"] == 5
  low, high = (f"{accuracy[name]:.4f}" for name in ("low", "high"))
  assert f"accuracy {accuracy['value']:.4f} {low} to {high} 5" in " ".join(shown[1].split())
  assert len(task["shots"]) == 1
  written = (tmp_path / "out/reviews.predictions.jsonl").read_text().splitlines()
  assert len(written) == 5
  assert json.loads(written[0])["place"].startswith(f"{folder}/reviews.jsonl:")
  assert (tmp_path / "out/reviews.png").stat().st_size > 1000
  assert results["tasks"][f"perplexity:{folder}/train.jsonl"]["tokens"] == 5


def test_all_tasks_are_read_before_the_first_is_run(folder, subject, monkeypatch):
  monkeypatch.setattr(evaluating.answers, "evaluate", lambda *_, **__: pytest.fail("was run"))
  with pytest.raises(UserError, match=r"none.json: no such task file"):
    evaluating.evaluate(subject, [f"{folder}/reviews.jsonl", f"{folder}/none.json"])
  with pytest.raises(UserError, match="two tasks are named 'reviews'"):
    evaluating.evaluate(subject, [f"{folder}/reviews.jsonl"] * 2)


def test_nothing_to_evaluate_is_refused(run):
  with pytest.raises(UserError, match="nothing to evaluate: give --tasks"):
    run()


def test_a_metric_without_an_interval_says_so():
  lines = evaluating.table([("t", "ppl", Metric(3.0, None, None, 1))]).splitlines()
  assert lines[1].split() == ["t", "ppl", "3.0000", "-", "1"]
