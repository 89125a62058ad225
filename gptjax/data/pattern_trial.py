"""Tries out the regular expressions of a foreign tokenizer, some of which take for ever.

The time of a search with backtracking can grow with a power of the length of a run of characters,
or double with each character, and nothing can interrupt it. Short runs of each character that the
patterns name, and of some characters of each kind, show such patterns in time.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from gptjax.errors import UserError

_LENGTHS = (12, 48, 192)
_SECONDS = 0.1  # for one text; a pattern in use takes a thousandth
_LETTERS = "aAé中0٣ \t\r\n._'-!\u0301\U0001f600"


def patterns(description: Any) -> Iterator[str]:
  """Yields the regular expressions of a tokenizer.json."""
  if isinstance(description, dict):
    if isinstance(description.get("Regex"), str):
      yield description["Regex"]
    description = [value for name, value in description.items() if name != "vocab"]
  if isinstance(description, list):
    for value in description:
      if isinstance(value, dict | list):
        yield from patterns(value)


def try_patterns(description: Any, encode: Callable[[str], Any], name: str) -> None:
  """Raises UserError if a short text takes longer than any pattern in use needs."""
  steps = [description.get(part) for part in ("normalizer", "pre_tokenizer")]
  found = [*patterns(steps)]
  if not found:
    return
  runs = sorted({*_LETTERS, *"".join(found)})
  for length in _LENGTHS:
    for run in (*runs, "".join(runs)):
      # The end of the text prevents a match, and has the characters that a search first looks for.
      text = f"{(run * length)[:length]}\x01{''.join(runs)}"
      started = time.thread_time()  # Counts this thread alone, however busy the machine is.
      encode(text)
      if time.thread_time() - started > _SECONDS:
        raise UserError(f"{name}: one of its patterns takes too long ({', '.join(found)}).")


@contextlib.contextmanager
def patterns_that_give_up(name: str) -> Iterator[None]:
  """Turns the panic of a search that has taken too many steps into UserError."""
  try:
    yield
  except BaseException as error:
    if type(error).__name__ != "PanicException":
      raise
    raise UserError(f"{name}: one of its patterns takes too long ({error}).") from error
