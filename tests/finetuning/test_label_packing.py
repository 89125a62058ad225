import jax
import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from gptjax.data.options import read_options
from gptjax.errors import UserError
from gptjax.finetuning.label_packing import pack_examples
from gptjax.objectives.task import make_task
from tests.data.conftest import open_dataset


@pytest.fixture
def pack(encode, make_label_config):
  """Returns a function that makes one batch of records with labels."""

  def make(records, *, training=True, **keys):
    examples, _ = encode(records, **keys)
    config = make_label_config(records, **keys)
    task, data = make_task(config.task), read_options(config)
    return task.collate(
      task.items({"all": examples}, data, training=training)["all"].examples, data
    )

  return make


def first_row(batch):
  return jax.tree.map(lambda field: field[0], batch)


def placed(row):
  """The fields of a row where they are not 0, but for those of any row."""
  found = {"targets": row.targets, "weights": row.weights, "values": row.values}
  return {
    name: {index: field[index].tolist() for index in np.flatnonzero(field.any(-1)).tolist()}
    for name, field in (
      (name, np.reshape(f, (len(f), -1))) for name, f in found.items() if f is not None
    )
  }


def record(text, label, **others):
  return {"text": text, "label": label, **others}


END = 256
ROWS = {
  "classification": (
    [record("ab", "y"), record("c", "x")],
    {"labels": ("x", "y")},
    {"targets": {2: [1]}, "weights": {2: [1], 4: [1]}},
  ),
  "multi_label": (
    [record("ab", ["z", "x"]), record("c", ["y"]), record("d", [])],
    {"labels": ("x", "y", "z")},
    {
      "targets": {},
      "weights": {2: [1], 4: [1], 6: [1]},
      "values": {2: [1, 0, 1], 4: [0, 1, 0]},
    },
  ),
  "regression": (
    [record("ab", -2.5), record("c", 3)],
    {},
    {"targets": {}, "weights": {2: [1], 4: [1]}, "values": {2: [-2.5], 4: [3]}},
  ),
  "tagging": (
    [record(["a", "bc"], ["y", "x"]), record(["d"], ["y"])],
    {"labels": ("x", "y"), "word_separator": ""},
    {"targets": {0: [1], 4: [1]}, "weights": {0: [1], 2: [1], 4: [1]}},
  ),
  "span": (
    [record("q", {"text": ["bc"], "answer_start": [1]}, context="abcd")],
    {"pair_key": "context"},
    {"targets": {}, "weights": {6: [1]}, "values": {3: [1, 0], 4: [0, 1]}},
  ),
}


@pytest.mark.parametrize("task", ROWS)
def test_a_row_has_its_labels_where_the_contract_of_its_task_says(pack, task):
  records, keys, expected = ROWS[task]
  batch = pack(records, task=task, sequence_length=12, label_key="label", **keys)
  assert len(batch.inputs) == 1
  row = first_row(batch)
  assert placed(row) == expected
  for name in ("inputs", "targets", "segment_ids", "positions"):
    assert getattr(row, name).shape == (12,)
    assert getattr(row, name).dtype == np.int32
  assert row.weights.dtype == np.float32
  if task == "span":
    assert row.inputs.tolist() == [*b"q", END, *b"abcd", END, *[0] * 5]
    assert row.token_types.tolist() == [0, 0, 1, 1, 1, 1, 1, *[0] * 5]
    assert row.values.shape == (12, 2)
  else:
    assert row.token_types is None
    assert (row.values is None) == (task in ("classification", "tagging"))


def test_an_answer_of_one_token_is_its_first_and_its_last(pack):
  one = record("q", {"text": ["b"], "answer_start": [1]}, context="abcd")
  batch = pack([one], task="span", pair_key="context", label_key="label")
  assert placed(first_row(batch))["values"] == {3: [1, 1]}


