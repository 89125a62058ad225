"""The fields of another library's config, each mapped to ours by a rule that reads and writes."""

import dataclasses
import math
import typing
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

from gptjax.errors import UserError
from gptjax.model.config import ModelConfig, shortest_period

REQUIRED = object()
_KINDS = {field.name: field.type for field in dataclasses.fields(ModelConfig)}


class Fields:
  """The fields of a file, of which none may stay unread.

  Attributes:
    source: the file, for errors.
    tensors: names of the tensors that come with it, which decide what a config leaves open.
  """

  def __init__(self, values: Mapping[str, Any], source: str, tensors: Collection[str] = ()):
    self.source = source
    self.tensors = tensors
    self._unread = dict(values)

  def take(self, name: str, default: Any = REQUIRED, kind: Any = None) -> Any:
    """Returns the value of a field.

    Raises:
      UserError: it is missing and has no default, or it is neither that nor of `kind`, a type or a
        union of some; an int is a float too, a bool is no int.
    """
    value = self._unread.pop(name, default)
    if value is REQUIRED:
      raise UserError(f"{self.source}: no field {name!r}, which the architecture needs.")
    kinds = typing.get_args(kind) or (kind,)
    of_kind = type(value) in kinds or (type(value) is int and float in kinds)
    if kind is not None and value is not default and not of_kind:
      wanted = getattr(kind, "__name__", str(kind))
      raise UserError(f"{self.source}: field {name!r} is {value!r}, not a value of type {wanted}.")
    return value

  def take_mapping(self, name: str) -> Mapping[str, Any] | None:
    """Returns a field that has fields; None if it is null or missing."""
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
  """One thing that configs say, both ways.

  read: their fields, and what of our config the rules before it found -> more of it.
  write: our config -> their fields.
  """

  read: Callable[[Fields, Mapping[str, Any]], dict[str, Any]]
  write: Callable[[ModelConfig], dict[str, Any]]


def same(theirs: str, ours: str, default: Any = REQUIRED, *, none: Any = None) -> Rule:
  """A value that is copied. `none` is what we write for their null, or for a field that is missing
  and whose default is null."""

  kind = _KINDS[ours] if none is None else _KINDS[ours] | None

  def read(fields, found):
    value = fields.take(theirs, default, kind)
    return {ours: none if value is None else value}

  def write(config):
    value = getattr(config, ours)
    return {theirs: None if none is not None and value == none else value}

  return Rule(read, write)


def copied(**theirs: str) -> tuple[Rule, ...]:
  """Values that must be there and are copied, each by our name for it."""
  return tuple(same(name, ours) for ours, name in theirs.items())


def several(theirs: str, *ours: str, default: Any = REQUIRED) -> Rule:
  """A value that we say more than once."""

  def read(fields, found):
    return dict.fromkeys(ours, fields.take(theirs, default, _KINDS[ours[0]]))

  return Rule(read, lambda config: {theirs: getattr(config, ours[0])})


