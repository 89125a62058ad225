"""Baselines of fine-tuning, on sets whose best answer is known."""

import functools
import json

import numpy as np
import pytest
from absl import flags

from experiments.finetune import baselines
from gptjax.errors import UserError


def scored(found, test):
  everything = np.arange(len(test))
  return {
    (one.baseline, one.trained_on): {key: m(everything) for key, m in one.measures.items()}
    for one in found
  }


def reviews(count, start=0):
  """Every third is bad; the number is a word that says nothing."""
  return [
    {"text": f"{'dull' if n % 3 == 0 else 'fine'} {n}", "label": "bad" if n % 3 == 0 else "good"}
    for n in range(start, start + count)
  ]


def test_a_word_that_tells_the_label_is_learnt():
  splits = baselines.Splits(reviews(60), reviews(30, 60), reviews(30, 90))
  found = scored(baselines.results(splits, [5, 0], 0), splits.test)
  assert found["commonest label", 60]["accuracy"] == pytest.approx(2 / 3)
  assert found["commonest label", 60]["f1_macro"] == pytest.approx(0.4)
  assert found["logistic regression", 10]["accuracy"] == 1
  assert found["logistic regression", 60]["f1_macro"] == 1


def test_few_examples_are_chosen_by_the_seed_and_equally_many_of_each_label():
  records = reviews(60)
  first, other = baselines.few(records, 4, 0), baselines.few(records, 4, 1)
  assert sorted(one["label"] for one in first) == ["bad"] * 4 + ["good"] * 4
  assert first == baselines.few(records, 4, 0) != other
  # Fewer examples are among more.
  assert all(one in baselines.few(records, 9, 0) for one in first)
  assert baselines.few(records, 0, 0) == records
  with pytest.raises(UserError, match="examples_per_label=21: only 20 are of the label 'bad'"):
    baselines.few(records, 21, 0)


def test_the_regularization_is_the_best_of_the_validation_examples():
  class Constant:
    def __init__(self, value):
      self.value = value

    def fit(self, inputs, labels):
      return self

    def predict(self, inputs):
      return [self.value] * inputs.shape[0]

    def score(self, inputs, labels):
      return -abs(self.value - labels[0])

  train, validation, test = ([{"text": "word", "score": s}] for s in (1, 10, 1000))
  splits = baselines.Splits(train, validation, test)
  assert baselines.linear(Constant, train, splits, "score") == (10, [10])


def test_scores_are_regressed():
  def rated(count, start=0):
    return [{"text": f"{'fine ' * (n % 4)}film", "score": float(n % 4)} for n in range(count)]

  splits = baselines.Splits(rated(40), rated(20), rated(20))
  found = scored(baselines.results(splits, [], 0), splits.test)
  assert found["mean score", 40]["mean_absolute_error"] == 1
  assert found["ridge regression", 40]["mean_absolute_error"] < 0.5
  assert found["ridge regression", 40]["spearman"] > 0.9


def test_the_longest_known_entity_is_found_and_may_follow_another():
  known = {("a", "b"): "PER", ("a",): "LOC", ("b", "c", "d"): "ORG"}
  assert baselines.longest_matches(list("xabcdaa"), known) == [
    "O",
    "B-PER",
    "I-PER",
    "O",
    "O",
    "B-LOC",
    "B-LOC",
  ]
  assert baselines.longest_matches(list("bcdx"), known) == ["B-ORG", "I-ORG", "I-ORG", "O"]
  assert baselines.longest_matches([], known) == []


def test_entities_too_short_to_help_are_not_looked_up():
  tags = ["B-LOC", "I-LOC", "O", "B-PER", "O"]
  train = [{"tokens": list("京都见王。"), "tags": tags}]
  # 王 is mostly no name, which the validation examples tell.
  other = [{"tokens": list("王牌京都王"), "tags": ["O", "O", "B-LOC", "I-LOC", "O"]}]
  splits = baselines.Splits(train, other, other)
  (result,) = baselines.results(splits, [], 0)
  assert result.chosen == "entities of at least 2 tokens"
  assert result.measures["f1"](np.arange(1)) == 1


def test_the_translation_of_the_most_similar_text_is_taken():
  train = [{"en": "Open the file", "zh": "打开文件"}, {"en": "Close a window", "zh": "关闭窗口"}]
  test = [{"en": "Close the window", "zh": "关闭窗口"}, {"en": "Open a file", "zh": "打开文件"}]
  splits = baselines.Splits(train, train, test)
  found = scored(baselines.results(splits, [], 0), test)
  assert found["translation of the most similar text", 2]["bleu"] == pytest.approx(100)
  assert found["the English text", 0]["chrf"] < 10


def test_chinese_is_read_by_characters_and_english_by_words():
  assert baselines.is_chinese(["很好看", "it's good", "好 film"])
  assert not baselines.is_chinese(["a good film", "the word 好"])
  assert "很好看" in baselines.tf_idf(["很好看"], characters=True).vocabulary_
  assert "good film" in baselines.tf_idf(["a good film"], characters=False).vocabulary_


def test_the_commonest_result_of_code_is_guessed():
  train = [{"code": f">>> f({n})\n", "result": text} for n, text in enumerate(["1\n", "2", "1\n"])]
  test = [{"code": ">>> g()\n", "result": text} for text in ("1", "2", "3", "1")]
  found = scored(baselines.results(baselines.Splits(train, train, test), [], 0), test)
  assert found == {("commonest result", 3): {"pass@1": 0.5}}


def test_records_of_other_keys_are_an_error():
  splits = baselines.Splits([{"prompt": "a", "answer": "b"}], [], [])
  with pytest.raises(UserError, match="no baseline for records of 'prompt', 'answer'"):
    baselines.results(splits, [], 0)


def test_a_folder_makes_a_table_and_a_file(tmp_path, monkeypatch, capsys):
  for split, records in {
    "train": reviews(60),
    "validation": reviews(30),
    "test": reviews(9),
  }.items():
    lines = "\n".join(map(json.dumps, records))
    (tmp_path / f"{split}.jsonl").write_text(lines)
  values = flags.FlagValues()
  flags.DEFINE_list("data", [str(tmp_path)], "", flag_values=values)
  flags.DEFINE_list("examples_per_label", ["0"], "", flag_values=values)
  flags.DEFINE_integer("seed", 0, "", flag_values=values)
  flags.DEFINE_string("output", str(tmp_path / "out.json"), "", flag_values=values)
  values(["baselines"])
  monkeypatch.setattr(baselines, "FLAGS", values)
  few = functools.partial(baselines.scores.bootstrap, resamples=10)
  monkeypatch.setattr(baselines.scores, "bootstrap", few)
  baselines.main(["baselines"])
  rows = json.loads((tmp_path / "out.json").read_text())
  assert [row["baseline"] for row in rows] == ["commonest label", "logistic regression"]
  assert rows[0]["measures"]["accuracy"]["n"] == 9
  assert rows[0]["measures"]["accuracy"]["value"] == pytest.approx(2 / 3)
  assert "| commonest label | 60 |  | accuracy 0.6667 [" in capsys.readouterr().out
