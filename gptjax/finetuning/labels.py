"""The common part of tasks in which a model scores labels instead of writing text.

Axes: B batch, T positions, K labels, N examples.
"""

import abc
import collections
import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from gptjax.data.batch import Batch
from gptjax.data.options import DataOptions, PartOptions, check_records
from gptjax.data.sources import Source
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError, check_choice, check_number
from gptjax.finetuning import records
from gptjax.finetuning.answers import OVERLONG
from gptjax.finetuning.label_encoding import Example, Examples, LabelEncoder
from gptjax.finetuning.label_packing import pack_examples
from gptjax.finetuning.records import LabelledTexts, Record
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT
from gptjax.model.stats import ActivationStats, RouterStats
from gptjax.objectives.cross_entropy import LossSum
from gptjax.objectives.forward import label_logits
from gptjax.objectives.task import Task
from gptjax.scores import scores
from gptjax.scores.scores import Measure
from gptjax.training.step import make_eval_step

# Of more labels only the commonest are counted where a run says what it learns.
_LABELS_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class LabelTask(Task):
  """Scores the labels of a text or a pair of texts, by a head that replaces the vocabulary's.

  Attributes:
    overlong: handling of a text that is longer than a row: 'truncate' or 'drop'.
    r_drop: factor that makes two passes with different dropout agree: half of equation 4 of Liang
      et al. 2021 (arXiv:2106.14448), the mean of their losses plus r_drop / 4 times `divergence`.
    library: the library that the metrics need.
    columns: whether an example has a value for each label (`Batch.values`), not one label.
    one_label: whether a whole example has exactly one label of a set.
    is_by_word: whether the text is a list of words, each of which has a label.
    pair_key: key of a record's second text; '' is none.
    label_key: key of its label.
    transformers_head: name of the head in `transformers`, and the problem that it solves.
  """

  overlong: str = "truncate"
  r_drop: float = 0.0

  predicts_tokens: ClassVar[bool] = False
  writes_text: ClassVar[bool] = False
  packs_batches: ClassVar[bool] = True
  library: ClassVar[str] = ""
  columns: ClassVar[bool] = False
  one_label: ClassVar[bool] = False
  is_by_word: ClassVar[bool] = False
  pair_key: ClassVar[str] = ""
  label_key: ClassVar[str] = ""
  transformers_head: ClassVar[tuple[str, str | None]] = ("", None)
  between: ClassVar[str] = "\n"

  def __post_init__(self):
    check_choice("task.overlong", self.overlong, OVERLONG)
    check_number("task.r_drop", self.r_drop, at_least=0)

  # --- From records to examples -------------------------------------------------------------------

  def record_keys(self, text_key: str) -> dict[str, str]:
    if not text_key:
      raise UserError(f"data.text_key is empty; task={self.name!r} needs the key of its texts.")
    keys = {
      "data.text_key": text_key,
      "task.pair_key": self.pair_key,
      "task.label_key": self.label_key,
    }
    keys = {option: key for option, key in keys.items() if key}
    for first, second in itertools.combinations(keys, 2):
      if keys[first] == keys[second]:
        raise UserError(f"{first} and {second} are both {keys[first]!r}; give each its own key.")
    return keys

  def read(self, fields: Mapping[str, Any]) -> tuple[Sequence[Any], Any]:
    *keys, label_key = fields
    texts = self.read_texts({key: fields[key] for key in keys})
    return texts, self.read_label(fields[label_key], texts)

  def read_texts(self, fields: Mapping[str, Any]) -> Sequence[Any]:
    """{key: value} of a record without its label -> texts; UserError for what is none."""
    texts = [*fields.values()]
    records.check_not_empty(texts)
    return texts

  def read_label(self, label: Any, texts: Sequence[Any]) -> Any:
    """Parses the label of a record; UserError if that is impossible."""
    del texts
    return label

  def label_names(self, label: Any) -> list[str]:
    return [records.label_text(label)]

  def blank_label(self, texts: Sequence[Any]) -> Any:
    """Stands for the label of texts that have none yet; UserError if new texts cannot be labelled
    alone."""
    raise UserError(f"task={self.name!r} labels no new texts.")

  def open_sources(self, part: PartOptions, data: DataOptions) -> tuple[Source, Source]:
    """The records of a corpus: (training, validation)."""
    check_records(data.parts, self.name)
    return records.open_records(part, self)

  def open_pair(self, part: PartOptions, data: DataOptions) -> tuple[LabelledTexts, LabelledTexts]:
    sides = self.open_sources(part, data)
    return tuple(self.read_records(side, part.text_key) for side in sides)

  def read_records(self, source: Source, text_key: str) -> LabelledTexts:
    """Turns records into a source of their texts."""
    return LabelledTexts(source, text_key, self)

  @property
  def num_texts(self) -> int:
    return 2 if self.pair_key else 1

  def pieces(self, record: Record, encoder: LabelEncoder) -> list[str]:
    return list(record.texts)

  @abc.abstractmethod
  def example(self, record: Record, pieces: list[np.ndarray], encoder: LabelEncoder) -> Example:
    """Makes an example of the tokens of the pieces, without targets if none fit."""

  def encode(
    self, source: LabelledTexts, tokenizer: Tokenizer, data: DataOptions, *, progress: bool
  ) -> Examples:
    """Encodes texts; the results are kept in memory."""
    return LabelEncoder(tokenizer, data, self).encode(source, progress=progress)

  def rows(self, encoded: Examples, data: DataOptions, *, training: bool) -> Examples:
    return encoded

  def collate(self, rows: Sequence[Example], data: DataOptions) -> Batch:
    return self.pack(rows, data)[0]

  def pack(self, examples: Sequence[Example], data: DataOptions) -> tuple[Batch, list[int]]:
    """The batch of some examples, and their order in it (`pack_examples`)."""
    return pack_examples(
      examples,
      data.sequence_length,
      columns=self.num_labels if self.columns else 0,
      pairs=bool(self.pair_key),
      row_multiple=data.row_multiple,
    )

  def warnings(self, rows: Examples) -> Iterator[str]:
    if rows.truncated or rows.dropped:
      yield (
        f"of the records longer than a row, {rows.truncated} are truncated and {rows.dropped} "
        f"dropped (task.overlong={self.overlong})."
      )
    if rows.empty_words:
      yield f"words without any token, and so without a tag: {rows.empty_words}."

  def check_sides(self, training: Mapping[str, Any], validation: Mapping[str, Any]) -> None:
    records.warn_of_duplicates(training, validation)

  # --- The model ----------------------------------------------------------------------------------

  def ask(
    self, model: GPT, examples: Sequence[Example], data: DataOptions, *, batch_size: int
  ) -> Iterator["Answer"]:
    """Yields a model's answer to each example, in their order."""
    graph, params = nnx.split(model)
    eval_step = make_eval_step(graph, self)
    for first in range(0, len(examples), batch_size):
      batch, packed = self.pack(examples[first : first + batch_size], data)
      _, told = eval_step(params, batch)
      outputs = LabelOutputs(self)
      outputs.add(jax.device_get(told))
      yield from (outputs.answers[place] for place in np.argsort(packed))

  def check_model(self, model: ModelConfig) -> None:
    if model.encoder_layers:
      raise UserError(f"task={self.name!r} needs model.encoder_layers of 0.")

  def batch_fields(self, data: DataOptions) -> dict[str, tuple[tuple[int, ...], Any]]:
    fields = {}
    if self.pair_key:
      fields["token_types"] = ((data.sequence_length,), jnp.int32)
    if self.columns:
      fields["values"] = ((data.sequence_length, self.num_labels), jnp.float32)
    return fields

  @property
  def smoothing(self) -> float:
    """The share of a target that is spread over all labels."""
    return 0.0

  @abc.abstractmethod
  def loss_of_places(self, logits_BTK: jax.Array, batch: Batch, smoothing: float) -> jax.Array:
    """The loss at each position, [B, T], whether or not it counts."""

  @abc.abstractmethod
  def divergence(self, a_BTK: jax.Array, b_BTK: jax.Array, batch: Batch) -> jax.Array:
    """Symmetric Kullback-Leibler divergence (the sum of both directions) of two predictions at each
    position, [B, T]."""

  def loss_of_logits(self, logits_BTK: jax.Array, batch: Batch) -> LossSum:
    """Weighted sums over positions: the minimised loss, and the loss without smoothing."""
    plain_BT = self.loss_of_places(logits_BTK, batch, 0.0)
    total_BT = plain_BT
    if self.smoothing:
      total_BT = self.loss_of_places(logits_BTK, batch, self.smoothing)
    return LossSum(*(jnp.vdot(loss_BT, batch.weights) for loss_BT in (total_BT, plain_BT)))

  def loss(
    self,
    model: GPT,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    stats: ActivationStats | None = None,
    router_stats: RouterStats | None = None,
  ) -> LossSum:
    if not self.r_drop or key is None:
      return self.loss_of_logits(label_logits(model, batch, key, stats, router_stats), batch)
    keys = jax.random.split(key)
    a_BTK, b_BTK = (label_logits(model, batch, key, stats, router_stats) for key in keys)
    passes = (self.loss_of_logits(logits_BTK, batch) for logits_BTK in (a_BTK, b_BTK))
    sums = jax.tree.map(lambda x, y: (x + y) / 2, *passes)
    apart = jnp.vdot(self.divergence(a_BTK, b_BTK, batch), batch.weights)
    return sums._replace(total=sums.total + self.r_drop / 4 * apart)

  # --- Validation ---------------------------------------------------------------------------------

  def evaluate(self, model: GPT, batch: Batch) -> tuple[dict[str, tuple[Any, Any]], Any]:
    logits_BTK = label_logits(model, batch)
    loss = self.loss_of_logits(logits_BTK, batch).cross_entropy
    return {"loss": (loss, batch.weights.sum())}, (batch, logits_BTK)

  def outputs(self) -> "LabelOutputs":
    return LabelOutputs(self)

  def check_libraries(self) -> None:
    if self.library:
      scores.need(self.library)

  @abc.abstractmethod
  def answers(self, batch: Batch, logits_BTK: np.ndarray) -> Iterator["Answer"]:
    """The right and the predicted answer of each example of a batch, in the order of its rows."""

  @abc.abstractmethod
  def measures(self, outputs: "LabelOutputs") -> dict[str, Measure]:
    """The metrics as functions of the examples with given indices."""

  def report(self, outputs: "LabelOutputs") -> str:
    """A table of each label for the terminal; '' where there is none."""
    return ""

  def join(self, answers: Sequence["Answer"]) -> "Answer":
    """Makes one answer of those to the parts of a text, in their order."""
    raise UserError(f"task={self.name!r} has no one answer to the parts of a text.")

  def say(self, answer: Any) -> Any:
    """Formats an answer for people and JSON."""
    return answer

  def say_probabilities(self, answer: "Answer") -> Any:
    """The probabilities of an answer as JSON holds them; None where there are none."""
    return None


