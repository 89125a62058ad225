"""The task of finding the answer to a question in a context (SQuAD).

Axes: B batch, T and S positions, K = 2 columns: the first and the last token of the answer.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.data.batch import Batch
from gptjax.errors import UserError
from gptjax.finetuning.label_encoding import Example, LabelEncoder, Target
from gptjax.finetuning.labels import Answer, LabelOutputs, LabelTask
from gptjax.finetuning.records import Record
from gptjax.model.attention import same_segment
from gptjax.scores import scores
from gptjax.scores.scores import Measure

# Logit of a token that cannot be an answer; an infinity times 0 would be NaN.
_NEVER = -1e30
# Most tokens of an answer (code of Devlin et al. 2019).
MAX_SPAN = 30


@dataclasses.dataclass(frozen=True)
class Span(LabelTask):
  """Finds the part of a context that answers a question: its first and its last token.

  Attributes:
    pair_key: key of a record's context.
    label_key: key of its answers.
  """

  label_key: str = "answers"
  pair_key: str = "context"

  name = "span"
  metrics = ("exact_match", "f1")
  best_metric = "val/f1"
  columns = True
  num_labels = 2
  text_key = "question"
  transformers_head = ("QuestionAnswering", None)

  def __post_init__(self):
    super().__post_init__()
    if not self.pair_key:
      raise UserError("task='span' needs task.pair_key, the key of the context.")

  def read_label(self, label: Any, texts: Sequence[str]) -> tuple[int, int]:
    """Start and stop of the first of SQuAD's answers (Rajpurkar et al. 2016), in characters."""
    context = texts[1]
    match label:
      case {"text": [str(text), *_], "answer_start": [int(start), *_]}:
        if not text or start < 0 or not context.startswith(text, start):
          raise UserError(
            f"the answer {text!r} is not at character {start} of the context, where there is "
            f"{context[max(start, 0) :][: len(text)]!r}."
          )
        return start, start + len(text)
    form = '{"text": [TEXT, ...], "answer_start": [N, ...]}'
    raise UserError(f"the answer is not of the form {form}.")

  def pieces(self, record: Record, encoder: LabelEncoder) -> list[str]:
    question, context = record.texts
    start, stop = record.label
    # A space is part of the token after it.
    before, answer = context[:start].removesuffix(" "), context[start:stop]
    space = context[len(before) : start]
    return [question, before, encoder.after(space, answer), encoder.after("", context[stop:])]

  def example(self, record: Record, pieces: list[np.ndarray], encoder: LabelEncoder) -> Example:
    question, before, answer, after = pieces
    layout = encoder.lay_out([question, np.concatenate([before, answer, after])])
    # A tokenizer may have the space before the answer as a token of its own.
    decode = encoder.tokenizer.decode_bytes
    blank = len([*itertools.takewhile(lambda token: decode([token]).isspace(), answer)])
    start = layout.second[0] + len(before) + blank
    stop = layout.second[0] + len(before) + len(answer)
    fits = start < stop < layout.second[1]
    return Example(
      record.name,
      layout.tokens,
      (Target(layout.place),) if fits else (),
      layout.second,
      ((start, 0, 1.0), (stop - 1, 1, 1.0)),
      truncated=layout.truncated,
    )

  def loss_of_places(self, logits_BTK: jax.Array, batch: Batch, smoothing: float) -> jax.Array:
    """Mean of the cross-entropies of the answer's first and last token, among the context's tokens
    in the position's segment (Devlin et al. 2019, section 4.2)."""
    logp_BKTS = _log_probabilities(logits_BTK, batch)
    answer_BKS = batch.values.swapaxes(1, 2)
    among_BTS = same_segment(batch.segment_ids, batch.segment_ids)
    picked_BKTS = answer_BKS[:, :, None] * among_BTS[:, None]
    return -jnp.where(picked_BKTS > 0, picked_BKTS * logp_BKTS, 0.0).sum(-1).mean(1)

  def divergence(self, a_BTK: jax.Array, b_BTK: jax.Array, batch: Batch) -> jax.Array:
    """Divergence of the distributions over the context's tokens, averaged over first and last."""
    logp_a, logp_b = _log_probabilities(a_BTK, batch), _log_probabilities(b_BTK, batch)
    return ((jnp.exp(logp_a) - jnp.exp(logp_b)) * (logp_a - logp_b)).sum(-1).mean(1)

  def answers(self, batch: Batch, logits_BTK: np.ndarray) -> Iterator[Answer]:
    may_answer_BT = np.asarray(answer_candidates(batch))
    for row, place in np.argwhere(batch.weights > 0):
      inside = batch.segment_ids[row] == batch.segment_ids[row, place]
      candidates = np.flatnonzero(inside & may_answer_BT[row])
      candidates = candidates[np.argsort(batch.positions[row, candidates])]
      gold = tuple(int(one) for one in batch.values[row, candidates].argmax(0))
      yield Answer(gold, best_span(logits_BTK[row, candidates]))

  def measures(self, outputs: LabelOutputs) -> dict[str, Measure]:
    return scores.spans(outputs.golds, outputs.predicted)

  def say(self, answer: tuple[int, int]) -> list[int]:
    return list(answer)


def answer_candidates(batch: Batch) -> jax.Array:
  """Tokens of the context, which can be in an answer: bool [B, T]."""
  second_BT = batch.token_types == 1
  return second_BT & jnp.pad(second_BT[:, 1:], ((0, 0), (0, 1)))


def best_span(logits_TK: np.ndarray) -> tuple[int, int]:
  """The first and the last position of the likeliest answer of at most MAX_SPAN tokens."""
  sums_TS = logits_TK[:, None, 0] + logits_TK[None, :, 1]
  allowed_TS = np.triu(np.ones_like(sums_TS, bool)) & np.tri(*sums_TS.shape, MAX_SPAN - 1, bool)
  first, last = np.unravel_index(np.where(allowed_TS, sums_TS, -np.inf).argmax(), sums_TS.shape)
  return int(first), int(last)


def _log_probabilities(logits_BTK: jax.Array, batch: Batch) -> jax.Array:
  """log p of each token to be first or last, among the candidates in a position's segment:
  [B, K, T, S], `_NEVER` for other tokens."""
  among_BTS = same_segment(batch.segment_ids, batch.segment_ids)
  among_BTS &= answer_candidates(batch)[:, None, :]
  logits_BKTS = jnp.where(among_BTS[:, None], logits_BTK.swapaxes(1, 2)[:, :, None], _NEVER)
  return jax.nn.log_softmax(logits_BKTS)
