"""Small files: written atomically, named within their folder, parsed within limits; new folders."""

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from gptjax.errors import UserError

# The longest integer that a float can hold; no file that is read here needs a longer one.
_MAX_DIGITS = 300


def write_atomically(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file atomically: whenever the process dies, the file is complete or as it was before.

  Args:
    path: local or remote (gs://...), in a folder that exists.
    content: text is written as UTF-8.
  """
  data = content.encode() if isinstance(content, str) else content
  if "://" in os.fspath(path):
    epath.Path(path).write_bytes(data)  # An object appears once all of it has arrived.
    return
  path = Path(path)
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
  try:
    with temporary.open("wb") as stream:
      stream.write(data)
      stream.flush()
      os.fsync(stream.fileno())  # Else the name may reach the disk before the content does.
    if path.exists():
      shutil.copymode(path, temporary)
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def check_new(folder: Path) -> None:
  """Raises UserError if a folder that is to be written (--to) has anything in it already."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(f"--to={folder} is there already and not empty; nothing is overwritten.")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
  """Yields an empty folder that takes the name of `folder` when all is in it, or is removed.

  Raises:
    UserError: as `check_new`, or it cannot be written.
  """
  check_new(folder)
  partial = folder.with_name(f"{folder.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  try:
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
      folder.rmdir()
    partial.rename(folder)
  except OSError as error:
    raise UserError(f"--to={folder}: cannot be written ({error}).") from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def plain_name(name: Any, source: object) -> str:
  """Returns the name of a file that another file gives, if it lies in one folder with that file.

  Raises:
    UserError: the name leads anywhere else; `source` is the file that gives it.
  """
  if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
    raise UserError(f"{source}: {name!r} is not the name of a file in the same folder.")
  return name


def parse_json(content: str | bytes, source: object) -> Any:
  """Parses JSON from anywhere.

  Raises:
    UserError: it is not JSON, nested too deep, or has an integer longer than any float; `source` is
      where it comes from.
  """
  try:
    return json.loads(content, parse_int=_parse_integer)
  except json.JSONDecodeError as error:
    line = f"line {error.lineno}, " if error.lineno > 1 else ""
    raise UserError(f"{source}: not JSON ({error.msg}, {line}column {error.colno}).") from error
  except UnicodeDecodeError as error:
    raise UserError(f"{source}: not JSON (byte {error.start}: {error.reason}).") from error
  except ValueError as error:
    raise UserError(f"{source}: {error}.") from error
  except RecursionError as error:
    raise UserError(f"{source}: JSON that is nested too deep to be read.") from error


def read_json(path: epath.PathLike) -> Any:
  """Reads a file of JSON; UserError that names it if it cannot be read or parsed."""
  return parse_json(read_bytes(path), path)


def read_bytes(path: epath.PathLike) -> bytes:
  """Reads a whole file; UserError that names it if it is a pipe or cannot be read."""
  try:
    if Path(path).is_fifo():
      raise OSError("a pipe, not a file")  # Reading it might wait for ever.
    return epath.Path(path).read_bytes()
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _parse_integer(digits: str) -> int:
  if len(digits) > _MAX_DIGITS:
    raise ValueError(f"an integer of {len(digits)} digits")
  return int(digits)
