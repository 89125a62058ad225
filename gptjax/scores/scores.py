"""Metrics of answers, by the field's own libraries, with bootstrap intervals.

A `Measure` is a statistic of the examples with given indices, so that it can be resampled. The
libraries are imported where they are used: some take seconds, and few tasks need all of them.
"""

import collections
import dataclasses
import functools
import importlib
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.errors import UserError

# A function of int64 indices [n] into the examples, with repetition.
Measure = Callable[[np.ndarray], float]

RESAMPLES = 1000

# Libraries that the metrics of a kind of task need.
LIBRARIES = {
  "classification": "sklearn.metrics",
  "summarization": "rouge_score.rouge_scorer",
  "translation": "sacrebleu.metrics",
  "tagging": "seqeval.metrics.sequence_labeling",
}


@dataclasses.dataclass(frozen=True)
class Metric:
  """The value of a metric on n examples, and its 95 % interval [low, high], None if not known."""

  value: float
  low: float | None
  high: float | None
  n: int


def bootstrap(measure: Measure, n: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Metric:
  """The measure of n examples and its percentile interval (Efron 1979), from `resamples` draws of n
  with replacement; no interval for one example, nor for a measure that is not finite on a draw.

  The draws of a `Biased` measure are shifted by their bias, but not below 0 (Efron and Tibshirani
  1993, section 10.2), so that the interval is that of the measure on so many examples.
  """
  value = float(measure(np.arange(n)))
  if n < 2:
    return Metric(value, None, None, n)
  rng = np.random.default_rng(seed)
  drawn = np.array([measure(rng.integers(n, size=n)) for _ in range(resamples)])
  if not np.isfinite(drawn).all():
    return Metric(value, None, None, n)
  if isinstance(measure, Biased):
    drawn = np.maximum(drawn - (drawn.mean() - value), 0)
  low, high = np.percentile(drawn, [2.5, 97.5])
  return Metric(value, float(low), float(high), n)


@dataclasses.dataclass(frozen=True)
class Biased:
  """A measure of at least 0 that noise makes larger; a bootstrap draw has the noise twice."""

  measure: Measure

  def __call__(self, indices: np.ndarray) -> float:
    return self.measure(indices)


def mean_of(values: Sequence[float]) -> Measure:
  values = np.asarray(values, float)
  return lambda indices: values[indices].mean()


# --- Classification ----------------------------------------------------------------------------


def classification(gold: Sequence[str], predicted: Sequence[str]) -> dict[str, Measure]:
  """Accuracy, macro F1 over the labels that occur, and Matthews' correlation (scikit-learn); and
  the accuracy of always answering with the most frequent label."""
  metrics = need("sklearn.metrics")
  gold, predicted = np.array(gold), np.array(predicted)
  commonest = collections.Counter(gold.tolist()).most_common(1)[0][0]

  def macro_f1(i):
    present = np.unique(gold[i])
    return metrics.f1_score(gold[i], predicted[i], labels=present, average="macro", zero_division=0)

  def mcc(i):
    # With a single label it is 0 by definition, and scikit-learn warns.
    several = len({*gold[i], *predicted[i]}) > 1
    return metrics.matthews_corrcoef(gold[i], predicted[i]) if several else 0.0

  return {
    "accuracy": mean_of(gold == predicted),
    "f1_macro": macro_f1,
    "mcc": mcc,
    "majority_baseline": mean_of(gold == commonest),
  }


def classification_report(
  gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]
) -> dict[str, Any]:
  """scikit-learn's report on each label, and the confusion matrix, a row per right label."""
  metrics = need("sklearn.metrics")
  report = metrics.classification_report(
    gold, predicted, labels=labels, output_dict=True, zero_division=0
  )
  return {
    "report": report,
    "labels": list(labels),
    "confusion": metrics.confusion_matrix(gold, predicted, labels=labels).tolist(),
  }


def multi_label(gold_NK: np.ndarray, predicted_NK: np.ndarray) -> dict[str, Measure]:
  """The share of examples with exactly the right labels (booleans), and F1 over all decisions and
  averaged over labels (scikit-learn)."""
  metrics = need("sklearn.metrics")

  def f1(average: str) -> Measure:
    return lambda i: metrics.f1_score(gold_NK[i], predicted_NK[i], average=average, zero_division=0)

  exact = (gold_NK == predicted_NK).all(axis=1)
  return {"exact_match": mean_of(exact), "f1_micro": f1("micro"), "f1_macro": f1("macro")}


def spearman(gold: Sequence[float], predicted: Sequence[float]) -> Measure:
  """Spearman's rank correlation (SciPy)."""
  from scipy import stats  # Half a second.

  gold, predicted = np.array(gold, float), np.array(predicted, float)

  def correlation(i):
    constant = np.ptp(gold[i]) == 0 or np.ptp(predicted[i]) == 0
    return np.nan if constant else stats.spearmanr(gold[i], predicted[i]).statistic

  return correlation


