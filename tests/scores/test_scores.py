"""Metrics against values that are known, and their intervals."""

import itertools
import math

import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.scores import scores
from gptjax.scores.scores import bootstrap, pass_at_k


def values(measures, n):
  return {name: measure(np.arange(n)) for name, measure in measures.items()}


# --- Intervals ---------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_mean():
  rng = np.random.default_rng(0)
  data = rng.normal(5, 2, size=400)
  found = bootstrap(scores.mean_of(data), 400, seed=1)
  reach = 1.96 * data.std() / math.sqrt(400)
  assert found.value == pytest.approx(data.mean())
  assert (found.low, found.high) == pytest.approx(
    (data.mean() - reach, data.mean() + reach), abs=0.03
  )
  assert found == bootstrap(scores.mean_of(data), 400, seed=1)
  assert found != bootstrap(scores.mean_of(data), 400, seed=2)


def test_95_of_100_intervals_hold_the_truth():
  rng = np.random.default_rng(0)
  held = []
  for seed in range(200):
    coins = rng.random(100) < 0.7
    found = bootstrap(scores.mean_of(coins), 100, seed=seed, resamples=200)
    held.append(found.low <= 0.7 <= found.high)
  assert 0.90 <= np.mean(held) <= 0.99


def test_one_example_has_no_interval():
  assert bootstrap(scores.mean_of([0.5]), 1) == scores.Metric(0.5, None, None, 1)


# --- Classification ----------------------------------------------------------------------------


