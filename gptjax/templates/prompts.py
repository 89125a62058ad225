"""Jinja templates that turn records into text."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from gptjax.config import PRESETS
from gptjax.errors import UserError, did_you_mean
from gptjax.templates.sandbox import ERRORS, BoundedEnvironment

PROMPTS = PRESETS / "prompts"


@dataclasses.dataclass(frozen=True)
class Example:
  """A record and where it comes from, `place` (FILE:LINE)."""

  record: Mapping[str, Any]
  place: str

  def get(self, key: str) -> Any:
    """The value of a key; UserError if the record does not have it."""
    if key not in self.record:
      found = ", ".join(map(repr, self.record)) or "nothing"
      raise UserError(f"{self.place}: no key {key!r} (found: {found}).")
    return self.record[key]


@dataclasses.dataclass(frozen=True)
class Template:
  """A template in Jinja, rendered in a sandbox; `place` is the file that it comes from."""

  place: str
  source: str

  def render(self, example: Example, **more: str) -> str:
    """The text of an example; UserError for a wrong template, missing variable or printed null."""
    variables = {**example.record, **more}
    try:
      return _compile(self.source).render(variables)
    except jinja2.TemplateSyntaxError as error:
      raise UserError(f"{self.place}: line {error.lineno}: {error.message}.") from error
    except ERRORS as error:
      found = ", ".join(map(repr, variables))
      raise UserError(
        f"{self.place}: cannot be rendered for {example.place}: {error} (found: {found})."
      ) from error


@functools.lru_cache
def _compile(source: str) -> jinja2.Template:
  environment = BoundedEnvironment(
    undefined=jinja2.StrictUndefined,
    finalize=_not_null,
    trim_blocks=True,
    keep_trailing_newline=True,
  )
  return environment.from_string(source)


def _not_null(value: Any) -> Any:
  if value is None:
    raise jinja2.UndefinedError("what it writes is null")
  return value


def open_template(name: str, folder: Path, key: str) -> Template:
  """Opens the template `name` of a folder, or else of configs/prompts, without its last line end.

  Raises:
    UserError: there is none, or it is no text; `key` is the option that asked for it.
  """
  own = folder / Path(name).expanduser()
  place = own if own.is_file() else PROMPTS / name
  if not place.is_file():
    hint = did_you_mean(name, [path.name for path in PROMPTS.glob("*.jinja")])
    raise UserError(f"{key}: {name!r} is neither {own} nor in configs/prompts. {hint}")
  try:
    return Template(str(place), place.read_text(encoding="utf-8").removesuffix("\n"))
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{place}: cannot be read ({error}).") from error
