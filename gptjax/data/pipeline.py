"""From a config to batches: puts together everything in this folder."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from etils import epath

from gptjax.data import mixture
from gptjax.data import tokenizer as tokenizers
from gptjax.data.batch import Batch
from gptjax.data.options import DataOptions, read_options
from gptjax.data.sources import Source
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError

# More text than this would not change a vocabulary.
_TOKENIZER_TRAINING_CHARACTERS = 200_000_000


@dataclasses.dataclass(frozen=True)
class _Corpora:
  """Training or validation data: the documents and the tokens of each part."""

  sources: Mapping[str, Source]
  encoded: Mapping[str, Any]

  @property
  def num_tokens(self) -> int:
    return sum(tokens.num_tokens for tokens in self.encoded.values())


class Dataset:
  """Batches of a config for one host. Made by `open_dataset`."""

  def __init__(
    self,
    options: DataOptions,
    task: Any,
    tokenizer: Tokenizer,
    training: _Corpora,
    validation: _Corpora,
    process_index: int,
    process_count: int,
  ):
    self.tokenizer = tokenizer
    self._options, self._task = options, task
    self._training, self._validation = training, validation
    self._process = (process_index, process_count)
    self._host_rows = options.batch_size // process_count
    self._first_row = process_index * self._host_rows
    items = task.items(training.encoded, options, training=True)
    validation_items = task.items(validation.encoded, options, training=False)
    if process_index == 0:
      for side, parts in (("training", items), ("validation", validation_items)):
        for name, part in parts.items():
          for warning in task.warnings(part):
            logging.warning("data part %r, %s: %s", name, side, warning)
    self._items_per_epoch = sum(map(len, items.values()))
    make_row = task.row_maker(tokenizer, options, training=True)
    self._rows = mixture.training_rows(items, options.weights, seed=options.seed, make_row=make_row)
    self._make_validation_row = task.row_maker(tokenizer, options, training=False)
    self._validation_items = [*validation_items.values()]

  @property
  def num_tokens(self) -> int:
    """Training tokens, all parts together."""
    return self._training.num_tokens

  @property
  def tokens_per_step(self) -> int:
    """Tokens of a step, padding included; or, if examples are packed anew for each batch, those of
    `batch_size` examples of mean length."""
    if not self._task.packs_batches:
      return self._options.batch_size * self._options.sequence_length
    return max(1, round(self._options.batch_size * self.num_tokens / self._items_per_epoch))

  @property
  def fingerprints(self) -> dict[str, str]:
    """Hashes of everything that decides the batches: the tokenizer, and each corpus."""
    sides = {"training": self._training, "validation": self._validation}
    return {"tokenizer": self.tokenizer.fingerprint()} | {
      f"{side} part {name!r}": f"{encoded.checksum:08x}"
      for side, corpora in sides.items()
      for name, encoded in corpora.encoded.items()
    }

  @property
  def steps_per_epoch(self) -> float:
    """Steps of an epoch, in which as many items are taken as all parts have together."""
    return self._items_per_epoch / self._options.batch_size

  @property
  def validation_bytes(self) -> int | None:
    """UTF-8 bytes of the validation text, for bits per byte; None if not all of it is predicted."""
    if not self._task.predicts_all_text:
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
    first = step * self._options.batch_size
    if self._task.packs_batches:
      return self._packed([self._rows[first + i] for i in range(self._options.batch_size)])
    first += self._first_row
    rows = [self._rows[first + i] for i in range(self._host_rows)]
    return self._task.collate(rows, self._options)

  def training_batches(self, start_step: int) -> Iterator[Batch]:
    """Yields `training_batch(step)` for each step from `start_step` on, made ahead by threads."""
    batches = grain.MapDataset.range(sys.maxsize)[start_step:].map(self.training_batch)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

  def validation_batches(self) -> Iterator[Batch]:
    """Yields this host's rows of the validation set, once, in order.

    A row's randomness depends on the seed and the row's index alone. All hosts yield equally many
    batches; the last is filled up with rows of weight 0.
    """
    items = enumerate(itertools.chain.from_iterable(self._validation_items))
    while batch := list(itertools.islice(items, self._options.batch_size)):
      if self._task.packs_batches:
        yield self._packed([self._validation_row(*one) for one in batch])
        continue
      host = batch[self._first_row : self._first_row + self._host_rows]
      rows = [self._validation_row(*one) for one in host]
      missing = self._host_rows - len(rows)
      if missing:
        rows += [jax.tree.map(np.zeros_like, self._validation_row(*batch[0]))] * missing
      yield self._task.collate(rows, self._options)

  def _packed(self, rows: Sequence[Any]) -> Batch:
    """Packs a batch, the same on all hosts, and returns this host's rows of it."""
    index, count = self._process
    batch = self._task.collate(rows, self._options)
    return jax.tree.map(lambda x: np.split(x, count)[index], batch)

  def _texts(self, side: _Corpora) -> Iterator[str]:
    return itertools.chain.from_iterable(map(self._task.texts, side.sources.values()))

  def _validation_row(self, index: int, item: Any) -> Any:
    return self._make_validation_row(item, np.random.default_rng((self._options.seed, index)))


