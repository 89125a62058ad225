import collections
import json

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from gptjax.data.options import read_options
from gptjax.errors import UserError
from gptjax.objectives.task import make_task
from tests.data.conftest import open_dataset


def record(text, label, **others):
  return {"text": text, "label": label, **others}


def open_sides(config):
  options = read_options(config)
  (part,) = options.parts.values()
  return make_task(config.task).open_pair(part, options)


def find_labels(config):
  return make_task(config.task).settle(read_options(config), ()).labels


def counts(side):
  return collections.Counter(one.label for one in side.records)


@pytest.mark.parametrize(
  ("task", "given", "found"),
  [
    ("classification", ["neu", "pos", "neg", "pos"], ("neg", "neu", "pos")),
    ("classification", [10, 9, 2, 2], ("2", "9", "10")),
    ("classification", ["10", "9", "2"], ("2", "9", "10")),
    ("classification", [True, False], ("false", "true")),
    ("multi_label", [["joy"], [], ["fear", "joy"]], ("fear", "joy")),
    ("tagging", [["O", "B-PER"], ["O"]], ("B-PER", "O")),
  ],
)
def test_labels_are_found_in_order(make_label_config, task, given, found):
  records = [record(["a"] * len(label) if task == "tagging" else "a", label) for label in given]
  assert find_labels(make_label_config(records, task, label_key="label")) == found


def test_labels_are_those_of_the_training_records_alone(make_label_config, tmp_path):
  (tmp_path / "validation.jsonl").write_text(json.dumps(record("b", "other")))
  config = make_label_config([record("a", "x")], validation_path=f"{tmp_path}/validation.jsonl")
  assert find_labels(config) == ("x",)


@pytest.mark.parametrize(
  ("names", "given", "index"),
  [
    (("neg", "pos"), "pos", 1),
    (("neg", "pos"), 1, 1),
    (("neg", "pos"), True, 1),
    (("false", "true"), False, 0),
    (("2", "1"), 1, 1),
    (("2", "1"), 0, 0),
    (("2", "1"), "2", 0),
  ],
)
def test_a_number_is_a_label_by_its_text_or_else_by_its_place(
  make_label_config, names, given, index
):
  training, _ = open_sides(make_label_config([record("a", given)], labels=names))
  assert [one.label for one in training.records] == [index]


def test_no_key_is_proposed_that_another_option_has(make_label_config):
  with pytest.raises(UserError, match=r"no key 'label' \(found: 'text'\)\.$"):
    find_labels(make_label_config([record("a", None)]))


def test_empty_lines_are_passed_over(make_label_config, tmp_path):
  config = make_label_config([record("a", "x"), record("b", "y")], labels=("x", "y"))
  path = tmp_path / "records.jsonl"
  path.write_text("\n\n" + path.read_text().replace("\n", "\n\n"))
  assert find_labels(config) == ("x", "y")
  training, _ = open_sides(config)
  assert [one.name.rpartition(":")[2] for one in training.records] == ["3", "5"]
  config.data.update(validation_path="", validation_fraction=0.5)
  with pytest.raises(UserError, match=r"validation_fraction=0\.5 of 2 records, one of each label"):
    open_sides(config)


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_a_split_has_its_share_of_each_label(make_label_config, fraction):
  sizes = {"a": 100, "b": 37, "c": 10, "d": 2, "e": 1}
  records = [record(f"{label} {n}", label) for label, size in sizes.items() for n in range(size)]
  np.random.default_rng(1).shuffle(records)
  keys = {"labels": tuple(sizes), "validation_fraction": fraction}
  config = make_label_config(records, **keys)
  assert sorted(find_labels(make_label_config(records, **keys | {"labels": ()}))) == [*sizes]
  training, validation = open_sides(config)
  texts = [[one.texts for one in side.records] for side in (training, validation)]
  assert sorted(texts[0] + texts[1]) == sorted((one["text"],) for one in records)
  assert len(texts[1]) == pytest.approx(fraction * len(records), abs=2)
  for index, size in enumerate(sizes.values()):
    assert abs(counts(validation)[index] - fraction * size) < 1
    assert counts(training)[index] >= 1
  again = open_sides(make_label_config(records, seed=1, **keys))
  assert [[one.texts for one in side.records] for side in again] == texts


