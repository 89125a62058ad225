"""A task: everything that decides what a model learns, in one object.

The loop, the step, validation, checkpoints, sweeps and `gptjax.evaluate` know only this interface.
A new task is one class, whose fields are the keys of `config.task`, and one line of `TASKS`.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from gptjax import wings
from gptjax.data import cache, sources
from gptjax.data.batch import Batch
from gptjax.data.options import DataOptions, PartOptions
from gptjax.data.sources import Source
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError, did_you_mean
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT
from gptjax.model.stats import ActivationStats, RouterStats
from gptjax.objectives.cross_entropy import LossSum

# Where each task is. Tasks in a wing are imported only when one is asked for.
TASKS = {
  "next_token": "gptjax.objectives.text:NextToken",
  "prefix": "gptjax.objectives.text:Prefix",
  "masked": "gptjax.objectives.text:Masked",
  "span_corruption": "gptjax.objectives.text:SpanCorruption",
  "chat": "gptjax.finetuning.answers:Chat",
  "prompt": "gptjax.finetuning.answers:Prompt",
  "classification": "gptjax.finetuning.classification:Classification",
  "multi_label": "gptjax.finetuning.classification:MultiLabel",
  "regression": "gptjax.finetuning.classification:Regression",
  "tagging": "gptjax.finetuning.tagging:Tagging",
  "span": "gptjax.finetuning.span:Span",
  "preference": "gptjax.finetuning.preference:Preference",
  "dpo": "gptjax.alignment.preferences:DPO",
  "simpo": "gptjax.alignment.preferences:SimPO",
  "cpo": "gptjax.alignment.preferences:CPO",
  "orpo": "gptjax.alignment.preferences:ORPO",
  "distill": "gptjax.compression.distillation:Distill",
  "distill_chat": "gptjax.compression.distillation:DistillChat",
  "distill_classification": "gptjax.compression.distillation:DistillClassification",
}
# Instead of a name: the task that the model of `init_from` was made for.
OF_THE_MODEL = "of_the_model"


class Rows(Protocol):
  """Items to train on, read by index: windows of tokens, finished rows, or examples."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Any: ...


class Encoded(Protocol):
  """A tokenised part of a corpus, with `num_bytes` of UTF-8 text if known, and a checksum."""

  num_tokens: int
  checksum: int


