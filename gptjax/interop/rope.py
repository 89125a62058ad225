"""Rotary positions and their scaling in configs."""

import math
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from gptjax.errors import UserError
from gptjax.interop.fields import REQUIRED, Fields, Rule
from gptjax.model.config import ModelConfig

# For each `rope_type`: our fields, their names, and the method's default, which is 0 in our fields.
_SCALINGS: Mapping[str, Sequence[tuple[str, str, float | None]]] = {
  "default": (),
  "linear": (("rope.factor", "factor", None),),
  "dynamic": (("rope.factor", "factor", None),),
  "llama3": (
    ("rope.factor", "factor", None),
    ("rope.low_freq_factor", "low_freq_factor", 1.0),
    ("rope.high_freq_factor", "high_freq_factor", 4.0),
  ),
  "yarn": (
    ("rope.factor", "factor", None),
    ("rope.low_freq_factor", "beta_slow", 1.0),
    ("rope.high_freq_factor", "beta_fast", 32.0),
  ),
}
_ORIGINAL = "original_max_position_embeddings"


def rope(
  default_base: float,
  *,
  must_say_scaling: bool = False,
  older_base: str = "rope_theta",
  older_fraction: str | None = None,
  default_fraction: float = 1.0,
  kinds: Sequence[str] = tuple(_SCALINGS),
) -> Rule:
  """Rotary positions: `rope_parameters`, or `rope_theta` and `rope_scaling` in older files.

  Args:
    default_base, default_fraction: base and rotated part if the file does not give them.
    must_say_scaling: whether a file without `rope_parameters` and `rope_scaling` is refused.
    older_base, older_fraction: names of the base and the rotated part of a head in older files;
      None if they have no such field.
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
    if older_fraction:  # Its default may differ.
      theirs.setdefault("partial_rotary_factor", 1.0)
    return {"rope_parameters": theirs}

  return Rule(read, write)


def read_rope(
  fields: Fields, found: Mapping[str, Any], kinds: Sequence[str] = tuple(_SCALINGS)
) -> dict[str, Any]:
  """Reads a set of rotary parameters into our fields; `found` has the width and the positions."""

  def number(name: str, default: Any = REQUIRED) -> float:
    return float(fields.take(name, default, float))

  head_dim = found.get("head_dim") or found["embed_dim"] // found["num_heads"]
  fraction = number("partial_rotary_factor", 1.0)
  ours = {
    "position.kind": "rope",
    "rope.base": number("rope_theta"),
    "rope.dim": int(head_dim * fraction),
  }
  if fraction != 1 and ours["rope.dim"] % 2:
    raise UserError(
      f"{fields.source}: field 'partial_rotary_factor' is {fraction}, which is an odd number "
      f"of a head's {head_dim} dimensions; only an even one can be read."
    )
  older, newer = fields.take("type", None), fields.take("rope_type", None)
  kind = newer or older or "default"
  if kind not in kinds:
    raise fields.refuse("rope_type" if newer else "type", kind, kinds)
  for name, theirs, own in _SCALINGS[kind]:
    value = number(theirs, own if own and kind == "yarn" else REQUIRED)
    ours[name] = 0.0 if value == own else value
  original = fields.take(_ORIGINAL, None, int | None)
  if kind != "default":
    ours["rope.scaling"] = kind
  if kind in ("dynamic", "llama3", "yarn"):
    # The reference does not read the original length of 'dynamic'.
    positions = found["position.max_positions"]
    ours["rope.original_positions"] = (kind != "dynamic" and original) or positions
  if kind == "yarn":
    ours["rope.truncate"] = fields.take("truncate", True, bool)
    ours["rope.attention_factor"] = _attention_factor(fields, ours["rope.factor"])
  fields.refuse_unread()
  return ours


def _attention_factor(fields: Fields, factor: float) -> float:
  """The factor of rotated queries and keys in 'yarn'; 0 for the method's default. In DeepSeek's
  files it is the ratio of two such numbers, with `mscale` instead of the method's 1."""
  said = fields.take("attention_factor", None, float | None)
  scales = [fields.take(name, None, float | None) for name in ("mscale", "mscale_all_dim")]
  if said is None and all(scales) and factor > 1:
    above, below = (0.1 * scale * math.log(factor) + 1 for scale in scales)
    return above / below
  return float(said or 0)


def write_rope(config: ModelConfig) -> dict[str, Any]:
  """The inverse of `read_rope`."""
  kind = "default" if config.rope.scaling == "none" else config.rope.scaling
  theirs = {"rope_theta": config.rope.base, "rope_type": kind}
  theirs |= {name: attrgetter(ours)(config) or own for ours, name, own in _SCALINGS[kind]}
  if config.rope.dim != config.head_dim:
    fraction = config.rope.dim / config.head_dim
    if int(config.head_dim * fraction) < config.rope.dim:  # Rounded as in reading.
      fraction = math.nextafter(fraction, 1)
    theirs["partial_rotary_factor"] = fraction
  if kind in ("llama3", "yarn"):
    theirs[_ORIGINAL] = config.rope.original_positions
  if kind == "yarn":
    theirs["truncate"] = config.rope.truncate
    if config.rope.attention_factor:
      theirs["attention_factor"] = config.rope.attention_factor
  return theirs
