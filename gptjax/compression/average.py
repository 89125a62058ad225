"""Averages of models that were trained from one: means, soups, task arithmetic and its relatives.

A model is its parameters by name, here numpy arrays [...], float32. Sums are float64.
"""

import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from gptjax.compression.calibration import ROWS
from gptjax.compression.models import (
  calibration_rows,
  load_whole,
  params_of,
  with_params,
)
from gptjax.data.batch import Batch
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError, check_choice, check_number
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT, describe_parameters, model_graph
from gptjax.objectives.forward import token_loss
from gptjax.small_files import check_new, new_folder
from gptjax.training.pretrained import labels_of, read_model_config, save_model

Params = Mapping[str, np.ndarray]
# Of held-out data; higher is better.
Score = Callable[[Params], float]

# The methods, and the options of each with their defaults.
METHODS: Mapping[str, Mapping[str, Any]] = {
  "mean": {"weights": None},
  "greedy": {"data": None, "rows": 128, "length": 1024, "seed": 0},
  "slerp": {"fraction": 0.5},
  "task": {"base": None, "scale": 1.0},
  "ties": {"base": None, "scale": 1.0, "density": 0.2},
  "dare": {"base": None, "scale": 1.0, "drop": 0.9, "seed": 0},
}
# Cosine from which two vectors count as parallel.
_PARALLEL = 0.9995


@dataclasses.dataclass(frozen=True)
class Averaged:
  """What was made: the number of parameters, and the checkpoints that are in it."""

  parameters: int
  ingredients: tuple[str, ...]


def average(
  checkpoints: Sequence[str],
  target: Path,
  *,
  method: str,
  ema: bool = False,
  progress: bool = True,
  **options: Any,
) -> Averaged:
  """Writes an average of models into a new folder. All of them are in memory at a time.

  The methods and their options, all with defaults but `base` and `data`:
    'mean': `weights`, one for each checkpoint, which are divided by their sum; None is equal ones.
    'greedy': `greedy_soup` by the loss on text, `data`, `rows`, `length` and `seed` as for
      `read_rows`.
    'slerp': `fraction`, see `slerp`.
    'task': `base`, a checkpoint, and `scale`, see `add_tasks`.
    'ties': also `density`, see `merge_ties`.
    'dare': also `drop` and `seed`, see `drop_and_rescale`; then as 'task'.

  Args:
    checkpoints: as for `load_model`. The tokenizer and the names of labels are the first one's.
    target: a folder that does not exist or is empty. It is written completely or not at all.
    method: one of `METHODS`.
    ema: take the moving averages of the checkpoints' weights, though not of `base`.
    progress: show what is going on.
    **options: those of the method; None is the default.

  Raises:
    UserError: an option is not one of the method or cannot be used; the models have other shapes,
      tokens or labels; a checkpoint cannot be read; the target exists or cannot be written.
  """
  check_new(target)
  settings = _check(checkpoints, method, options)
  named = [*checkpoints, settings["base"]] if "base" in settings else list(checkpoints)
  loaded, tokenizer = load_alike(named, ema=ema, averaged=len(checkpoints), progress=progress)
  config, labels = loaded[0].config, labels_of(named[0])
  models = [jax.device_get(params_of(model)) for model in loaded]
  base = models.pop() if "base" in settings else None
  ingredients = tuple(map(str, checkpoints))
  match method:
    case "mean":
      result = mean(models, settings["weights"])
    case "greedy":
      text = {name: settings[name] for name in METHODS["greedy"]}
      tokens_RT = calibration_rows(tokenizer=tokenizer, **text)
      result, chosen = greedy_soup(models, text_score(config, tokens_RT), progress=progress)
      ingredients = tuple(ingredients[index] for index in chosen)
    case "slerp":
      stacked = {name for name, x in describe_parameters(config).items() if "layers" in x.axes}
      result = slerp(*models, settings["fraction"], stacked)
    case "task":
      result = add_tasks(base, _tasks(base, models), settings["scale"])
    case "ties":
      result = merge_ties(base, _tasks(base, models), settings["scale"], settings["density"])
    case "dare":
      tasks = [
        drop_and_rescale(task, settings["drop"], (settings["seed"], number))
        for number, task in enumerate(_tasks(base, models))
      ]
      result = add_tasks(base, tasks, settings["scale"])
  with new_folder(target) as folder:
    save_model(folder, with_params(config, result), tokenizer, labels)
  return Averaged(sum(x.size for x in result.values()), ingredients)


