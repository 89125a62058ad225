"""From a config to batches: the assembly of everything in this folder."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from etils import epath

from gptjax.data import cache, chat, conversations, labels, mixture, prompts, sources
from gptjax.data import tokenizer as tokenizers
from gptjax.data.batch import Batch
from gptjax.data.cache import TokenCache
from gptjax.data.chat_encoding import ChatEncoder
from gptjax.data.chat_packing import PackedConversations
from gptjax.data.conversations import Conversations
from gptjax.data.denoising import MaskedLanguageModel, PrefixLanguageModel, SpanCorruption
from gptjax.data.fim import FillInTheMiddle
from gptjax.data.label_encoding import Examples, LabelEncoder
from gptjax.data.label_packing import PackedExamples, pack_examples
from gptjax.data.labels import LabelledTexts
from gptjax.data.mixture import MakeRow
from gptjax.data.options import DataOptions, read_options
from gptjax.data.packing import Windows, pack
from gptjax.data.prompts import PromptEncoder, Prompts
from gptjax.data.sources import Source
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError

# A vocabulary is settled long before this much text.
_TOKENIZER_TRAINING_CHARACTERS = 200_000_000
# Formats whose documents stay whole, side by side in a row, and know what is learnt of them.
_WHOLE = ("chat", "prompt", "labels")


@dataclasses.dataclass(frozen=True)
class _Corpora:
  """One side of the split: the documents and the tokens of each part."""

  sources: Mapping[str, Source | LabelledTexts]
  caches: Mapping[str, TokenCache | Examples]

  def windows(
    self, options: DataOptions, length: int, *, drop_remainder: bool
  ) -> dict[str, Windows | PackedConversations | PackedExamples]:
    if options.format == "labels":
      return pack_examples(self.caches, options, training=drop_remainder)
    windows = {}
    for name, tokens in self.caches.items():
      try:
        if options.format in _WHOLE:
          windows[name] = PackedConversations(tokens, length, options.overlong)
        else:
          windows[name] = Windows(tokens, length, drop_remainder=drop_remainder)
      except UserError as error:
        raise UserError(f"data part {name!r}: {error}") from error
    return windows

  def text(self) -> Iterator[str]:
    return itertools.chain.from_iterable(map(_texts, self.sources.values()))


class Dataset:
  """Batches of a config for one host. Made by `open_dataset`."""

  def __init__(
    self,
    options: DataOptions,
    tokenizer: Tokenizer,
    training: _Corpora,
    validation: _Corpora,
    process_index: int,
    process_count: int,
  ):
    self.tokenizer = tokenizer
    self._options = options
    self._training, self._validation = training, validation
    self._host_rows = options.batch_size // process_count
    self._first_row = process_index * self._host_rows
    make_row, window_length = _make_objective(options, tokenizer, options.fim_rate)
    windows = training.windows(options, window_length, drop_remainder=True)
    validation_windows = validation.windows(options, window_length, drop_remainder=False)
    if process_index == 0:
      _warn_overlong("training", windows, options)
      _warn_overlong("validation", validation_windows, options)
    self._rows_per_epoch = sum(map(len, windows.values()))
    self._rows = mixture.training_rows(
      windows, options.weights, seed=options.seed, make_row=make_row
    )
    self._make_validation_row, _ = _make_objective(options, tokenizer, fim_rate=0)
    self._validation_windows = [*validation_windows.values()]

  @property
  def num_tokens(self) -> int:
    """Training tokens, all parts together."""
    return sum(tokens.num_tokens for tokens in self._training.caches.values())

  @property
  def steps_per_epoch(self) -> float:
    """Steps that take as many rows as the corpora have, all parts together."""
    return self._rows_per_epoch / self._options.batch_size

  @property
  def validation_bytes(self) -> int | None:
    """UTF-8 bytes of the validation text, for bits per byte; None if not all of it is predicted."""
    if self._options.objective != "next_token" or self._options.format in _WHOLE:
      return None
    return sum(tokens.num_bytes for tokens in self._validation.caches.values())

  def training_text(self) -> Iterator[str]:
    """Yields the training documents."""
    return self._training.text()

  def validation_text(self) -> Iterator[str]:
    """Yields the validation documents."""
    return self._validation.text()

  def training_batch(self, step: int) -> Batch:
    """Returns this host's rows of batch `step`, from 0: a pure function of (config, seed, step)."""
    start = step * self._options.batch_size + self._first_row
    return Batch.stack([self._rows[start + row] for row in range(self._host_rows)])

  def training_batches(self, start_step: int) -> Iterator[Batch]:
    """Yields `training_batch(step)` for each step from `start_step` on, made ahead by threads."""
    batches = grain.MapDataset.range(sys.maxsize)[start_step:].map(self.training_batch)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

  def validation_batches(self) -> Iterator[Batch]:
    """Yields this host's rows of the validation set, once, in order and never reordered for FIM.

    What the objective draws at random depends on the seed and the row's index alone. Every host
    yields as many batches; the last is filled up with rows of weight 0.
    """
    windows = enumerate(itertools.chain.from_iterable(self._validation_windows))
    while batch := list(itertools.islice(windows, self._options.batch_size)):
      host = batch[self._first_row : self._first_row + self._host_rows]
      rows = [self._validation_row(index, window) for index, window in host]
      missing = self._host_rows - len(rows)
      if missing:
        rows += [jax.tree.map(np.zeros_like, self._validation_row(*batch[0]))] * missing
      yield Batch.stack(rows)

  def _validation_row(self, index: int, window: np.ndarray) -> Batch:
    return self._make_validation_row(window, np.random.default_rng((self._options.seed, index)))


