"""Maps the fields of another library's config to ours, by rules that read and write."""

import dataclasses
import math
import typing
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from gptjax.errors import UserError
from gptjax.model.config import ModelConfig, shortest_period

REQUIRED = object()
_KINDS = ModelConfig.kinds()


class Fields:
  """The fields of a file, all of which must be read.

  Attributes:
    source: the file, for errors.
    tensors: names of the file's tensors, which decide what the config leaves open.
  """

  def __init__(self, values: Mapping[str, Any], source: str, tensors: Collection[str] = ()):
    self.source = source
    self.tensors = tensors
    self._unread = dict(values)

  def take(self, name: str, default: Any = REQUIRED, kind: Any = None) -> Any:
    """Returns the value of a field.

    Raises:
      UserError: it is missing and has no default, or it is neither the default nor of `kind`, a
        type or a union of types; an int is also a float, a bool is not an int.
    """
    value = self._unread.pop(name, default)
    if value is REQUIRED:
      raise UserError(f"{self.source}: no field {name!r}, which the architecture needs.")
    kinds = typing.get_args(kind) or (kind,)
    of_kind = type(value) in kinds or (type(value) is int and float in kinds)
    if kind is not None and value is not default and not of_kind:
      wanted = getattr(kind, "__name__", str(kind))
      raise UserError(f"{self.source}: field {name!r} is {value!r}, not a value of type {wanted}.")
    if isinstance(value, float) and not math.isfinite(value):
      raise UserError(f"{self.source}: field {name!r} is {value!r}, which is no finite number.")
    return value

  def take_mapping(self, name: str) -> Mapping[str, Any] | None:
    """Returns a field with fields of its own; None if it is null or missing."""
    return self.take(name, None, dict | None)

  def refuse(self, name: str, value: Any, known: Collection[Any]) -> UserError:
    choices = " or ".join(map(repr, known))
    return UserError(f"{self.source}: field {name!r} is {value!r}; only {choices} can be read.")

  def nested(self, name: str, values: Mapping[str, Any]) -> "Fields":
    return Fields(values, f"{self.source}: {name}", self.tensors)

  def refuse_unread(self) -> None:
    """Raises UserError if a field was not read: it could change what the model computes."""
    if self._unread:
      name, value = next(iter(self._unread.items()))
      raise UserError(f"{self.source}: field {name!r} = {value!r} is not known.")


@dataclasses.dataclass(frozen=True)
class Rule:
  """One correspondence between their fields and ours, in both directions.

  read: their fields, and the fields of ours from earlier rules -> more fields of ours.
  write: our config -> their fields.
  """

  read: Callable[[Fields, Mapping[str, Any]], dict[str, Any]]
  write: Callable[[ModelConfig], dict[str, Any]]


def same(theirs: str, ours: str, default: Any = REQUIRED, *, none: Any = None) -> Rule:
  """A value that is copied. `none` is our value for their null, or for a missing field whose
  default is null."""
  kind = _KINDS[ours] if none is None else _KINDS[ours] | None

  def read(fields, found):
    value = fields.take(theirs, default, kind)
    return {ours: none if value is None else value}

  def write(config):
    value = attrgetter(ours)(config)
    return {theirs: None if none is not None and value == none else value}

  return Rule(read, write)


def copied(theirs: Mapping[str, str]) -> tuple[Rule, ...]:
  """Required values that are copied, from our names to theirs."""
  return tuple(same(name, ours) for ours, name in theirs.items())


def several(theirs: str, *ours: str, default: Any = REQUIRED) -> Rule:
  """A value that we have in several fields."""

  def read(fields, found):
    return dict.fromkeys(ours, fields.take(theirs, default, _KINDS[ours[0]]))

  return Rule(read, lambda config: {theirs: attrgetter(ours[0])(config)})


def choice(theirs: str, values: Mapping[Any, Mapping[str, Any]], default: Any = REQUIRED) -> Rule:
  """A value that stands for some of our fields; among values with the same meaning, the first is
  written."""

  def read(fields, found):
    value = fields.take(theirs, default)
    if not isinstance(value, Hashable) or value not in values:
      raise fields.refuse(theirs, value, values)
    return dict(values[value])

  def write(config):
    fits = (
      value
      for value, ours in values.items()
      if all(attrgetter(name)(config) == x for name, x in ours.items())
    )
    # If none fits, the written value reads as another config, which the caller refuses.
    return {theirs: next(fits, next(iter(values)))}

  return Rule(read, write)


def always(ours: Mapping[str, Any]) -> Rule:
  """Values of our fields that the architecture implies, without a field of theirs."""
  return Rule(lambda fields, found: dict(ours), lambda config: {})


def fixed(theirs: str, value: Any) -> Rule:
  """A field with a single supported value, its default."""

  def read(fields, found):
    if (said := fields.take(theirs, value)) != value:
      raise fields.refuse(theirs, said, (value,))
    return {}

  return Rule(read, lambda config: {})


def ignored(*names: str) -> Rule:
  """Fields without influence on the model's output."""

  def read(fields, found):
    for name in names:
      fields.take(name, None)
    return {}

  return Rule(read, lambda config: {})


def read_layers(
  fields: Fields,
  theirs: str,
  kinds: Sequence[Any],
  names: Mapping[str, str],
  window: int | None,
  num_layers: int,
) -> dict[str, Any]:
  """`layer_pattern` and `window` from a field with the kind of each layer; `names` maps their kinds
  to ours."""
  for kind in kinds:
    if not isinstance(kind, str) or kind not in names:
      raise fields.refuse(theirs, kind, names)
  if len(kinds) != num_layers:
    raise UserError(f"{fields.source}: {theirs!r} is of {len(kinds)} layers, not {num_layers}.")
  pattern = shortest_period(tuple(names[kind] for kind in kinds))
  return {"layer_pattern": pattern, "window": (window or 0) if "local" in pattern else 0}
