"""The engine: answers many requests at once, one step of the model after the other.

    engine = Engine(model, tokenizer, rows=8)
    answer = engine.submit(Request(tokenizer.encode_prompt("Once upon")))
    while not answer.finish_reason:
      engine.step()
    print(answer.text)

Requests join and leave between steps (Yu et al. 2022, Orca). A long prompt is read in chunks, so
that the others go on meanwhile. An answer does not depend on what else is in the batch.

Axes: B rows, T positions, R rows to choose a token for, V vocabulary.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Sequence

import jax
import numpy as np

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.inference.pages import PAGE
from gptjax.inference.reader import Reader
from gptjax.inference.request import Answer, Request, TokenScore
from gptjax.inference.sampling import (
  MAX_CANDIDATES,
  Adjustment,
  Choice,
  Sampling,
  Settings,
  choose,
  score_tokens,
)
from gptjax.inference.speculation import Drafter, Speculation, make_drafter
from gptjax.model.gpt import GPT

# The fewest tokens of a prompt that are read together: fewer shapes to compile.
SHORTEST = 16
_GREEDY = Sampling(temperature=0)


@dataclasses.dataclass
class Counts:
  """What the engine did so far: steps of the model, tokens of prompts that were read and that were
  cached, tokens written, tokens that were drafted and those of them that were right, and answers
  that lost their pages to others and were read again."""

  steps: int = 0
  prompt_tokens: int = 0
  cached_tokens: int = 0
  written_tokens: int = 0
  drafted_tokens: int = 0
  accepted_tokens: int = 0
  preemptions: int = 0


@dataclasses.dataclass(frozen=True)
class Update:
  """News of an answer: the text that became certain in a step."""

  answer: Answer
  text: str


class Engine:
  """Answers requests with a model; not to be used from two threads at once.

  Attributes:
    waiting, running: answers before and after they got a row.
    counts: what was done so far.
    reader: the model and its cache.
  """

  def __init__(
    self,
    model: GPT,
    tokenizer: Tokenizer,
    *,
    rows: int = 8,
    length: int | None = None,
    pages: int | None = None,
    chunk: int = 256,
    weights: str | None = None,
    cache: str | None = None,
    draft: str | Drafter | None = None,
  ):
    """Brings the model into its inference form and makes an empty cache.

    Args:
      model: any GPT that is not bidirectional; its parameters may be sharded.
      tokenizer: the model's.
      rows: answers that grow at the same time.
      length: tokens of a prompt with its answer, at most; by default the model's `max_positions`.
      pages: pages of the cache, of `PAGE` tokens each; by default enough for all rows.
      chunk: tokens of prompts that are read in one step, so that other answers do not wait.
      weights: see `inference_form`.
      cache: format of keys and values, one of `pages.CACHES`; None is the compute dtype.
      draft: what guesses the next tokens of an answer, so that several are checked in one step;
        see `make_drafter`. It changes no answer.

    Raises:
      UserError: the tokenizer has more tokens than the model, the model cannot write, or `length`
        exceeds its learned positions.
    """
    check_writes(model, tokenizer)
    position = model.config.position
    self.length = length or position.max_positions
    if position.kind == "learned" and self.length > position.room:
      raise UserError(
        f"length={self.length} exceeds the model's {position.room} learned positions."
      )
    self.config, self.tokenizer = model.config, tokenizer
    self.rows, self.chunk = rows, chunk
    self.reader = Reader(
      model, rows=rows, length=self.length, pages=pages, weights=weights, cache=cache
    )
    self.waiting: deque[Answer] = deque()
    self.running: list[Answer] = []
    self.counts = Counts()
    self._slots = list(range(rows))
    if isinstance(draft, str):
      options = {"rows": rows, "length": self.length, "weights": weights}
      draft = make_drafter(draft, model, tokenizer, **options)
    self._speculation = None if draft is None else Speculation(draft)
    self._in_step = False

  @property
  def idle(self) -> bool:
    return not self.waiting and not self.running

  @property
  def room(self) -> int:
    """Tokens of a prompt with its answer, at most."""
    return min(self.length, self.reader.pages.count * PAGE)

  def submit(self, request: Request) -> Answer:
    """Takes a request, which is answered by the next steps.

    Raises:
      UserError: the prompt is empty or leaves no room for the answer, or a setting is none.
    """
    if not len(request.tokens):
      raise UserError("a prompt given as ids needs at least one.")
    if request.max_tokens < (0 if request.scores_prompt else 1):
      raise UserError(f"max_tokens={request.max_tokens} must be at least 1.")
    if not 0 <= request.seed < 2**32:
      raise UserError(f"seed={request.seed} must be from 0 to 2**32 - 1.")
    if not 0 <= (request.log_probs or 0) <= MAX_CANDIDATES:
      raise UserError(f"log_probs={request.log_probs} must be from 0 to {MAX_CANDIDATES}.")
    if request.adapter is not None and not 0 <= request.adapter < self.reader.adapters:
      raise UserError(
        f"no adapter {request.adapter}; the model has {self.reader.adapters}, counted from 0."
      )
    size = self.tokenizer.vocab_size
    wrong = [token for token in [*request.tokens, *request.logit_bias] if not 0 <= token < size]
    if wrong:
      raise UserError(f"token {wrong[0]} is none of the tokenizer's, which are below {size}.")
    tokens = [self.config.decoder_start] if self.reader.has_encoder else request.tokens
    if len(tokens) + request.max_tokens > self.room:
      raise UserError(
        f"a prompt of {len(tokens)} tokens and max_tokens={request.max_tokens} exceed the "
        f"{self.room} that there is room for."
      )
    answer = Answer(request, self.tokenizer, tokens)
    self.waiting.append(answer)
    return answer

  def cancel(self, answer: Answer) -> None:
    """Ends an answer now, and frees its row and pages."""
    if not answer.finish_reason:
      answer.end("cancelled")
      self._remove(answer)

  def run(self, requests: Sequence[Request]) -> list[Answer]:
    """Answers all requests."""
    answers = [self.submit(request) for request in requests]
    while not all(answer.finish_reason for answer in answers):
      self.step()
    return answers

  def step(self) -> list[Update]:
    """Reads a chunk of the prompts and adds a token to each answer whose prompt is read.

    After a step that an error or Ctrl-C ended, the next one reads all texts again.
    """
    if self._in_step:
      self._start_over()
    self._in_step = True
    self._admit()
    for answer in self.running:
      self._find(answer)
    growing = [answer for answer in self.running if not _reads(answer)]
    updates, left = [], self.chunk
    for answer in list(self.running):
      if left > 0 and answer in self.running and _reads(answer):
        left -= self._read_prompt(answer, left, updates)
    drafts = self._draft(growing)
    for answer, draft in zip(growing, drafts, strict=True):
      if answer in self.running:
        self._make_room(answer, 1 + len(draft))
    # Those who still have their pages.
    kept = [i for i, answer in enumerate(growing) if answer in self.running]
    if kept:
      self._write([growing[i] for i in kept], [drafts[i] for i in kept], updates)
    self._in_step = False
    return updates

  # --- Rows and pages ----------------------------------------------------------------------------

  def _admit(self) -> None:
    """Gives rows to those who wait, in their order, while their prompts have room."""
    while self.waiting and self._slots:
      answer = self.waiting[0]
      if -(-len(answer.tokens) // PAGE) > self.reader.pages.available and self.running:
        return
      self.waiting.popleft()
      answer.row.slot = self._slots.pop()
      self.running.append(answer)
      if self.reader.has_encoder:
        # It ends like a document.
        self.reader.encode(answer.row, [*answer.request.tokens, self.tokenizer.end_of_text])

  def _find(self, answer: Answer) -> None:
    """Gives a new row the pages that already hold the start of its text."""
    row = answer.row
    if row.pages or answer.request.scores_prompt:
      return
    # All but the last token, whose logits are needed.
    self.reader.find(row, answer.tokens[:-1])
    if len(answer.tokens) == answer.prompt_length:
      answer.cached_tokens = row.read
      self.counts.cached_tokens += row.read

  def _make_room(self, answer: Answer, tokens: int) -> bool:
    """Takes the pages for the next tokens of an answer, if need be from the one that came last;
    false if that is this one."""
    while not self.reader.make_room(answer.row, tokens):
      last = self.running[-1]
      self._remove(last)
      self.waiting.appendleft(last)
      self.counts.preemptions += 1
      if last is answer:
        return False
    return True

  def _start_over(self) -> None:
    """Empties the cache, of which a broken step may have left nothing, and lets all wait anew."""
    self.waiting.extendleft(reversed(self.running))
    self.running = []
    self._slots = list(range(self.rows))
    self.reader.clear()
    for answer in self.waiting:
      answer.row.pages, answer.row.read = [], 0
    if self._speculation is not None:
      self._speculation.drafter.clear()

  def _remove(self, answer: Answer) -> None:
    if self._speculation is not None:
      self._speculation.drafter.forget(answer)
    if answer in self.waiting:
      self.waiting.remove(answer)
      return
    self.running.remove(answer)
    self._slots.append(answer.row.slot)
    self.reader.release(answer.row)

  # --- Steps of the model ------------------------------------------------------------------------

  def _read_prompt(self, answer: Answer, most: int, updates: list[Update]) -> int:
    """Reads tokens of a prompt, and with the last of them chooses the answer's first; returns how
    many were read."""
    row, scores = answer.row, answer.request.scores_prompt
    # Those before may have read the same.
    self._find(answer)
    # A prefix sees all of itself.
    new = answer.unread if self.config.visibility == "prefix" else answer.unread[:most]
    if not self._make_room(answer, len(new)):
      return 0
    logits_1CV = self.reader.read([row], [new], least=SHORTEST, all_scored=scores)
    if scores:
      self._score_prompt(answer, logits_1CV, len(new))
      logits_1CV = logits_1CV[:, len(new) - 1 :][:, :1]
    self.reader.advance(row, answer.tokens[: row.read + len(new)])
    self.counts.steps += 1
    self.counts.prompt_tokens += len(new)
    if not answer.unread:
      if answer.request.max_tokens:
        self._choose([answer], [[]], logits_1CV, updates)
      else:
        answer.end("length")
        self._remove(answer)
        updates.append(Update(answer, ""))
    return len(new)

  def _draft(self, answers: Sequence[Answer]) -> list[list[int]]:
    """Guesses how each answer goes on, within its room and its language."""
    if self._speculation is None or not answers:
      return [[] for _ in answers]
    drafts = self._speculation.propose(answers)
    for answer, draft in zip(answers, drafts, strict=True):
      # One more token is chosen after the draft.
      del draft[answer.room - 1 :]
      constraint, taken = answer.request.constraint, 0
      while constraint is not None and taken < len(draft) and constraint.allowed()[draft[taken]]:
        constraint.accept(draft[taken])
        taken += 1
      if constraint is not None:
        constraint.take_back(taken)
        del draft[taken:]
    return drafts

  def _write(
    self, answers: Sequence[Answer], drafts: Sequence[list[int]], updates: list[Update]
  ) -> None:
    """Adds a token to each answer, and before it those of its draft that are right."""
    start = time.perf_counter()
    T = max(map(len, drafts)) + 1
    read = [[*answer.unread, *draft] for answer, draft in zip(answers, drafts, strict=True)]
    logits_BTV = self.reader.read([answer.row for answer in answers], read, all_scored=T > 1)
    before = self.counts.written_tokens
    self._choose(answers, drafts, logits_BTV, updates)
    self.counts.steps += 1
    if self._speculation is not None:
      written = self.counts.written_tokens - before
      drafted = sum(map(len, drafts))
      self.counts.drafted_tokens += drafted
      self.counts.accepted_tokens += written - len(answers)
      seconds = time.perf_counter() - start
      self._speculation.learn(len(answers), drafted, written, seconds)

  def _choose(
    self,
    answers: Sequence[Answer],
    drafts: Sequence[list[int]],
    logits_BTV: jax.Array,
    updates: list[Update],
  ) -> None:
    """Chooses the next token of each answer and, as long as they are the drafted ones, more.

    A token is drawn from the answer's own seed and the token's place, drafted or not: so a draft
    changes nothing but the number of steps.
    """
    B, T, _ = logits_BTV.shape
    R, V = B * T, self.tokenizer.vocab_size
    places = [
      (row * T + t, answer, draft[:t])
      for row, (answer, draft) in enumerate(zip(answers, drafts, strict=True))
      for t in range(len(draft) + 1)
    ]
    samplings, seeds, lengths = [_GREEDY] * R, [0] * R, [0] * R
    for place, answer, drafted in places:
      samplings[place], seeds[place] = answer.request.sampling, answer.request.seed
      lengths[place] = len(answer.tokens) + len(drafted)
    told = any(answer.request.log_probs is not None for answer in answers)
    choice: Choice = jax.device_get(
      choose(
        logits_BTV,
        Settings.of(samplings, seeds, lengths),
        _adjust(places, R, V),
        vocab_size=V,
        candidates=min(MAX_CANDIDATES, V) if told else None,
      )
    )
    for row, (answer, draft) in enumerate(zip(answers, drafts, strict=True)):
      text = ""
      for t in range(len(draft) + 1):
        place = row * T + t
        text += self._add(answer, choice, place)
        if answer.finish_reason or t == len(draft) or answer.tokens[-1] != draft[t]:
          break
      # The last token is not read yet.
      self.reader.advance(answer.row, answer.tokens[:-1])
      if answer.finish_reason:
        self._remove(answer)
      if text or answer.finish_reason:
        updates.append(Update(answer, text))

  def _add(self, answer: Answer, choice: Choice, place: int) -> str:
    """Adds a chosen token to an answer; returns the text that became certain."""
    token, told = int(choice.tokens[place]), answer.request.log_probs
    score = None
    if told is not None:
      log_prob = float(choice.log_probs[place])
      score = TokenScore(token, log_prob, _candidates(choice, place, told))
    self.counts.written_tokens += 1
    return answer.add(token, score, is_last=answer.room == 1)

  def _score_prompt(self, answer: Answer, logits_1TV: jax.Array, count: int) -> None:
    """Tells the log-probabilities of a prompt's tokens after the first `count` that were read."""
    read = answer.row.read
    if not read:
      answer.prompt_scores = [TokenScore(answer.tokens[0], None)]
    targets = answer.tokens[: answer.prompt_length][read + 1 : read + 1 + count]
    targets_T = np.zeros(logits_1TV.shape[1], np.int32)
    targets_T[: len(targets)] = targets
    size, told = self.tokenizer.vocab_size, answer.request.log_probs or 0
    options = {"vocab_size": size, "candidates": min(MAX_CANDIDATES, size) if told else 0}
    choice = jax.device_get(score_tokens(logits_1TV[0], targets_T, **options))
    for place, token in enumerate(targets):
      score = TokenScore(token, float(choice.log_probs[place]), _candidates(choice, place, told))
      answer.prompt_scores.append(score)