def _make_objective(
  options: DataOptions, tokenizer: Tokenizer, fim_rate: float
) -> tuple[MakeRow, int]:
  """What makes rows of windows, and the length of those."""
  length = options.sequence_length
  if options.format in _WHOLE:
    return lambda row, _: row, length
  match options.objective:
    case "prefix":
      return PrefixLanguageModel(length, tokenizer.end_of_text), length
    case "masked":
      return (
        MaskedLanguageModel(tokenizer, length, options.mask_rate, options.whole_words),
        length,
      )
    case "span_corruption":
      corruption = SpanCorruption(
        tokenizer, length, options.mask_rate, options.mean_span, options.decoder_start
      )
      return corruption, corruption.window_length
  fim = FillInTheMiddle(tokenizer, fim_rate, options.spm_rate) if fim_rate else None

  def next_token(window: np.ndarray, rng: np.random.Generator) -> Batch:
    return pack(fim(window, rng) if fim else window, length, tokenizer.end_of_text)

  return next_token, length


def open_dataset(
  config: Any,
  workdir: epath.PathLike,
  *,
  process_index: int = 0,
  process_count: int = 1,
  progress: bool = False,
) -> Dataset:
  """Opens the data of `config`; tokenises it on the first run and caches the tokens.

  Args:
    config: has seed, batch_size, sequence_length, tokenizer and data (see options.py).
    workdir: the run's folder; its tokenizer is kept in `workdir/tokenizer`.
    process_index: this host; of a global batch it gets the process_index-th contiguous slice.
    process_count: number of hosts.
    progress: whether to show progress bars on stderr.

  Raises:
    UserError: if the config, a document, the tokenizer or a folder cannot be used.
  """
  options = read_options(config)
  if options.batch_size % process_count:
    raise UserError(
      f"batch_size is {options.batch_size}, which {process_count} processes cannot share evenly. "
      f"Set --config.batch_size to a multiple of {process_count}."
    )
  if options.format == "labels":
    pairs = {name: labels.open_pair(part, options) for name, part in options.parts.items()}
  else:
    pairs = {name: sources.open_pair(part) for name, part in options.parts.items()}
  if options.format == "chat":
    pairs = {name: tuple(map(Conversations, pair)) for name, pair in pairs.items()}
  elif options.format == "prompt":
    prompt = prompts.open_template(options.prompt, Path(), "data.prompt")
    answer = prompts.Template("data.answer", options.answer)
    pairs = {
      name: tuple(Prompts(side, prompt, answer) for side in pair) for name, pair in pairs.items()
    }
  training = {name: pair[0] for name, pair in pairs.items()}
  validation = {name: pair[1] for name, pair in pairs.items()}
  if options.format == "labels" and process_index == 0:
    labels.warn_of_duplicates(training, validation)
  tokenizer = tokenizers.train_or_load(
    options.tokenizer,
    lambda: _tokenizer_text(training, options.weights),
    epath.Path(workdir) / "tokenizer",
    save=process_index == 0,
    progress=progress,
  )

  encoder = tokenizer
  if options.format == "chat":
    chosen = chat.set_template(tokenizer, options.chat_template)
    if process_index == 0 and chosen.fingerprint() != tokenizer.fingerprint():
      chosen.save(epath.Path(workdir) / "tokenizer")  # To be talked to as it was trained.
    tokenizer, encoder = chosen, ChatEncoder(chosen, options.train_on)
  elif options.format == "prompt":
    encoder = PromptEncoder(tokenizer)

  def tokenise(side: Mapping[str, Source | LabelledTexts]) -> _Corpora:
    if options.format == "labels":
      encode = LabelEncoder(tokenizer, options).encode
      return _Corpora(
        side, {name: encode(texts, progress=progress) for name, texts in side.items()}
      )
    return _Corpora(
      side,
      {
        name: cache.open_or_build(source, encoder, options.cache_dir, progress=progress)
        for name, source in side.items()
      },
    )

  return Dataset(
    options, tokenizer, tokenise(training), tokenise(validation), process_index, process_count
  )


def _warn_overlong(
  side: str,
  windows: Mapping[str, Windows | PackedConversations | PackedExamples],
  options: DataOptions,
) -> None:
  for name, rows in windows.items():
    if isinstance(rows, PackedExamples) and rows.empty_words:
      logging.warning(
        "data part %r, %s: words without any token, and so without a tag: %d.",
        *(name, side, rows.empty_words),
      )
    if not isinstance(rows, Windows) and rows.truncated + rows.dropped:
      logging.warning(
        "data part %r, %s: of the documents longer than a row of %d tokens, %d are truncated "
        "and %d dropped (data.overlong=%s).",
        *(name, side, options.sequence_length, rows.truncated, rows.dropped, options.overlong),
      )


def _texts(source: Source, indices: Iterable[int] | None = None) -> Iterator[str]:
  kinds = {Conversations: conversations.texts, Prompts: prompts.texts}
  return kinds.get(type(source), sources.documents)(source, indices)


def _tokenizer_text(training: Mapping[str, Source], weights: Mapping[str, float]) -> Iterator[str]:
  """Yields text to train a tokenizer on: of a large corpus, documents spread evenly over it."""
  for name, source in training.items():
    budget = _TOKENIZER_TRAINING_CHARACTERS * weights[name] / sum(weights.values())
    probe = list(_texts(source, range(min(len(source), 100))))
    typical = sum(map(len, probe)) / max(1, len(probe))
    count = min(len(source), math.ceil(budget / max(1, typical)))
    yield from _texts(source, np.linspace(0, len(source) - 1, count, dtype=int).tolist())
