"""Speculative decoding: cheap guesses of the next tokens, several of which one step checks.

Leviathan et al. 2023 (arXiv:2211.17192). Here a guess is right if it is the very token that the
model chooses at its place, whose randomness comes from the place alone: the answer, drawn or not,
is the one without guesses. A draft model that draws with the same randomness agrees often (the
Gumbel coupling of Daliri et al. 2025, arXiv:2408.07978).
"""

import statistics
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from flax import nnx

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.inference.reader import Reader, Row
from gptjax.inference.request import Answer
from gptjax.inference.sampling import Settings, choose, compilations
from gptjax.model.gpt import GPT, is_plain, model_graph
from gptjax.training.pretrained import load_model

# Guesses at a time: with one more token, rows of the product that a CPU makes at the cost of a few.
MOST = 7
# The share of the time that guesses may lose, and the steps that they may lose at a time.
_SHARE, _PATIENCE = 0.01, 2
# Steps without guesses that are measured first, the last ones whose seconds are kept, and steps
# with guesses after which one is without.
_FIRST, _MEASURED, _REFRESH = 3, 9, 32
# Tokens of a text that a draft model reads at a time.
_CHUNK = 256


class Drafter(Protocol):
  """Guesses how answers go on."""

  def propose(self, answers: Sequence[Answer], most: int) -> list[list[int]]:
    """At most `most` tokens for each answer, or none."""
    ...

  def forget(self, answer: Answer) -> None:
    """Drops what was kept for an answer."""
    ...

  def clear(self) -> None:
    """Drops what was kept for all."""
    ...


class PromptLookup:
  """Guesses that what followed the last tokens earlier in the text follows them again (Saxena 2023,
  Prompt Lookup Decoding)."""

  def __init__(self, longest: int = 3, shortest: int = 2):
    """Looks for the last `longest` tokens, then for fewer."""
    self.longest, self.shortest = longest, shortest

  def propose(self, answers: Sequence[Answer], most: int) -> list[list[int]]:
    return [self._look_up(np.array(answer.tokens, np.int32), most) for answer in answers]

  def _look_up(self, tokens: np.ndarray, most: int) -> list[int]:
    for size in range(self.longest, self.shortest - 1, -1):
      if len(tokens) <= size:
        continue
      windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], size)
      found = np.flatnonzero((windows == tokens[-size:]).all(axis=1))
      if len(found):
        after = found[-1] + size
        return tokens[after : after + most].tolist()
    return []

  def forget(self, answer: Answer) -> None:
    pass

  def clear(self) -> None:
    pass


class DraftModel:
  """Guesses with a smaller model of the same tokens."""

  def __init__(
    self,
    model: GPT,
    tokenizer: Tokenizer,
    *,
    rows: int,
    length: int,
    weights: str | None = None,
  ):
    """Prepares the model; arguments as for `Engine`.

    Raises:
      UserError: the model has too few tokens or positions, or an encoder.
    """
    config = model.config
    if config.vocab_size < tokenizer.vocab_size or model.encoder is not None:
      raise UserError("the draft model is none of the same tokens, or has an encoder.")
    if config.position.kind == "learned" and config.position.room < length:
      raise UserError(f"the draft model's {config.position.room} positions are not {length}.")
    self.size = tokenizer.vocab_size
    self.reader = Reader(model, rows=rows, length=length, pages=None, weights=weights)
    # The row of each answer, and the tokens that it has read.
    self._rows: dict[int, tuple[Row, list[int]]] = {}

  def propose(self, answers: Sequence[Answer], most: int) -> list[list[int]]:
    texts = [list(answer.tokens) for answer in answers]
    rows = [self._catch_up(answer) for answer in answers]
    most = min(most, *(answer.room - 1 for answer in answers))
    if None in rows:
      return [[] for _ in answers]
    for _ in range(most):
      if not all(self.reader.make_room(row, 1) for row in rows):
        break
      logits_B1V = self.reader.read(rows, [[text[-1]] for text in texts])
      tokens = self._choose(answers, len(texts[0]) - len(answers[0].tokens), logits_B1V)
      for answer, row, text, token in zip(answers, rows, texts, tokens, strict=False):
        self.reader.advance(row, text)
        self._rows[id(answer)] = (row, list(text))
        text.append(int(token))
    return [text[len(answer.tokens) :] for answer, text in zip(answers, texts, strict=True)]

  def _catch_up(self, answer: Answer) -> Row | None:
    """Reads all but the last token of an answer; None if there are too few pages."""
    row, known = self._rows.setdefault(id(answer), (Row(), []))
    text = answer.tokens[:-1]
    # Guesses that were wrong were read too.
    same = (i for i, (a, b) in enumerate(zip(text, known, strict=False)) if a != b)
    row.read = min(row.read, next(same, len(text)))
    while row.read < len(text):
      new = text[row.read :][:_CHUNK]
      if not self.reader.make_room(row, len(new)):
        return None
      self.reader.read([row], [new], least=MOST + 1)
      self.reader.advance(row, text[: row.read + len(new)])
    self._rows[id(answer)] = (row, text)
    return row

  def _choose(self, answers: Sequence[Answer], drafted: int, logits_B1V: jax.Array) -> np.ndarray:
    """Draws with the randomness that the model will draw with."""
    padded = [*answers, *[answers[0]] * (len(logits_B1V) - len(answers))]
    settings = Settings.of(
      [answer.request.sampling for answer in padded],
      [answer.request.seed for answer in padded],
      [len(answer.tokens) + drafted for answer in padded],
    )
    return jax.device_get(choose(logits_B1V, settings, vocab_size=self.size).tokens)

  def forget(self, answer: Answer) -> None:
    row, _ = self._rows.pop(id(answer), (Row(), []))
    self.reader.release(row)

  def clear(self) -> None:
    self._rows = {}
    self.reader.clear()