@dataclasses.dataclass(frozen=True)
class NamedLabelTask(LabelTask):
  """A task whose labels are names from a set.

  Attributes:
    labels: all names, in order; () takes them from the training records.
    label_smoothing: share of the target that is spread evenly over the labels (Szegedy et al. 2016,
      section 7).
    exclusive: whether a label excludes the others, so that at least two are needed.
  """

  labels: tuple[str, ...] = ()
  label_smoothing: float = 0.0

  library: ClassVar[str] = "sklearn.metrics"
  exclusive: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    object.__setattr__(self, "labels", tuple(self.labels))
    if len(set(self.labels)) < len(self.labels):
      raise UserError(f"task.labels has a label twice: {', '.join(self.labels)}.")
    check_number("task.label_smoothing", self.label_smoothing, at_least=0, below=1)

  @property
  def num_labels(self) -> int:
    return len(self.labels)

  def check_model(self, model: ModelConfig) -> None:
    super().check_model(model)
    if len(self.labels) == 1 and self.exclusive:
      raise UserError(
        f"task={self.name!r}: the only label is {self.labels[0]!r}, so that there is nothing to "
        "tell apart. Is task.label_key the right one?"
      )

  @property
  def smoothing(self) -> float:
    return self.label_smoothing

  def settle(self, data: DataOptions, known: Sequence[str]) -> "NamedLabelTask":
    """The task with the labels of the training records: in the order of a known head with the same
    labels, or else sorted, as numbers if all are numbers."""
    if self.labels:
      return self
    found = set()
    for part in data.parts.values():
      training, _ = self.open_sources(part, data)
      found.update(*LabelledTexts(training, part.text_key, self).label_names())
    if {*known} == found:
      return dataclasses.replace(self, labels=tuple(known))
    whole = all(re.fullmatch("-?[0-9]+", label) for label in found)
    return dataclasses.replace(self, labels=tuple(sorted(found, key=int if whole else str)))

  def items(
    self, parts: Mapping[str, Examples], data: DataOptions, *, training: bool
  ) -> dict[str, Examples]:
    if not training:
      return dict(parts)
    counts = collections.Counter()
    for part in parts.values():
      for example in part.examples:
        counts.update(self.labels_in(example))
    if missing := [name for index, name in enumerate(self.labels) if not counts[index]]:
      raise UserError(
        f"task.labels: label {missing[0]!r} has no training example; leave it out or add one."
      )
    if once := [name for index, name in enumerate(self.labels) if counts[index] == 1]:
      logging.warning(
        "labels with a single training example: %s. Is each meant, or a slip of the pen?",
        ", ".join(map(repr, once)),
      )
    return {name: self.weigh(examples, counts) for name, examples in parts.items()}

  def warnings(self, rows: Examples) -> Iterator[str]:
    yield from super().warnings(rows)
    counts = collections.Counter(label for one in rows.examples for label in self.labels_in(one))
    total = max(counts.total(), 1)
    shown = [
      f"{self.labels[label]} {count:,} ({count / total:.1%})"
      for label, count in counts.most_common(_LABELS_SHOWN)
    ]
    more = f" and {len(counts) - len(shown)} more" if len(counts) > len(shown) else ""
    yield f"labels: {', '.join(shown)}{more}."

  def weigh(self, examples: Examples, counts: Mapping[int, int]) -> Examples:
    """Weights the examples by how often their labels occur in all parts."""
    del counts
    return examples

  def say_probabilities(self, answer: "Answer") -> Any:
    return dict(zip(self.labels, answer.probabilities.tolist(), strict=True))

  def labels_in(self, example: Example) -> list[int]:
    """The indices of an example's labels."""
    return [target.label for target in example.targets]


