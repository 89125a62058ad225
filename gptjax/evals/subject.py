"""The model under evaluation: likelihoods and completions, in batches."""

import dataclasses
import functools
from collections.abc import Sequence

from tqdm import tqdm

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.evals import score as scoring
from gptjax.evals.score import Score
from gptjax.inference.engine import Engine
from gptjax.inference.lengths import round_up
from gptjax.inference.request import Request
from gptjax.inference.sampling import Sampling
from gptjax.model.gpt import GPT
from gptjax.templates.chat import ChatTemplate

Prompt = str | list[int]


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model, its tokenizer, and options of asking it.

  Attributes:
    chat: whether prompts are a user's messages, and answers the assistant's.
    batch_size: most rows of a batch.
    max_length: tokens that the model reads at a time; None is its `max_positions`.
    progress: whether to show bars on stderr.
  """

  model: GPT
  tokenizer: Tokenizer
  chat: bool = False
  batch_size: int = 8
  max_length: int | None = None
  progress: bool = False

  def __post_init__(self):
    if self.batch_size < 1:
      raise UserError(f"batch_size={self.batch_size} must be at least 1.")
    if self.chat:
      ChatTemplate(self.tokenizer)  # Raises if there is none.

  def prompt(
    self, instruction: str, shots: Sequence[tuple[str, str]], question: str, separator: str
  ) -> Prompt:
    """The prompt for a question after the worked examples `shots`, (question, answer) each."""
    if not self.chat:
      asked = [*(before + answer for before, answer in shots), question]
      return separator.join([instruction] * bool(instruction) + asked)
    messages = [{"role": "system", "content": instruction}] if instruction else []
    for before, answer in shots:
      messages.append({"role": "user", "content": before})
      messages.append({"role": "assistant", "content": answer.strip()})
    messages.append({"role": "user", "content": question})
    return ChatTemplate(self.tokenizer).encode(messages)

  def likelihoods(
    self, prompts: Sequence[tuple[Prompt, str]], *, end_of_text: bool = False
  ) -> list[Score]:
    """Scores each continuation after its prompt, with the end of text if asked (not in a chat)."""
    if end_of_text and self.chat:
      raise UserError("end_of_text=true: in a chat the template ends an answer; leave the key out.")
    end = [self.tokenizer.end_of_text] if end_of_text else []
    pairs = [
      scoring.encode_pair(self.tokenizer, prompt, text.strip() if self.chat else text)
      for prompt, text in prompts
    ]
    return self.score([(context, [*after, *end]) for context, after in pairs])

  def score(self, pairs: Sequence[scoring.Pair]) -> list[Score]:
    return scoring.score(self.model, pairs, **self._options)

  def score_documents(self, texts: Sequence[str]) -> list[Score]:
    return scoring.score_documents(self.model, self.tokenizer, texts, **self._options)

  def write(
    self,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
    sampling: Sampling = Sampling(temperature=0),  # noqa: B008 (frozen)
    seeds: Sequence[int] | None = None,
  ) -> list[str]:
    """Continues each prompt, without its start if it is too long; `seeds` has one for each."""
    room = self.context_length
    # An encoder's prompt and a decoder's text are separate rows.
    room -= 0 if self.model.encoder is not None else max_tokens
    if room < 1:
      raise UserError(f"max_tokens={max_tokens} leaves no room for a prompt ({room} tokens).")
    rows = [
      self.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt
      for prompt in prompts
    ]
    scoring.warn_of_cuts([len(row) for row in rows], room)
    seeds = [0] * len(rows) if seeds is None else seeds
    requests = [
      Request(row[-room:], max_tokens, sampling, seed, stop)
      for row, seed in zip(rows, seeds, strict=True)
    ]
    longest = 1 if self.model.encoder is not None else max(map(len, rows), default=1)
    engine = self._engine(min(longest + max_tokens, self.context_length))
    answers = [engine.submit(request) for request in requests]
    with tqdm(total=len(rows), desc="writing", unit="row", disable=not self.progress) as bar:
      while not engine.idle:
        bar.update(sum(bool(update.answer.finish_reason) for update in engine.step()))
    return [answer.text for answer in answers]

  def _engine(self, length: int) -> Engine:
    """An engine with room for texts of so many tokens, which is kept for those that are shorter."""
    if not self._engines or self._engines[0].length < length:
      length = round_up(length, 128, self.context_length)
      self._engines[:] = [Engine(self.model, self.tokenizer, rows=self.batch_size, length=length)]
    return self._engines[0]

  @functools.cached_property
  def _engines(self) -> list[Engine]:
    return []

  @property
  def context_length(self) -> int:
    """The number of tokens that the model reads at a time."""
    return scoring.context_length(self.model, self.max_length)

  @property
  def _options(self) -> dict:
    names = ("batch_size", "max_length", "progress")
    return {name: getattr(self, name) for name in names}