def test_a_classification_is_measured_over_the_labels_there_are():
  gold, predicted = ["a", "a", "b", "b", "c"], ["a", "b", "b", "(none)", "c"]
  found = values(scores.classification(gold, predicted), 5)
  # F1 of a is 2/3, of b 1/2, of c 1; '(none)' is no label.
  assert found["f1_macro"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
  assert found["accuracy"] == 3 / 5
  assert found["majority_baseline"] == 2 / 5
  report = scores.classification_report(gold, predicted, ["a", "b", "c", "(none)"])
  assert report["confusion"] == [[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
  assert report["report"]["a"]["recall"] == 0.5


def test_matthews_correlation_of_guessing_is_0():
  found = values(scores.classification(["a", "b"] * 10, ["a"] * 20), 20)
  assert (found["mcc"], found["accuracy"]) == (0, 0.5)


def test_spearman_looks_at_ranks_alone():
  measure = scores.spearman([1, 2, 3, 4], [0.1, 0.2, 50, 51])
  assert measure(np.arange(4)) == pytest.approx(1)
  assert np.isnan(measure(np.zeros(4, int)))


def test_calibration_error_by_hand():
  # In (0.5, 0.6] accuracy 0.5 at confidence 0.56, in (0.9, 1] 1 at 0.95.
  measure = scores.calibration_error([0.55, 0.57, 1.0, 0.9001], [True, False, True, True])
  assert measure(np.arange(4)) == pytest.approx((2 * 0.06 + 2 * 0.04995) / 4)
  assert scores.bin_of(np.array([0.0, 0.1, 0.100001, 1.0]), 10).tolist() == [0, 0, 1, 9]
  assert scores.calibration_error([1.0, 1.0], [True, True])(np.arange(2)) == 0


def test_the_interval_of_a_calibration_error_is_around_it():
  # Noise adds to it: draws from draws are larger than what they are drawn from.
  rng = np.random.default_rng(0)
  found = []
  for seed in range(60):
    confidence = rng.uniform(0.5, 1, 200)
    measure = scores.calibration_error(confidence, rng.random(200) < confidence)
    found.append(scores.bootstrap(measure, 200, resamples=200, seed=seed))
  assert all(0 <= one.low <= one.value <= one.high for one in found)
  expected = np.mean([one.value for one in found])
  assert np.mean([one.low <= expected <= one.high for one in found]) >= 0.9


# --- Ranking -----------------------------------------------------------------------------------


def measured(scored, right, k=()):
  """The metrics of candidates with these scores, of which these are right, both [N, C]."""
  ranked = [
    np.array(one)[scores.ranking_order(np.array(found), np.array(one))]
    for found, one in zip(scored, right, strict=True)
  ]
  return values(scores.ranking(ranked, k), len(ranked))


def test_rankings_are_measured_as_by_scikit_learn():
  from sklearn import metrics

  rng = np.random.default_rng(0)
  scored = rng.normal(size=(50, 7))
  index = rng.integers(7, size=50)
  one_right = np.eye(7, dtype=bool)[index]
  found = measured(scored, one_right, k=[1, 3, 5])
  assert found["ndcg"] == pytest.approx(metrics.ndcg_score(one_right, scored))
  assert found["mrr"] == pytest.approx(
    metrics.label_ranking_average_precision_score(one_right, scored)
  )
  for k, name in ((1, "accuracy"), (3, "hit@3"), (5, "hit@5")):
    assert found[name] == metrics.top_k_accuracy_score(index, scored, k=k, labels=range(7))
  assert found["accuracy_of_chance"] == pytest.approx(1 / 7)
  several = one_right | (rng.random((50, 7)) < 0.3)
  assert measured(scored, several)["ndcg"] == pytest.approx(metrics.ndcg_score(several, scored))


def test_a_tie_counts_against_what_is_right():
  from sklearn import metrics

  right = np.eye(4, dtype=bool)
  constant = measured(np.zeros((4, 4)), right, k=[3])
  assert (constant["accuracy"], constant["hit@3"], constant["mrr"]) == (0, 0, 1 / 4)
  assert constant["ndcg"] == pytest.approx(1 / math.log2(5))
  tied = np.random.default_rng(0).integers(3, size=(4, 4))
  precision = metrics.label_ranking_average_precision_score(right, tied)
  assert measured(tied, right)["mrr"] == pytest.approx(precision)


def test_what_guessing_gets_depends_on_the_numbers_of_candidates():
  found = measured([[3, 2, 1], [1, 2]], [[True, True, False], [True, False]], k=[2])
  assert found == pytest.approx(
    {
      "accuracy": 1 / 2,
      "hit@2": 1,
      "mrr": 3 / 4,
      "ndcg": (1 + 1 / math.log2(3)) / 2,
      "accuracy_of_chance": (2 / 3 + 1 / 2) / 2,
    }
  )


# --- Texts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("gold", "answer", "language", "exact", "f1"),
  [
    ("The Eiffel Tower", "eiffel tower.", "en", 1, 1),
    ("Eiffel Tower", "the tall Eiffel Tower", "en", 0, 4 / 5),
    (["Paris", "the city of Paris"], "City of Paris", "en", 1, 1),
    ("Paris", "", "en", 0, 0),
    ("北京大学", "北京大学。", "zh", 1, 1),
    ("北京大学", "北京", "zh", 0, 2 / 3),
    ("2008年", "2008 年", "zh", 1, 1),
  ],
)
def test_answers_to_questions(gold, answer, language, exact, f1):
  found = values(scores.question_answering([gold], [answer], language), 1)
  assert found == pytest.approx({"exact_match": exact, "f1": f1})


def test_summaries_in_english_and_chinese():
  found = values(scores.summarization(["the cats sat"], ["the cat sat"]), 1)
  assert found == pytest.approx({"rouge1": 1, "rouge2": 1, "rougeL": 1})  # by stems
  found = values(scores.summarization(["今天天气好"], ["今天天气差"], "zh"), 1)
  assert found == pytest.approx({"rouge1": 0.8, "rouge2": 0.75, "rougeL": 0.8})


GOLD = ["The cat is on the mat.", "There is a dog in the house.", "It rains again today, they say."]
FOUND = ["The cat sat on the mat.", "There is a dog in the house.", "Today it rains again."]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_translations_are_scored_as_by_sacrebleu(language):
  import sacrebleu

  gold, found = GOLD, FOUND
  if language == "zh":
    gold = ["猫坐在垫子上。", "房子里有一条狗。", "今天又下雨了。"]
    found = ["猫在垫子上坐着。", "房子里有一条狗。", "又下雨了，今天。"]
  measures = scores.translation(gold, found, language)
  tokenizer = {"en": "13a", "zh": "zh"}[language]
  for some in ([0, 1, 2], [1, 0, 1]):
    texts = [found[i] for i in some], [[gold[i] for i in some]]
    bleu = sacrebleu.corpus_bleu(*texts, tokenize=tokenizer).score
    assert measures["bleu"](np.array(some)) == pytest.approx(bleu)
    assert measures["chrf"](np.array(some)) == pytest.approx(sacrebleu.corpus_chrf(*texts).score)
    assert 0 < bleu < 100
  assert f"tok:{tokenizer}" in scores.translation_signatures(language)["bleu"]


def test_entities_count_whole():
  from seqeval import metrics

  gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"], ["O"]]
  found = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-ORG"], ["O"]]
  measured = values(scores.tagging(gold, found), 3)
  assert measured == pytest.approx(
    {
      "precision": metrics.precision_score(gold, found),
      "recall": metrics.recall_score(gold, found),
      "f1": metrics.f1_score(gold, found),
    }
  )
  assert measured["precision"] == 2 / 4
  assert scores.tagging([["O"]], [["O"]])["f1"](np.arange(1)) == 0


# --- Code and perplexity -----------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "correct"), [(5, 0), (5, 2), (5, 5), (6, 1)])
def test_pass_at_k_is_the_share_of_choices_with_a_correct_one(samples, correct):
  for k in range(1, samples + 1):
    choices = list(itertools.combinations(range(samples), k))
    share = sum(min(choice) < correct for choice in choices) / len(choices)
    assert pass_at_k(samples, correct, k) == pytest.approx(share)


def test_pass_at_k_needs_k_samples():
  with pytest.raises(UserError, match="pass@3 of 2 samples"):
    pass_at_k(2, 1, 3)
  found = values(scores.code([[True, False], [False, False]], [1, 2]), 2)
  assert found == {"pass@1": 0.25, "pass@2": 0.5}


def test_perplexity_is_of_all_tokens_not_of_documents():
  nats = [2 * math.log(2), 6 * math.log(4)]
  found = values(scores.language_modelling(nats, [2, 6], ["ab", "de 世"]), 2)
  total = 14 * math.log(2)
  assert found["perplexity"] == pytest.approx(math.exp(total / 8))
  assert found["word_perplexity"] == pytest.approx(math.exp(total / 3))
  assert found["bits_per_byte"] == pytest.approx(14 / 8)


def test_a_missing_library_is_named():
  with pytest.raises(UserError, match=r'no_such_library is missing: pip install "\.\[eval\]"'):
    scores.need("no_such_library")
