"""Structured pruning: a smaller dense model of the layers, heads and channels that matter most.

Importance is measured once, on the whole model. What is cut of a parameter is told by its axes.

Axes: R rows, T positions, M tokens of all rows, D width, L layers, N query heads, K key-value
heads, G query heads of one key-value head, F feed-forward width, I inputs of a projection.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.typing import ArrayLike
from tqdm import tqdm

from gptjax.compression.calibration import walk
from gptjax.compression.models import calibration_rows, load_whole, params_of, with_params
from gptjax.errors import UserError, check_number
from gptjax.model.config import ModelConfig, shortest_period
from gptjax.model.gpt import GPT, ParameterInfo, count_parameters, describe_parameters
from gptjax.small_files import check_new, new_folder
from gptjax.training.pretrained import labels_of, read_model_config, save_model

# The field of the config that is the size of an axis.
_FIELDS = {"embed": "embed_dim", "heads": "num_heads", "kv_heads": "num_kv_heads", "mlp": "mlp_dim"}


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of the smaller model; None stays as it is.

  Attributes:
    layers: number of layers.
    mlp_dim: feed-forward channels.
    kv_heads: key-value heads, which go with all their query heads.
    heads: query heads, as many for each key-value head that stays; None is all that go with these.
      In multi-head attention either of the two is both.
    embed_dim: width of the residual stream. The width of a head stays.
  """

  layers: int | None = None
  mlp_dim: int | None = None
  kv_heads: int | None = None
  heads: int | None = None
  embed_dim: int | None = None

  def check(self, config: ModelConfig) -> None:
    """Raises UserError for a size that a model of this config cannot be cut to."""
    fields = {"layers": "num_layers", "kv_heads": "num_kv_heads", "heads": "num_heads"}
    asked = {name: size for name, size in vars(self).items() if size is not None}
    if not asked:
      known = ", ".join(f"--{name}" for name in vars(self))
      raise UserError(f"nothing to cut: give one or more of {known}.")
    for name, size in asked.items():
      check_number(f"--{name}", size, at_least=1, at_most=getattr(config, fields.get(name, name)))
    kv_heads, heads = self.heads_of(config)
    if heads % kv_heads or heads // kv_heads > config.num_heads // config.num_kv_heads:
      raise UserError(
        f"--heads={heads} is not 1 to {config.num_heads // config.num_kv_heads} times the "
        f"{kv_heads} key-value heads that stay."
      )
    scaled = config.transfer.parametrization
    obstacles = [
      ("mlp_dim", config.experts.count, "model.experts, whose channels are not measured"),
      ("embed_dim", config.head.pooler, "model.head.pooler, which is as wide"),
      ("embed_dim", config.head.transform, "model.head.transform, which is as wide"),
      ("embed_dim", scaled != "standard", f"model.transfer.parametrization={scaled!r}"),
      ("layers", scaled == "completep", f"model.transfer.parametrization={scaled!r}"),
    ]
    kind, attention = config.position.kind, config.attention
    for name in ("kv_heads", "heads"):
      obstacles += [
        (name, kind in ("alibi", "t5"), f"model.position.kind={kind!r}, which knows each head"),
        (name, attention.qk_norm and not attention.qk_norm_per_head, "a norm over all heads"),
      ]
    for name, holds, what in obstacles:
      if name in asked and holds:
        raise UserError(f"--{name} cannot be cut in a model with {what}; leave it out.")

  def heads_of(self, config: ModelConfig) -> tuple[int, int]:
    """The key-value heads and the query heads that stay."""
    group = config.num_heads // config.num_kv_heads
    implied = self.heads if group == 1 else None
    kv_heads = self.kv_heads or implied or config.num_kv_heads
    return kv_heads, self.heads or kv_heads * group


@dataclasses.dataclass(frozen=True)
class Importance:
  """How much each part of a model matters on some text; the larger, the more.

  Attributes:
    layers: [L], block influence: 1 - the mean cosine of a layer's input and output (Men et al.
      2024, arXiv:2403.03853, equation 1).
    mlp: [L, F], the mean absolute input of mlp/down (Muralidharan et al. 2024, arXiv:2407.14679,
      section 2.2); [L, 0] in a mixture of experts.
    heads: [L, N], the mean square of the input of attention/out, summed over a head.
    embed: [D], the mean absolute input of attention and of the feed-forward network, which are
      outputs of norms, summed over the layers.
  """

  layers: np.ndarray
  mlp: np.ndarray
  heads: np.ndarray
  embed: np.ndarray


@dataclasses.dataclass(frozen=True)
class Shrunk:
  """What became of a model: the numbers of parameters, the layers that stayed, from 0, and the
  block influence of each layer that there was."""

  parameters_before: int
  parameters: int
  layers: tuple[int, ...]
  influence: tuple[float, ...]


