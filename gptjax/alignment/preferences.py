"""Tasks that learn which of two answers is better from the log probabilities of both.

Axes: B batch, T positions, D width, P pairs of a row, 2 the better and the worse answer.
"""

import abc
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.alignment import losses, pairs
from gptjax.alignment.pairs import PackedPairs, PairEncoder, Pairs
from gptjax.data import cache
from gptjax.data import tokenizer as tokenizers
from gptjax.data.batch import Batch
from gptjax.data.cache import TokenCache
from gptjax.data.options import DataOptions, PartOptions
from gptjax.data.sources import Source
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError, check_choice, check_number
from gptjax.finetuning.answers import AnswerTask
from gptjax.finetuning.chat_templates import set_template
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT
from gptjax.model.stats import ActivationStats, RouterStats
from gptjax.objectives.cross_entropy import LossSum
from gptjax.objectives.forward import hidden, token_scores
from gptjax.training.pretrained import read_model_config, tokenizer_of

# What `DPO` minimises of the margin.
KINDS = ("sigmoid", "ipo", "hinge")


class PairScores(NamedTuple):
  """Log probabilities of answers, float32 [B, P, 2], and which pairs there are, float32 [B, P].

  sums: over an answer's tokens. means: the same per token. valid: 1 or 0.
  """

  sums: jax.Array
  means: jax.Array
  valid: jax.Array


def score_pairs(model: GPT, x_BTD: jax.Array, batch: Batch) -> PairScores:
  """Scores both answers of each pair from the model's hidden states."""
  log_prob_BT = token_scores(model, x_BTD, batch).log_prob
  learnt_BT = jnp.abs(batch.values[..., 0])
  sums_BP2 = _sum_answers(learnt_BT * log_prob_BT, batch)
  tokens_BP2 = _sum_answers(learnt_BT, batch)
  valid_BP = (tokens_BP2[..., 0] > 0).astype(jnp.float32)
  return PairScores(sums_BP2, sums_BP2 / jnp.maximum(tokens_BP2, 1), valid_BP)


def _sum_answers(x_BT: jax.Array, batch: Batch) -> jax.Array:
  """Sums over each segment, [B, P, 2]; segments are numbered from 1, the two of a pair in a row."""
  most = x_BT.shape[1] // 2 * 2

  def of_row(x_T: jax.Array, segments_T: jax.Array) -> jax.Array:
    return jax.ops.segment_sum(x_T, segments_T, most + 1)[1:]

  return jax.vmap(of_row)(x_BT, batch.segment_ids).reshape(len(x_BT), -1, 2)


