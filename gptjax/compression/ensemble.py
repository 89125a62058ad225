"""Ensembles: models that answer together, by the mean of their logits, in one checkpoint.

Axes: B batch, T positions, D width of a member, E width of all members, V vocabulary, K labels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.compression.average import load_alike
from gptjax.errors import UserError, check_number
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT, ParameterInfo
from gptjax.model.layers import Linear
from gptjax.model.stack import Cache
from gptjax.small_files import check_new, new_folder
from gptjax.training.adaptation import WholeModel
from gptjax.training.pretrained import labels_of, save_model

# The key of a checkpoint's config that says how many models are in it.
KEY = "ensemble"


class Ensemble(nnx.Module):
  """Decoders or classifiers of one shape, with the methods of a `GPT` that is used.

  Attributes:
    members: the models.
    config: that of a member, with the layers of all: what a cache has to hold.
  """

  encoder = None

  def __init__(self, members: Sequence[GPT]):
    self.members = nnx.List(members)
    config = members[0].config
    self.config = config.replace({"num_layers": config.num_layers * len(members)})

  def __call__(self, tokens_BT: jax.Array, **options: Any) -> jax.Array:
    return self.logits(self.hidden(tokens_BT, **options)[0])

  @property
  def label_head(self) -> Linear | None:
    return self.members[0].label_head

  def hidden(
    self, tokens_BT: jax.Array, *, cache: Cache | None = None, **options: Any
  ) -> tuple[jax.Array, Cache | None]:
    """The hidden states of all members side by side, [B, T, E], and the caches of their layers one
    after the other; arguments as for `GPT.hidden`."""
    each, found, written = self.members[0].config.num_layers, [], []
    for number, member in enumerate(self.members):
      own = None if cache is None else cache[number * each : (number + 1) * each]
      x_BTD, own = member.hidden(tokens_BT, cache=own, **options)
      found.append(x_BTD)
      written += own or []
    return jnp.concatenate(found, -1), None if cache is None else written

  def logits(self, x_BTE: jax.Array) -> jax.Array:
    """The mean of the members' logits, [B, T, V], float32."""
    parts = jnp.split(x_BTE, len(self.members), -1)
    return sum(m.logits(x) for m, x in zip(self.members, parts, strict=True)) / len(parts)

  def label_logits(self, x_BTE: jax.Array, *options: Any) -> jax.Array:
    """The mean of the members' scores of labels, [B, T, K], float32; as `GPT.label_logits`."""
    parts = jnp.split(x_BTE, len(self.members), -1)
    pairs = zip(self.members, parts, strict=True)
    return sum(member.label_logits(x, *options) for member, x in pairs) / len(parts)


@dataclasses.dataclass(frozen=True)
class Together(WholeModel):
  """A checkpoint that holds an ensemble of `members` models; see `WholeModel` for the interface."""

  members: int

  method = KEY

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> "Together":
    check_number(f"{KEY}.members", members := config.get("members"), at_least=2)
    return cls(members)

  def abstract_model(self, config: ModelConfig) -> Ensemble:
    own = config.replace({"num_layers": config.num_layers // self.members})
    return nnx.eval_shape(lambda: Ensemble([GPT(own, nnx.Rngs(0)) for _ in range(self.members)]))

  def trained(self, config: ModelConfig) -> dict[str, ParameterInfo]:
    raise UserError("an ensemble is not trained: train its members, or distil it into one model.")

  def plain(self, model: GPT) -> GPT:
    raise UserError(
      f"the checkpoint is an ensemble of {self.members} models and no single one: take one of "
      "those that it was made from."
    )


def put_together(
  checkpoints: Sequence[str], target: Path, *, ema: bool = False, progress: bool = True
) -> Ensemble:
  """Writes an ensemble into a new folder, written completely or not at all.

  Args:
    checkpoints: as for `load_model`. The tokenizer and the names of labels are the first one's.
    target: a folder that does not exist or is empty.
    ema: take the moving averages of the weights.
    progress: show bars on stderr.

  Raises:
    UserError: there are fewer than 2 models, they have other shapes, tokens or labels, or an
      encoder beside the decoder, or the target exists.
  """
  check_new(target)
  if len(checkpoints) < 2:
    raise UserError(f"--checkpoint={','.join(checkpoints)}: an ensemble needs at least 2 models.")
  models, tokenizer = load_alike(checkpoints, ema=ema, progress=progress)
  if models[0].encoder is not None:
    raise UserError(f"{checkpoints[0]} has an encoder beside its decoder: no ensemble of such.")
  whole = Ensemble(models)
  with new_folder(target) as folder:
    more = {KEY: {"members": len(models)}}
    save_model(folder, whole, tokenizer, labels_of(checkpoints[0]), more)
  return whole