class Outputs(Protocol):
  """Collects a model's outputs on validation examples."""

  def add(self, told: Any) -> None:
    """Adds the second result of `Task.evaluate` for a batch, on the host."""

  def metrics(self) -> dict[str, float]:
    """{name: value}, exact over all examples."""


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
  """The interface of a task, with defaults that most tasks share.

  Attributes:
    name: value of `config.task.name`.
    metrics: names of the validation's metrics beside the loss, without 'val/'.
    best_metric: the validation metric that decides which checkpoint is the best, with 'val/'.
    text_key: key of a record's text, unless `data.text_key` says otherwise.
    predicts_tokens: whether the targets are tokens, not labels with a head of their own.
    writes_text: whether the model writes text, so that a run shows samples.
    packs_batches: whether the rows of a batch are packed from `batch_size` items, so that each host
      needs them all. Otherwise an item is a row.
  """

  name: ClassVar[str] = ""
  metrics: ClassVar[tuple[str, ...]] = ("perplexity",)
  best_metric: ClassVar[str] = "val/loss"
  text_key: ClassVar[str] = "text"
  predicts_tokens: ClassVar[bool] = True
  writes_text: ClassVar[bool] = True
  packs_batches: ClassVar[bool] = False

  # --- From records to rows ---------------------------------------------------------------------

  def open_pair(self, part: PartOptions, data: DataOptions) -> tuple[Source, Source]:
    """Opens a corpus: (training documents, validation documents)."""
    del data
    return sources.open_pair(part)

  def texts(self, source: Source, indices: Iterable[int] | None = None) -> Iterator[str]:
    """Yields the text of the documents, all or those at `indices`."""
    return sources.documents(source, indices)

  def settle(self, data: DataOptions, known: Sequence[str]) -> "Task":
    """The task completed from the training records, for instance with the names of the labels;
    `known` are the labels of the model that the run starts from."""
    del data, known
    return self

  def settle_tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer that the run is to keep."""
    return tokenizer

  def encode(
    self, source: Source, tokenizer: Tokenizer, data: DataOptions, *, progress: bool
  ) -> Encoded:
    """Tokenises documents, or opens the tokens of an earlier run."""
    return cache.open_or_build(source, self.encoder(tokenizer), data.cache_dir, progress=progress)

  def encoder(self, tokenizer: Tokenizer) -> cache.Encoder:
    """The encoder from documents to tokens, for the token cache."""
    return tokenizer

  def items(
    self, parts: Mapping[str, Encoded], data: DataOptions, *, training: bool
  ) -> dict[str, Rows]:
    """The items of each part; UserError, which names the part, if there are none."""
    found = {}
    for name, encoded in parts.items():
      try:
        found[name] = self.rows(encoded, data, training=training)
      except UserError as error:
        raise UserError(f"data part {name!r}: {error}") from error
    return found

  @abc.abstractmethod
  def rows(self, encoded: Encoded, data: DataOptions, *, training: bool) -> Rows:
    """The items of one part."""

  def row_maker(
    self, tokenizer: Tokenizer, data: DataOptions, *, training: bool
  ) -> Callable[[Any, np.random.Generator], Any]:
    """Returns the function (item, randomness) -> row, with everything random about a row."""
    del tokenizer, data, training
    return lambda item, _: item

  def collate(self, rows: Sequence[Any], data: DataOptions) -> Batch:
    """Makes a batch of rows."""
    del data
    return Batch.stack(rows)

  def warnings(self, rows: Rows) -> Iterator[str]:
    """Yields warnings about documents that are not in the rows."""
    del rows
    return iter(())

  def check_sides(self, training: Mapping[str, Source], validation: Mapping[str, Source]) -> None:
    """Warns of overlap between training and validation."""

  @property
  def predicts_all_text(self) -> bool:
    """Whether each byte of the text is predicted once, so that bits per byte are known."""
    return False

  # --- The model ----------------------------------------------------------------------------------

  @property
  def num_labels(self) -> int:
    """The number of scores that the model's head gives a token; 0 is a language model."""
    return 0

  @property
  def second_model(self) -> str:
    """The checkpoint of a frozen model that the task reads at `model.second`; '' is none."""
    return ""

  def check_model(self, model: ModelConfig) -> None:
    """Raises UserError for a model that cannot do the task."""

  def target_length(self, data: DataOptions) -> int:
    """Positions of a row that have targets."""
    return data.sequence_length

  def batch_fields(self, data: DataOptions) -> dict[str, tuple[tuple[int, ...], Any]]:
    """{name: (shape of a row, dtype)} of the fields of `Batch` that not every task has."""
    del data
    return {}

  @abc.abstractmethod
  def loss(
    self,
    model: GPT,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    stats: ActivationStats | None = None,
    router_stats: RouterStats | None = None,
  ) -> LossSum:
    """The weighted sum of the losses of all targets.

    Args:
      model: the model.
      batch: rows.
      key: randomness of dropout; None is evaluation.
      stats, router_stats: as in `GPT.hidden`.
    """

  # --- Validation ---------------------------------------------------------------------------------

  def evaluate(self, model: GPT, batch: Batch) -> tuple[dict[str, tuple[Any, Any]], Any]:
    """Returns {name: (sum, weight)} over targets, and input for `Outputs.add` or None; traced."""
    return {"loss": (self.loss(model, batch).cross_entropy, batch.weights.sum())}, None

  def outputs(self) -> Outputs | None:
    """A collector of the outputs of a validation; None if the sums are enough."""
    return None

  def check_libraries(self) -> None:
    """Raises UserError if a library that the metrics need is missing."""


def find_task(name: str) -> type[Task]:
  """The class of a task; UserError for an unknown name."""
  if name not in TASKS:
    raise UserError(f"task: no task {name!r}. {did_you_mean(name, TASKS)}")
  return wings.load(TASKS[name], f"task={name!r}")


def task_defaults(name: str) -> dict[str, Any]:
  """The keys of `config.task` for a task, with their defaults."""
  options = {}
  if name != OF_THE_MODEL:
    options = {field.name: field.default for field in dataclasses.fields(find_task(name))}
  return {"name": name, **options}


def make_task(config: Mapping[str, Any]) -> Task:
  """Reads `config.task`.

  Raises:
    UserError: a key that the task does not have, or a value that it refuses.
  """
  options = {key: value for key, value in config.items() if key != "name"}
  kind = find_task(config["name"])
  known = [field.name for field in dataclasses.fields(kind)]
  for key in options:
    if key not in known:
      raise UserError(f"task.{key} is no option of task={kind.name!r}. {did_you_mean(key, known)}")
  return kind(**options)


def metrics_of(task: type[Task] | Task) -> tuple[str, ...]:
  """The names of a validation's metrics, with 'val/'."""
  return ("val/loss", *(f"val/{name}" for name in task.metrics))
