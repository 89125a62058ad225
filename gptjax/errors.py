"""Errors that a user can act on: one sentence that names the mistake and its correction."""

import difflib
import math
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
  """Input that cannot be used. Entry points print the message alone, without a traceback."""


def check_number(
  key: str,
  value: Any,
  *,
  at_least: float = -math.inf,
  above: float = -math.inf,
  at_most: float = math.inf,
  below: float = math.inf,
) -> None:
  """Raises UserError, which names the key, unless the value is a finite number within bounds."""
  finite = isinstance(value, int | float) and math.isfinite(value)
  if finite and at_least <= value <= at_most and above < value < below:
    return
  bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
  wanted = [f"{words} {bound}" for words, bound in bounds.items() if math.isfinite(bound)]
  raise UserError(f"{key} is {value!r}; it must be {' and '.join(wanted) or 'a finite number'}.")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
  """Returns "Did you mean 'a' or 'b'?" for the nearest names, or the whole list if none is near."""
  choices = sorted(choices)
  near = difflib.get_close_matches(name, choices, n=3, cutoff=0.6)
  if near:
    return f"Did you mean {' or '.join(repr(choice) for choice in near)}?"
  return f"Choose one of: {', '.join(choices)}."


def check_choice(key: str, value: str, choices: Iterable[str]) -> None:
  """Raises UserError, with the nearest choice, unless the value is one of the choices."""
  if value not in choices:
    raise UserError(f"{key}: no choice {value!r}. {did_you_mean(str(value), choices)}")
