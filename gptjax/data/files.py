"""Documents in local files, read at random: text, JSON, Parquet, CSV, the standard library.

A document is the value of a record's `text_key`; if that is '', the whole record as JSON.
"""

import codecs
import dataclasses
import functools
import glob
import gzip
import hashlib
import itertools
import json
import os
import platform
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard
from absl import logging
from pyarrow import csv

from gptjax.errors import UserError
from gptjax.small_files import parse_json

# What records are in, by the suffix of a file. A folder stands for its files of the first kind that
# it has any of.
_SUFFIXES = {
  "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
  "parquet": (".parquet",),
  "csv": (".csv", ".tsv"),
  "json": (".json",),
}
RECORD_SUFFIXES = tuple(itertools.chain(*_SUFFIXES.values()))
_BLOCK_BYTES = 1 << 24
# How much larger than its file a decompressed text may be; real texts are 3 to 30 times as large.
_MAX_EXPANSION = 200
_STRINGS = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())


@dataclasses.dataclass(frozen=True)
class FileSet:
  """Files in a fixed order; their names, sizes and times stand for their content."""

  root: Path
  files: tuple[Path, ...]

  def identity(self) -> str:
    """Changes when a file is added, removed, renamed or written, not when the folder moves."""
    stats = [(file, file.stat()) for file in self.files]
    rows = [(str(f.relative_to(self.root)), s.st_size, s.st_mtime_ns) for f, s in stats]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def find_files(path: str, suffixes: Sequence[str] = ()) -> FileSet:
  """Returns the files that `path` (a file, a folder, a glob) stands for, sorted by name.

  A folder stands for all files below it that are not hidden and, if `suffixes` are given, end
  with one of them.
  """
  place = Path(path).expanduser()
  if place.is_file():
    return FileSet(place.parent, (place,))
  if place.is_dir():
    found = sorted(f for f in _walk(place) if not suffixes or f.name.endswith(tuple(suffixes)))
    for file in found:
      _require_file(file)
    if not found:
      raise UserError(f"{path}: no {' or '.join(suffixes) or 'visible'} file in this folder.")
    return FileSet(place, tuple(found))
  if place.exists():
    _require_file(place)
  found = sorted(Path(file) for file in glob.glob(str(place), recursive=True))
  found = [file for file in found if file.is_file()]
  if not found:
    raise UserError(f"{path}: no such file or folder, and no file matches it as a pattern.")
  return FileSet(Path(os.path.commonpath([file.parent for file in found])), tuple(found))


def _require_file(file: Path) -> None:
  """Refuses a pipe (reading it might wait for ever), a device, and a link to nothing."""
  if not file.is_file():
    kind = "neither a file nor a folder" if file.exists() else "a link to what is not there"
    raise UserError(f"{file} is {kind}; move it away, or name the files by a pattern.")


def _walk(root: Path, excluded: Collection[str] = ()) -> Iterator[Path]:
  for folder, folders, names in os.walk(root):
    folders[:] = (name for name in folders if name[0] != "." and name not in excluded)
    yield from (Path(folder, name) for name in names if name[0] != ".")


class TextFiles:
  """One document a file."""

  def __init__(self, files: FileSet, undecodable: str, identity: str = ""):
    self._files = files
    self._undecodable = undecodable
    self._identity = identity

  def __len__(self) -> int:
    return len(self._files.files)

  def __getitem__(self, index: int) -> str:
    return decode(self._files.files[index].read_bytes(), self.name(index), self._undecodable)

  def name(self, index: int) -> str:
    return str(self._files.files[index])

  def sizes(self) -> np.ndarray:
    return np.array([file.stat().st_size for file in self._files.files], np.int64)

  def fingerprint(self) -> str:
    return f"text {self._identity} {self._files.identity()}"


def stdlib(undecodable: str) -> TextFiles:
  """Returns the hand-written modules of the running Python, without tests: about 10 MB."""
  root = Path(sysconfig.get_paths()["stdlib"])
  foreign = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
  files = [
    file
    for file in sorted(_walk(root, foreign))
    if file.suffix == ".py"
    and not file.name.startswith("_sysconfigdata")
    # Most of `encodings` are tables written by a script, and their first lines say so.
    and not (file.parent.name == "encodings" and b"gencodec.py" in file.read_bytes()[:200])
  ]
  return TextFiles(FileSet(root, tuple(files)), undecodable, platform.python_version())