@dataclasses.dataclass(frozen=True)
class _OfPairs(AnswerTask):
  """Learns from pairs of answers, in the formats of `alignment.pairs`; the loss is a mean over
  pairs.

  Attributes:
    beta: how strongly preferences count.
    chat_template: as in `Chat`.
  """

  beta: float = 0.1
  chat_template: str = ""

  metrics = ("accuracy", "margin")

  def __post_init__(self):
    super().__post_init__()
    check_number("task.beta", self.beta, above=0)
    if self.z_loss:
      raise UserError(f"task.z_loss={self.z_loss} is not of task={self.name!r}; set it to 0.")

  def open_pair(self, part: PartOptions, data: DataOptions) -> tuple[Source, Source]:
    return tuple(map(Pairs, self.open_records(part, data)))

  def texts(self, source: Source, indices: Iterable[int] | None = None) -> Iterator[str]:
    return pairs.texts(source, indices)

  def settle_tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
    return set_template(tokenizer, self.chat_template)

  def encoder(self, tokenizer: Tokenizer) -> cache.Encoder:
    return PairEncoder(tokenizer)

  def encode(
    self, source: Source, tokenizer: Tokenizer, data: DataOptions, *, progress: bool
  ) -> "EncodedPairs":
    encoder = self.encoder(tokenizer)
    built = cache.open_or_build(source, encoder, data.cache_dir, progress=progress)
    return EncodedPairs(**vars(built), mark=encoder.mark)

  def rows(self, encoded: "EncodedPairs", data: DataOptions, *, training: bool) -> PackedPairs:
    return PackedPairs(encoded, encoded.mark, data.sequence_length, self.overlong)

  def batch_fields(self, data: DataOptions) -> dict[str, tuple[tuple[int, ...], Any]]:
    return {"values": ((data.sequence_length, 1), jnp.float32)}

  @abc.abstractmethod
  def judge(self, scores: PairScores, reference: PairScores | None) -> tuple[jax.Array, jax.Array]:
    """The loss of each pair, and by how much the better answer is favoured, [B, P] each."""

  def reference_scores(self, model: GPT, batch: Batch) -> PairScores | None:
    """What a frozen model says of the same pairs, if the task has one."""
    del model, batch
    return None

  def loss(
    self,
    model: GPT,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    stats: ActivationStats | None = None,
    router_stats: RouterStats | None = None,
  ) -> LossSum:
    scores = score_pairs(model, hidden(model, batch, key, stats, router_stats), batch)
    losses_BP, _ = self.judge(scores, self.reference_scores(model, batch))
    total = jnp.vdot(losses_BP, scores.valid)
    return LossSum(total, jax.lax.stop_gradient(total))

  def evaluate(self, model: GPT, batch: Batch) -> tuple[dict[str, tuple[Any, Any]], Any]:
    """As `Task.evaluate`, of pairs."""
    scores = score_pairs(model, hidden(model, batch), batch)
    losses_BP, margins_BP = self.judge(scores, self.reference_scores(model, batch))
    told = {"loss": losses_BP, "accuracy": (margins_BP > 0).astype(jnp.float32)}
    told["margin"] = margins_BP
    weight = batch.weights.sum()
    return {name: (jnp.vdot(x_BP, scores.valid), weight) for name, x_BP in told.items()}, None


@dataclasses.dataclass(frozen=True)
class EncodedPairs(TokenCache):
  """A tokenised corpus of pairs; `mark` separates the two conversations of each."""

  mark: int


@dataclasses.dataclass(frozen=True)
class DPO(_OfPairs):
  """Direct preference optimisation: favours the better answer more than a reference model does
  (Rafailov et al. 2023, arXiv:2305.18290).

  Attributes:
    reference: the checkpoint of the reference, usually that of `init_from`; it is not trained.
    kind: what is minimised of the margin between the answers, one of `KINDS` (`losses`). 'ipo' is
      of means over tokens.
    label_smoothing: of 'sigmoid', the probability that a record has its answers the wrong way
      round.
    per_token: of the others, compare means over tokens too (Lambert et al. 2024, arXiv:2411.15124,
      section 5.1).
    reference_free: take a reference that finds all answers equally likely.
  """

  reference: str = ""
  kind: str = "sigmoid"
  label_smoothing: float = 0.0
  per_token: bool = False
  reference_free: bool = False

  name = "dpo"

  def __post_init__(self):
    super().__post_init__()
    check_choice("task.kind", self.kind, KINDS)
    check_number("task.label_smoothing", self.label_smoothing, at_least=0, below=0.5)
    if self.label_smoothing and self.kind != "sigmoid":
      raise UserError(f"task.label_smoothing is of task.kind='sigmoid', not of {self.kind!r}.")
    if self.per_token and self.kind == "ipo":
      raise UserError("task.per_token: task.kind='ipo' is of means over tokens anyway.")
    if self.reference_free and self.reference:
      raise UserError("task.reference_free takes no task.reference; set one of the two.")

  @property
  def second_model(self) -> str:
    if not (self.reference or self.reference_free):
      raise UserError(
        "task='dpo' needs task.reference, the checkpoint that is compared with: usually that of "
        "--config.init_from."
      )
    return self.reference

  def check_model(self, model: ModelConfig) -> None:
    super().check_model(model)
    if not self.second_model:
      return
    theirs = read_model_config(self.reference)
    if theirs.vocab_size != model.vocab_size:
      raise UserError(
        f"model.vocab_size={model.vocab_size}, but task.reference={self.reference} has "
        f"{theirs.vocab_size}; make it the same."
      )
    try:
      super().check_model(theirs)
    except UserError as error:
      raise UserError(f"task.reference={self.reference}: {error}") from error

  def settle_tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
    settled = super().settle_tokenizer(tokenizer)
    if self.second_model:
      spec = tokenizer_of(self.reference)
      if not settled.means_the_same(tokenizers.load(spec)):
        raise UserError(
          f"task.reference={self.reference} reads other tokens than this run. Start in another "
          f"--workdir with --config.tokenizer={spec}."
        )
    return settled

  def reference_scores(self, model: GPT, batch: Batch) -> PairScores | None:
    if self.reference_free:
      return None
    if model.second is None:
      raise UserError("task='dpo': the model was loaded without its reference.")
    return jax.lax.stop_gradient(score_pairs(model.second, hidden(model.second, batch), batch))

  def judge(self, scores: PairScores, reference: PairScores | None) -> tuple[jax.Array, jax.Array]:
    by_token = self.per_token or self.kind == "ipo"
    ratios_BP2 = scores.means if by_token else scores.sums
    if reference is not None:
      ratios_BP2 = ratios_BP2 - (reference.means if by_token else reference.sums)
    margin_BP = ratios_BP2[..., 0] - ratios_BP2[..., 1]
    match self.kind:
      case "sigmoid":
        losses_BP = losses.dpo(margin_BP, self.beta, self.label_smoothing)
      case "ipo":
        losses_BP = losses.ipo(margin_BP, self.beta)
      case _:
        losses_BP = losses.hinge(margin_BP, self.beta)
    return losses_BP, self.beta * margin_BP