def calibration_error(
  confidence: Sequence[float], correct: Sequence[bool], bins: int = 10
) -> Measure:
  """Expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3): the mean difference
  between accuracy and confidence over bins of equal width, weighted by their examples."""
  confidence, correct = np.asarray(confidence, float), np.asarray(correct, float)
  number = bin_of(confidence, bins)

  def error(i):
    gaps = np.bincount(number[i], correct[i] - confidence[i], bins)
    return np.abs(gaps).sum() / len(i)

  return Biased(error)


def bin_of(confidence: np.ndarray, bins: int) -> np.ndarray:
  """The number of the interval (b / bins, (b + 1) / bins] that each confidence lies in."""
  return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def spans(
  golds: Sequence[tuple[int, int]], predicted: Sequence[tuple[int, int]]
) -> dict[str, Measure]:
  """The share of spans (first, last token) that are exactly right, and the mean F1 of tokens."""
  exact, f1 = [], []
  for gold, found in zip(golds, predicted, strict=True):
    common = max(min(gold[1], found[1]) - max(gold[0], found[0]) + 1, 0)
    sizes = gold[1] - gold[0] + 1 + found[1] - found[0] + 1
    exact.append(gold == found)
    f1.append(2 * common / sizes)
  return {"exact_match": mean_of(exact), "f1": mean_of(f1)}


# --- Ranking -----------------------------------------------------------------------------------


