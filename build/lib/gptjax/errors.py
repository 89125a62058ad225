"""Errors that a user can act on: one sentence that names what is wrong and what would be right."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """Input that cannot be used. Entry points print the message alone, without a traceback."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
  """Returns "Did you mean 'a' or 'b'?" for the nearest names, or the whole list if none is near."""
  choices = sorted(choices)
  near = difflib.get_close_matches(name, choices, n=3, cutoff=0.6)
  if near:
    return f"Did you mean {' or '.join(repr(choice) for choice in near)}?"
  return f"Choose one of: {', '.join(choices)}."


def check_choice(key: str, value: str, choices: Iterable[str]) -> None:
  """Raises UserError, with the nearest choice, for a value that is none of the choices."""
  if value not in choices:
    raise UserError(f"{key}: no choice {value!r}. {did_you_mean(str(value), choices)}")
