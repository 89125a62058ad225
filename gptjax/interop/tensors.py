"""Maps the tensors of another library's files to our parameters, by entries that work both ways.

Axes: N heads, H head width. Our parameter is first reshaped to two axes, [in, out], a bias to one,
[out], without the layers' axis; the experts' axis stays in front unless each has its own tensor.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from gptjax.errors import UserError
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import ParameterInfo


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of theirs, and our parameters that it holds.

  Attributes:
    theirs: its name; `{i}` is the layer, `{e}` the expert.
    ours: the names of our parameters, in their order along its outputs.
    transposed: whether a matrix is [out, in] (torch.nn.Linear).
    groups: order of the outputs of several parameters: one parameter after the other if 1, or in
      as many groups, with a part of each, as there are 'heads' or 'mlp' outputs.
    rotary_pairs: whether dimensions that are rotated together are adjacent in each head; ours are
      half a head apart.
  """

  theirs: str
  ours: tuple[str, ...]
  transposed: bool = False
  groups: int | str = 1
  rotary_pairs: bool = False

  def names(self, parameters: Mapping[str, ParameterInfo]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, index) of each tensor of the entry; the index in our parameters is the layer, or the
    layer and expert, or empty if a tensor is a whole parameter."""
    info = parameters[self.ours[0]]
    for index in np.ndindex(*info.shape[: self._stacks(info)]):
      yield self.theirs.format(**dict(zip("ie", index, strict=False))), index

  def with_prefix(self, old: str, new: str) -> "Entry":
    """The entry with another prefix of the tensor's name."""
    if not self.theirs.startswith(old):
      return self
    return dataclasses.replace(self, theirs=new + self.theirs.removeprefix(old))

  def shape(self, parameters: Mapping[str, ParameterInfo], config: ModelConfig) -> tuple[int, ...]:
    """The shape of their tensor."""
    flats = [self._flat(parameters[name]) for name in self.ours]
    joined = (*flats[0][:-1], sum(flat[-1] for flat in flats))
    if self._is_transposed(parameters):
      return (*joined[:-2], joined[-1], joined[-2])
    return joined

  def split(
    self, tensor: np.ndarray, parameters: Mapping[str, ParameterInfo], config: ModelConfig
  ) -> list[np.ndarray]:
    """Splits their tensor into a layer (or an expert of it) of each parameter, in our shape."""
    flats = [self._flat(parameters[name]) for name in self.ours]
    if self._is_transposed(parameters):
      tensor = tensor.swapaxes(-1, -2)
    groups = self._groups(config)
    widths = [flat[-1] // groups for flat in flats]
    grouped = tensor.reshape(*tensor.shape[:-1], groups, sum(widths))
    parts = np.split(grouped, np.cumsum(widths)[:-1], axis=-1)
    ours = []
    for name, flat, part in zip(self.ours, flats, parts, strict=True):
      part = part.reshape(flat)
      if self.rotary_pairs:
        part = _rotary_halves(part, config)
      ours.append(part.reshape(self._own_shape(parameters[name])))
    return ours

  def join(
    self, layers: Sequence[np.ndarray], parameters: Mapping[str, ParameterInfo], config: ModelConfig
  ) -> np.ndarray:
    """The inverse of `split`."""
    flats = [
      layer.reshape(self._flat(parameters[name]))
      for name, layer in zip(self.ours, layers, strict=True)
    ]
    if self.rotary_pairs:
      flats = [_rotary_pairs(flat, config) for flat in flats]
    groups = self._groups(config)
    grouped = [flat.reshape(*flat.shape[:-1], groups, -1) for flat in flats]
    joined = np.concatenate(grouped, axis=-1) if len(grouped) > 1 else grouped[0]
    joined = joined.reshape(*flats[0].shape[:-1], -1)
    if self._is_transposed(parameters):
      joined = joined.swapaxes(-1, -2)
    return joined

  def _groups(self, config: ModelConfig) -> int:
    return {"heads": config.num_heads, "mlp": config.mlp_dim}.get(self.groups, self.groups)

  def _is_transposed(self, parameters: Mapping[str, ParameterInfo]) -> bool:
    return self.transposed and parameters[self.ours[0]].fan_in_axes is not None

  def _stacks(self, info: ParameterInfo) -> int:
    """The number of leading axes (layers, experts) of a parameter that are split over tensors."""
    return (info.axes[0] == "layers") + ("{e}" in self.theirs)

  def _own_shape(self, info: ParameterInfo) -> tuple[int, ...]:
    """The shape of one layer of our parameter, or of one expert of it."""
    return info.shape[self._stacks(info) :]

  def _flat(self, info: ParameterInfo) -> tuple[int, ...]:
    shape = self._own_shape(info)
    experts = shape[:1] if "experts" in info.axes and "{e}" not in self.theirs else ()
    if info.fan_in_axes is not None:
      return (*experts, info.fan_in, info.fan_out)
    if self.ours[0].endswith("/embedding"):
      return shape
    return (*experts, math.prod(shape[len(experts) :]))


def _rotary_pairs(x: np.ndarray, config: ModelConfig) -> np.ndarray:
  """Reorders [..., N * H] so that the rotated pairs (0, R/2), (1, R/2 + 1) ... of each head, R
  being rope_dim, become adjacent."""
  rotated, rest = _rotary_parts(x, config)
  pairs = rotated.reshape(*rotated.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(rotated.shape)
  return np.concatenate([pairs, rest], axis=-1).reshape(x.shape)


def _rotary_halves(x: np.ndarray, config: ModelConfig) -> np.ndarray:
  rotated, rest = _rotary_parts(x, config)
  halves = rotated.reshape(*rotated.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(rotated.shape)
  return np.concatenate([halves, rest], axis=-1).reshape(x.shape)


def _rotary_parts(x: np.ndarray, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
  heads = x.reshape(*x.shape[:-1], -1, config.head_dim)
  return heads[..., : config.rope.dim], heads[..., config.rope.dim :]


def linear(theirs: str, *ours: str, **how) -> list[Entry]:
  """A torch.nn.Linear: weight [out, in] and, if ours has one, bias."""
  return _projection(theirs, ours, transposed=True, **how)


def conv1d(theirs: str, *ours: str) -> list[Entry]:
  """GPT-2's Conv1D: weight [in, out] and bias."""
  return _projection(theirs, ours, transposed=False)


def _projection(theirs: str, ours: Sequence[str], **how) -> list[Entry]:
  return [
    Entry(f"{theirs}.weight", tuple(f"{name}/kernel" for name in ours), **how),
    Entry(f"{theirs}.bias", tuple(f"{name}/bias" for name in ours), **how),
  ]


def norm(theirs: str, ours: str) -> list[Entry]:
  return [Entry(f"{theirs}.weight", (f"{ours}/scale",)), Entry(f"{theirs}.bias", (f"{ours}/bias",))]


def linears(theirs: str, ours: str, **names: str) -> list[Entry]:
  """A torch.nn.Linear for each of our names, within modules with the given names."""
  return [
    entry
    for name, written in names.items()
    for entry in linear(f"{theirs}.{written}", f"{ours}/{name}")
  ]


def table(theirs: str, ours: str) -> list[Entry]:
  return [Entry(f"{theirs}.weight", (f"{ours}/embedding",))]


def applicable(
  entries: Sequence[Entry], parameters: Mapping[str, ParameterInfo], family: str
) -> list[Entry]:
  """The entries for this model's parameters, each parameter in exactly one.

  Raises:
    UserError: the family has no place for a parameter.
  """
  chosen = [entry for entry in entries if any(name in parameters for name in entry.ours)]
  covered = [name for entry in chosen for name in entry.ours]
  for name in parameters:
    if covered.count(name) != 1:
      raise UserError(f"family {family!r} has no place for the parameter {name!r}.")
  missing = sorted(set(covered) - set(parameters))
  if missing:
    raise UserError(f"family {family!r} needs a parameter {missing[0]!r}, which this model lacks.")
  return chosen


def matches_any(name: str, patterns: Sequence[str]) -> bool:
  return any(re.fullmatch(pattern, name) for pattern in patterns)
