import collections
import dataclasses
import json
import os

import pytest

from gptjax.errors import UserError
from gptjax.evals import task as tasks
from gptjax.evals.task import choose_shots, evaluated_examples, load_task, read_examples
from gptjax.templates.prompts import Example

SENTIMENT = {
  "kind": "classification",
  "prompt": "sentiment.jinja",
  "target": "label",
  "labels": {"pos": " positive", "neg": " negative"},
}
TEST = [{"text": f"test {i}", "label": ("pos", "neg")[i % 2]} for i in range(6)]
TRAIN = [{"text": f"train {i}", "label": ("pos", "neg")[i % 2]} for i in range(20)]


@pytest.fixture
def sentiment(write_task):
  def load(examples=TEST, train=TRAIN, **changes):
    return load_task(write_task(examples, train, **SENTIMENT | changes))

  return load


def test_a_jsonl_file_is_the_data_of_the_task_beside_it(sentiment):
  task = sentiment()
  (task.file.parent / "task.jsonl").write_text('{"text": "a", "label": "pos"}\n')
  beside = load_task(str(task.file.with_suffix(".jsonl")))
  assert (beside.data, beside.labels, beside.name) == ("task.jsonl", task.labels, "task")


def test_a_template_beside_the_task_comes_before_ours(sentiment):
  task = sentiment()
  example = Example({"text": "Fine."}, "x:1")
  assert task.question.render(example) == "Review: Fine.\nSentiment:"
  (task.file.parent / "sentiment.jinja").write_text("{{ text }} {# mine #}=>\n")
  assert task.question.render(example) == "Fine. =>"


def test_the_tasks_of_the_docstring_can_be_read(write_task):
  blocks = [json.loads(block) for block in tasks.__doc__.split("\n\n") if block.startswith("{")]
  classification, ranking, record, code, problem = blocks
  assert load_task(write_task(TEST, **classification)).labels["pos"] == " positive"
  task = load_task(write_task([record], **ranking))
  assert task.known_metrics == ("accuracy", "hit@5", "hit@10", "mrr", "ndcg", "accuracy_of_chance")
  (example,) = evaluated_examples(dataclasses.replace(task, data="data.jsonl"))
  assert task.question.render(example) == "Bought: Alien; Heat\nNext:"
  assert task.answer(example) == " Ronin"
  task = load_task(write_task([problem], **(code | {"data": "data.jsonl"})))
  (example,) = evaluated_examples(task)
  assert task.question.render(example) == "def add(a, b):\n"
  assert (task.known_metrics, task.stop[0]) == (("pass@1",), "\ndef ")


# --- What is wrong is told before a model runs -------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"kind": "clasification"}, "kind: no 'clasification'. Did you mean 'classification'"),
    ({"label": "x"}, "no key 'label' in a task. Did you mean 'labels'"),
    ({"prompt": ""}, "of kind 'classification' needs the key 'prompt'"),
    ({"labels": {"pos": " good"}}, "at least 2 labels"),
    ({"labels": {"pos": " good", "neg": " "}}, "each label needs a text"),
    ({"metrics": ["acuracy"]}, "no metric 'acuracy' of this task. Did you mean 'accuracy'"),
    ({"metrics": ["ece"], "by": "generation"}, "no metric 'ece'"),
    ({"calibrate": True, "by": "generation"}, "calibrate is of classification by likelihood"),
    ({"max_tokens": "many"}, "'max_tokens' is str"),
    ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
    ({"samples": 0}, "samples is 0; it must be at least 1"),
    ({"temperature": -1.0}, r"temperature is -1\.0; it must be at least 0"),
    ({"timeout_seconds": -1}, "timeout_seconds is -1; it must be at least 0"),
    ({"stop": [1]}, "stop: 1 is not a text"),
    ({"stop": [""]}, "stop: '' is not a text"),
    (
      {"kind": "code", "program": "x", "check": "x", "samples": 2, "k": [3]},
      "k: 3 is not from 1 to samples=2",
    ),
    ({"kind": "ranking"}, "of kind 'ranking' needs the key 'candidates'"),
    ({"kind": "ranking", "candidates": "x", "k": ["5"]}, "k: '5' is not a whole number from 1"),
    ({"kind": "ranking", "candidates": "x", "k": [0]}, "k: 0 is not a whole number from 1"),
    ({"kind": "ranking", "candidates": "x", "by": "generation"}, "by: candidates are ranked by"),
    ({"kind": "ranking", "candidates": "x", "prediction": "y"}, "the model has to be asked"),
    ({"kind": "ranking", "candidates": "x", "metrics": ["hit@5"]}, "no metric 'hit@5'"),
    ({"end_of_text": True, "by": "generation"}, "end_of_text is of what is chosen by its likeli"),
    ({"domain_premise": "x", "kind": "summarization"}, "domain_premise is of what is chosen by"),
  ],
)
def test_a_setting_that_cannot_be_is_refused(sentiment, changes, sentence):
  with pytest.raises(UserError, match=f"task.json: .*{sentence}"):
    sentiment(**changes)


def test_examples_in_a_pipe_are_refused_instead_of_waited_for(tmp_path):
  os.mkfifo(tmp_path / "pipe.jsonl")
  with pytest.raises(UserError, match=r"pipe\.jsonl is neither a file nor a folder"):
    read_examples(tmp_path / "pipe.jsonl")