@dataclasses.dataclass(frozen=True)
class ClassTask(NamedLabelTask):
  """A task in which each position has one label from a set.

  Attributes:
    class_weights: 'balanced' weights a label with n_k of n positions by n / (K n_k) (King and Zeng
      2001, as in scikit-learn), or 'none'.
  """

  class_weights: str = "none"

  def __post_init__(self):
    super().__post_init__()
    check_choice("task.class_weights", self.class_weights, ("none", "balanced"))

  def weigh(self, examples: Examples, counts: Mapping[int, int]) -> Examples:
    if self.class_weights == "none":
      return examples
    total = sum(counts.values())

    def weighed(example: Example) -> Example:
      targets = tuple(
        dataclasses.replace(target, weight=total / (self.num_labels * counts[target.label]))
        for target in example.targets
      )
      return dataclasses.replace(example, targets=targets)

    return dataclasses.replace(examples, examples=[weighed(one) for one in examples.examples])

  def loss_of_places(self, logits_BTK: jax.Array, batch: Batch, smoothing: float) -> jax.Array:
    """The cross-entropy of the label."""
    logp_BTK = jax.nn.log_softmax(logits_BTK)
    wanted_BT = jnp.take_along_axis(logp_BTK, batch.targets[..., None], axis=-1)[..., 0]
    return -((1 - smoothing) * wanted_BT + smoothing * logp_BTK.mean(-1))

  def divergence(self, a_BTK: jax.Array, b_BTK: jax.Array, batch: Batch) -> jax.Array:
    logp_a, logp_b = jax.nn.log_softmax(a_BTK), jax.nn.log_softmax(b_BTK)
    return ((jnp.exp(logp_a) - jnp.exp(logp_b)) * (logp_a - logp_b)).sum(-1)


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
  """The right label of an example, the predicted one, and the probabilities of the labels where
  there are any: [K], or of each word [W, K]."""

  gold: Any
  predicted: Any
  probabilities: np.ndarray | None = None


class LabelOutputs:
  """Collects the answers of a model to examples, and measures them."""

  def __init__(self, task: LabelTask):
    self._task = task
    self.answers: list[Answer] = []

  def add(self, told: tuple[Batch, np.ndarray]) -> None:
    """Adds a batch, on the host, and the scores of its labels [B, T, K]."""
    batch, logits_BTK = told
    self.answers += self._task.answers(batch, np.asarray(logits_BTK, np.float32))

  @property
  def golds(self) -> list[Any]:
    return [answer.gold for answer in self.answers]

  @property
  def predicted(self) -> list[Any]:
    return [answer.predicted for answer in self.answers]

  @property
  def confidence(self) -> np.ndarray | None:
    """The largest probability of each example, [N]; None unless it has one label of a set."""
    if not self._task.one_label:
      return None
    return np.array([answer.probabilities.max() for answer in self.answers])

  def metrics(self) -> dict[str, float]:
    """The task's metrics of its answers; others are sums of `Task.evaluate`."""
    everything = np.arange(len(self.answers))
    measures = self._task.measures(self)
    names = (name for name in self._task.metrics if name in measures)
    return {name: float(measures[name](everything)) for name in names}
