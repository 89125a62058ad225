"""How good the scores of labels are: of whole texts, of their words, or of spans of them.

Axes: B batch, T positions, K labels, N examples.
"""

import numpy as np

from gptjax.data.batch import Batch
from gptjax.objectives import scores
from gptjax.objectives.label_losses import answer_candidates
from gptjax.objectives.scores import Measure

# What `LabelOutputs.measures` knows of each objective.
METRICS = {
  "classification": ("accuracy", "f1_macro", "mcc", "ece"),
  "multi_label": ("exact_match", "f1_micro", "f1_macro"),
  "regression": ("spearman", "mean_absolute_error"),
  "tagging": ("f1", "precision", "recall"),
  "span": ("exact_match", "f1"),
}
LIBRARIES = {
  "classification": "sklearn.metrics",
  "multi_label": "sklearn.metrics",
  "regression": "scipy.stats",
  "tagging": "seqeval.metrics.sequence_labeling",
}
# Tokens of an answer, at most (Devlin et al. 2019, their code).
MAX_SPAN = 30


class LabelOutputs:
  """What is right and what a model says, of each example of some batches.

  golds, predicted: of 'classification' the index of a label, of 'tagging' a list of them in the
  order of the words, of 'span' (first, last) positions, of the others [K] values.
  probabilities: of 'classification', [K].
  """

  def __init__(self, objective: str):
    self.objective = objective
    self.golds, self.predicted, self.probabilities = [], [], []

  def add(self, batch: Batch, logits_BTK: np.ndarray) -> None:
    """Takes in a batch, on the host, and the scores of its labels."""
    logits_BTK = np.asarray(logits_BTK, np.float32)
    examples = np.argwhere(batch.weights > 0)
    match self.objective:
      case "tagging":
        segments = batch.segment_ids[tuple(examples.T)]
        for row, segment in dict.fromkeys(zip(examples[:, 0], segments, strict=True)):
          inside = (batch.segment_ids[row] == segment) & (batch.weights[row] > 0)
          words = np.flatnonzero(inside)
          words = words[np.argsort(batch.positions[row, words])]
          self.golds.append(batch.targets[row, words])
          self.predicted.append(logits_BTK[row, words].argmax(-1))
      case "span":
        may_answer_BT = np.asarray(answer_candidates(batch))
        for row, place in examples:
          inside = batch.segment_ids[row] == batch.segment_ids[row, place]
          candidates = np.flatnonzero(inside & may_answer_BT[row])
          candidates = candidates[np.argsort(batch.positions[row, candidates])]
          self.golds.append(tuple(batch.values[row, candidates].argmax(0)))
          self.predicted.append(best_span(logits_BTK[row, candidates]))
      case "classification":
        for row, place in examples:
          logits = logits_BTK[row, place]
          p = np.exp(logits - logits.max())
          self.golds.append(int(batch.targets[row, place]))
          self.predicted.append(int(p.argmax()))
          self.probabilities.append(p / p.sum())
      case _:
        for row, place in examples:
          logits = logits_BTK[row, place]
          self.golds.append(batch.values[row, place])
          self.predicted.append(logits > 0 if self.objective == "multi_label" else logits)

  def measures(self, labels: tuple[str, ...]) -> dict[str, Measure]:
    """The metrics of the objective, of the examples with given indices."""
    golds, predicted = self.golds, self.predicted
    match self.objective:
      case "classification":
        found = scores.classification(golds, predicted)
        correct = np.array(golds) == np.array(predicted)
        confidence = np.max(self.probabilities, axis=1)
        return found | {"ece": scores.calibration_error(confidence, correct)}
      case "multi_label":
        return scores.multi_label(np.array(golds) > 0, np.array(predicted))
      case "regression":
        gold_N, predicted_N = np.array(golds)[:, 0], np.array(predicted)[:, 0]
        return {
          "spearman": scores.spearman(gold_N, predicted_N),
          "mean_absolute_error": scores.mean_of(np.abs(gold_N - predicted_N)),
        }
      case "tagging":
        names = np.array(labels)
        return scores.tagging(
          [names[tags].tolist() for tags in golds], [names[tags].tolist() for tags in predicted]
        )
    return scores.spans(golds, predicted)


def best_span(logits_TK: np.ndarray) -> tuple[int, int]:
  """The first and the last position of the likeliest answer of at most MAX_SPAN tokens."""
  sums_TS = logits_TK[:, None, 0] + logits_TK[None, :, 1]
  allowed_TS = np.triu(np.ones_like(sums_TS, bool)) & np.tri(*sums_TS.shape, MAX_SPAN - 1, bool)
  first, last = np.unravel_index(np.where(allowed_TS, sums_TS, -np.inf).argmax(), sums_TS.shape)
  return int(first), int(last)
