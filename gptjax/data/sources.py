"""Corpora as sequences of documents, and their split into training and validation.

If `text_key` is '', a document is a whole record as JSON.
"""

import difflib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from etils import epath

from gptjax.data import files
from gptjax.data.options import PartOptions, check_path
from gptjax.errors import UserError, did_you_mean

# The split must not move with config.seed: runs of several seeds share their validation set, their
# tokenizer and their token cache.
_SPLIT_SEED = 0


class Source(Protocol):
  """Documents that can be read at random, in a fixed order. Users skip empty documents."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> str:
    """Returns the text of a document; UserError if it cannot be read."""

  def name(self, index: int) -> str:
    """Returns where the document comes from, for error messages: a file, or FILE:LINE."""

  def sizes(self) -> np.ndarray:
    """Returns int64 [len], the bytes of each document, or ones if only reading would tell."""

  def fingerprint(self) -> str:
    """Returns a string that changes whenever the documents do."""


def open_pair(
  options: PartOptions, divide: Callable[[Source, float, int], tuple[Source, Source]] | None = None
) -> tuple[Source, Source]:
  """Opens a corpus: (training documents, validation documents).

  Validation is a split of its own (`validation_split`), files of its own (`validation_path`), or
  `validation_fraction` of the training corpus, chosen by `divide` or else `split`.
  """
  check_path(options)
  source = _open(options, options.path, options.split)
  if not len(source):
    raise UserError(f"{options.path or options.source}: no documents.")
  if options.validation_split or options.validation_path:
    path = options.validation_path or options.path
    validation = _open(options, path, options.validation_split or options.split)
    if not len(validation):
      raise UserError(f"{path} {options.validation_split}: no documents to validate on.".strip())
    return source, validation
  if len(source) == 1 and not options.text_key:
    raise UserError(
      f"{source.name(0)}: a single record cannot be split into training and validation. "
      "Set --config.data.validation_path= to others."
    )
  return (divide or split)(source, options.validation_fraction, _SPLIT_SEED)


def _open(options: PartOptions, path: str, part: str) -> Source:
  match options.source:
    case "text":
      return files.TextFiles(files.find_files(path), options.undecodable)
    case "stdlib":
      return files.stdlib(options.undecodable)
    case "jsonl" | "parquet":
      return files.open_by_suffix(path, options.text_key, options.undecodable, options.source)
  files.refuse_to_skip(path, options.undecodable)
  match options.source:
    case "tfds":
      return open_tfds(path, part, options.text_key, options.tfds_data_dir)
    case "hf":
      return open_hf(path, part, options.text_key)


class Records:
  """Documents under one key of a random-access sequence of records (TFDS, Hugging Face)."""

  def __init__(self, records: Any, text_key: str, label: str, identity: str):
    self._records = records
    self._text_key = text_key
    self._label = label
    self._identity = identity

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> str:
    record = self._records[int(index)]
    if not self._text_key:
      return files.to_json(record)
    text = record[self._text_key]
    return files.decode(text, self.name(index)) if isinstance(text, bytes) else text

  def name(self, index: int) -> str:
    return f"{self._label}[{index}]"

  def sizes(self) -> np.ndarray:
    return np.ones(len(self), np.int64)

  def fingerprint(self) -> str:
    return f"{self._label} {self._text_key} {self._identity}"


def open_tfds(name: str, split: str, text_key: str, data_dir: str) -> Records:
  """Opens a TensorFlow dataset (`NAME[/config]`) without TensorFlow; downloads it if necessary."""
  import tensorflow_datasets as tfds  # Slow to import, and most runs do without.

  try:
    source = tfds.data_source(name, split=split, data_dir=data_dir or None)
  except tfds.core.DatasetNotFoundError as error:
    known = tfds.list_builders(with_community_datasets=False)
    near = difflib.get_close_matches(name.split("/")[0], known)  # All 200 would bury the message.
    raise UserError(
      f"TFDS can build no dataset {name!r} here, and finds none in tfds_data_dir={data_dir!r}. "
      f"{did_you_mean(name, near) if near else ''}".strip()
    ) from error
  except (ValueError, KeyError, OSError, ImportError, NotImplementedError) as error:
    raise UserError(f"TFDS {name!r}, split {split!r}: {_first_line(error)}") from error
  info = source.dataset_info
  if text_key and text_key not in info.features:
    raise UserError(files.missing_key(f"TFDS {info.full_name}", text_key, list(info.features)))
  folder = epath.Path(info.data_dir)
  stats = [(p.name, p.stat()) for p in sorted(folder.iterdir())] if folder.exists() else []
  identity = [(file, stat.length, stat.mtime) for file, stat in stats]
  return Records(source, text_key, f"tfds:{info.full_name}:{split}", f"{len(source)} {identity}")


def open_hf(path: str, split: str, text_key: str) -> Records:
  """Opens a Hugging Face dataset (`id`, `id:config` or a local folder) by its library."""
  try:
    import datasets
  except ImportError as error:
    raise UserError(
      "Hugging Face sets need the library `datasets`. Install it: pip install datasets."
    ) from error
  name, _, config = path.partition(":")
  try:
    records = datasets.load_dataset(name, config or None, split=split)
  except (ValueError, OSError) as error:  # The library's own errors derive from these.
    raise UserError(f"Hugging Face {path!r}, split {split!r}: {_first_line(error)}") from error
  if text_key and text_key not in records.column_names:
    raise UserError(files.missing_key(f"Hugging Face {path}", text_key, records.column_names))
  if text_key:
    records = records.select_columns([text_key])
  return Records(records, text_key, f"hf:{path}:{split}", records._fingerprint)


def _first_line(error: Exception) -> str:
  lines = str(error.args[0] if error.args else error).strip().splitlines()
  return lines[0] if lines else type(error).__name__


class Subset:
  """Some documents of a source, in its order."""

  def __init__(self, source: Source, indices: np.ndarray):
    self._source = source
    self._indices = np.sort(indices)

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> str:
    return self._source[int(self._indices[index])]

  def name(self, index: int) -> str:
    return self._source.name(int(self._indices[index]))

  def sizes(self) -> np.ndarray:
    return self._source.sizes()[self._indices]

  def fingerprint(self) -> str:
    digest = hashlib.sha256(self._indices.astype(np.int64).tobytes()).hexdigest()
    return f"{self._source.fingerprint()} documents {digest}"


class Excerpt:
  """The characters from `start` to `stop` of a source's only document."""

  def __init__(self, source: Source, start: int, stop: int):
    self._source = source
    self._start, self._stop = start, stop

  def __len__(self) -> int:
    return 1

  def __getitem__(self, index: int) -> str:
    return self._source[index][self._start : self._stop]

  def name(self, index: int) -> str:
    return self._source.name(index)

  def sizes(self) -> np.ndarray:
    return np.array([len(self[0].encode())], np.int64)

  def fingerprint(self) -> str:
    return f"{self._source.fingerprint()} characters {self._start}:{self._stop}"