def choice(theirs: str, values: Mapping[Any, Mapping[str, Any]], default: Any = REQUIRED) -> Rule:
  """A value that stands for some of our fields; of values that mean the same, the first is
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
      if all(getattr(config, name) == x for name, x in ours.items())
    )
    # Where none fits, what is written reads as another config, which the caller refuses.
    return {theirs: next(fits, next(iter(values)))}

  return Rule(read, write)


def always(**ours: Any) -> Rule:
  """What the architecture says without a field."""
  return Rule(lambda fields, found: ours, lambda config: {})


def fixed(theirs: str, value: Any) -> Rule:
  """A field of which we know one value alone, its default."""
  return Rule(choice(theirs, {value: {}}, value).read, lambda config: {})


def empty(theirs: str) -> Rule:
  """A list of which we know an empty one alone."""

  def read(fields, found):
    if value := fields.take(theirs, None, list | None):
      raise fields.refuse(theirs, value, ([],))
    return {}

  return Rule(read, lambda config: {})


def ignored(*names: str) -> Rule:
  """Fields that say nothing of what the model computes."""

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
  """`layer_pattern` and `window` of what a field calls the kind of each layer; `names` maps their
  kinds to ours."""
  for kind in kinds:
    if not isinstance(kind, str) or kind not in names:
      raise fields.refuse(theirs, kind, names)
  if len(kinds) != num_layers:
    raise UserError(f"{fields.source}: {theirs!r} is of {len(kinds)} layers, not {num_layers}.")
  pattern = shortest_period(tuple(names[kind] for kind in kinds))
  return {"layer_pattern": pattern, "window": (window or 0) if "local" in pattern else 0}


_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def rope(
  default_base: float,
  *,
  must_say_scaling: bool = False,
  older_base: str = "rope_theta",
  older_fraction: str | None = None,
  default_fraction: float = 1.0,
  kinds: Sequence[str] = _ROPE_KINDS,
) -> Rule:
  """Rotary positions: `rope_parameters`, or `rope_theta` and `rope_scaling` in older files.

  Args:
    default_base: of a file that does not say it.
    must_say_scaling: whether a file that says nothing is refused.
    older_base, older_fraction: what older files call the base and the rotated part of a head; None
      where they have no field for it.
    default_fraction: the rotated part of a file that does not say it.
    kinds: the scalings that the family has.
  """

  def read(fields, found):
    parameters = fields.take_mapping("rope_parameters")
    scaling = fields.take_mapping("rope_scaling")
    if must_say_scaling and parameters is None and scaling is None:
      fields.take("rope_parameters")
    values = {"rope_theta": fields.take(older_base, default_base)}
    if older_fraction:
      values["partial_rotary_factor"] = fields.take(older_fraction, default_fraction)
    values |= (scaling or {}) | (parameters or {})
    return read_rope(fields.nested("rope_parameters", values), found, kinds)

  def write(config):
    theirs = write_rope(config)
    if older_fraction:  # Whose default may be another.
      theirs.setdefault("partial_rotary_factor", 1.0)
    return {"rope_parameters": theirs}

  return Rule(read, write)


def read_rope(
  fields: Fields, found: Mapping[str, Any], kinds: Sequence[str] = _ROPE_KINDS
) -> dict[str, Any]:
  """One set of rotary parameters -> our fields; `found` has the width and the positions."""

  def number(name: str, default: Any = REQUIRED) -> float:
    return float(fields.take(name, default, float))

  original = fields.take("original_max_position_embeddings", None, int | None)
  head_dim = found.get("head_dim") or found["embed_dim"] // found["num_heads"]
  fraction = number("partial_rotary_factor", 1.0)
  ours = {
    "position": "rope",
    "rope_base": number("rope_theta"),
    "rope_dim": int(head_dim * fraction),
  }
  if fraction != 1 and ours["rope_dim"] % 2:
    raise UserError(
      f"{fields.source}: field 'partial_rotary_factor' is {fraction}, which is an odd number "
      f"of a head's {head_dim} dimensions; only an even one can be read."
    )
  older, newer = fields.take("type", None), fields.take("rope_type", None)
  kind = newer or older or "default"
  if kind not in kinds:
    raise fields.refuse("rope_type" if newer else "type", kind, kinds)
  if kind == "linear":
    ours |= {"rope_scaling": "linear", "rope_factor": number("factor")}
  elif kind == "dynamic":
    ours |= {
      "rope_scaling": "dynamic",
      "rope_factor": number("factor"),
      # Its reference does not read another.
      "rope_original_positions": found["max_positions"],
    }
  elif kind == "llama3":
    ours |= {
      "rope_scaling": "llama3",
      "rope_factor": number("factor"),
      "rope_slow_turns": _unless(1.0, number("low_freq_factor")),
      "rope_fast_turns": _unless(4.0, number("high_freq_factor")),
      "rope_original_positions": original or found["max_positions"],
    }
  elif kind == "yarn":
    factor = number("factor")
    ours |= {
      "rope_scaling": "yarn",
      "rope_factor": factor,
      "rope_slow_turns": _unless(1.0, number("beta_slow", 1.0)),
      "rope_fast_turns": _unless(32.0, number("beta_fast", 32.0)),
      "rope_round": fields.take("truncate", True, bool),
      "rope_attention_factor": _attention_factor(fields, factor),
      "rope_original_positions": original or found["max_positions"],
    }
  fields.refuse_unread()
  return ours


def _attention_factor(fields: Fields, factor: float) -> float:
  """The factor of rotated queries and keys under 'yarn'; 0 for the method's own. DeepSeek's files
  have the ratio of two numbers like the method's, with `mscale` in place of its 1."""
  said = fields.take("attention_factor", None, float | None)
  scales = [fields.take(name, None, float | None) for name in ("mscale", "mscale_all_dim")]
  if said is None and all(scales) and factor > 1:
    above, below = (0.1 * scale * math.log(factor) + 1 for scale in scales)
    return above / below
  return float(said or 0)


def _unless(own: float, turns: float) -> float:
  """0 for the number of turns that is the method's own, as presets say it."""
  return 0.0 if turns == own else turns


def write_rope(config: ModelConfig) -> dict[str, Any]:
  theirs = {"rope_theta": config.rope_base}
  if config.rope_dim != config.head_dim:
    fraction = config.rope_dim / config.head_dim
    if int(config.head_dim * fraction) < config.rope_dim:  # As it is read.
      fraction = math.nextafter(fraction, 1)
    theirs["partial_rotary_factor"] = fraction
  original = {"original_max_position_embeddings": config.rope_original_positions}
  match config.rope_scaling:
    case "none":
      return theirs | {"rope_type": "default"}
    case "linear" | "dynamic" as kind:
      return theirs | {"rope_type": kind, "factor": config.rope_factor}
    case "llama3":
      return (
        theirs
        | original
        | {
          "rope_type": "llama3",
          "factor": config.rope_factor,
          "low_freq_factor": config.rope_slow_turns or 1.0,
          "high_freq_factor": config.rope_fast_turns or 4.0,
        }
      )
  factor = {"attention_factor": config.rope_attention_factor}
  return (
    theirs
    | original
    | (factor if config.rope_attention_factor else {})
    | {
      "rope_type": "yarn",
      "factor": config.rope_factor,
      "beta_fast": config.rope_fast_turns or 32.0,
      "beta_slow": config.rope_slow_turns or 1.0,
      "truncate": config.rope_round,
    }
  )