def test_examples_of_each_label_are_drawn_by_the_seed(make_label_config):
  records = [record(f"text {n}", "ab"[n % 2]) for n in range(40)]
  keys = {"labels": ("a", "b"), "examples_per_label": 4, "validation_fraction": 0.25}

  def draw(seed):
    training, validation = open_sides(make_label_config(records, seed=seed, **keys))
    assert counts(training) == {0: 4, 1: 4}
    return (*({one.texts for one in side.records} for side in (training, validation)),)

  assert draw(0) == draw(0)
  assert draw(0)[0] != draw(1)[0]
  assert draw(0)[1] == draw(1)[1]
  assert not draw(0)[0] & draw(0)[1]
  with pytest.raises(UserError, match="examples_per_label=99, but label 'a' has 15 training ex"):
    open_sides(make_label_config(records, **keys | {"examples_per_label": 99}))


def test_texts_of_both_sides_are_told_once(make_label_config, tmp_path, caplog):
  validation = [record("new", 0), record("An  OLD\none", 0), record("b", 0), record("B ", 1)]
  (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, validation)))
  records = [record("an old one", 1), record("b", 0)]
  keys = {"labels": ("x", "y"), "validation_path": f"{tmp_path}/v.jsonl"}
  config = make_label_config(records, **keys)
  for index in range(2):
    open_dataset(config, tmp_path / "run", process_index=index, process_count=2)
  assert caplog.text.count("3 of 4 validation texts are training texts too") == 1
  assert "the first is " in caplog.text
  assert "v.jsonl:2, as " in caplog.text
  assert "records.jsonl:1." in caplog.text


ANSWER = {"text": ["cat"], "answer_start": [4]}


@pytest.mark.parametrize(
  ("task", "bad", "keys", "problem"),
  [
    (
      "classification",
      {"texts": "a", "label": 0},
      {},
      "no key 'text' (found: 'texts', 'label'). Set --config.data.text_key=texts.",
    ),
    (
      "classification",
      {"text": "a", "stars": 5},
      {},
      "no key 'label' (found: 'stars', 'text'). Set --config.task.label_key=stars.",
    ),
    ("classification", record("a", 0), {"pair_key": "b"}, "no key 'b' (found: 'text', 'label')."),
    ("classification", record("a", None), {}, "no key 'label' (found: 'text')."),
    ("classification", record("a", "z"), {}, "no label 'z'. Choose one of: x, y."),
    ("classification", record("a", 2), {}, "no label '2'. Choose one of: x, y."),
    ("classification", record("a", -1), {}, "no label '-1'. Choose one of: x, y."),
    ("classification", record("a", 1.0), {}, "a label is 1.0, not a string, a boolean or a wh"),
    ("classification", record(" \n", "x"), {}, "an empty text; fill it or leave the record out."),
    ("classification", record("a", "x", b=""), {"pair_key": "b"}, "an empty text; fill it"),
    ("classification", record(["a"], "x"), {}, "a text is list, not a string."),
    ("classification", record("a\ud800", "x"), {}, "half a surrogate pair at character 1"),
    ("multi_label", record("a", "x"), {}, "'label' is str, not a list of labels."),
    ("multi_label", record("a", ["x", "z"]), {}, "no label 'z'. Choose one of: x, y."),
    ("regression", record("a", "3"), {}, "'label' is '3', not a number."),
    ("regression", record("a", True), {}, "'label' is True, not a number."),
    ("regression", record("a", float("nan")), {}, "'label' is nan, not a number."),
    ("tagging", record("a", ["x"]), {}, "'text' is str, not a list of words."),
    ("tagging", record([], []), {}, "an empty text"),
    ("tagging", record(["a", "b"], ["x"]), {}, "1 tags for 2 words; each word needs one."),
    ("tagging", record(["a"], ["z"]), {}, "no label 'z'. Choose one of: x, y."),
    (
      "span",
      record("q", ANSWER, b="a cat"),
      {"pair_key": "b"},
      "the answer 'cat' is not at character 4 of the context, where there is 't'.",
    ),
    (
      "span",
      record("q", {"text": [], "answer_start": []}, b="a cat"),
      {"pair_key": "b"},
      'the answer is not of the form {"text": [TEXT, ...], "answer_start": [N, ...]}.',
    ),
  ],
)
def test_a_bad_record_is_named_with_its_line(make_label_config, task, bad, keys, problem):
  good = {
    "classification": record("a", "x", b="b"),
    "multi_label": record("a", ["x"]),
    "regression": record("a", 1),
    "tagging": record(["a"], ["x"]),
    "span": record("q", ANSWER, b="the cat"),
  }[task]
  if task not in ("regression", "span"):
    keys = keys | {"labels": ("x", "y")}
  training, _ = open_sides(make_label_config([good, bad], task, label_key="label", **keys))
  with pytest.raises(UserError) as error:
    _ = training.records
  place, _, sentence = str(error.value).partition("jsonl:2: ")
  assert place.endswith("records.")
  assert problem in sentence


