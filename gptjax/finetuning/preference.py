"""Reward modelling: the task of scoring the better of two answers higher.

Axes: B batch, T and S positions, K = 1 column: the reward.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.data.batch import Batch
from gptjax.errors import UserError
from gptjax.finetuning import records
from gptjax.finetuning.label_encoding import Example, LabelEncoder, Target
from gptjax.finetuning.labels import Answer, LabelOutputs, LabelTask
from gptjax.finetuning.records import Record
from gptjax.scores import scores
from gptjax.scores.scores import Measure


@dataclasses.dataclass(frozen=True)
class Preference(LabelTask):
  """Learns a reward for each answer to a prompt from pairs: the probability of the choice is
  sigmoid(chosen - rejected) (Bradley and Terry 1952; Ouyang et al. 2022, equation 1).

  The two answers of a record, each after the prompt, have at most half a row each.

  Attributes:
    prompt_key: key of a record's prompt.
    chosen_key: key of its better answer.
    rejected_key: key of its worse answer.
    separator: text between a prompt and an answer.
  """

  prompt_key: str = "prompt"
  chosen_key: str = "chosen"
  rejected_key: str = "rejected"
  separator: str = "\n"

  name = "preference"
  metrics = ("accuracy", "reward_margin")
  best_metric = "val/accuracy"
  transformers_head = ("SequenceClassification", "regression")
  columns = True
  num_labels = 1

  def record_keys(self, text_key: str) -> dict[str, str]:
    keys = ("prompt_key", "chosen_key", "rejected_key")
    return {f"task.{key}": getattr(self, key) for key in keys}

  def read(self, fields: Mapping[str, Any]) -> tuple[Sequence[Any], None]:
    texts = [*fields.values()]
    records.check_not_empty(texts)
    if texts[1] == texts[2]:
      raise UserError(f"{self.chosen_key!r} and {self.rejected_key!r} are the same text.")
    return texts, None

  def pieces(self, record: Record, encoder: LabelEncoder) -> list[str]:
    prompt, *answers = record.texts
    return [prompt, *(encoder.after(self.separator, answer) for answer in answers)]

  def example(self, record: Record, pieces: list[np.ndarray], encoder: LabelEncoder) -> Example:
    prompt, *answers = pieces
    specials = encoder.sequence_length - encoder.room
    room = encoder.sequence_length // 2 - specials
    texts = [np.concatenate([prompt, answer]) for answer in answers]
    chosen, rejected = (encoder.lay_out([text[:room]]) for text in texts)
    length = len(chosen.tokens)
    # Answers that are equal after cutting cannot be told apart.
    same = np.array_equal(chosen.tokens, rejected.tokens)
    return Example(
      record.name,
      np.concatenate([chosen.tokens, rejected.tokens]),
      () if same else (Target(chosen.place),),
      values=((chosen.place, 0, 1.0), (length + rejected.place, 0, -1.0)),
      truncated=any(len(text) > room for text in texts),
      segments=(length, len(rejected.tokens)),
    )

  def loss_of_places(self, logits_BTK: jax.Array, batch: Batch, smoothing: float) -> jax.Array:
    """-log p of the choice, at each position of the pair."""
    return -jax.nn.log_sigmoid(_margins(logits_BTK, batch))

  def divergence(self, a_BTK: jax.Array, b_BTK: jax.Array, batch: Batch) -> jax.Array:
    a_BT, b_BT = _margins(a_BTK, batch), _margins(b_BTK, batch)
    return (jax.nn.sigmoid(a_BT) - jax.nn.sigmoid(b_BT)) * (a_BT - b_BT)

  def answers(self, batch: Batch, logits_BTK: np.ndarray) -> Iterator[Answer]:
    """Margins between rewards; the right margin is above 0."""
    margins_BT = np.asarray(_margins(logits_BTK, batch))
    for row, place in np.argwhere(batch.weights > 0):
      yield Answer(True, float(margins_BT[row, place]))

  def measures(self, outputs: LabelOutputs) -> dict[str, Measure]:
    margins_N = np.array(outputs.predicted)
    return {
      "accuracy": scores.mean_of(margins_N > 0),
      "reward_margin": scores.mean_of(margins_N),
    }


def _margins(logits_BTK: jax.Array, batch: Batch) -> jax.Array:
  """The chosen answer's reward minus the rejected one's, at each position of their pair, [B, T].
  Two consecutive segments are a pair."""
  pairs_BT = (batch.segment_ids + 1) // 2
  same_BTS = (pairs_BT[:, :, None] == pairs_BT[:, None, :]).astype(jnp.float32)
  return jnp.einsum("bts,bs->bt", same_BTS, batch.values[..., 0] * logits_BTK[..., 0])
