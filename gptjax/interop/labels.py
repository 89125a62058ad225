"""Label heads in the format of `transformers`, and the names of the labels."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptjax import tree
from gptjax.errors import UserError
from gptjax.interop.fields import Fields, Rule
from gptjax.interop.tensors import Entry, linear
from gptjax.objectives.task import find_task
from gptjax.training.pretrained import Labels, number_labels

# Tasks that a head of `transformers` can be read as, by `LabelTask.transformers_head`.
_READ_AS = ("classification", "multi_label", "regression", "tagging", "span")
# Classes that score like another.
_ALIASES = {"NextSentencePrediction": "SequenceClassification"}
# The bias that can absorb a label bias for which a head has no place.
_FOLDS_INTO = "final_norm/bias"


@dataclasses.dataclass(frozen=True)
class LabelHead:
  """The head of a class of `transformers` that replaces the language model's.

  Attributes:
    theirs: name of the projection onto the labels.
    bias: whether that has a bias.
    pooler: name of the pooler that it reads, if it reads one.
    pooler_activation: the pooler's activation.
    prefix: beginning of the names of the model's tensors, if not the family's prefix.
  """

  theirs: str
  bias: bool = True
  pooler: str = ""
  pooler_activation: str = "tanh"
  prefix: str = ""

  @property
  def entries(self) -> Sequence[Entry]:
    return [
      *linear(self.theirs, "label_head"),
      *(linear(self.pooler, "pooler") if self.pooler else ()),
    ]

  @property
  def rule(self) -> Rule:
    """The rule that reads the number of labels and the properties of their head."""

    def read(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
      names = fields.take("id2label", None, dict | None)
      count = fields.take("num_labels", None, int | None)
      return {
        "label_head.num_labels": len(names) if names else count or 2,
        "label_head.bias": self.bias,
        "label_head.pooling": "pooler" if self.pooler else "none",
        "head.next_sentence": False,
        **({"head.pooler": True} if self.pooler else {}),
        "head.pooler_activation": self.pooler_activation,
      }

    return Rule(read, lambda config: {"num_labels": config.label_head.num_labels})


def transformers_task(labels: Labels) -> str:
  """The task in the name of a class of `transformers`, 'SequenceClassification'."""
  return find_task(labels.task).transformers_head[0]


def config_fields(labels: Labels) -> dict[str, Any]:
  """The fields of config.json that name the labels."""
  fields = {
    "id2label": {str(index): name for index, name in enumerate(labels.names)},
    "label2id": {name: index for index, name in enumerate(labels.names)},
  }
  problem = find_task(labels.task).transformers_head[1]
  return fields | ({"problem_type": problem} if problem else {})


def read_labels(values: Mapping[str, Any], task: str, source: str) -> Labels:
  """The labels that the fields of config.json name.

  Args:
    values: the fields.
    task: as in `transformers_task`.
    source: the file, for errors.

  Raises:
    UserError: the labels are not numbered from 0, or the problem is not known.
  """
  named = values.get("id2label") or dict(enumerate(number_labels(values.get("num_labels") or 2)))
  try:
    numbered = {int(index): str(name) for index, name in named.items()}
    names = tuple(numbered[index] for index in range(len(numbered)))
  except (AttributeError, KeyError, ValueError) as error:
    raise UserError(f"{source}: field 'id2label' is {named!r}, not names by 0, 1, ...") from error
  single = "regression" if len(names) == 1 else "single_label_classification"
  problem, task = values.get("problem_type") or single, _ALIASES.get(task, task)
  heads = {name: find_task(name).transformers_head for name in _READ_AS}
  for name, head in heads.items():
    if head in ((task, problem), (task, None)):
      return Labels(name, names)
  known = " or ".join(repr(known) for _, known in heads.values() if known)
  raise UserError(f"{source}: field 'problem_type' is {problem!r}; only {known} can be read.")


def can_fold_bias(parameters: Mapping[str, Any]) -> bool:
  """Whether a model with these parameters has a bias into which `fold_bias` can fold."""
  return _FOLDS_INTO in parameters


def fold_bias(params: Mapping[str, Any]) -> dict[str, Any]:
  """The parameters of an equivalent model without a label bias, W x + b = W (x + c).

  c is the smallest solution of W c = b, and goes into the bias of the norm that computes x.

  Raises:
    UserError: there is no such c, or float32 cannot hold it.
  """
  flat = dict(tree.named_leaves(params))
  b_K = np.asarray(flat.pop("label_head/bias"), np.float64)
  W_KD = np.asarray(flat["label_head/kernel"], np.float64).T
  before_D = np.asarray(flat[_FOLDS_INTO])
  after_D = (before_D + np.linalg.lstsq(W_KD, b_K)[0]).astype(np.float32)
  if np.abs(W_KD @ (after_D.astype(np.float64) - before_D) - b_K).max() > 1e-5 * np.abs(b_K).max():
    raise UserError(
      "the bias of the labels cannot go into that of the last norm, because the rows of their "
      "weights are not independent; fine-tune with --config.model.label_head.bias=false."
    )
  return flat | {_FOLDS_INTO: after_D}
