"""Reads and writes safetensors, in one file or in shards with an index.

A tensor is read only when asked for, so that a model need not be in memory twice.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from gptjax.errors import UserError
from gptjax.small_files import plain_name, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
MAX_SHARD_BYTES = 5 * 10**9


class TensorFiles(contextlib.ExitStack):
  """The tensors of a folder, by name. Closes its files when left.

  Raises:
    UserError: there is no safetensors file, a shard is missing, or a file is damaged.
  """

  def __init__(self, folder: Path):
    super().__init__()
    self._folder = folder
    self._files: dict[str, Any] = {}
    for path in _shards(folder):
      if not path.is_file():
        raise UserError(f"{path}: a folder or a pipe, not a file.")
      try:
        file = self.enter_context(safetensors.safe_open(path, framework="np"))
      except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); fetch it again.") from error
      self._files |= dict.fromkeys(file.keys(), file)

  @property
  def names(self) -> frozenset[str]:
    return frozenset(self._files)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._files[name].get_slice(name).get_shape())

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor in its own dtype; UserError if that is not a floating one."""
    dtype = self._files[name].get_slice(name).get_dtype()
    if dtype not in _FLOATS:
      raise UserError(
        f"{self._folder}: tensor {name!r} is of dtype {dtype}; only {', '.join(_FLOATS)} can be "
        "read, and quantised weights from GGUF files."
      )
    return self._files[name].get_tensor(name)


def _shards(folder: Path) -> list[Path]:
  if (folder / SINGLE).exists():
    return [folder / SINGLE]
  if (folder / INDEX).exists():
    paths = [folder / name for name in _indexed(folder / INDEX)]
    for path in paths:
      if not path.exists():
        raise UserError(f"{path} is missing; {folder / INDEX} names it.")
    return paths
  pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
  if pickles:
    raise UserError(
      f"{pickles[0]} is a pickle, which runs code of its author when it is read. Load it with "
      "transformers where you trust it, and save it with save_pretrained(DIR): that writes "
      "safetensors."
    )
  raise UserError(f"{folder}: no {SINGLE} and no {INDEX}.")


def _indexed(path: Path) -> list[str]:
  """The names of the files that an index lists."""
  try:
    names = set(read_json(path)["weight_map"].values())
  except (KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{path}: not an index of safetensors ({error}); fetch it again.") from error
  return sorted(plain_name(name, path) for name in names)


def write(folder: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
  """Writes (name, tensor) to one file, or to shards of up to 5 GB with an index; one shard at a
  time is in memory. `folder` exists and has no weights yet."""
  shards: list[list[str]] = []
  total = 0
  for shard in _in_shards(tensors):
    _write_file(folder / f"{len(shards)}.safetensors", shard)
    total += sum(array.nbytes for array in shard.values())
    shards.append(list(shard))
  if len(shards) == 1:
    (folder / "0.safetensors").rename(folder / SINGLE)
    return
  weight_map = {}
  for number, names in enumerate(shards):
    file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
    (folder / f"{number}.safetensors").rename(folder / file)
    weight_map |= dict.fromkeys(names, file)
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _in_shards(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
  shard: dict[str, np.ndarray] = {}
  filled = 0
  for name, array in tensors:
    if shard and filled + array.nbytes > MAX_SHARD_BYTES:
      yield shard
      shard, filled = {}, 0
    shard[name] = np.ascontiguousarray(array)
    filled += array.nbytes
  yield shard


def _write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
  path.touch()
  mode = path.stat().st_mode
  safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})
  path.chmod(mode)  # The library makes files that only their owner can read.