class JsonLines:
  """One document a line, plain or compressed (.gz, .zst).

  Lines are found once, by their byte offsets. Reading in order is cheap for all files; going
  back in a compressed file decompresses it from its start.
  """

  def __init__(self, files: FileSet, text_key: str, undecodable: str):
    self._files = files
    self._text_key = text_key
    self._undecodable = undecodable
    starts, lengths, self._first = [], [], [0]
    for file in files.files:
      file_starts, file_lengths = _find_lines(file)
      starts.append(file_starts)
      lengths.append(file_lengths)
      self._first.append(self._first[-1] + len(file_starts))
    self._starts, self._lengths = np.concatenate(starts), np.concatenate(lengths)
    self._open: tuple[int, BinaryIO] | None = None

  def __len__(self) -> int:
    return len(self._starts)

  def __getitem__(self, index: int) -> str:
    name = self.name(index)
    line = decode(self._read(index), name, self._undecodable)
    if not line.strip():
      return ""
    record = parse_json(line, name)
    if not isinstance(record, dict):
      raise UserError(f"{name}: a JSON {type(record).__name__}, not an object.")
    if not self._text_key:
      return line
    return _text(record.get(self._text_key), name, self._text_key, list(record))

  def name(self, index: int) -> str:
    file, line = self._locate(index)
    return f"{self._files.files[file]}:{line + 1}"

  def sizes(self) -> np.ndarray:
    return self._lengths

  def fingerprint(self) -> str:
    return f"jsonl {self._text_key} {self._files.identity()}"

  def _locate(self, index: int) -> tuple[int, int]:
    file = int(np.searchsorted(self._first, index, side="right")) - 1
    return file, index - self._first[file]

  def _read(self, index: int) -> bytes:
    file, _ = self._locate(index)
    start, length = int(self._starts[index]), int(self._lengths[index])
    if self._open is None or self._open[0] != file or self._open[1].tell() > start:
      if self._open is not None:
        self._open[1].close()
      self._open = (file, _open_binary(self._files.files[file]))
    stream = self._open[1]
    stream.seek(start)
    return stream.read(length)


def _open_binary(file: Path) -> BinaryIO:
  if file.suffix == ".gz":
    return gzip.open(file)
  if file.suffix == ".zst":
    return zstandard.ZstdDecompressor().stream_reader(file.open("rb"), read_across_frames=True)
  return file.open("rb")