def shrink(
  checkpoint: epath.PathLike,
  target: Path,
  sizes: Sizes,
  *,
  data: str,
  rows: int = 128,
  length: int = 2048,
  seed: int = 0,
  ema: bool = False,
  progress: bool = True,
) -> Shrunk:
  """Writes the smaller model into a new folder; it is a start for training, not yet a good model.

  Args:
    checkpoint: as for `load_model`.
    target: a folder that does not exist or is empty. It is written completely or not at all.
    sizes: what is left.
    data: text to measure importance on, with `rows`, `length` and `seed` as for `read_rows`.
    ema: take the moving average of a run's weights.
    progress: show a bar.

  Raises:
    UserError: a size does not fit the model; the checkpoint or the text cannot be read; the target
      exists or cannot be written.
  """
  check_new(target)
  sizes.check(read_model_config(checkpoint))
  labels = labels_of(checkpoint)
  model, tokenizer = load_whole(checkpoint, ema=ema, progress=progress)
  tokens_RT = calibration_rows(data, tokenizer, rows=rows, length=length, seed=seed)
  importance = measure(model, tokens_RT, progress=progress)
  kept = choose(importance, sizes, model.config)
  smaller = cut(model, kept)
  with new_folder(target) as folder:
    save_model(folder, smaller, tokenizer, labels)
  return Shrunk(
    count_parameters(model.config),
    count_parameters(smaller.config),
    tuple(kept["layers"].tolist()),
    tuple(importance.layers.tolist()),
  )


def measure(model: GPT, tokens_RT: np.ndarray, *, progress: bool = False) -> Importance:
  """Measures importance on rows of tokens, int32; UserError as `walk`."""
  config, tokens = model.config, tokens_RT.size
  influence, mlp, heads, embed = [], [], [], np.zeros(config.embed_dim, np.float32)
  before = None
  for layer in tqdm(walk(model, tokens_RT), "Measuring", config.num_layers, disable=not progress):
    if before is not None:
      influence.append(_influence(before, layer.inputs, tokens))
    before = layer.inputs
    found = jax.device_get(layer.measure(_activity))
    if "mlp/down" in found:
      mlp.append(found["mlp/down"]["absolute"] / tokens)
    squares = found["attention/out"]["squares"].reshape(config.num_heads, config.head_dim)
    heads.append(squares.sum(1) / tokens)
    # Query, key and value read the same; so do the two sides of a gated network.
    for projection in ("attention/query", "mlp/up"):
      if projection in found:
        embed += found[projection]["absolute"] / tokens
  influence.append(_influence(before, layer.outputs(), tokens))
  shape = (config.num_layers, -1)
  return Importance(np.array(influence), np.reshape(mlp, shape), np.reshape(heads, shape), embed)


def choose(importance: Importance, sizes: Sizes, config: ModelConfig) -> dict[str, np.ndarray]:
  """The indices that stay, in order, by the name of an axis: [n], or [layers that stay, n]."""
  layers = _top(importance.layers, sizes.layers or config.num_layers)
  kept = {"layers": layers}
  if sizes.mlp_dim:
    kept["mlp"] = _top(importance.mlp[layers], sizes.mlp_dim)
  if sizes.kv_heads or sizes.heads:
    kv_heads, heads = sizes.heads_of(config)
    by_group = importance.heads[layers].reshape(len(layers), config.num_kv_heads, -1)
    groups = _top(by_group.sum(2), kv_heads)
    within = _top(np.take_along_axis(by_group, groups[..., None], 1), heads // kv_heads)
    kept["kv_heads"] = groups
    kept["heads"] = (groups[..., None] * by_group.shape[2] + within).reshape(len(layers), -1)
  if sizes.embed_dim:
    kept["embed"] = _top(importance.embed, sizes.embed_dim)
  return kept


def cut(model: GPT, kept: Mapping[str, np.ndarray]) -> GPT:
  """The model of these indices of the axes, as `choose` returns them, in a config of its own."""
  config, parameters = model.config, describe_parameters(model.config)
  kinds = config.layer_pattern * (config.num_layers // len(config.layer_pattern))
  pattern = shortest_period(tuple(kinds[index] for index in kept["layers"]))
  changes = {"num_layers": len(kept["layers"]), "layer_pattern": pattern}
  fields = {
    "mlp": "mlp_dim",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "embed": "embed_dim",
  }
  changes |= {field: kept[axis].shape[-1] for axis, field in fields.items() if axis in kept}
  params = {name: _cut(x, parameters[name], kept) for name, x in params_of(model).items()}
  return with_params(config.replace(changes), params)


def _cut(x: ArrayLike, info: ParameterInfo, kept: Mapping[str, np.ndarray]) -> np.ndarray:
  x = np.asarray(x)
  for axis, name in enumerate(info.axes):
    indices = kept.get(name)
    if indices is None:
      continue
    if indices.ndim == 1:
      x = np.take(x, indices, axis)
    else:
      # The layers, the first axis, have been cut before.
      parts = zip(x, indices, strict=True)
      x = np.stack([np.take(of_layer, own, axis - 1) for of_layer, own in parts])
  return x


def _top(scores: np.ndarray, count: int) -> np.ndarray:
  """Indices of the largest along the last axis, in their order; of equals the first."""
  return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :count], axis=-1)


def _activity(x_MI: jax.Array) -> dict[str, jax.Array]:
  return {"absolute": jnp.abs(x_MI).sum(0), "squares": jnp.square(x_MI).sum(0)}


@jax.jit
def _sum_cosines(x_RTD: jax.Array, y_RTD: jax.Array) -> jax.Array:
  x, y = x_RTD.astype(jnp.float32), y_RTD.astype(jnp.float32)
  lengths = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
  return ((x * y).sum(-1) / jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny)).sum()


def _influence(before: list[jax.Array], after: list[jax.Array], tokens: int) -> float:
  return 1 - sum(float(_sum_cosines(x, y)) for x, y in zip(before, after, strict=True)) / tokens