@dataclasses.dataclass(frozen=True)
class SimPO(_OfPairs):
  """Favours the better answer by its mean log probability, without a reference (Meng et al. 2024,
  arXiv:2405.14734).

  Attributes:
    gamma: the margin that the better answer is to have.
  """

  beta: float = 2.0
  gamma: float = 1.0

  name = "simpo"

  def __post_init__(self):
    super().__post_init__()
    check_number("task.gamma", self.gamma, at_least=0)

  def judge(self, scores: PairScores, reference: PairScores | None) -> tuple[jax.Array, jax.Array]:
    chosen_BP, rejected_BP = scores.means[..., 0], scores.means[..., 1]
    losses_BP = losses.simpo(chosen_BP, rejected_BP, self.beta, self.gamma)
    return losses_BP, self.beta * (chosen_BP - rejected_BP)


@dataclasses.dataclass(frozen=True)
class CPO(_OfPairs):
  """Favours the better answer, and learns to write it (Xu et al. 2024, arXiv:2401.08417).

  Attributes:
    alpha: factor of the better answer's own loss.
  """

  alpha: float = 1.0

  name = "cpo"

  def __post_init__(self):
    super().__post_init__()
    check_number("task.alpha", self.alpha, at_least=0)

  def judge(self, scores: PairScores, reference: PairScores | None) -> tuple[jax.Array, jax.Array]:
    chosen_BP, rejected_BP = scores.sums[..., 0], scores.sums[..., 1]
    means_BP = scores.means[..., 0]
    losses_BP = losses.cpo(chosen_BP, rejected_BP, means_BP, self.beta, self.alpha)
    return losses_BP, self.beta * (chosen_BP - rejected_BP)


@dataclasses.dataclass(frozen=True)
class ORPO(_OfPairs):
  """Learns to write the better answer, and makes its odds larger than the worse one's (Hong et al.
  2024, arXiv:2403.07691)."""

  name = "orpo"

  def judge(self, scores: PairScores, reference: PairScores | None) -> tuple[jax.Array, jax.Array]:
    chosen_BP, rejected_BP = scores.means[..., 0], scores.means[..., 1]
    losses_BP = losses.orpo(chosen_BP, rejected_BP, self.beta)
    return losses_BP, self.beta * (chosen_BP - rejected_BP)