def open_dataset(
  config: Any,
  workdir: epath.PathLike,
  task: Any,
  *,
  row_multiple: int = 1,
  process_index: int = 0,
  process_count: int = 1,
  progress: bool = False,
) -> Dataset:
  """Opens the data of `config`; tokenises it on the first run and caches the tokens.

  Args:
    config: has seed, batch_size, sequence_length, tokenizer and data (see options.py).
    workdir: the run's folder; its tokenizer is kept in `workdir/tokenizer`.
    task: a `gptjax.objectives.task.Task`, whose part about records and rows is called here.
    row_multiple: as in `DataOptions`; a multiple of `process_count`.
    process_index: this host, which gets the process_index-th contiguous slice of a global batch.
    process_count: number of hosts.
    progress: whether to show progress bars on stderr.

  Raises:
    UserError: if the config, a document, the tokenizer or a folder cannot be used.
  """
  options = read_options(config, row_multiple=max(row_multiple, process_count))
  if options.batch_size % process_count:
    raise UserError(
      f"batch_size is {options.batch_size}, which {process_count} processes cannot share evenly. "
      f"Set --config.batch_size to a multiple of {process_count}."
    )
  pairs = {name: task.open_pair(part, options) for name, part in options.parts.items()}
  training = {name: pair[0] for name, pair in pairs.items()}
  validation = {name: pair[1] for name, pair in pairs.items()}
  folder = epath.Path(workdir) / "tokenizer"
  found = tokenizers.train_or_load(
    options.tokenizer,
    lambda: _tokenizer_text(task, training, options.weights),
    folder,
    save=process_index == 0,
    progress=progress,
  )
  tokenizer = task.settle_tokenizer(found)
  if process_index == 0:
    task.check_sides(training, validation)
    if tokenizer.fingerprint() != found.fingerprint():
      tokenizer.save(folder)  # With the chat template that the model is trained with.

  def encode(side: Mapping[str, Source]) -> _Corpora:
    encoded = {
      name: task.encode(source, tokenizer, options, progress=progress)
      for name, source in side.items()
    }
    return _Corpora(side, encoded)

  return Dataset(
    options, task, tokenizer, encode(training), encode(validation), process_index, process_count
  )


def _tokenizer_text(
  task: Any, training: Mapping[str, Source], weights: Mapping[str, float]
) -> Iterator[str]:
  """Yields text to train a tokenizer on: documents spread evenly over a large corpus."""
  for name, source in training.items():
    budget = _TOKENIZER_TRAINING_CHARACTERS * weights[name] / sum(weights.values())
    probe = list(task.texts(source, range(min(len(source), 100))))
    typical = sum(map(len, probe)) / max(1, len(probe))
    count = min(len(source), math.ceil(budget / max(1, typical)))
    yield from task.texts(source, np.linspace(0, len(source) - 1, count, dtype=int).tolist())