def load_alike(
  checkpoints: Sequence[str], *, ema: bool, averaged: int | None = None, progress: bool
) -> tuple[list[GPT], Tokenizer]:
  """Loads models of one shape, and the tokenizer of the first.

  Args:
    checkpoints: as for `load_model`.
    ema: take the moving averages of the weights, of the first `averaged` models or of all.
    averaged: see `ema`.
    progress: show bars on stderr.

  Raises:
    UserError: the models have other shapes, tokens or labels, or one cannot be read.
  """
  first, labels = checkpoints[0], labels_of(checkpoints[0])
  config = read_model_config(first)
  for other in checkpoints[1:]:
    theirs = read_model_config(other)
    if differences := config.differences(theirs) + config.head_differences(theirs):
      raise UserError(f"{first} and {other} are other models: {'; '.join(differences)}.")
    if labels_of(other) != labels:
      raise UserError(f"{first} and {other} have other labels.")
  models, tokenizer = [], None
  bar = tqdm(checkpoints, "Loading", unit="model", disable=not progress)
  for number, checkpoint in enumerate(bar):
    own = ema and (averaged is None or number < averaged)
    model, found = load_whole(checkpoint, ema=own, progress=progress)
    tokenizer = tokenizer or found
    if not found.means_the_same(tokenizer):
      raise UserError(f"{first} and {checkpoint} have other tokens.")
    models.append(model)
  return models, tokenizer


def _check(checkpoints: Sequence[str], method: str, options: Mapping[str, Any]) -> dict[str, Any]:
  """The options of a method, given or by default; UserError for what it cannot use."""
  check_choice("--method", method, METHODS)
  given = {name: value for name, value in options.items() if value is not None}
  for name in given:
    if name not in METHODS[method]:
      raise UserError(f"--{name} is not an option of --method={method}; leave it out.")
  settings = dict(METHODS[method]) | given
  if not checkpoints or (method == "slerp" and len(checkpoints) != 2):
    needed = "exactly 2" if method == "slerp" else "at least 1"
    raise UserError(f"--method={method} takes {needed} checkpoints, not {len(checkpoints)}.")
  needs = {"base": "the model that the others were trained from", "data": "text to score them on"}
  for name in needs.keys() & settings.keys():
    if not settings[name]:
      raise UserError(f"--method={method} needs --{name}, {needs[name]}.")
  if weights := settings.get("weights"):
    if len(weights) != len(checkpoints):
      raise UserError(f"--weights has {len(weights)} numbers for {len(checkpoints)} checkpoints.")
    for weight in weights:
      check_number("--weights", weight, at_least=0)
    check_number("the sum of --weights", sum(weights), above=0)
  bounds = {"fraction": {"at_least": 0, "at_most": 1}, "scale": {}}
  bounds |= {"density": {"above": 0, "at_most": 1}, "drop": {"at_least": 0, "below": 1}}
  for name in bounds.keys() & settings.keys():
    check_number(f"--{name}", settings[name], **bounds[name])
  return settings


def mean(models: Sequence[Params], weights: Sequence[float] | None = None) -> dict[str, np.ndarray]:
  """The mean of models, weighted by `weights` over their sum."""
  shares = np.ones(len(models)) if weights is None else np.asarray(weights, np.float64)
  shares = shares / shares.sum()
  return {
    name: sum(
      share * x[name].astype(np.float64) for share, x in zip(shares, models, strict=True)
    ).astype(np.float32)
    for name in models[0]
  }


def greedy_soup(
  models: Sequence[Params], score: Score, *, progress: bool = False
) -> tuple[dict[str, np.ndarray], list[int]]:
  """The mean of those models that make it better, and which they are, in the order of their scores.

  Wortsman et al. 2022, arXiv:2203.05482, recipe 1: beginning with the best, each model stays if the
  mean is no worse with it on held-out data.
  """
  scores = [score(model) for model in tqdm(models, "Scoring", unit="model", disable=not progress)]
  best, *others = np.argsort(-np.asarray(scores), kind="stable").tolist()
  chosen, soup, reached = [best], mean([models[best]]), scores[best]
  for index in tqdm(others, "Soup", unit="model", disable=not progress):
    candidate = mean([models[i] for i in [*chosen, index]])
    if (found := score(candidate)) >= reached:
      chosen, soup, reached = [*chosen, index], candidate, found
  return soup, chosen


