"""Beam search: the likeliest completions of a prompt, found by keeping several as they grow.

Of all continuations of its beams a search keeps the likeliest. Beams that begin alike share the
full pages of the cache; where one goes on in two ways, its last page is copied.
"""

import dataclasses
import heapq
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import check_number
from gptjax.inference.generate import Completion, fit_prompts
from gptjax.inference.pages import PAGE
from gptjax.inference.reader import Reader, Row
from gptjax.inference.sampling import score_tokens
from gptjax.inference.text import Writer
from gptjax.model.gpt import GPT


@dataclasses.dataclass(frozen=True)
class Hypothesis(Completion):
  """A completion that a search found. `log_likelihood`: sum over its tokens and the one that ended
  it, in nats. `score`: that, divided by their number to the power of the length penalty."""

  log_likelihood: float
  score: float


@dataclasses.dataclass
class _Beam:
  """A completion that grows, all of whose tokens but the last are in the cache."""

  tokens: list[int]
  log_likelihood: float
  row: Row


def beam_search(
  model: GPT,
  tokenizer: Tokenizer,
  prompts: Sequence[str | Sequence[int]],
  *,
  beams: int,
  length_penalty: float = 1.0,
  max_tokens: int = 128,
  stop: Sequence[str] = (),
  rows: int = 32,
  weights: str | None = None,
  cache: str | None = None,
) -> list[list[Hypothesis]]:
  """Returns the best completions of each prompt, the best first, at most `beams` of them.

  What a search finds does not depend on the other prompts. Scores and the end of a search are those
  of `transformers` with its default `early_stopping=False`: a log-likelihood is divided by length
  to the power of `length_penalty` (Wu et al. 2016, arXiv:1609.08144, equation 14, take the length
  plus 5, over 6). A search ends when it has `beams` completions and none that grows would score
  higher than the worst of them if it ended now.

  Args:
    model, tokenizer, prompts, max_tokens, stop, weights, cache: as for `generate`.
    beams: completions that grow at the same time; 1 takes the likeliest token each time.
    length_penalty: above 0 favours long completions, below 0 short ones; 0 is the log-likelihood.
    rows: beams of all prompts that are read together, at most, but those of one prompt.

  Raises:
    UserError: `beams` is not positive, or as for `generate`.
  """
  check_number("beams", beams, at_least=1)
  check_number("length_penalty", length_penalty)
  starts, length = fit_prompts(model, tokenizer, prompts, max_tokens)
  together = min(max(rows // beams, 1), len(prompts))
  # Beams share the prompt's full pages and have their own after those, of which the first and the
  # last may be begun, and for a moment a copy.
  pages = together * (max(map(len, starts)) // PAGE + beams * (max_tokens // PAGE + 3))
  options = {"pages": pages, "weights": weights, "cache": cache}
  reader = Reader(model, rows=together, length=length, **options)
  searches = [
    _Search(tokenizer, prompt, start, beams, length_penalty, max_tokens, stop)
    for prompt, start in zip(prompts, starts, strict=True)
  ]
  for first in range(0, len(searches), together):
    group = searches[first : first + together]
    for slot, search in enumerate(group):
      search.begin(reader, slot)
    while growing := [beam for search in group for beam in search.beams]:
      last = [beam.tokens[-1:] for beam in growing]
      likeliest = group[0].read(reader, [beam.row for beam in growing], last)
      for search in group:
        search.extend(reader, likeliest)
  return [search.found for search in searches]


@dataclasses.dataclass
class _Search:
  """The search for a prompt's completions.

  Attributes:
    start: the prompt's ids. most: how many beams there are.
    beams: those that grow, the likeliest first; none when the search has ended.
    found: those that have ended, the best first.
  """

  tokenizer: Tokenizer
  prompt: str | Sequence[int]
  start: list[int]
  most: int
  length_penalty: float
  max_tokens: int
  stop: Sequence[str]
  beams: list[_Beam] = dataclasses.field(default_factory=list)
  found: list[Hypothesis] = dataclasses.field(default_factory=list)

  @property
  def candidates(self) -> int:
    """How many continuations of all beams are looked at: enough that as many as beams go on."""
    return max(2, 1 + len(self.tokenizer.stops)) * self.most

  def read(
    self, reader: Reader, rows: Sequence[Row], tokens: Sequence[Sequence[int]]
  ) -> Iterator[list[tuple[int, float]]]:
    """Reads the next tokens of rows; returns for each the likeliest tokens after the last, with the
    logarithms of their probabilities."""
    if not all(reader.make_room(row, len(new)) for row, new in zip(rows, tokens, strict=True)):
      raise MemoryError("a beam search has fewer pages than its beams can need.")
    # A prompt's length is rounded up to few shapes, as each is compiled.
    least = 1 if max(map(len, tokens)) == 1 else PAGE
    logits_BV = reader.read(rows, tokens, least=least)[:, 0]
    for row, new in zip(rows, tokens, strict=True):
      row.read += len(new)
    size, targets_B = self.tokenizer.vocab_size, np.zeros(len(logits_BV), np.int32)
    count = min(self.candidates, size)
    found = score_tokens(logits_BV, targets_B, vocab_size=size, candidates=count)
    found = jax.device_get((found.candidates, found.candidate_log_probs))
    return (list(zip(*row, strict=True)) for row in zip(*(x.tolist() for x in found), strict=True))

  def begin(self, reader: Reader, slot: int) -> None:
    """Reads the prompt, and makes the first beams of the tokens after it."""
    row, start = Row(prefix=len(self.start), slot=slot), self.start
    if reader.has_encoder:
      reader.encode(row, [*start, self.tokenizer.end_of_text])
      start = [reader.config.decoder_start]
    self.beams = [_Beam([], 0.0, row)]
    self.extend(reader, self.read(reader, [row], [start]))

  def extend(self, reader: Reader, likeliest: Iterator[list[tuple[int, float]]]) -> None:
    """Makes the next beams of these and the likeliest tokens after each, which come first in
    `likeliest`."""
    after = [
      (beam.log_likelihood + score, beam, token)
      for beam, tokens in zip(self.beams, likeliest, strict=False)
      for token, score in tokens
    ]
    kept: list[tuple[float, _Beam, int]] = []
    best = heapq.nlargest(self.candidates, after, key=lambda candidate: candidate[0])
    for rank, (total, beam, token) in enumerate(best):
      ended = self._ended([*beam.tokens, token], total)
      if ended is None:
        kept.append((total, beam, token))
      elif rank < self.most:
        self.found.append(ended)
    self.found = heapq.nlargest(self.most, self.found, key=lambda one: one.score)
    if len(self.found) == self.most and kept:
      total, beam, _ = kept[0]
      if total / (len(beam.tokens) + 1) ** self.length_penalty <= self.found[-1].score:
        kept = []
    old, self.beams, taken = self.beams, [], set()
    for total, beam, token in kept[: self.most]:
      # The first to go on takes the row.
      row = reader.fork(beam.row) if id(beam) in taken else beam.row
      taken.add(id(beam))
      self.beams.append(_Beam([*beam.tokens, token], total, row))
    for beam in old:
      if id(beam) not in taken:
        reader.release(beam.row)

  def _ended(self, tokens: list[int], log_likelihood: float) -> Hypothesis | None:
    """The completion that these tokens are; None if they go on."""
    is_last, stops = len(tokens) == self.max_tokens, self.tokenizer.stops
    if not (self.stop or is_last or tokens[-1] in stops):
      return None
    writer = Writer(self.tokenizer, self.stop, stops)
    for number, token in enumerate(tokens, start=1):
      writer.add(token, number == self.max_tokens)
    if not writer.finish_reason:
      return None
    prompt = self.prompt if isinstance(self.prompt, str) else self.tokenizer.decode(self.prompt)
    score = log_likelihood / len(tokens) ** self.length_penalty
    about = (prompt, writer.text, writer.tokens, writer.finish_reason)
    return Hypothesis(*about, log_likelihood, score)
