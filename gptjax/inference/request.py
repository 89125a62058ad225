"""What is asked of the engine, and the state of an answer."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from gptjax.data.tokenizer import Tokenizer
from gptjax.inference.reader import Row
from gptjax.inference.sampling import Sampling
from gptjax.inference.text import Writer


class Constraint(Protocol):
  """A language that an answer has to be in, such as the JSON of a schema."""

  def allowed(self) -> np.ndarray:
    """The tokens that may come next, bool [V]."""
    ...

  def accept(self, token: int) -> None:
    """Takes the token that came."""
    ...

  def take_back(self, count: int) -> None:
    """Forgets the last tokens."""
    ...


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt and how to continue it.

  Attributes:
    tokens: ids of the prompt, at least one; with an encoder, of its text.
    max_tokens: the most tokens to add; 0 only scores the prompt.
    sampling: how tokens are chosen.
    seed: of the random choices; it and the request decide the answer.
    stop: strings that end the answer, themselves left out.
    log_probs: how many of the likeliest tokens are told at each position, beside the one chosen;
      None is no log-probabilities.
    scores_prompt: whether log-probabilities are also told for the prompt.
    logit_bias: what is added to the logits of tokens.
    adapter: the adapter that reads and writes, in a model that has several; None is none.
    ignore_end: whether the answer goes on after the tokens that end one.
    constraint: the language of the answer, used by this request alone.
  """

  tokens: Sequence[int]
  max_tokens: int = 128
  sampling: Sampling = dataclasses.field(default_factory=Sampling)
  seed: int = 0
  stop: Sequence[str] = ()
  log_probs: int | None = None
  scores_prompt: bool = False
  logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
  adapter: int | None = None
  ignore_end: bool = False
  constraint: Constraint | None = None


@dataclasses.dataclass(frozen=True)
class TokenScore:
  """The logarithm of a token's probability, before temperature and filters, and those of the
  likeliest tokens in its place, falling. The first token of a prompt has none (None)."""

  token: int
  log_prob: float | None
  candidates: Sequence[tuple[int, float]] = ()


class Answer:
  """The growing answer to a request.

  Attributes:
    request: what was asked.
    tokens: all tokens: of the prompt (with an encoder, the decoder's start), and the answer's.
    prompt_length: how many of them are the prompt's.
    scores: of the answer's tokens, where they are asked for.
    prompt_scores: of the prompt's.
    cached_tokens: how many tokens of the prompt did not have to be read.
    row: the answer's place in the cache.
  """

  def __init__(self, request: Request, tokenizer: Tokenizer, tokens: Sequence[int]):
    stops = frozenset() if request.ignore_end else tokenizer.stops
    self.request = request
    self.tokens = list(tokens)
    self.prompt_length = len(self.tokens)
    self.scores: list[TokenScore] = []
    self.prompt_scores: list[TokenScore] = []
    self.cached_tokens = 0
    self._writer = Writer(tokenizer, request.stop, stops)
    self._ended = ""
    self.row = Row(prefix=self.prompt_length, adapter=request.adapter)

  @property
  def unread(self) -> list[int]:
    """The tokens that are not in the cache."""
    return self.tokens[self.row.read :]

  @property
  def room(self) -> int:
    """How many tokens may still be added."""
    return self.prompt_length + self.request.max_tokens - len(self.tokens)

  @property
  def text(self) -> str:
    """The text that is certain so far."""
    return self._writer.text

  @property
  def completion(self) -> list[int]:
    """The tokens of the text, without one that ended it."""
    return self._writer.tokens

  @property
  def finish_reason(self) -> str:
    """'stop' (the model ended the text or its turn, or wrote a stop string), 'length', 'cancelled';
    empty while the answer grows."""
    return self._writer.finish_reason or self._ended

  def add(self, token: int, score: TokenScore | None, is_last: bool) -> str:
    """Takes the next token, and returns the text that became certain."""
    self.tokens.append(token)
    if score is not None:
      self.scores.append(score)
    constraint = self.request.constraint
    if constraint is not None:
      constraint.accept(token)
    return self._writer.add(token, is_last)

  def end(self, reason: str) -> None:
    self._ended = reason
