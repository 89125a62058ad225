"""Distillation: tasks in which a student learns from the probabilities of a teacher, a frozen model
beside it that reads the same rows.

Axes: B batch, T positions, D width, K labels.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from gptjax.compression.divergence import DIVERGENCES, Measure, compare, diverge
from gptjax.data import tokenizer as tokenizers
from gptjax.data.batch import Batch
from gptjax.data.options import DataOptions
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError, check_choice, check_number
from gptjax.finetuning.answers import Chat
from gptjax.finetuning.classification import Classification
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT
from gptjax.model.stats import ActivationStats, RouterStats
from gptjax.objectives.cross_entropy import LossSum
from gptjax.objectives.forward import hidden, label_logits
from gptjax.objectives.task import Task
from gptjax.objectives.text import NextToken
from gptjax.training.pretrained import labels_of, number_labels, read_model_config, tokenizer_of

# What a student is compared with its teacher by in validation, whatever is minimised.
_TOLD = Measure()


@dataclasses.dataclass(frozen=True)
class Distillation(Task):
  """The part that all such tasks share; before another task in the list of bases.

  Attributes:
    teacher: the teacher's checkpoint: a run, or another library's files.
    alpha: share of the divergence in what is minimised; the rest is the task's own loss.
    temperature, divergence, beta: as in `Measure`; beta is of 'js' alone.
  """

  teacher: str = ""
  alpha: float = 0.5
  temperature: float = 1.0
  divergence: str = "forward_kl"
  beta: float = 0.5

  # Of the model's config: what has to be the teacher's too.
  shared: ClassVar[tuple[str, ...]] = ("visibility", "label_head.num_labels")

  def __post_init__(self):
    super().__post_init__()
    check_number("task.alpha", self.alpha, at_least=0, at_most=1)
    check_number("task.temperature", self.temperature, above=0)
    check_choice("task.divergence", self.divergence, DIVERGENCES)
    check_number("task.beta", self.beta, above=0, below=1)
    if self.divergence != "js" and self.beta != Distillation.beta:
      raise UserError(
        f"task.beta={self.beta} is of task.divergence='js' alone, not of {self.divergence!r}."
      )

  @property
  def second_model(self) -> str:
    if not self.teacher:
      raise UserError(f"task={self.name!r} needs task.teacher, the checkpoint to learn from.")
    return self.teacher

  @property
  def measure(self) -> Measure:
    """What is minimised."""
    return Measure(self.alpha, self.temperature, self.divergence, self.beta)

  def check_model(self, model: ModelConfig) -> None:
    super().check_model(model)
    theirs = read_model_config(self.second_model)
    for key in self.shared:
      mine, other = (operator.attrgetter(key)(config) for config in (model, theirs))
      if mine != other:
        raise UserError(
          f"model.{key}={mine!r}, but task.teacher={self.teacher} has {other!r}; make it the same."
        )
    try:
      super().check_model(theirs)
    except UserError as error:
      raise UserError(f"task.teacher={self.teacher}: {error}") from error

  def settle_tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
    """Refuses a teacher whose ids stand for other tokens; its template of chats may be another."""
    settled = super().settle_tokenizer(tokenizer)
    spec = tokenizer_of(self.second_model)
    if not settled.means_the_same(theirs := tokenizers.load(spec)):
      raise UserError(
        f"task.teacher={self.teacher} reads other tokens than this run: {theirs.vocab_size} of "
        f"its own, not the {settled.vocab_size} of {settled.spec!r}. Start in another --workdir "
        f"with --config.tokenizer={spec}."
      )
    return settled

  def ask_teacher(self, forward: Callable[[GPT, Batch], jax.Array], model: GPT, batch: Batch):
    """The result of a forward pass of the teacher, without dropout and without a gradient.

    Raises:
      UserError: the model was loaded alone, or its teacher cannot read the rows.
    """
    if model.second is None:
      raise UserError(f"task={self.name!r}: the model was loaded without its teacher.")
    try:
      return jax.lax.stop_gradient(forward(model.second, batch))
    except UserError as error:
      raise UserError(f"task.teacher={self.teacher}: {error}") from error


@dataclasses.dataclass(frozen=True)
class _OfTokens(Distillation):
  """Learns a distribution of the next token.

  Attributes:
    hidden_weight: factor of 1 - cosine between the last hidden states of both models (Sanh et al.
      2019, arXiv:1910.01108, section 3), which then have one width.
  """

  hidden_weight: float = 0.0

  shared = ("vocab_size", *Distillation.shared)

  def __post_init__(self):
    super().__post_init__()
    check_number("task.hidden_weight", self.hidden_weight, at_least=0)

  @property
  def measure(self) -> Measure:
    return super().measure._replace(z_loss=self.z_loss)

  def check_model(self, model: ModelConfig) -> None:
    super().check_model(model)
    width = read_model_config(self.second_model).embed_dim
    if self.hidden_weight and width != model.embed_dim:
      raise UserError(
        f"task.hidden_weight={self.hidden_weight} compares hidden states of one width, but "
        f"model.embed_dim={model.embed_dim} and task.teacher={self.teacher} has {width}."
      )

  def loss(
    self,
    model: GPT,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    stats: ActivationStats | None = None,
    router_stats: RouterStats | None = None,
  ) -> LossSum:
    x_BTD = hidden(model, batch, key, stats, router_stats)
    y_BTE = self.ask_teacher(hidden, model, batch)
    sums = compare(model, x_BTD, y_BTE, batch, self.measure)
    total = sums.total
    if self.hidden_weight:
      total += self.hidden_weight * jnp.vdot(_angle(x_BTD, y_BTE), batch.weights)
    return LossSum(total, sums.cross_entropy)

  def evaluate(self, model: GPT, batch: Batch) -> tuple[dict[str, tuple[Any, Any]], Any]:
    """As `Task.evaluate`; a model without its teacher has its loss alone."""
    weight = batch.weights.sum()
    if model.second is None:
      return {"loss": (super().loss(model, batch).cross_entropy, weight)}, None
    y_BTE = self.ask_teacher(hidden, model, batch)
    sums = compare(model, hidden(model, batch), y_BTE, batch, _TOLD)
    told = {"loss": sums.cross_entropy, "kl": sums.divergence, "agreement": sums.agreement}
    return {name: (x, weight) for name, x in told.items()}, None


def _angle(x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
  """1 - cosine of two vectors at each position, [B, T], float32."""
  x_BTD, y_BTD = (one.astype(jnp.float32) for one in (x_BTD, y_BTD))
  squares_BT = jnp.square(x_BTD).sum(-1) * jnp.square(y_BTD).sum(-1)
  # Not the root of 0, whose derivative is infinite.
  return 1 - (x_BTD * y_BTD).sum(-1) * jax.lax.rsqrt(jnp.maximum(squares_BT, 1e-30))


@dataclasses.dataclass(frozen=True)
class Distill(_OfTokens, NextToken):
  """Learns the teacher's next token of a text, beside the text's own."""

  name = "distill"
  metrics = (*NextToken.metrics, "kl", "agreement")


@dataclasses.dataclass(frozen=True)
class DistillChat(_OfTokens, Chat):
  """Learns the teacher's next token in the assistant's turns, beside what is said there."""

  name = "distill_chat"
  metrics = (*Chat.metrics, "kl", "agreement")


@dataclasses.dataclass(frozen=True)
class DistillClassification(Distillation, Classification):
  """Learns the teacher's probabilities of the labels, beside the right label. The models may have
  other widths and other heads, but the same labels."""

  name = "distill_classification"
  metrics = (*Classification.metrics, "kl", "agreement")

  def __post_init__(self):
    super().__post_init__()
    if self.r_drop:
      raise UserError(f"task.r_drop={self.r_drop}: task={self.name!r} makes one pass; set it to 0.")

  def settle(self, data: DataOptions, known: Sequence[str]) -> "DistillClassification":
    """The labels of the training records, in the teacher's order."""
    known = labels_of(self.second_model)
    return super().settle(data, known.names if known else ())

  def check_model(self, model: ModelConfig) -> None:
    super().check_model(model)
    names = labels_of(self.second_model).names
    if names not in (self.labels, number_labels(len(names))):
      raise UserError(
        f"task.labels={','.join(self.labels)}, but task.teacher={self.teacher} has "
        f"{','.join(names)}, in this order."
      )

  def loss(
    self,
    model: GPT,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    stats: ActivationStats | None = None,
    router_stats: RouterStats | None = None,
  ) -> LossSum:
    logits_BTK = label_logits(model, batch, key, stats, router_stats)
    own = self.loss_of_logits(logits_BTK, batch)
    theirs_BTK = self.ask_teacher(label_logits, model, batch)
    soft = self.alpha * self.temperature**2 * _apart(theirs_BTK, logits_BTK, batch, self.measure)
    return own._replace(total=(1 - self.alpha) * own.total + soft)

  def evaluate(self, model: GPT, batch: Batch) -> tuple[dict[str, tuple[Any, Any]], Any]:
    """As `Task.evaluate`; a model without its teacher is not compared."""
    told, (batch, logits_BTK) = super().evaluate(model, batch)
    if model.second is not None:
      theirs_BTK = self.ask_teacher(label_logits, model, batch)
      agrees_BT = logits_BTK.argmax(-1) == theirs_BTK.argmax(-1)
      weight = batch.weights.sum()
      told["kl"] = (_apart(theirs_BTK, logits_BTK, batch, _TOLD), weight)
      told["agreement"] = (jnp.vdot(agrees_BT.astype(jnp.float32), batch.weights), weight)
    return told, (batch, logits_BTK)


def _apart(
  theirs_BTK: jax.Array, logits_BTK: jax.Array, batch: Batch, measure: Measure
) -> jax.Array:
  """The weighted sum of the divergences at the temperature."""
  both = (jax.nn.log_softmax(x / measure.temperature) for x in (theirs_BTK, logits_BTK))
  return jnp.vdot(diverge(*both, measure)[0], batch.weights)
