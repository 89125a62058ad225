"""Opens GGUF files of llama.cpp, after checking that their header says nothing impossible.

The library `gguf` believes a header: a count of 2**60 keeps it busy for ever.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

from gptjax.errors import UserError

_STRING, _ARRAY = 8, 9
# Bytes of a value, by the number of its type in the GGUF specification.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def open_gguf(path: Path) -> Any:
  """Opens a file as a gguf.GGUFReader; UserError if it is missing, damaged or cut short, or if
  `gguf` is not installed."""
  gguf = import_gguf(path)
  if not path.is_file():
    raise UserError(f"{path}: no such file.")
  try:
    with path.open("rb") as file:
      _check_header(file, path.stat().st_size)
    return gguf.GGUFReader(path)
  except (ValueError, LookupError, ArithmeticError, TypeError, struct.error) as error:
    raise UserError(f"{path}: not a GGUF file, or cut short ({error}).") from error


def import_gguf(path: Path) -> Any:
  """Imports the library, an extra that few need; UserError, naming the file that needs it, if it is
  not installed."""
  try:
    import gguf
  except ImportError as error:
    raise UserError(f"{path} needs the package gguf: pip install gguf.") from error
  return gguf


def _check_header(file: BinaryIO, size: int) -> None:
  """Raises ValueError for counts that the file is too short for, and for arrays of arrays."""

  def read(layout: str) -> tuple[int, ...]:
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))

  def skip(length: int) -> None:
    if length > size - file.tell():
      raise ValueError(f"{length} bytes are said to follow byte {file.tell()} of {size}")
    file.seek(length, 1)

  def skip_value(kind: int, count: int = 1) -> None:
    if kind in _SIZES:
      skip(count * _SIZES[kind])
    elif kind == _STRING:
      for _ in range(count):  # Ends at the end of the file, whatever the count.
        skip(read("Q")[0])
    else:
      raise ValueError("an array of arrays" if kind == _ARRAY else f"values of the type {kind}")

  magic, version, tensors, pairs = read("4sIQQ")
  if magic != b"GGUF" or version not in (2, 3):  # The library says so better.
    return
  if tensors > size or pairs > size:
    raise ValueError(f"{tensors} tensors and {pairs} fields in {size} bytes")
  for _ in range(pairs):
    skip(read("Q")[0])
    (kind,) = read("I")
    skip_value(*read("IQ")) if kind == _ARRAY else skip_value(kind)
