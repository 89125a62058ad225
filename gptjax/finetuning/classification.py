"""Tasks that score whole texts: one label, any number of labels, or a number.

Axes: B batch, T positions, K labels, N examples.
"""

import abc
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from gptjax.data.batch import Batch
from gptjax.data.options import DataOptions, PartOptions, check_records
from gptjax.data.sources import Source
from gptjax.errors import UserError
from gptjax.finetuning import records
from gptjax.finetuning.label_encoding import Example, LabelEncoder, Target
from gptjax.finetuning.labels import Answer, ClassTask, LabelOutputs, LabelTask, NamedLabelTask
from gptjax.finetuning.records import LabelledTexts, Record
from gptjax.scores import scores
from gptjax.scores.scores import Measure


@dataclasses.dataclass(frozen=True)
class _OfWholeTexts(LabelTask):
  """A task that scores a text, or a pair of texts, at one token.

  Attributes:
    pair_key: key of a record's second text, such as a hypothesis; '' is none.
    label_key: key of its label.
  """

  pair_key: str = ""
  label_key: str = "label"

  @abc.abstractmethod
  def target(self, label: Any, place: int) -> tuple[Target, tuple[tuple[int, int, float], ...]]:
    """The target of an `Example`, and its values."""

  def example(self, record: Record, pieces: list[np.ndarray], encoder: LabelEncoder) -> Example:
    layout = encoder.lay_out(pieces)
    target, values = self.target(record.label, layout.place)
    return Example(
      record.name, layout.tokens, (target,), layout.second, values, truncated=layout.truncated
    )


@dataclasses.dataclass(frozen=True)
class Classification(_OfWholeTexts, ClassTask):
  """Predicts one label of a text or a pair of texts.

  Attributes:
    examples_per_label: training examples of each label, drawn by the seed; 0 is all.
  """

  examples_per_label: int = 0

  name = "classification"
  one_label = True
  metrics = ("accuracy", "f1_macro", "mcc", "ece")
  best_metric = "val/accuracy"
  transformers_head = ("SequenceClassification", "single_label_classification")

  def __post_init__(self):
    super().__post_init__()
    if self.examples_per_label < 0:
      raise UserError(f"task.examples_per_label={self.examples_per_label} must be 0 or more.")

  def read_label(self, label: Any, texts: Sequence[str]) -> int:
    return records.label_index(label, self.labels)

  def blank_label(self, texts: Sequence[Any]) -> int:
    return 0

  def open_sources(self, part: PartOptions, data: DataOptions) -> tuple[Source, Source]:
    check_records(data.parts, self.name)
    return records.open_records(part, self, stratified=True)

  def open_pair(self, part: PartOptions, data: DataOptions) -> tuple[LabelledTexts, LabelledTexts]:
    training, validation = super().open_pair(part, data)
    if self.examples_per_label:
      if len(data.parts) > 1:
        raise UserError(
          f"task.examples_per_label={self.examples_per_label} needs a single corpus, not "
          f"{len(data.parts)}."
        )
      few = records.few_of_each(training, self.labels, self.examples_per_label, data.seed)
      training = LabelledTexts(few, part.text_key, self)
    return training, validation

  def target(self, label: int, place: int) -> tuple[Target, tuple]:
    return Target(place, label), ()

  def answers(self, batch: Batch, logits_BTK: np.ndarray) -> Iterator[Answer]:
    for row, place in np.argwhere(batch.weights > 0):
      logits_K = logits_BTK[row, place]
      p_K = special.softmax(logits_K)
      yield Answer(int(batch.targets[row, place]), int(p_K.argmax()), p_K)

  def measures(self, outputs: LabelOutputs) -> dict[str, Measure]:
    golds, predicted = outputs.golds, outputs.predicted
    correct = np.array(golds) == np.array(predicted)
    found = scores.classification(golds, predicted)
    return found | {"ece": scores.calibration_error(outputs.confidence, correct)}

  def report(self, outputs: LabelOutputs) -> str:
    golds, predicted = ([self.say(x) for x in side] for side in (outputs.golds, outputs.predicted))
    return scores.need("sklearn.metrics").classification_report(
      golds, predicted, labels=self.labels, digits=4, zero_division=0
    )

  def join(self, answers: Sequence[Answer]) -> Answer:
    """The label of the mean probabilities."""
    p_K = np.mean([answer.probabilities for answer in answers], axis=0)
    return Answer(answers[0].gold, int(p_K.argmax()), p_K)

  def say(self, answer: int) -> str:
    return self.labels[answer]