def text_score(config: ModelConfig, tokens_RT: np.ndarray) -> Score:
  """Minus the mean cross-entropy, in nats, of the next token in rows of text, as a score.

  Raises:
    UserError: the model does not predict the next token of a text.
  """
  if config.visibility != "causal" or config.encoder_layers or config.label_head.num_labels:
    raise UserError(
      "--method=greedy scores models by the loss of the next token; this one has none."
    )
  graph = model_graph(config)

  @jax.jit
  def loss(params, tokens_RT):
    inputs, targets = tokens_RT[:, :-1], tokens_RT[:, 1:]
    ones = jnp.ones_like(inputs)
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    batch = Batch(inputs, targets, ones.astype(jnp.float32), ones, positions)
    return token_loss(nnx.merge(graph, params), batch).cross_entropy

  def score(params: Params) -> float:
    placed = nnx.to_pure_dict(nnx.state(with_params(config, params), nnx.Param))
    starts = range(0, len(tokens_RT), ROWS)
    total = sum(float(loss(placed, tokens_RT[start : start + ROWS])) for start in starts)
    return -total / tokens_RT[:, 1:].size

  return score


def slerp(
  a: Params, b: Params, fraction: float, stacked: Container[str] = ()
) -> dict[str, np.ndarray]:
  """The points at a fraction of the arcs from a's parameters to b's (Shoemake 1985).

  Each parameter is one vector, or one for each layer if its name is in `stacked`. Where two vectors
  are nearly parallel or one is 0, the point is on the line between them.
  """

  def between(name: str) -> np.ndarray:
    rows = len(a[name]) if name in stacked else 1
    x, y = (one[name].astype(np.float64).reshape(rows, -1) for one in (a, b))
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosine = np.divide((x * y).sum(1), lengths, out=np.ones(rows), where=lengths > 0)
    straight = np.abs(cosine) > _PARALLEL
    angle = np.arccos(np.where(straight, 0.0, cosine))
    of_x = np.where(straight, 1 - fraction, np.sin((1 - fraction) * angle) / np.sin(angle))
    of_y = np.where(straight, fraction, np.sin(fraction * angle) / np.sin(angle))
    point = of_x[:, None] * x + of_y[:, None] * y
    return point.astype(np.float32).reshape(a[name].shape)

  return {name: between(name) for name in a}


def _tasks(base: Params, models: Sequence[Params]) -> list[dict[str, np.ndarray]]:
  """What training added to the base in each model, its task vector."""
  return [{name: x - base[name] for name, x in model.items()} for model in models]


def add_tasks(base: Params, tasks: Sequence[Params], scale: float) -> dict[str, np.ndarray]:
  """base + scale * the sum of task vectors (Ilharco et al. 2022, arXiv:2212.04089, section 2)."""
  return {
    name: x + np.float32(scale) * sum(task[name] for task in tasks) for name, x in base.items()
  }


def merge_ties(
  base: Params, tasks: Sequence[Params], scale: float, density: float
) -> dict[str, np.ndarray]:
  """Merges task vectors without their conflicts (Yadav et al. 2023, arXiv:2306.01708, algorithm 1).

  Of each task vector the share `density` with the largest magnitudes stays, over all parameters at
  once. The sign of an element is that of the sum over tasks, and the result is the mean of those
  that stay and have this sign; `scale` times it is added to the base.
  """
  thresholds = []
  for task in tasks:
    magnitudes = np.concatenate([np.abs(x).ravel() for x in task.values()])
    place = magnitudes.size - max(1, round(density * magnitudes.size))
    thresholds.append(np.partition(magnitudes, place)[place])

  def merged(name: str) -> np.ndarray:
    trimmed = [
      np.where(np.abs(task[name]) >= least, task[name], 0)
      for task, least in zip(tasks, thresholds, strict=True)
    ]
    sign = np.sign(sum(trimmed))
    agreeing = [np.where(np.sign(x) == sign, x, 0) for x in trimmed]
    count = sum((x != 0).astype(np.float32) for x in agreeing)
    return base[name] + np.float32(scale) * sum(agreeing) / np.maximum(count, 1)

  return {name: merged(name) for name in base}


def drop_and_rescale(task: Params, drop: float, seed: Sequence[int]) -> dict[str, np.ndarray]:
  """Sets each element of a task vector to 0 with probability `drop`, and divides the others by
  1 - drop, so that the expectation stays (DARE, Yu et al. 2023, arXiv:2311.03099, section 3.2)."""
  rng = np.random.default_rng(seed)
  factor = np.float32(1 / (1 - drop))
  return {
    name: np.where(rng.random(x.shape, np.float32) < drop, np.float32(0), x * factor)
    for name, x in task.items()
  }
