"""Tasks on plain text, a stream of tokens cut into windows: language models and their relatives."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.data import denoising
from gptjax.data.batch import Batch
from gptjax.data.cache import TokenCache
from gptjax.data.fim import FillInTheMiddle
from gptjax.data.options import DataOptions
from gptjax.data.packing import Windows, pack
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError, check_number
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT
from gptjax.model.stats import ActivationStats, RouterStats
from gptjax.objectives.cross_entropy import LossSum
from gptjax.objectives.forward import token_loss
from gptjax.objectives.task import Task

MakeRow = Callable[[np.ndarray, np.random.Generator], Batch]


@dataclasses.dataclass(frozen=True)
class TokenTask(Task):
  """Predicts tokens, by the cross-entropy of each.

  Attributes:
    z_loss: factor of log(sum exp(logits))^2, which is minimised too but not part of the loss shown.
  """

  z_loss: float = 0.0

  def __post_init__(self):
    check_number("task.z_loss", self.z_loss, at_least=0)

  def loss(
    self,
    model: GPT,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    stats: ActivationStats | None = None,
    router_stats: RouterStats | None = None,
  ) -> LossSum:
    return token_loss(model, batch, key, z_loss=self.z_loss, stats=stats, router_stats=router_stats)


@dataclasses.dataclass(frozen=True)
class TextTask(TokenTask):
  """Predicts tokens of plain text.

  Attributes:
    visibility: the `ModelConfig.visibility` that the task needs.
    has_encoder: whether it needs an encoder.
  """

  visibility: ClassVar[str] = "causal"
  has_encoder: ClassVar[bool] = False

  def rows(self, encoded: TokenCache, data: DataOptions, *, training: bool) -> Windows:
    return Windows(encoded, self.window_length(data), drop_remainder=training)

  def window_length(self, data: DataOptions) -> int:
    """Tokens of a window, without the one that the next window begins with."""
    return data.sequence_length

  def check_model(self, model: ModelConfig) -> None:
    if model.visibility != self.visibility:
      raise UserError(
        f"task={self.name!r} needs model.visibility={self.visibility!r}, not {model.visibility!r}."
      )
    if self.has_encoder != (model.encoder_layers > 0):
      needs = "at least 1" if self.has_encoder else "0"
      raise UserError(
        f"task={self.name!r} needs model.encoder_layers of {needs}, not {model.encoder_layers}."
      )


@dataclasses.dataclass(frozen=True)
class NextToken(TextTask):
  """Predicts the next token of a text (GPT).

  Attributes:
    fim_rate: share of training documents that are reordered for fill-in-the-middle (Bavarian et al.
      2022).
    spm_rate: share of reordered documents with the suffix first.
  """

  fim_rate: float = 0.0
  spm_rate: float = 0.5

  name = "next_token"
  metrics = ("perplexity", "bits_per_byte")
  predicts_all_text = True

  def __post_init__(self):
    super().__post_init__()
    for key in ("fim_rate", "spm_rate"):
      check_number(f"task.{key}", getattr(self, key), at_least=0, at_most=1)

  def row_maker(self, tokenizer: Tokenizer, data: DataOptions, *, training: bool) -> MakeRow:
    reorder = training and self.fim_rate > 0
    fim = FillInTheMiddle(tokenizer, self.fim_rate, self.spm_rate) if reorder else None

    def make_row(window: np.ndarray, rng: np.random.Generator) -> Batch:
      window = fim(window, rng) if fim else window
      return pack(window, data.sequence_length, tokenizer.end_of_text)

    return make_row


@dataclasses.dataclass(frozen=True)
class Prefix(TextTask):
  """Predicts a text after a bidirectional prefix (Raffel et al. 2020, section 3.2.3)."""

  name = "prefix"
  visibility = "prefix"

  def row_maker(self, tokenizer: Tokenizer, data: DataOptions, *, training: bool) -> MakeRow:
    return denoising.PrefixLanguageModel(data.sequence_length, tokenizer.end_of_text)

  def batch_fields(self, data: DataOptions) -> dict[str, tuple[tuple[int, ...], Any]]:
    return {"prefix": ((data.sequence_length,), jnp.int32)}


@dataclasses.dataclass(frozen=True)
class Masked(TextTask):
  """Predicts masked tokens of a text (BERT, Devlin et al. 2019).

  Attributes:
    mask_rate: share of the tokens to predict.
    whole_words: whether a word is masked with all of its tokens; Chinese needs jieba.
  """

  mask_rate: float = 0.15
  whole_words: bool = True

  name = "masked"
  visibility = "bidirectional"
  writes_text = False

  def __post_init__(self):
    super().__post_init__()
    check_mask_rate(self.mask_rate)

  def row_maker(self, tokenizer: Tokenizer, data: DataOptions, *, training: bool) -> MakeRow:
    return denoising.MaskedLanguageModel(
      tokenizer, data.sequence_length, self.mask_rate, self.whole_words
    )


@dataclasses.dataclass(frozen=True)
class SpanCorruption(TextTask):
  """Writes the spans that are missing in the encoder's text (T5, Raffel et al. 2020).

  Attributes:
    mask_rate: share of the tokens to predict.
    mean_span: mean number of tokens in a span.
  """

  mask_rate: float = 0.15
  mean_span: float = 3.0

  name = "span_corruption"
  has_encoder = True

  def __post_init__(self):
    super().__post_init__()
    check_mask_rate(self.mask_rate)
    check_number("task.mean_span", self.mean_span, at_least=1)

  def row_maker(self, tokenizer: Tokenizer, data: DataOptions, *, training: bool) -> MakeRow:
    return denoising.SpanCorruption(
      tokenizer, data.sequence_length, self.mask_rate, self.mean_span, data.decoder_start
    )

  def window_length(self, data: DataOptions) -> int:
    return self._lengths(data)[0]

  def target_length(self, data: DataOptions) -> int:
    return self._lengths(data)[1]

  def batch_fields(self, data: DataOptions) -> dict[str, tuple[tuple[int, ...], Any]]:
    names = ("encoder_inputs", "encoder_segment_ids", "encoder_positions")
    return dict.fromkeys(names, ((data.sequence_length,), jnp.int32))

  def _lengths(self, data: DataOptions) -> tuple[int, int]:
    return denoising.span_corruption_lengths(data.sequence_length, self.mask_rate, self.mean_span)


def check_mask_rate(rate: float) -> None:
  """Raises UserError for a `task.mask_rate` that leaves nothing to predict, or to predict from."""
  check_number("task.mask_rate", rate, above=0, below=1)
