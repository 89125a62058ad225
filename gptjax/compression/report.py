"""What compression costs: a compressed model beside the one that it was made from.

Axes: R rows, T positions, V vocabulary.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from gptjax.compression.calibration import ROWS
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.inference.engine import Engine
from gptjax.inference.request import Request
from gptjax.model.gpt import GPT
from gptjax.scores import scores
from gptjax.scores.scores import Metric
from gptjax.training.pretrained import name_checkpoint

# Tokens of a prompt, and of an answer whose writing is timed; and how often.
PROMPT, ANSWER, REPEATS = 32, 64, 5


@dataclasses.dataclass(frozen=True)
class Quality:
  """How well a model predicts text, and how far it is from the original, with intervals over rows.

  Attributes:
    perplexity: of the model. original: of the original.
    ratio: perplexity over that of the original.
    kl: mean divergence of its predictions from the original's, nats a token.
    agreement: share of tokens for which both have the same likeliest one.
  """

  perplexity: Metric
  original: Metric
  ratio: Metric
  kl: Metric
  agreement: Metric


@dataclasses.dataclass(frozen=True)
class Speed:
  """Tokens a second of greedy answers of so many rows at once, the median, least and largest of
  `REPEATS`; and the price of a million of them."""

  rows: int
  tokens_per_second: float
  least: float
  largest: float
  price_per_million: float | None


def measure_quality(
  model: GPT, original: GPT, tokens_RT: np.ndarray, *, progress: bool = False
) -> Quality:
  """Predicts every token of rows but the first with both models.

  Raises:
    UserError: the models have other vocabularies.
  """
  if model.config.vocab_size != original.config.vocab_size:
    raise UserError(
      f"--checkpoint has a vocabulary of {model.config.vocab_size} and --original one of "
      f"{original.config.vocab_size}: their predictions cannot be compared."
    )
  graphs, params = zip(*(nnx.split(one) for one in (model, original)), strict=True)
  told: list[dict[str, jax.Array]] = []
  for start in tqdm(range(0, len(tokens_RT), ROWS), "predicting", disable=not progress):
    told.append(_compare(graphs, params, tokens_RT[start : start + ROWS]))
  found = {name: np.concatenate([one[name] for one in told]) for name in told[0]}

  def perplexity(name: str) -> scores.Measure:
    return lambda rows: float(np.exp(found[name][rows].mean()))

  measures = {
    "perplexity": perplexity("nats"),
    "original": perplexity("original"),
    "ratio": lambda rows: float(np.exp((found["nats"] - found["original"])[rows].mean())),
    "kl": scores.mean_of(found["kl"]),
    "agreement": scores.mean_of(found["agreement"]),
  }
  metrics = {name: scores.bootstrap(one, len(tokens_RT)) for name, one in measures.items()}
  return Quality(**metrics)


@functools.partial(jax.jit, static_argnames="graphs")
def _compare(graphs: Any, params: Any, tokens_RT: jax.Array) -> dict[str, jax.Array]:
  """Means over the tokens of each row."""

  def log_probs(graph, params) -> jax.Array:
    return jax.nn.log_softmax(nnx.merge(graph, params)(tokens_RT[:, :-1]))

  own_RTV, theirs_RTV = (log_probs(*pair) for pair in zip(graphs, params, strict=True))
  targets_RT1 = tokens_RT[:, 1:, None]

  def nats(log_probs_RTV: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(log_probs_RTV, targets_RT1, -1).mean((1, 2))

  same_RT = own_RTV.argmax(-1) == theirs_RTV.argmax(-1)
  return {
    "nats": nats(own_RTV),
    "original": nats(theirs_RTV),
    "kl": (jnp.exp(theirs_RTV) * (theirs_RTV - own_RTV)).sum(-1).mean(-1),
    "agreement": same_RT.astype(jnp.float32).mean(-1),
  }


def measure_speed(
  model: GPT, tokenizer: Tokenizer, tokens_RT: np.ndarray, *, rows: int, price: float | None = None
) -> Speed:
  """Times the engine while it continues the beginnings of rows, prompts not counted.

  Args:
    model: the model, in the format that it is stored in.
    tokenizer: the model's.
    tokens_RT: text, at least `PROMPT` tokens a row.
    rows: answers at the same time.
    price: of an hour of this machine.
  """
  engine = Engine(model, tokenizer, rows=rows, length=PROMPT + ANSWER)
  rates = []
  for repeat in range(REPEATS + 1):  # The first compiles.
    for row in range(rows):
      prompt = tokens_RT[(repeat * rows + row) % len(tokens_RT), :PROMPT]
      engine.submit(Request(prompt.tolist(), max_tokens=ANSWER, ignore_end=True))
    engine.step()  # Reads the prompts.
    written, start = 0, time.perf_counter()
    while not engine.idle:
      written += len(engine.running)
      engine.step()
    rates.append(written / (time.perf_counter() - start))
  rate = statistics.median(rates[1:])
  per_million = None if price is None else price / 3600 / rate * 1e6
  return Speed(rows, rate, min(rates[1:]), max(rates[1:]), per_million)


def describe(quality: Quality, speeds: Sequence[Speed], memory: Sequence[int]) -> str:
  """The report as lines of text; `memory` is the bytes of the model and of the original."""
  own, theirs = memory
  lines = [
    f"in memory: {own:,} bytes of parameters, {own / theirs:.3f} of {theirs:,}",
    f"perplexity: {_show(quality.perplexity)}, of the original {_show(quality.original)}",
    f"perplexity over the original's: {_show(quality.ratio)}",
    f"KL from the original, nats a token: {_show(quality.kl)}",
    f"same likeliest token: {_show(quality.agreement)}",
  ]
  for speed in speeds:
    line = f"{speed.rows} at once: {speed.tokens_per_second:.1f} tokens/s"
    line += f" ({speed.least:.1f} to {speed.largest:.1f})"
    if speed.price_per_million is not None:
      line += f", {speed.price_per_million:.4f} for a million tokens"
    lines.append(line)
  return "\n".join(lines)


def disk(checkpoint: str) -> int:
  """Bytes of the files of a checkpoint."""
  name = name_checkpoint(checkpoint).removeprefix("hf:").removeprefix("gguf:")
  path = Path(name).expanduser()
  files = [path] if path.is_file() else path.rglob("*")
  return sum(file.stat().st_size for file in files if file.is_file())


def _show(metric: Metric) -> str:
  interval = "" if metric.low is None else f" [{metric.low:.4f}, {metric.high:.4f}]"
  return f"{metric.value:.4f}{interval}"