@dataclasses.dataclass(frozen=True)
class MultiLabel(_OfWholeTexts, NamedLabelTask):
  """Predicts any number of labels of a text, independently."""

  name = "multi_label"
  exclusive = False
  metrics = ("exact_match", "f1_micro", "f1_macro")
  best_metric = "val/f1_micro"
  transformers_head = ("SequenceClassification", "multi_label_classification")
  columns = True

  def read_label(self, label: Any, texts: Sequence[str]) -> tuple[int, ...]:
    listed = records.check_list(label, self.label_key, "labels")
    return tuple(records.label_index(one, self.labels) for one in listed)

  def label_names(self, label: Any) -> list[str]:
    return [records.label_text(one) for one in records.check_list(label, self.label_key, "labels")]

  def blank_label(self, texts: Sequence[Any]) -> tuple[int, ...]:
    return ()

  def target(self, label: tuple[int, ...], place: int) -> tuple[Target, tuple]:
    return Target(place), tuple((place, index, 1.0) for index in label)

  def labels_in(self, example: Example) -> list[int]:
    return [column for _, column, _ in example.values]

  def loss_of_places(self, logits_BTK: jax.Array, batch: Batch, smoothing: float) -> jax.Array:
    """The binary cross-entropy, averaged over labels."""
    wanted_BTK = batch.values * (1 - smoothing) + smoothing / 2
    positive, negative = jax.nn.log_sigmoid(logits_BTK), jax.nn.log_sigmoid(-logits_BTK)
    return -(wanted_BTK * positive + (1 - wanted_BTK) * negative).mean(-1)

  def divergence(self, a_BTK: jax.Array, b_BTK: jax.Array, batch: Batch) -> jax.Array:
    """The symmetric Kullback-Leibler divergence, averaged over labels."""
    # The logarithms of the normalisers cancel in the sum of the two directions.
    return ((jax.nn.sigmoid(a_BTK) - jax.nn.sigmoid(b_BTK)) * (a_BTK - b_BTK)).mean(-1)

  def answers(self, batch: Batch, logits_BTK: np.ndarray) -> Iterator[Answer]:
    for row, place in np.argwhere(batch.weights > 0):
      logits_K = logits_BTK[row, place]
      yield Answer(batch.values[row, place], logits_K > 0, special.expit(logits_K))

  def measures(self, outputs: LabelOutputs) -> dict[str, Measure]:
    return scores.multi_label(np.array(outputs.golds) > 0, np.array(outputs.predicted))

  def report(self, outputs: LabelOutputs) -> str:
    return scores.need("sklearn.metrics").classification_report(
      np.array(outputs.golds) > 0,
      np.array(outputs.predicted),
      target_names=self.labels,
      digits=4,
      zero_division=0,
    )

  def join(self, answers: Sequence[Answer]) -> Answer:
    """The labels whose mean probability is above one half."""
    p_K = np.mean([answer.probabilities for answer in answers], axis=0)
    return Answer(answers[0].gold, p_K > 0.5, p_K)

  def say(self, answer: np.ndarray) -> list[str]:
    return [self.labels[index] for index in np.flatnonzero(answer)]


@dataclasses.dataclass(frozen=True)
class Regression(_OfWholeTexts):
  """Predicts a number for a text or a pair of texts."""

  name = "regression"
  metrics = ("spearman", "mean_absolute_error")
  best_metric = "val/spearman"
  transformers_head = ("SequenceClassification", "regression")
  library = "scipy.stats"
  columns = True
  num_labels = 1

  def read_label(self, label: Any, texts: Sequence[str]) -> float:
    is_number = isinstance(label, int | float) and not isinstance(label, bool)
    if not is_number or not math.isfinite(label):
      raise UserError(f"{self.label_key!r} is {label!r}, not a number.")
    return float(label)

  def blank_label(self, texts: Sequence[Any]) -> float:
    return 0.0

  def target(self, label: float, place: int) -> tuple[Target, tuple]:
    return Target(place), ((place, 0, label),)

  def loss_of_places(self, logits_BTK: jax.Array, batch: Batch, smoothing: float) -> jax.Array:
    """The squared error."""
    return jnp.square(logits_BTK - batch.values).mean(-1)

  def divergence(self, a_BTK: jax.Array, b_BTK: jax.Array, batch: Batch) -> jax.Array:
    """(a - b)^2, between normal distributions of variance 1."""
    return jnp.square(a_BTK - b_BTK).mean(-1)

  def answers(self, batch: Batch, logits_BTK: np.ndarray) -> Iterator[Answer]:
    for row, place in np.argwhere(batch.weights > 0):
      yield Answer(float(batch.values[row, place, 0]), float(logits_BTK[row, place, 0]))

  def join(self, answers: Sequence[Answer]) -> Answer:
    """The mean."""
    return Answer(answers[0].gold, float(np.mean([answer.predicted for answer in answers])))

  def measures(self, outputs: LabelOutputs) -> dict[str, Measure]:
    gold_N, predicted_N = np.array(outputs.golds), np.array(outputs.predicted)
    return {
      "spearman": scores.spearman(gold_N, predicted_N),
      "mean_absolute_error": scores.mean_of(np.abs(gold_N - predicted_N)),
    }
