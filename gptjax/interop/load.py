"""Moves parameters between another library's files and our arrays, tensor by tensor."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import jax
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from gptjax import tree
from gptjax.errors import UserError
from gptjax.interop.tensors import Entry, applicable, matches_any
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import ParameterInfo


class Tensors(Protocol):
  """The tensors of a file, by name; each is read only when asked for."""

  @property
  def names(self) -> frozenset[str]: ...

  def shape(self, name: str) -> tuple[int, ...]: ...

  def read(self, name: str) -> np.ndarray: ...


class Importer:
  """Loads parameters of a model from the tensors of a file; all are checked before any is read.

  Args:
    entries: which tensor holds which parameters.
    tensors: the file.
    parameters: descriptions of our model's parameters.
    config: config of our model.
    source: the file's name, for errors.
    prefix, older_names, ignored, copies: as in `Family`.

  Raises:
    UserError: a tensor is missing, is of another shape, or has no place in the model.
  """

  def __init__(
    self,
    entries: Sequence[Entry],
    tensors: Tensors,
    parameters: Mapping[str, ParameterInfo],
    config: ModelConfig,
    *,
    source: str,
    prefix: str = "",
    older_names: Mapping[str, str] = MappingProxyType({}),
    ignored: Sequence[str] = (),
    copies: Mapping[str, str] = MappingProxyType({}),
  ):
    self._tensors, self._parameters, self._config = tensors, parameters, config
    self._prefix, self._older_names, self._source = prefix, older_names, source
    self._entry_of = {
      name: entry for entry in applicable(entries, parameters, source) for name in entry.ours
    }
    unread = set(tensors.names)
    for entry in dict.fromkeys(self._entry_of.values()):
      expected = entry.shape(parameters, config)
      for written, _ in entry.names(parameters):
        name = self._find(written)
        if (found := tensors.shape(name)) != expected:
          raise UserError(
            f"{source}: tensor {name!r} is {list(found)}, the config makes it {list(expected)}."
          )
        unread.discard(name)
    self._copies = {name: self._find(copies[name]) for name in unread if name in copies}
    for name in sorted(unread):
      if name not in self._copies and not matches_any(name, ignored):
        raise UserError(f"{source}: tensor {name!r} has no place in the model.")

  def load(
    self, shardings: Mapping[str, jax.sharding.Sharding], *, progress: bool = False
  ) -> dict[str, Any]:
    """Returns the parameters named in `shardings`, float32, each device's part on that device.
    Beside the result, memory holds this process's part of one parameter and the tensor that is
    being read.

    Raises:
      UserError: a tensor is not of floats, or differs from one that the config ties it to.
    """
    for name, original in self._copies.items():
      if not np.array_equal(self._tensors.read(name), self._tensors.read(original)):
        raise UserError(
          f"{self._source}: tensor {name!r} is not {original!r}, to which the config ties it."
        )
    loaded = {
      name: self._load_parameter(name, shardings[name])
      for name in tqdm(shardings, "parameters", disable=not progress)
    }
    return traverse_util.unflatten_dict(loaded, sep="/")

  def _load_parameter(self, name: str, sharding: jax.sharding.Sharding) -> jax.Array:
    """Reads each tensor once, and skips those without a part on the devices here."""
    info, entry = self._parameters[name], self._entry_of[name]
    own = entry.ours.index(name)

    def bounds(index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
      return tuple(part.indices(size)[:2] for part, size in zip(index, info.shape, strict=True))

    parts = {
      part: np.empty([stop - start for start, stop in part], np.float32)
      for part in map(bounds, sharding.addressable_devices_indices_map(info.shape).values())
    }
    for written, place in entry.names(self._parameters):
      stacks = len(place)
      having = [
        part
        for part in parts
        if all(start <= i < stop for i, (start, stop) in zip(place, part, strict=False))
      ]
      if not having:
        continue
      tensor = self._tensors.read(self._find(written))
      if not np.isfinite(tensor).all():
        raise UserError(f"{self._source}: tensor {written!r} has a value that is not finite.")
      whole = entry.split(tensor, self._parameters, self._config)[own]
      for part in having:
        at = tuple(i - start for i, (start, _) in zip(place, part, strict=False))
        parts[part][at] = whole[tuple(slice(*ends) for ends in part[stacks:])]
    return jax.make_array_from_callback(info.shape, sharding, lambda index: parts[bounds(index)])

  def _find(self, name: str) -> str:
    names = [name]
    for suffix, older in self._older_names.items():
      if name.endswith(suffix):
        names.append(name.removesuffix(suffix) + older)
    for candidate in (*names, *(name.removeprefix(self._prefix) for name in names)):
      if candidate in self._tensors.names:
        return candidate
    raise UserError(f"{self._source}: no tensor {name!r}, which the config needs.")


def export(
  entries: Sequence[Entry],
  params: Mapping[str, Any],
  parameters: Mapping[str, ParameterInfo],
  config: ModelConfig,
  family: str,
  dtype: Any,
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, tensor) of a model's parameters.

  Raises:
    UserError: the family has no place for a parameter, or a value is too large for the dtype.
  """
  flat = tree.named_leaves(params)
  for entry in applicable(entries, parameters, family):
    for name, index in entry.names(parameters):
      layers = [np.asarray(flat[ours][index]) for ours in entry.ours]
      tensor = entry.join(layers, parameters, config)
      with np.errstate(over="ignore"):
        cast = tensor.astype(dtype)
      if (np.isfinite(tensor) & ~np.isfinite(cast)).any():
        raise UserError(f"tensor {name!r} has values too large for {np.dtype(dtype)}.")
      yield name, cast