def test_every_example_is_in_one_row_and_sees_no_other(pack):
  rng = np.random.default_rng(0)
  texts = ["".join(rng.choice(list("abc"), rng.integers(1, 20))) for _ in range(200)]
  records = [record(text, int(n % 3), second="z") for n, text in enumerate(texts)]
  batch = pack(records, labels=("0", "1", "2"), sequence_length=32, pair_key="second")
  rows = [jax.tree.map(lambda field, n=n: field[n], batch) for n in range(len(batch.inputs))]
  found = []
  for row in rows:
    for segment in range(1, row.segment_ids.max() + 1):
      inside = row.segment_ids == segment
      assert row.positions[inside].tolist() == list(range(inside.sum()))
      assert row.weights[inside].tolist() == [0] * (inside.sum() - 1) + [1]
      assert row.token_types[inside].tolist() == [0] * (inside.sum() - 2) + [1, 1]
      text = bytes(row.inputs[inside][:-3].tolist()).decode()
      found.append((text, row.targets[inside][-1]))
    padding = row.segment_ids == 0
    assert not any(field[padding].any() for field in (row.inputs, row.weights, row.positions))
  assert sorted(found) == sorted((text, n % 3) for n, text in enumerate(texts))
  assert sum(bool(row.segment_ids.any()) for row in rows) < len(texts) / 2


@pytest.mark.parametrize("task", ["classification", "tagging"])
def test_balanced_weights_are_those_of_scikit_learn(pack, task):
  labels = [0] * 7 + [1] * 2 + [2]
  records = (
    [record("a", label) for label in labels]
    if task == "classification"
    else [record(["a"] * 4, labels[:4]), record(["a"] * 6, labels[4:])]
  )
  keys = {"task": task, "labels": ("x", "y", "z"), "class_weights": "balanced"}
  batch = pack(records, label_key="label", **keys)
  pairs = zip(batch.targets.ravel(), batch.weights.ravel(), strict=True)
  found = {(int(label), float(weight)) for label, weight in pairs if weight}
  expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
  assert found == {(label, float(np.float32(weight))) for label, weight in enumerate(expected)}
  validation = pack(records, training=False, label_key="label", **keys)
  assert {*validation.weights.ravel().tolist()} == {0, 1}


@pytest.mark.parametrize("task", ["classification", "tagging", "multi_label"])
def test_a_label_without_an_example_is_an_error_in_training(pack, task):
  of_list = task != "classification"
  records = [record(["a"] if task == "tagging" else "a", ["x"] if of_list else "x")]
  keys = {"task": task, "labels": ("x", "lost")}
  with pytest.raises(UserError, match=r"task\.labels: label 'lost' has no training example"):
    pack(records, label_key="label", **keys)
  assert len(pack(records, training=False, label_key="label", **keys).inputs) == 1


@pytest.mark.parametrize("row_multiple", [1, 4])
def test_batches_have_few_shapes_and_lose_no_example(encode, row_multiple):
  records = [record("a" * (n % 30 + 1), "x") for n in range(40)]
  examples, _ = encode(records, labels=("x",), sequence_length=40)
  shapes = set()
  for size in range(1, 40):
    batch, order = pack_examples(examples.examples[:size], 40, row_multiple=row_multiple)
    assert sorted(order) == list(range(size))
    assert batch.weights.sum() == size
    shapes.add(len(batch.inputs))
  assert shapes <= {row_multiple * 2**n for n in range(6)}


def test_which_examples_share_a_row_changes_from_epoch_to_epoch(make_label_config, tmp_path):
  records = [record(f"{n:02}", "x") for n in range(32)]
  config = make_label_config(records, labels=("x",), sequence_length=16, batch_size=8)
  dataset = open_dataset(config, tmp_path)
  assert dataset.steps_per_epoch == 4

  def neighbours(epoch):
    found = set()
    for step in range(4 * epoch, 4 * epoch + 4):
      batch = dataset.training_batch(step)
      assert batch.weights.sum() == 8  # Examples, however many rows they take.
      for inputs, segments in zip(batch.inputs, batch.segment_ids, strict=True):
        texts = [bytes(inputs[segments == n][:2].tolist()) for n in range(1, segments.max() + 1)]
        found |= {(one, other) for one in texts for other in texts if one < other}
    return found

  assert neighbours(0) != neighbours(1)


def test_weights_are_balanced_over_all_parts(make_config, tmp_path):
  part = make_config(preset="jsonl").data
  mixture = {}
  for name, labels in {"one": [0, 0, 0], "other": [0, 1, 1, 1, 1]}.items():
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(f'{{"text": "{name}", "label": {label}}}\n' for label in labels))
    keys = {"path": str(path), "validation_path": str(path), "weight": 1.0}
    mixture[name] = {**part.to_dict(), **keys}
  config = make_config(
    mixture=mixture,
    task="classification",
    labels=("x", "y"),
    class_weights="balanced",
  )
  dataset = open_dataset(config, tmp_path)
  weights = np.concatenate([dataset.training_batch(step).weights for step in range(2)])
  assert set(weights[weights > 0].tolist()) == {1.0}