def test_a_bad_label_is_named_when_labels_are_looked_for(make_label_config):
  config = make_label_config([record("a", "x"), record("b", [])])
  with pytest.raises(UserError, match=r"records\.jsonl:2: a label is \[\], not a string"):
    find_labels(config)


@pytest.mark.parametrize(
  ("task", "keys", "problem"),
  [
    ("span", {"pair_key": ""}, "task='span' needs task.pair_key"),
    ("tagging", {"pair_key": "b"}, "task.pair_key is no option of task='tagging'"),
    ("regression", {"class_weights": "balanced"}, "task.class_weights is no option of task='reg"),
    ("tagging", {"examples_per_label": 1}, "task.examples_per_label is no option of task='tag"),
    ("span", {"label_smoothing": 0.1}, "task.label_smoothing is no option of task='span'"),
    ("classification", {"labels": ("x", "x")}, "task.labels has a label twice: x, x."),
  ],
)
def test_options_that_contradict_each_other_are_an_error(make_label_config, task, keys, problem):
  config = make_label_config([record("a", "x")], task)
  config.task.update(keys)
  with pytest.raises(UserError, match=problem):
    open_sides(config)


@pytest.mark.parametrize("task", ["classification", "tagging"])
def test_a_run_trains_its_tokenizer_on_the_texts(make_label_config, tmp_path, task):
  of_words = task == "tagging"
  words = [f"word{n}" for n in range(30)]
  records = [record(words if of_words else " ".join(words), ["x"] * 30 if of_words else "x")] * 4
  keys = {"label_key": "label", "tokenizer": "bpe:300", "sequence_length": 128}
  config = make_label_config(records, task, labels=("x",), **keys)
  dataset = open_dataset(config, tmp_path / "run")
  assert [*dataset.training_text()] == [" ".join(words)] * 4
  assert len(dataset.tokenizer.encode(" word1")) < 4
  assert dataset.num_tokens == 4 * (len(dataset.tokenizer.encode(" ".join(words))) + 1)
  assert dataset.validation_bytes is None


def test_validation_is_filled_up_with_rows_of_no_weight(make_label_config, tmp_path):
  records = [record("a text of some length", [1], b="another of its kind")] * 3
  config = make_label_config(
    records, "multi_label", labels=("x", "y"), pair_key="b", batch_size=4, validation_fraction=0.4
  )
  config.task.labels = ("y",)
  with pytest.raises(UserError, match="no label '1'"):
    open_dataset(config, tmp_path)
  config.task.labels = ("1",)
  (batch,) = open_dataset(config, tmp_path, row_multiple=4).validation_batches()
  assert batch.weights.sum() == 1
  assert batch.values.shape == (4, 64, 1)
  assert batch.values.sum() == 1
  assert not any(field[1:].any() for field in jax.tree.leaves(batch))


def test_a_set_of_tfds_opens_by_its_names_of_labels(make_config, tmp_path):
  part = {"source": "tfds", "path": "imdb_reviews", "validation_split": "test"}
  config = make_config(preset="tfds", task="classification", labels=("neg", "pos"), **part)
  with tfds.testing.mock_data(num_examples=20):
    dataset = open_dataset(config, tmp_path)
    unsettled = make_config(preset="tfds", task="classification", **part)
    assert find_labels(unsettled) == ("0", "1")
    batches = [dataset.training_batch(step) for step in range(10)]
  assert {target for b in batches for target in b.targets[b.weights > 0].tolist()} == {0, 1}


def test_what_is_cut_and_what_has_no_token_is_said_once(
  make_label_config, tmp_path, wordpiece, caplog
):
  records = [record(["cat", "\u200b"], ["x", "x"]), record(["cat"] * 9, ["x"] * 9)]
  config = make_label_config(
    records,
    "tagging",
    label_key="label",
    labels=("x",),
    tokenizer=str(wordpiece),
    sequence_length=8,
  )
  for index in range(2):
    open_dataset(config, tmp_path / "run", process_index=index, process_count=2)
  for side in ("training", "validation"):
    said = f"data part 'jsonl', {side}: "
    assert caplog.text.count(f"{said}words without any token, and so without a tag: 1.") == 1
    assert caplog.text.count(f"{said}of the records longer than a row, 1 are t") == 1
