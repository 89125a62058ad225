"""The projections of a model that the `peft` library adapts, and their names there.

If one projection of theirs is several of ours (GPT-2's c_attn), ours are blocks of its outputs.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.interop.family import Family
from gptjax.interop.tensors import Entry, applicable
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import ParameterInfo, describe_parameters

# Prefix of the names of a model's modules in the library.
PREFIX = "base_model.model."


class Projection:
  """A projection of theirs in every layer, and our projections that it contains.

  Attributes:
    module: its name in the model, `{i}` being the layer.
    names: our kernels, in their order along its outputs.
    target: the library's name for it in every layer: the end of its name.
    is_ambiguous: whether that end also matches another projection.
  """

  def __init__(
    self,
    entry: Entry,
    parameters: Mapping[str, ParameterInfo],
    config: ModelConfig,
    modules: Sequence[str],
  ):
    self.module = _module(entry)
    self.names = entry.ours
    self.target = self.module.rpartition("{i}.")[2]
    self.is_ambiguous = sum(module.endswith(self.target) for module in modules) > 1
    self._entry, self._config = entry, config
    self._infos = {name: parameters[name] for name in entry.ours}
    info = self._infos[self.names[0]]
    self.layers = info.shape[0]
    self.in_shape = tuple(info.shape[axis] for axis in info.fan_in_axes)
    self.inputs = math.prod(self.in_shape)
    self.outputs = sum(math.prod(self.out_shape(name)) for name in self.names)

  @property
  def modules(self) -> list[str]:
    """Its name in each layer."""
    return [self.module.format(i=i) for i in range(self.layers)]

  @property
  def targets(self) -> list[str]:
    """Names to list for the library, which accepts a whole name or the end of one."""
    return self.modules if self.is_ambiguous else [self.target]

  @property
  def pattern(self) -> str:
    """The key of its options, a regular expression for a whole name or the end of one."""
    return _all_layers(self.module) if self.is_ambiguous else self.target

  @property
  def fan_in_fan_out(self) -> bool:
    """Whether the library's weight is [in, out]."""
    return not self._entry.transposed

  def tensor_names(self, suffix: str) -> list[str]:
    return [f"{PREFIX}{module}.{suffix}" for module in self.modules]

  def split(self, tensors: Sequence[np.ndarray], rank: int | None = None) -> list[np.ndarray]:
    """Splits [out, rank] or [out] of each layer into our kernels' [L, rank, *out] or [L, *out]."""
    entry, infos = self._like_outputs(rank)
    layers = [entry.split(tensor, infos, self._config) for tensor in tensors]
    return [np.stack(of_name) for of_name in zip(*layers, strict=True)]

  def join(self, ours: Sequence[np.ndarray], rank: int | None = None) -> list[np.ndarray]:
    """The inverse of `split`."""
    entry, infos = self._like_outputs(rank)
    return [entry.join([x[i] for x in ours], infos, self._config) for i in range(self.layers)]

  def out_shape(self, name: str) -> tuple[int, ...]:
    return self._infos[name].shape[1 + len(self.in_shape) :]

  def _like_outputs(self, rank: int | None) -> tuple[Entry, dict[str, ParameterInfo]]:
    """The entry and the parameters of a projection with `rank` inputs, or of a bias."""
    middle, inputs = ((), None) if rank is None else ((rank,), (1,))
    infos = {}
    for name, info in self._infos.items():
      shape = (self.layers, *middle, *self.out_shape(name))
      axes = ("layers", *("rank",) * len(middle), *info.axes[1 + len(self.in_shape) :])
      infos[name] = ParameterInfo(shape, axes, inputs, "hidden")
    entry = self._entry
    return Entry(entry.theirs, self.names, True, entry.groups, entry.rotary_pairs), infos


def find_entries(model_config: ModelConfig, family: Family) -> list[Entry]:
  """The tensors of the model by their names in the library, which omit the family's prefix in a
  class without a head."""
  entries = applicable(
    family.entries(model_config), describe_parameters(model_config), family.model_type
  )
  if re.search(r"(?<!LMHead)Model$", family.architecture(model_config)):
    return [entry.with_prefix(family.prefix, "") for entry in entries]
  return entries


def find_projections(entries: Sequence[Entry], model_config: ModelConfig) -> list[Projection]:
  """The projections inside layers, without experts."""
  parameters = describe_parameters(model_config)
  modules = [
    _module(entry) for entry in entries if parameters[entry.ours[0]].fan_in_axes is not None
  ]
  return [
    Projection(entry, parameters, model_config, modules)
    for entry in entries
    if (info := parameters[entry.ours[0]]).fan_in_axes is not None
    and info.axes[0] == "layers"
    and "experts" not in info.axes
  ]


def is_target(fields: Mapping[str, Any], module: str) -> bool:
  """Whether the library adapts a module, by the fields of adapter_config.json."""
  targets = fields["target_modules"]
  if not _is_named(module, targets) or is_saved(fields, module):
    return False
  if _is_named(module, fields.get("exclude_modules") or ()):
    return False
  layers = fields.get("layers_to_transform")
  if isinstance(targets, str) or module in targets or layers in (None, []):
    return True
  patterns = fields.get("layers_pattern") or r"[^.]*"
  for pattern in [patterns] if isinstance(patterns, str) else patterns:
    if found := re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", module):
      return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
  return False


def is_saved(fields: Mapping[str, Any], module: str) -> bool:
  """Whether the library saves a module whole, alone or within a module that contains it."""
  parts = module.split(".")
  holders = [".".join(parts[: end + 1]) for end in range(len(parts))]
  saved = tuple(fields.get("modules_to_save") or ())
  return any(holder.endswith(saved) for holder in holders)


def _is_named(module: str, names: str | Sequence[str]) -> bool:
  """Whether a module matches a regular expression, or a list of names or ends of names."""
  if isinstance(names, str):
    return names == "all-linear" or re.fullmatch(names, module) is not None
  return any(f".{module}".endswith(f".{name}") for name in names)


def _module(entry: Entry) -> str:
  return entry.theirs.removesuffix(".weight")


def _all_layers(module: str) -> str:
  before, after = map(re.escape, module.split("{i}"))
  return rf"{before}\d+{after}"
