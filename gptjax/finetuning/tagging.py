"""The task of tagging the words of a text, such as names of people and places.

Axes: B batch, T positions, K labels.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from gptjax.data.batch import Batch
from gptjax.errors import UserError
from gptjax.finetuning import records
from gptjax.finetuning.label_encoding import Example, LabelEncoder, Target
from gptjax.finetuning.labels import Answer, ClassTask, LabelOutputs
from gptjax.finetuning.records import Record
from gptjax.scores import scores
from gptjax.scores.scores import Measure


@dataclasses.dataclass(frozen=True)
class Tagging(ClassTask):
  """Predicts a tag for each word, such as B-PER, at the word's first token, or at its last token in
  a causal model.

  Attributes:
    label_key: key of a record's tags.
    word_separator: text between words; '' for Chinese characters.
  """

  label_key: str = "tags"
  word_separator: str = " "

  name = "tagging"
  is_by_word = True
  metrics = ("f1", "precision", "recall")
  best_metric = "val/f1"
  library = "seqeval.metrics.sequence_labeling"
  text_key = "tokens"
  transformers_head = ("TokenClassification", None)

  @property
  def between(self) -> str:
    return self.word_separator

  def read_texts(self, fields: Mapping[str, Any]) -> Sequence[Any]:
    ((text_key, words),) = fields.items()
    records.check_list(words, text_key, "words")
    if all(isinstance(word, str) and not word.strip() for word in words):
      raise UserError("an empty text; fill it or leave the record out.")
    return words

  def read_label(self, label: Any, texts: Sequence[Any]) -> tuple[int, ...]:
    tags = records.check_list(label, self.label_key, "labels")
    if len(tags) != len(texts):
      raise UserError(f"{len(tags)} tags for {len(texts)} words; each word needs one.")
    return tuple(records.label_index(tag, self.labels) for tag in tags)

  def blank_label(self, texts: Sequence[Any]) -> tuple[int, ...]:
    return (0,) * len(texts)

  def label_names(self, label: Any) -> list[str]:
    return [records.label_text(tag) for tag in records.check_list(label, self.label_key, "labels")]

  def pieces(self, record: Record, encoder: LabelEncoder) -> list[str]:
    first, *others = record.texts
    return [first, *(encoder.after(self.word_separator, word) for word in others)]

  def example(self, record: Record, pieces: list[np.ndarray], encoder: LabelEncoder) -> Example:
    layout = encoder.lay_out([np.concatenate(pieces)])
    start, stop = layout.first
    targets = []
    for word, tag in zip(pieces, record.label, strict=True):
      end = start + len(word)
      place = end - 1 if encoder.scores_at == "last" else start
      if len(word) and place < stop:
        targets.append(Target(place, tag))
      start = end
    return Example(
      record.name,
      layout.tokens,
      tuple(targets),
      truncated=layout.truncated,
      empty_words=sum(not len(word) for word in pieces),
    )

  def answers(self, batch: Batch, logits_BTK: np.ndarray) -> Iterator[Answer]:
    examples = np.argwhere(batch.weights > 0)
    segments = batch.segment_ids[tuple(examples.T)]
    for row, segment in dict.fromkeys(zip(examples[:, 0], segments, strict=True)):
      inside = (batch.segment_ids[row] == segment) & (batch.weights[row] > 0)
      words = np.flatnonzero(inside)
      words = words[np.argsort(batch.positions[row, words])]
      p_WK = special.softmax(logits_BTK[row, words], axis=-1)
      yield Answer(batch.targets[row, words], p_WK.argmax(-1), p_WK)

  def report(self, outputs: LabelOutputs) -> str:
    """Precision, recall and F1 of each type of entity (seqeval)."""
    golds, predicted = ([self.say(x) for x in side] for side in (outputs.golds, outputs.predicted))
    seqeval = scores.need("seqeval.metrics.sequence_labeling")
    return seqeval.classification_report(golds, predicted, digits=4, zero_division=0)

  def join(self, answers: Sequence[Answer]) -> Answer:
    """The tags of all words."""
    parts = ((one.gold, one.predicted, one.probabilities) for one in answers)
    return Answer(*map(np.concatenate, zip(*parts, strict=True)))

  def measures(self, outputs: LabelOutputs) -> dict[str, Measure]:
    golds, predicted = outputs.golds, outputs.predicted
    return scores.tagging(*([self.say(tags) for tags in side] for side in (golds, predicted)))

  def say(self, answer: np.ndarray) -> list[str]:
    return [self.labels[tag] for tag in answer]

  def say_probabilities(self, answer: Answer) -> list[float]:
    """The probability of each word's tag."""
    return answer.probabilities.max(-1).tolist()