def split(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
  """Splits a source by document into (training, validation), at random but reproducibly.

  Validation gets the number of documents whose bytes come nearest to `fraction` of all bytes, and
  at least one. A single document is cut instead, at a line start; its last `fraction`, in
  characters, is for validation.
  """
  if len(source) == 1:
    text = source[0]
    if len(text) < 2:
      raise UserError(f"{source.name(0)}: too short to split into training and validation.")
    cut = _line_start(text, round((1 - fraction) * len(text)))
    return Excerpt(source, 0, cut), Excerpt(source, cut, len(text))
  order = np.random.default_rng(seed).permutation(len(source))
  sizes = np.cumsum(source.sizes()[order])
  nearest = 1 + int(np.argmin(np.abs(sizes - fraction * sizes[-1])))
  count = min(nearest, len(source) - 1)
  return Subset(source, order[count:]), Subset(source, order[:count])


def _line_start(text: str, near: int) -> int:
  """Returns the line start nearest to `near`, or `near` itself if the text is a single line."""
  before, after = text.rfind("\n", 0, near) + 1, text.find("\n", near) + 1
  starts = [start for start in (before, after) if 0 < start < len(text)]
  return min(starts, key=lambda start: abs(start - near), default=min(max(near, 1), len(text) - 1))


def documents(source: Source, indices: Iterable[int] | None = None) -> Iterator[str]:
  """Yields the documents, all or those at `indices`, without empty ones."""
  for index in range(len(source)) if indices is None else indices:
    try:
      text = source[index]
    except OSError as error:
      raise UserError(f"{source.name(index)}: cannot be read ({error}).") from error
    if text:
      yield text