def _find_lines(file: Path) -> tuple[np.ndarray, np.ndarray]:
  """Returns the start and the length of each line, in bytes of the decompressed file."""
  ends, size = [], 0
  try:
    with _open_binary(file) as stream:
      while block := stream.read(_BLOCK_BYTES):
        _check_expansion(file, size)
        ends.append(size + 1 + np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")))
        size += len(block)
  except (OSError, EOFError, zstandard.ZstdError) as error:
    raise UserError(f"{file}: cannot be read ({error}).") from error
  ends = np.concatenate(ends) if ends else np.zeros(0, np.int64)
  if size and (not len(ends) or ends[-1] != size):
    ends = np.append(ends, size)
  starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
  return starts.astype(np.int64), (ends - starts).astype(np.int64)


def _check_expansion(file: Path, size: int) -> None:
  """Raises UserError if `size` bytes, decompressed, are more than a file of texts can hold."""
  packed = file.stat().st_size
  if size > _MAX_EXPANSION * max(packed, _BLOCK_BYTES):
    raise UserError(
      f"{file}: expands to more than {_MAX_EXPANSION} times its {packed:,} bytes, as no text "
      "does; if it is to be read, write it uncompressed first."
    )


class ParquetFiles:
  """One document a row; the row group that was read last is kept."""

  def __init__(self, files: FileSet, text_key: str):
    self._files = files
    self._text_key = text_key
    rows, self._groups = [0], []
    for number, file in enumerate(files.files):
      try:
        metadata = pq.read_metadata(file)
      except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{file}: not a Parquet file ({error}).") from error
      columns = metadata.schema.to_arrow_schema().names
      if text_key and text_key not in columns:
        raise UserError(missing_key(file, text_key, columns))
      file_start = rows[-1]
      for group in range(metadata.num_row_groups):
        self._groups.append((number, group, file_start))
        rows.append(rows[-1] + metadata.row_group(group).num_rows)
    self._first = np.array(rows, np.int64)
    self._table = functools.lru_cache(maxsize=1)(self._read_group)

  def __len__(self) -> int:
    return int(self._first[-1])

  def __getitem__(self, index: int) -> str:
    group = self._group(index)
    try:
      (record,) = self._table(group).slice(int(index - self._first[group]), 1).to_pylist()
    except UnicodeDecodeError as error:
      return decode(error.object, self.name(index))  # Which names the byte.
    if not self._text_key:
      return to_json(record)
    return _text(record[self._text_key], self.name(index), self._text_key, [self._text_key])

  def name(self, index: int) -> str:
    number, _, file_start = self._groups[self._group(index)]
    return f"{self._files.files[number]}:{index - file_start + 1}"

  def sizes(self) -> np.ndarray:
    return np.ones(len(self), np.int64)  # The files do not say; reading all rows costs too much.

  def fingerprint(self) -> str:
    return f"parquet {self._text_key} {self._files.identity()}"

  def _group(self, index: int) -> int:
    return int(np.searchsorted(self._first, index, side="right")) - 1

  def _read_group(self, group: int) -> pa.Table:
    number, group_in_file, _ = self._groups[group]
    file = self._files.files[number]
    columns = [self._text_key] if self._text_key else None
    metadata = pq.read_metadata(file)
    # A value that is repeated is stored once, and stays so in memory until its size is known.
    texts = [f.name for f in metadata.schema.to_arrow_schema() if f.type in _STRINGS]
    _check_expansion(file, metadata.row_group(group_in_file).total_byte_size)
    with pq.ParquetFile(file, metadata=metadata, read_dictionary=texts) as reader:
      table = reader.read_row_group(group_in_file, columns=columns)
    _check_expansion(file, sum(map(_expanded_bytes, table.columns)))
    return table


def _expanded_bytes(column: pa.ChunkedArray) -> int:
  if not pa.types.is_dictionary(column.type):
    return column.nbytes
  lengths = (pc.take(pc.binary_length(part.dictionary), part.indices) for part in column.chunks)
  return sum(pc.sum(part).as_py() or 0 for part in lengths)


class Tables:
  """One document a row of CSV or TSV, or an item of a JSON array; all of them in memory."""

  def __init__(self, files: FileSet, text_key: str):
    self._files, self._text_key = files, text_key
    self._rows = [(file, row) for file in files.files for row in enumerate(_read_table(file), 1)]

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> str:
    _, (_, record) = self._rows[index]
    if not self._text_key:
      return to_json(record)
    return _text(record.get(self._text_key), self.name(index), self._text_key, [*record])

  def name(self, index: int) -> str:
    file, (number, _) = self._rows[index]
    return f"{file}:{number}"

  def sizes(self) -> np.ndarray:
    return np.ones(len(self), np.int64)

  def fingerprint(self) -> str:
    return f"table {self._text_key} {self._files.identity()}"


def _read_table(file: Path) -> list[dict[str, Any]]:
  if file.suffix == ".json":
    records = parse_json(decode(file.read_bytes(), str(file)), file)
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
      raise UserError(f"{file}: JSON, but neither an array of objects nor one object a line.")
    return records
  form = csv.ParseOptions(delimiter="\t" if file.suffix == ".tsv" else ",", newlines_in_values=True)
  try:
    return csv.read_csv(file, parse_options=form).to_pylist()
  except (OSError, pa.ArrowInvalid) as error:
    raise UserError(f"{file}: cannot be read as {file.suffix[1:].upper()} ({error}).") from error


def open_texts(path: str) -> "TextFiles | Any":
  """Opens text files, or the key 'text' of records, by the name of the path; UserError for a file
  that cannot be read."""
  if path.endswith(RECORD_SUFFIXES):
    return open_by_suffix(path, "text", "error")
  return TextFiles(find_files(path), "error")


def open_by_suffix(
  path: str, text_key: str, undecodable: str, default: str = "jsonl"
) -> JsonLines | ParquetFiles | Tables:
  """Opens records in the format that their suffix tells, or the default where it tells none."""
  found = find_files(path, RECORD_SUFFIXES)
  kinds = {file: _kind_of(file, default) for file in found.files}
  kind = min(kinds.values(), key=[*_SUFFIXES].index)
  found = dataclasses.replace(found, files=tuple(file for file in kinds if kinds[file] == kind))
  if kind == "jsonl":
    return JsonLines(found, text_key, undecodable)
  refuse_to_skip(path, undecodable)
  match kind:
    case "parquet":
      return ParquetFiles(found, text_key)
  return Tables(found, text_key)


def _kind_of(file: Path, default: str) -> str:
  kinds = (kind for kind, suffixes in _SUFFIXES.items() if file.name.endswith(suffixes))
  kind = next(kinds, default)
  if kind == "json":
    with file.open("rb") as stream:  # Lines of objects are called .json too.
      start = stream.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
    kind = "json" if start.startswith(b"[") else "jsonl"
  return kind


def refuse_to_skip(path: str, undecodable: str) -> None:
  """Raises UserError for an option that files other than text and JSON lines have no use for."""
  if undecodable == "skip":
    raise UserError(
      f"{path}: data.undecodable=skip is for text and jsonl; other records that are not UTF-8 are "
      "errors. Set --config.data.undecodable=error."
    )


def decode(data: bytes, name: str, undecodable: str = "") -> str:
  """Decodes UTF-8 text; binary data is a UserError, which under 'error' proposes to skip it, or
  under 'skip' an empty document."""
  try:
    if b"\0" not in data:  # Valid UTF-8, but in no text: binary formats and UTF-16 have it.
      return data.decode("utf-8").removeprefix("\ufeff")  # A byte order mark.
    reason = f"a zero byte at {data.index(0)}"
  except UnicodeDecodeError as error:
    reason = f"byte {error.start}: {error.reason}"
  if undecodable == "skip":
    _warn_skipped(name, reason)
    return ""
  hint = ", or set --config.data.undecodable=skip" if undecodable == "error" else ""
  raise UserError(f"{name}: not UTF-8 text ({reason}). Convert it{hint}.")


@functools.lru_cache(maxsize=1024)  # A document is read more than once; one warning is enough.
def _warn_skipped(name: str, reason: str) -> None:
  logging.warning("%s: skipped, not UTF-8 text (%s).", name, reason)


def to_json(record: object) -> str:
  """Returns a record as JSON; bytes become UTF-8 text, and values unknown to JSON their str()."""

  def plain(value: object) -> object:
    match value:
      case bytes():
        return value.decode("utf-8", errors="replace")
      case np.ndarray() | np.generic():
        return value.tolist()
    return str(value)

  return json.dumps(record, ensure_ascii=False, default=plain)


def missing_key(
  name: object,
  key: str,
  found: Sequence[str],
  option: str = "data.text_key",
  taken: Collection[str] = (),
) -> str:
  """Returns the sentence for a record without the key that an option of the config names; it
  proposes none that other options have taken."""
  others = [other for other in found if other != key]
  free = [other for other in others if other not in taken]
  hint = f" Set --config.{option}={free[0]}." if free else ""
  return f"{name}: no key {key!r} (found: {', '.join(map(repr, others)) or 'nothing'}).{hint}"


def _text(value: object, name: str, text_key: str, found: Sequence[str]) -> str:
  if text_key not in found:
    raise UserError(missing_key(name, text_key, found))
  if not isinstance(value, str):
    raise UserError(f"{name}: {text_key!r} is {type(value).__name__}, not a string.")
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:
    raise UserError(
      f"{name}: {text_key!r} has half a surrogate pair at character {error.start}, "
      "which is no Unicode text."
    ) from error
  return value
