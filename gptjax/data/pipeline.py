"""From a config to batches: the assembly of everything in this folder."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from etils import epath

from gptjax.data import formats, mixture
from gptjax.data import tokenizer as tokenizers
from gptjax.data.batch import Batch
from gptjax.data.denoising import MaskedLanguageModel, PrefixLanguageModel, SpanCorruption
from gptjax.data.fim import FillInTheMiddle
from gptjax.data.formats import Encoded, TextFormat
from gptjax.data.mixture import MakeRow
from gptjax.data.options import DataOptions, read_options
from gptjax.data.packing import pack
from gptjax.data.sources import Source
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError

# A vocabulary is settled long before this much text.
_TOKENIZER_TRAINING_CHARACTERS = 200_000_000


@dataclasses.dataclass(frozen=True)
class _Corpora:
  """One side of the split: the documents and the tokens of each part."""

  sources: Mapping[str, Source]
  encoded: Mapping[str, Encoded]


class Dataset:
  """Batches of a config for one host. Made by `open_dataset`."""

  def __init__(
    self,
    options: DataOptions,
    made_of: TextFormat,
    tokenizer: Tokenizer,
    training: _Corpora,
    validation: _Corpora,
    process_index: int,
    process_count: int,
  ):
    self.tokenizer = tokenizer
    self._options, self._format = options, made_of
    self._training, self._validation = training, validation
    self._host_rows = options.batch_size // process_count
    self._first_row = process_index * self._host_rows
    make_row, length = self._make_objective(options.fim_rate)
    rows = made_of.pack(training.encoded, length, training=True)
    validation_rows = made_of.pack(validation.encoded, length, training=False)
    if process_index == 0:
      for side, parts in (("training", rows), ("validation", validation_rows)):
        for name, part in parts.items():
          for warning in made_of.warnings(part):
            logging.warning("data part %r, %s: %s", name, side, warning)
    self._rows_per_epoch = sum(map(len, rows.values()))
    self._rows = mixture.training_rows(rows, options.weights, seed=options.seed, make_row=make_row)
    self._make_validation_row, _ = self._make_objective(fim_rate=0)
    self._validation_rows = [*validation_rows.values()]

  @property
  def num_tokens(self) -> int:
    """Training tokens, all parts together."""
    return sum(tokens.num_tokens for tokens in self._training.encoded.values())

  @property
  def steps_per_epoch(self) -> float:
    """Steps that take as many rows as the corpora have, all parts together."""
    return self._rows_per_epoch / self._options.batch_size

  @property
  def validation_bytes(self) -> int | None:
    """UTF-8 bytes of the validation text, for bits per byte; None if not all of it is predicted."""
    if self._options.objective != "next_token" or self._format.whole:
      return None
    return sum(tokens.num_bytes for tokens in self._validation.encoded.values())

  def training_text(self) -> Iterator[str]:
    """Yields the training documents."""
    return self._texts(self._training)

  def validation_text(self) -> Iterator[str]:
    """Yields the validation documents."""
    return self._texts(self._validation)

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
    packed = enumerate(itertools.chain.from_iterable(self._validation_rows))
    while batch := list(itertools.islice(packed, self._options.batch_size)):
      host = batch[self._first_row : self._first_row + self._host_rows]
      rows = [self._validation_row(index, row) for index, row in host]
      missing = self._host_rows - len(rows)
      if missing:
        rows += [jax.tree.map(np.zeros_like, self._validation_row(*batch[0]))] * missing
      yield Batch.stack(rows)

  def _texts(self, side: _Corpora) -> Iterator[str]:
    return itertools.chain.from_iterable(map(self._format.texts, side.sources.values()))

  def _validation_row(self, index: int, row: np.ndarray | Batch) -> Batch:
    return self._make_validation_row(row, np.random.default_rng((self._options.seed, index)))

  def _make_objective(self, fim_rate: float) -> tuple[MakeRow, int]:
    if self._format.whole:
      return lambda row, _: row, self._options.sequence_length
    return _make_objective(self._options, self.tokenizer, fim_rate)


def _make_objective(
  options: DataOptions, tokenizer: Tokenizer, fim_rate: float
) -> tuple[MakeRow, int]:
  """What makes rows of windows, and the length of those."""
  length = options.sequence_length
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
  made_of = formats.make_format(options)
  pairs = {name: made_of.open_pair(part) for name, part in options.parts.items()}
  training = {name: pair[0] for name, pair in pairs.items()}
  validation = {name: pair[1] for name, pair in pairs.items()}
  folder = epath.Path(workdir) / "tokenizer"
  found = tokenizers.train_or_load(
    options.tokenizer,
    lambda: _tokenizer_text(made_of, training, options.weights),
    folder,
    save=process_index == 0,
    progress=progress,
  )
  tokenizer = made_of.settle(found)
  if process_index == 0:
    made_of.check(training, validation)
    if tokenizer.fingerprint() != found.fingerprint():
      tokenizer.save(folder)  # To be talked to as it was trained.

  def encode(side: Mapping[str, Source]) -> _Corpora:
    encoded = {
      name: made_of.encode(source, tokenizer, progress=progress) for name, source in side.items()
    }
    return _Corpora(side, encoded)

  return Dataset(
    options,
    made_of,
    tokenizer,
    encode(training),
    encode(validation),
    process_index,
    process_count,
  )


def _tokenizer_text(
  made_of: TextFormat, training: Mapping[str, Source], weights: Mapping[str, float]
) -> Iterator[str]:
  """Yields text to train a tokenizer on: of a large corpus, documents spread evenly over it."""
  for name, source in training.items():
    budget = _TOKENIZER_TRAINING_CHARACTERS * weights[name] / sum(weights.values())
    probe = list(made_of.texts(source, range(min(len(source), 100))))
    typical = sum(map(len, probe)) / max(1, len(probe))
    count = min(len(source), math.ceil(budget / max(1, typical)))
    yield from made_of.texts(source, np.linspace(0, len(source) - 1, count, dtype=int).tolist())
