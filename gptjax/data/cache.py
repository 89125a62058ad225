"""Tokens of a corpus, made once and memory-mapped ever after.

A stream is [end_of_text, tokens of a document] for each document and a last end_of_text, so that
every document starts after a separator and its end is learnt.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tqdm
from absl import logging

from gptjax.data.sources import Source, documents
from gptjax.devices import hosts as host
from gptjax.errors import UserError
from gptjax.small_files import read_json

_FORMAT = 2
_CHUNK_CHARACTERS = 1 << 22
_PIECE_CHARACTERS = 1 << 18
_CHECK_BYTES = 1 << 24
# No pattern of the byte-level tokenizers reaches from a lone newline into a word after it, so
# cutting there changes no token. One that puts a space before each text would put one at each cut.
_CUT = re.compile(r"(?<=\S\n)(?=\w)")


class Encoder(Protocol):
  """Turns documents into token ids: a `Tokenizer`, a `ChatEncoder` or a `PromptEncoder`."""

  vocab_size: int
  end_of_text: int
  adds_space: bool

  def encode_batch(self, texts: Sequence[str]) -> Sequence[np.ndarray | list[np.ndarray]]:
    """Returns the tokens of each text, or a list of arrays if a text becomes several documents."""

  def fingerprint(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class TokenCache:
  """A tokenised corpus.

  Attributes:
    tokens: uint16 or uint32 [num_tokens], memory-mapped.
    boundaries: int64 [num_documents], where each document's leading end_of_text stands.
    num_bytes: UTF-8 bytes of the documents' text.
    checksum: CRC-32 of the tokens and then the boundaries; equal corpora have equal checksums.
  """

  tokens: np.ndarray
  boundaries: np.ndarray
  num_bytes: int
  checksum: int

  @property
  def num_tokens(self) -> int:
    return len(self.tokens)

  @property
  def num_documents(self) -> int:
    return len(self.boundaries)


def open_or_build(
  source: Source, tokenizer: Encoder, cache_dir: str, *, progress: bool = False
) -> TokenCache:
  """Opens the cache of (source, tokenizer), building it first if there is none.

  A build holds a file lock, which ends with its process: a second builder waits and then finds the
  work done, and leftovers of a killed build are removed. The finished folder appears by one rename.

  Args:
    source: the documents.
    tokenizer: what to encode them with.
    cache_dir: where caches live; '' for $XDG_CACHE_HOME/gptjax.
    progress: whether to show a progress bar on stderr.

  Raises:
    UserError: if a document cannot be read, if none has any text, or if the folder cannot be
      written.
  """
  identity = f"{_FORMAT} {tokenizer.fingerprint()} {source.fingerprint()}"
  root = (Path(cache_dir).expanduser() if cache_dir else host.cache_root()) / "tokens"
  folder = root / hashlib.sha256(identity.encode()).hexdigest()[:32]
  partial = folder.with_suffix(".partial")
  with _writing(root):
    if cache := _open(folder):
      return cache
    root.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if cache := _open(folder):
        return cache
      shutil.rmtree(partial, ignore_errors=True)
      shutil.rmtree(folder, ignore_errors=True)  # Here only if it was damaged.
      try:
        _build(partial, source, tokenizer, progress)
        os.replace(partial, folder)
      finally:
        shutil.rmtree(partial, ignore_errors=True)
  return _open(folder)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(
      f"{folder}: cannot keep the token cache ({error}). "
      "Set --config.data.cache_dir= to a folder with room."
    ) from error


def _open(folder: Path) -> TokenCache | None:
  """Opens a finished cache; None if there is none, or if its files are not as they were written."""
  if not (folder / "meta.json").exists():
    return None
  try:
    meta = read_json(folder / "meta.json")
    tokens = np.memmap(folder / "tokens.bin", np.dtype(meta["dtype"]), "r")
    boundaries = np.load(folder / "boundaries.npy", mmap_mode="r")
    cache = TokenCache(tokens, boundaries, meta["num_bytes"], meta["checksum"])
    if _checksum(boundaries, _checksum(tokens)) != cache.checksum:
      raise ValueError("another checksum than when it was written")
  except (OSError, ValueError, KeyError, TypeError) as error:
    logging.warning("%s: damaged (%s); it will be built again.", folder, error)
    return None
  return cache


def _checksum(array: np.ndarray, start: int = 0) -> int:
  """Continues the CRC-32 `start` over an array's bytes, read a block at a time."""
  content = array.view(np.uint8)
  for block in range(0, len(content), _CHECK_BYTES):
    start = zlib.crc32(content[block : block + _CHECK_BYTES], start)
  return start


def _build(folder: Path, source: Source, tokenizer: Encoder, progress: bool) -> None:
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
  separator = np.array([tokenizer.end_of_text], dtype)
  boundaries, num_tokens, num_bytes, checksum = [], 0, 0, 0
  folder.mkdir()
  with open(folder / "tokens.bin", "wb") as stream:

    def write(tokens: np.ndarray) -> None:
      nonlocal num_tokens, checksum
      stream.write(tokens)
      checksum = _checksum(tokens, checksum)
      num_tokens += len(tokens)

    for starts, pieces in _chunks(source, progress, cut=not tokenizer.adds_space):
      num_bytes += sum(len(piece.encode()) for piece in pieces)
      # The tokenizers' own threads encode the pieces of a chunk in parallel.
      for begins, encoded in zip(starts, tokenizer.encode_batch(pieces), strict=True):
        for tokens in encoded if isinstance(encoded, list) else [encoded]:
          if begins:
            boundaries.append(num_tokens)
            write(separator)
          write(tokens.astype(dtype))
    if not boundaries:
      raise UserError(f"{source.name(0)}: no text in any of {len(source)} documents.")
    write(separator)
    stream.flush()
    os.fsync(stream.fileno())
  positions = np.array(boundaries, np.int64)
  meta = {
    "dtype": dtype.name,
    "num_tokens": num_tokens,
    "num_documents": len(positions),
    "num_bytes": num_bytes,
    "checksum": _checksum(positions, checksum),
  }
  np.save(folder / "boundaries.npy", positions)
  (folder / "meta.json").write_text(json.dumps(meta))


def _chunks(source: Source, progress: bool, *, cut: bool) -> Iterator[tuple[list[bool], list[str]]]:
  """Yields some megabytes of text at a time: (does a document begin here, text) by piece."""
  starts, pieces, characters = [], [], 0
  texts = documents(source)
  for text in tqdm.tqdm(texts, "Tokenising", len(source), unit="doc", disable=not progress):
    for number, piece in enumerate(_pieces(text) if cut else filter(None, [text])):
      starts.append(number == 0)
      pieces.append(piece)
      characters += len(piece)
      if characters >= _CHUNK_CHARACTERS:
        yield starts, pieces
        starts, pieces, characters = [], [], 0
  if pieces:
    yield starts, pieces


def _pieces(text: str) -> Iterator[str]:
  """Cuts a long text where it does not change the tokens; an empty text has no piece."""
  start = 0
  while start < len(text):
    cut = _CUT.search(text, start + _PIECE_CHARACTERS)
    stop = cut.start() if cut else len(text)
    yield text[start:stop]
    start = stop