def ranking_order(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Indices [C] of candidates from the highest score; at equal scores right ones come last."""
  return np.lexsort((right, -scores))


def ranking(right: Sequence[np.ndarray], k: Sequence[int]) -> dict[str, Measure]:
  """Metrics of how far ahead the right candidates are ranked.

  accuracy, and hit@k for each `k` above 1: whether a right candidate is the first, or one of the
  first k. mrr: the mean reciprocal rank of the first right one (Voorhees 1999). ndcg: the
  discounted cumulative gain, in parts of the best order's (Järvelin & Kekäläinen 2002), with a
  discount of log2(1 + rank) (Burges et al. 2005). accuracy_of_chance: expected when guessing.

  Args:
    right: bool [C] for each example, whether each candidate in ranked order is right; one must be.
    k: the k of hit@k.
  """
  first = np.array([one.argmax() for one in right])

  def ndcg(one: np.ndarray) -> float:
    gains = 1 / np.log2(2 + np.arange(len(one)))
    return gains[one].sum() / gains[: one.sum()].sum()

  return {
    "accuracy": mean_of(first == 0),
    **{f"hit@{one}": mean_of(first < one) for one in k if one > 1},
    "mrr": mean_of(1 / (1 + first)),
    "ndcg": mean_of([ndcg(one) for one in right]),
    "accuracy_of_chance": mean_of([one.mean() for one in right]),
  }


# --- Texts -------------------------------------------------------------------------------------


def question_answering(
  golds: Sequence[str | Sequence[str]], answers: Sequence[str], language: str = "en"
) -> dict[str, Measure]:
  """Exact match and F1 of words, the best over the right answers (Rajpurkar et al. 2016, section
  6.1); for Chinese, F1 of characters (Cui et al. 2019, arXiv:1810.07366)."""
  exact, f1 = [], []
  for gold, answer in zip(golds, answers, strict=True):
    found = _words(answer, language)
    right = [_words(text, language) for text in ([gold] if isinstance(gold, str) else gold)]
    exact.append(max(found == words for words in right))
    f1.append(max(_overlap(found, words) for words in right))
  return {"exact_match": mean_of(exact), "f1": mean_of(f1)}


_PUNCTUATION = frozenset(string.punctuation)


def _words(text: str, language: str) -> list[str]:
  """The words of a text in lower case, without punctuation and English articles."""
  kept = (
    c for c in text.lower() if c not in _PUNCTUATION and not unicodedata.category(c).startswith("P")
  )
  text = "".join(kept)
  if language == "zh":
    return chinese_units(text)
  return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _overlap(found: list[str], right: list[str]) -> float:
  if not found or not right:
    return float(found == right)
  common = (collections.Counter(found) & collections.Counter(right)).total()
  return 2 * common / (len(found) + len(right))


def chinese_units(text: str) -> list[str]:
  """Splits a text into Chinese characters and runs of letters or digits."""
  return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower())


def summarization(
  golds: Sequence[str], answers: Sequence[str], language: str = "en"
) -> dict[str, Measure]:
  """F-measures of ROUGE-1, -2 and -L (Lin 2004; rouge-score, with Porter's stemmer); Chinese by
  characters, which the library's own tokenizer would drop."""
  rouge_scorer = need("rouge_score.rouge_scorer")

  class Characters:
    def tokenize(self, text: str) -> list[str]:
      return chinese_units(text)

  names = ("rouge1", "rouge2", "rougeL")
  tokenizer = Characters() if language == "zh" else None
  scorer = rouge_scorer.RougeScorer(names, use_stemmer=tokenizer is None, tokenizer=tokenizer)
  scored = [scorer.score(gold, answer) for gold, answer in zip(golds, answers, strict=True)]
  return {name: mean_of([one[name].fmeasure for one in scored]) for name in names}


def translation(
  golds: Sequence[str], answers: Sequence[str], language: str = "en"
) -> dict[str, Measure]:
  """Corpus BLEU and chrF2 (Papineni et al. 2002, Popović 2015; sacreBLEU), from 0 to 100."""

  def corpus_score(scorer):
    # sacreBLEU's own bootstrap resamples these counts too; tokenising each draw would take minutes.
    counts = np.array(scorer._extract_corpus_statistics(answers, [golds]))
    return lambda i: scorer._compute_score_from_stats(counts[i].sum(axis=0).tolist()).score

  return {name: corpus_score(one) for name, one in _translation_scorers(language).items()}


def _translation_scorers(language: str) -> dict[str, Any]:
  metrics = need("sacrebleu.metrics")
  return {
    "bleu": metrics.BLEU(tokenize="zh" if language == "zh" else "13a"),
    "chrf": metrics.CHRF(),
  }


def translation_signatures(language: str) -> dict[str, str]:
  """sacreBLEU's own descriptions, without which its scores cannot be compared."""
  signatures = {}
  for name, scorer in _translation_scorers(language).items():
    scorer.corpus_score(["text"], [["text"]])  # Tells the scorer the number of references.
    signatures[name] = str(scorer.get_signature())
  return signatures


def tagging(
  golds: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> dict[str, Measure]:
  """Precision, recall and F1 over all whole entities (seqeval, as conlleval).

  Args:
    golds, predicted: tags such as 'B-PER', 'I-PER', 'O', equally many for each example.
  """
  labeling = need("seqeval.metrics.sequence_labeling")
  counts = []
  for gold, found in zip(golds, predicted, strict=True):
    right, named = (set(labeling.get_entities([*tags])) for tags in (gold, found))
    counts.append((len(right & named), len(named), len(right)))
  counts = np.array(counts, float)

  def ratio(weights):
    def measure(i):
      correct, named, right = counts[i].sum(axis=0)
      total = weights @ (named, right)
      return correct / total if total else 0.0

    return measure

  weights = {"precision": (1, 0), "recall": (0, 1), "f1": (0.5, 0.5)}
  return {name: ratio(np.array(weight)) for name, weight in weights.items()}


# --- Code --------------------------------------------------------------------------------------


def pass_at_k(samples: int, correct: int, k: int) -> float:
  """Unbiased estimate of the probability that one of k samples is correct:
  1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374, equation 1)."""
  if not 1 <= k <= samples:
    raise UserError(f"pass@{k} of {samples} samples: k must be from 1 to {samples}.")
  if samples - correct < k:
    return 1.0
  return float(1 - np.prod(1 - k / np.arange(samples - correct + 1, samples + 1)))


def code(passed: Sequence[Sequence[bool]], k: Sequence[int]) -> dict[str, Measure]:
  """pass@k over problems; `passed` says of each problem which samples were correct."""
  return {
    f"pass@{one}": mean_of([pass_at_k(len(samples), sum(samples), one) for samples in passed])
    for one in k
  }


# --- Language modelling ------------------------------------------------------------------------


def language_modelling(
  nats: Sequence[float], tokens: Sequence[int], texts: Sequence[str]
) -> dict[str, Measure]:
  """Perplexity of tokens and of words, and bits per byte; `nats` per document are -log p."""
  sizes = [(len(text.split()), len(text.encode())) for text in texts]
  table = np.array([(a, b, *c) for a, b, c in zip(nats, tokens, sizes, strict=True)], float)

  def per(column, finish):
    def measure(i):
      total = table[i].sum(axis=0)
      return float(finish(total[0] / total[column])) if total[column] else float("nan")

    return measure

  return {
    "perplexity": per(1, np.exp),
    "word_perplexity": per(2, np.exp),
    "bits_per_byte": per(3, lambda nats_per_byte: nats_per_byte / np.log(2)),
  }


@functools.lru_cache
def need(module: str) -> Any:
  """Imports a module of the extra `eval`; UserError if it is not installed."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise UserError(f'{module} is missing: pip install ".[eval]" ({error}).') from error