def make_drafter(
  draft: str,
  model: GPT,
  tokenizer: Tokenizer,
  *,
  rows: int,
  length: int,
  weights: str | None = None,
) -> Drafter:
  """Makes what a flag `--draft` names: 'lookup' (`PromptLookup`), 'layers:N' (`skip_layers`), or a
  checkpoint with the tokens of `tokenizer`.

  Raises:
    UserError: there is no such part of the layers, or the checkpoint has other tokens.
  """
  if draft == "lookup":
    return PromptLookup()
  if draft.startswith("layers:"):
    keep = draft.removeprefix("layers:")
    if not keep.isdecimal():
      raise UserError(f"draft={draft!r}: after 'layers:' goes a number, such as layers:4.")
    smaller = skip_layers(model, int(keep))
  else:
    smaller, its_tokenizer = load_model(draft)
    if its_tokenizer.fingerprint() != tokenizer.fingerprint():
      raise UserError(f"draft={draft!r} has another tokenizer than the model.")
  return DraftModel(smaller, tokenizer, rows=rows, length=length, weights=weights)


def skip_layers(model: GPT, keep: int) -> GPT:
  """The model with `keep` of its layers, evenly spaced, the first and the last among them: a draft
  model without training (Zhang et al. 2024, arXiv:2309.08168).

  Raises:
    UserError: the model has no such part, a whole number of its pattern of layers, or is not plain.
  """
  if not is_plain(model):
    raise UserError(
      "draft='layers:N' is not of a model in few bits, with adapters or of several: take lookup or "
      "a checkpoint."
    )
  config = model.config
  period, layers = len(config.layer_pattern), config.num_layers
  if keep % period or not period <= keep < layers:
    raise UserError(
      f"{keep} of the model's {layers} layers cannot be kept: give a multiple of {period} below it."
    )
  periods = np.linspace(0, layers // period - 1, keep // period).round().astype(int)
  kept = (periods[:, None] * period + np.arange(period)).reshape(-1)
  graphdef = model_graph(config.replace({"num_layers": keep}))
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  params["blocks"] = jax.tree.map(lambda leaf: leaf[kept], params["blocks"])
  return nnx.merge(graphdef, params)


class Speculation:
  """Asks a drafter as long as that pays, by what the last steps took and wrote.

  What guesses lost is made good by steps without before more are made: in the long run they cost at
  most `_SHARE` of the time. What a drafter takes to read a new text is an investment, for which one
  step's right guesses need not pay yet.
  """

  def __init__(self, drafter: Drafter):
    self.drafter = drafter
    # Seconds of a token in the last steps without guesses, by the number of rows (rounded up).
    self._without: dict[int, deque[float]] = {}
    # Seconds that may be lost, which guesses win and spend, and where they stop to lose.
    self._credit = self._floor = 0.0
    # The answers that the drafter follows.
    self._following: set[int] = set()
    self._most, self._guessed, self._drafting = 1, 0, 0.0
    self._compiled = compilations.total()

  def propose(self, answers: Sequence[Answer]) -> list[list[int]]:
    """Guesses for each answer; none while they do not pay."""
    self._compiled, self._drafting = compilations.total(), 0.0
    rows, found = 1 << (len(answers) - 1).bit_length(), {id(answer) for answer in answers}
    if len(self._without.get(rows, ())) < _FIRST or self._guessed >= _REFRESH:
      self._guessed = 0
      return [[] for _ in answers]
    begins = not found <= self._following
    if self._credit < (0 if begins else self._floor):
      # Later it is tried again, carefully, as the text may have become easier.
      self._following, self._most = set(), 1
      return [[] for _ in answers]
    self._following = found
    start = time.perf_counter()
    drafts = self.drafter.propose(answers, self._most)
    self._drafting = time.perf_counter() - start
    if begins:
      self._floor = -self._drafting - _PATIENCE * self._plain(rows) * len(answers)
    return drafts

  def _plain(self, rows: int) -> float:
    """Seconds of a token without guesses."""
    # The median, as a busy machine's slowest step says nothing of the others.
    return statistics.median(self._without[rows])

  def learn(self, answers: int, drafted: int, written: int, seconds: float) -> None:
    """Takes the measurements of a step: its answers, guessed and written tokens, and seconds."""
    if compilations.total() != self._compiled:
      return  # What was compiled for it will not be again.
    rows = 1 << (answers - 1).bit_length()
    if drafted:
      self._guessed += 1
      gain = written * self._plain(rows) - seconds
      is_right = 2 * (written - answers) > drafted
      # Powers of two with the token that is chosen itself, as shapes are.
      self._most = min(2 * self._most + 1, MOST) if is_right else max(self._most // 2, 1)
    else:
      self._guessed = 0
      self._without.setdefault(rows, deque(maxlen=_MEASURED)).append(seconds / written)
      gain = _SHARE * seconds
    most = 2 * _PATIENCE * self._plain(rows) * answers
    self._credit = min(self._credit + gain - self._drafting, most)