def test_files_that_are_missing_or_broken_are_named(sentiment, tmp_path):
  with pytest.raises(UserError, match=r"none.json: no such task file, which .*none.jsonl needs"):
    load_task(str(tmp_path / "none.jsonl"))
  with pytest.raises(
    UserError, match=r"prompt: 'sentimant.jinja' is neither .* nor in configs/p.*'se"
  ):
    _ = sentiment(prompt="sentimant.jinja").question
  task = sentiment()
  for line, sentence in [
    ("{", r"data.jsonl:2: not JSON"),
    ("[1]", r"data.jsonl:2: a JSON list, not an object"),
    ('{"text": "a"}', r"data.jsonl:2: no key 'label' \(found: 'text'\)"),
    ('{"label": "bad"}', r"data.jsonl:2: 'label' is 'bad', which is not one of .*'pos', 'neg'"),
    ("", r"data.jsonl: no example of the label 'neg'"),
  ]:
    task.path("data.jsonl").write_text(f'{{"text": "a", "label": "pos"}}\n{line}\n')
    with pytest.raises(UserError, match=sentence):
      evaluated_examples(task)
  task.path("data.jsonl").write_text("\n")
  with pytest.raises(UserError, match=r"data.jsonl: no examples"):
    evaluated_examples(task)
  (tmp_path / "list.json").write_text("[1, 2]")
  with pytest.raises(UserError, match=r"list.json: not a JSON object"):
    load_task(str(tmp_path / "list.json"))


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"of": ["a"]}, "'of' is not a list of at least 2 texts"),
    ({"of": ["a", 1]}, "'of' is not a list of at least 2 texts"),
    ({"of": ["a", " "]}, "'of' is not a list of at least 2 texts, none empty"),
    ({"of": ["a", "b", " a"]}, "'of' has 'a' 2 times"),
    ({"next": "c"}, "'next' is 'c', which is not one of the 2 texts of 'of'"),
    ({"next": ["a", "c"]}, "'next' is 'c', which is"),
    ({"next": 2}, "'next' is 2, which is"),
    ({"next": -1}, "'next' is -1, which is"),
    ({"next": []}, r"'next' is \[\], which is"),
    ({"next": None}, "'next' is None, which is"),
  ],
)
def test_candidates_that_cannot_be_ranked_are_named_by_their_line(write_task, changes, sentence):
  right = {"of": ["a", "b"], "next": "a"}
  settings = {"kind": "ranking", "prompt": "x.jinja", "candidates": "of", "target": "next"}
  task = load_task(write_task([right, right | changes], **settings))
  with pytest.raises(UserError, match=f"data.jsonl:2: {sentence}"):
    evaluated_examples(task)
  missing = load_task(write_task([{"next": "a"}], **settings))
  with pytest.raises(UserError, match=r"data.jsonl:1: no key 'of' \(found: 'next'\)"):
    evaluated_examples(missing)


# --- The choice of examples --------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_shots_are_balanced_and_decided_by_the_seed(sentiment, count):
  task = sentiment()
  shots, _ = choose_shots(task, count, 3, [])
  labels = collections.Counter(shot.record["label"] for shot in shots)
  assert len(shots) == count
  assert max(labels.values()) - min(labels.values() if count > 1 else [1]) <= 1
  assert len({shot.place for shot in shots}) == count
  assert choose_shots(task, count, 3, [])[0] == shots
  assert any(choose_shots(task, count, seed, [])[0] != shots for seed in (4, 5, 6))


def test_shots_are_never_evaluated_examples(sentiment):
  task = sentiment(train=[*TEST, *TRAIN[:4]])
  evaluated = evaluated_examples(task)
  for seed in range(5):
    shots, left_out = choose_shots(task, 4, seed, evaluated)
    assert all(shot.record["text"].startswith("train") for shot in shots)
    assert left_out == len(TEST)
  with pytest.raises(
    UserError, match=r"train.jsonl: 2 examples of the label '\w+' that are not ev"
  ):
    choose_shots(task, 6, 0, evaluated)


def test_the_evaluated_file_is_no_training_file(sentiment):
  task = dataclasses.replace(
    sentiment(), train="../" + sentiment().file.parent.name + "/data.jsonl"
  )
  with pytest.raises(UserError, match="'train' is the evaluated file"):
    choose_shots(task, 1, 0, [])


def test_shots_need_a_training_file(sentiment):
  with pytest.raises(UserError, match="--shots=1 needs the key 'train'"):
    choose_shots(sentiment(train=None), 1, 0, [])
  task = sentiment(kind="code", program="{{ completion }}", check="x", target="")
  with pytest.raises(UserError, match="--shots=1 needs the key 'target'"):
    choose_shots(task, 1, 0, [])


def test_a_limit_is_a_random_part_of_the_examples(sentiment):
  task = sentiment(
    examples=[{"text": str(i), "label": "pos" if i < 50 else "neg"} for i in range(99)]
  )
  some = evaluated_examples(task, limit=20, seed=1)
  assert len(some) == 20
  assert {one.record["label"] for one in some} == {"pos", "neg"}
  assert some == evaluated_examples(task, limit=20, seed=1)
  assert some != evaluated_examples(task, limit=20, seed=2)
