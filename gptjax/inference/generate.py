"""Continues prompts: the function behind the command, the notebooks and the samples of training."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptjax.data.chat import ChatTemplate
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.inference.decode import decode, prefill
from gptjax.inference.lengths import round_up
from gptjax.inference.sampling import Sampling
from gptjax.model.gpt import GPT

# Tokens after which the host looks at the text again, for stop strings and streaming.
CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Completion:
  """A completion of one prompt. `finish_reason` is 'stop' (the model ended the text or its turn, or
  wrote a stop string) or 'length'."""

  prompt: str
  completion: str
  tokens: list[int]
  finish_reason: str


def generate(
  model: GPT,
  tokenizer: Tokenizer,
  prompts: Sequence[str | Sequence[int]],
  *,
  max_tokens: int = 128,
  sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
  stop: Sequence[str] = (),
  seed: int | Sequence[int] = 0,
  on_text: Callable[[int, str], None] | None = None,
  pad_to_multiple_of: int = 32,
) -> list[Completion]:
  """Continues each prompt; a completion does not depend on the rest of the batch.

  Args:
    model: any GPT that is not bidirectional; its parameters may be sharded. If there is an encoder,
      it reads the prompt.
    tokenizer: the model's.
    prompts: texts, encoded by `Tokenizer.encode_prompt`, or complete token ids.
    max_tokens: the most tokens to add to a prompt.
    sampling: how tokens are chosen.
    stop: strings that end a completion, themselves left out.
    seed: seed of the random choices, one for all prompts or one for each; a prompt and a seed
      decide the completion.
    on_text: called with (prompt index, new text) as text becomes certain.
    pad_to_multiple_of: the longest prompt is padded to a multiple of this, a whole row to one of
      four times this, so that few shapes are compiled.

  Raises:
    UserError: there are no prompts, one has no ids, one and `max_tokens` do not fit the learned
      positions, or the tokenizer has more tokens than the model.
  """
  if not prompts or max_tokens < 1:
    raise UserError("generate needs at least one prompt and max_tokens of at least 1.")
  if tokenizer.vocab_size > model.config.vocab_size:
    raise UserError(
      f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}."
    )
  starts = [_ids(tokenizer, prompt) for prompt in prompts]
  source = None
  if model.encoder is not None:
    # The encoder's text ends like a document; the decoder starts a new one.
    source = _pad([[*start, tokenizer.end_of_text] for start in starts], pad_to_multiple_of)
    starts = [[model.config.decoder_start]] * len(prompts)
  lengths = np.array([len(start) for start in starts], np.int32)
  longest = int(lengths.max())
  position = model.config.position
  room = position.room if position.kind == "learned" else None
  if room is not None and longest + max_tokens > room:
    raise UserError(
      f"a prompt of {longest} tokens and max_tokens={max_tokens} exceed the model's {room} learned "
      "positions."
    )
  prompt_length = round_up(longest, pad_to_multiple_of, room)
  total_length = round_up(longest + max_tokens, 4 * pad_to_multiple_of, room)
  tokens = np.full((len(starts), total_length), tokenizer.end_of_text, np.int32)
  for row, start in enumerate(starts):
    tokens[row, : len(start)] = start

  graphdef, params = nnx.split(model)
  seeds = [seed] * len(starts) if isinstance(seed, int) else list(seed)
  if len(seeds) != len(starts) or not all(0 <= one < 2**32 for one in seeds):
    raise UserError(f"seed={seed}: give one number from 0 to 2**32 - 1, or one for each prompt.")
  keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
  decoding = prefill(
    graphdef, params, tokens, lengths, keys, prompt_length=prompt_length, source=source
  )
  writers = [_Writer(tokenizer, stop) for _ in starts]
  while True:
    decoding = decode(
      graphdef,
      params,
      decoding,
      lengths + max_tokens,
      np.array(sorted(tokenizer.stops), np.int32),
      steps=min(CHUNK, max_tokens),
      sampling=sampling,
      vocab_size=tokenizer.vocab_size,
    )
    rows, ends, finished = jax.device_get((decoding.tokens, decoding.lengths, decoding.finished))
    for i, writer in enumerate(writers):
      text = writer.update(rows[i, lengths[i] : ends[i]].tolist(), bool(finished[i]))
      if text and on_text is not None:
        on_text(i, text)
    if all(writer.finish_reason for writer in writers):
      return [
        Completion(
          prompt if isinstance(prompt, str) else tokenizer.decode(prompt),
          writer.text,
          writer.tokens,
          writer.finish_reason,
        )
        for prompt, writer in zip(prompts, writers, strict=True)
      ]


def _ids(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
  if isinstance(prompt, str):
    return tokenizer.encode_prompt(prompt)
  if not len(prompt):
    raise UserError("a prompt given as ids needs at least one.")
  return list(prompt)


def _pad(rows: Sequence[Sequence[int]], multiple: int) -> tuple[np.ndarray, np.ndarray]:
  """Pads rows to int32 [B, S], S rounded up; also returns their lengths [B]."""
  lengths = np.array([len(row) for row in rows], np.int32)
  padded = np.zeros((len(rows), round_up(int(lengths.max()), multiple)), np.int32)
  for i, row in enumerate(rows):
    padded[i, : len(row)] = row
  return padded, lengths


class _Writer:
  """Turns the growing tokens of one row into text, up to a stop string."""

  def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
    self.tokenizer = tokenizer
    self.stop = [string for string in stop if string]
    self.text = ""
    self.tokens: list[int] = []
    self.finish_reason = ""

  def update(self, tokens: list[int], finished: bool) -> str:
    """Takes all tokens so far, and returns the text that became certain since the last call."""
    if self.finish_reason:
      return ""
    ended = finished and tokens[-1] in self.tokenizer.stops
    self.tokens = tokens[:-1] if ended else tokens
    text = self.tokenizer.decode(self.tokens)
    cuts = [position for string in self.stop if (position := text.find(string)) >= 0]
    if cuts:
      text, self.finish_reason = text[: min(cuts)], "stop"
      # The rest of the chunk is discarded.
      while self.tokens and self.tokenizer.decode(self.tokens[:-1]).startswith(text):
        self.tokens = self.tokens[:-1]
    elif finished:
      self.finish_reason = "stop" if ended else "length"
    else:
      text = self._certain(text)
    new, self.text = text[len(self.text) :], text
    return new

  def _certain(self, text: str) -> str:
    """The text without an end that may be half a character or the start of a stop string."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    for string in self.stop:
      for size in range(min(len(string) - 1, len(text)), 0, -1):
        if text.endswith(string[:size]):
          text = text[:-size]
          break
    return text


def continue_prompts(model: GPT, tokenizer: Tokenizer, config: Mapping[str, Any]) -> list[str]:
  """Continues each prompt of `config.sample`, for a training run to show."""
  completions = generate(
    model,
    tokenizer,
    list(config.prompts),
    max_tokens=config.max_tokens,
    sampling=Sampling(temperature=config.temperature, top_p=config.top_p),
    seed=range(len(config.prompts)),
  )
  return [one.prompt + one.completion for one in completions]


def chat_prompts(tokenizer: Tokenizer, texts: Sequence[str], system: str | None) -> list[list[int]]:
  """Returns the ids that ask a chat model for its answer to each text.

  Raises:
    UserError: the model has no chat template, or its template refuses a system's message.
  """
  template = ChatTemplate(tokenizer)
  before = [] if system is None else [{"role": "system", "content": system}]
  return [template.encode([*before, {"role": "user", "content": text}]) for text in texts]