def check_writes(model: GPT, tokenizer: Tokenizer) -> None:
  """Raises UserError if the model cannot write the tokenizer's text."""
  config = model.config
  if tokenizer.vocab_size > config.vocab_size:
    raise UserError(
      f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}."
    )
  if config.visibility == "bidirectional":
    raise UserError("model.visibility='bidirectional': the model cannot write token by token.")
  if config.label_head.num_labels:
    raise UserError(
      f"the model scores {config.label_head.num_labels} labels (model.label_head.num_labels) and "
      "writes no text."
    )


def _reads(answer: Answer) -> bool:
  """Whether more is to be read than the last token, or that alone for its own sake."""
  is_scored = answer.request.scores_prompt and not answer.row.read
  return len(answer.unread) > 1 or is_scored


def _adjust(
  places: Sequence[tuple[int, Answer, list[int]]], rows: int, size: int
) -> Adjustment | None:
  """What penalties, biases and constraints change at each place (its row, the answer, and drafted
  tokens after it); None if there are none."""

  def changes(request: Request) -> bool:
    return bool(request.sampling.looks_back or request.logit_bias or request.constraint)

  if not any(changes(answer.request) for _, answer, _ in places):
    return None
  added, seen = np.zeros((rows, size), np.float32), np.zeros((rows, size), bool)
  for place, answer, drafted in places:
    request = answer.request
    tokens = [*answer.tokens, *drafted]
    seen[place, tokens] = True
    sampling = request.sampling
    written, counts = np.unique(tokens[answer.prompt_length :], return_counts=True)
    if len(written):
      penalties = sampling.presence_penalty + sampling.frequency_penalty * counts
      added[place, written] -= penalties.astype(np.float32)
    for token, bias in request.logit_bias.items():
      added[place, token] += bias
    if request.constraint is not None:
      for token in drafted:
        request.constraint.accept(token)
      added[place, ~request.constraint.allowed()] = -np.inf
      request.constraint.take_back(len(drafted))
  return Adjustment(added, seen)


def _candidates(choice: Choice, place: int, count: int) -> tuple[tuple[int, float], ...]:
  tokens, log_probs = choice.candidates[place, :count], choice.candidate_log_probs[place, :count]
  return tuple(zip(tokens.tolist(), log_probs.tolist(), strict=True))
