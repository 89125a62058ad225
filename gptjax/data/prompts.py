"""Tasks as text to be written: what Jinja templates make of records, a prompt and its answer."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from gptjax.data.chat_encoding import FlaggingEncoder, encode_pieces
from gptjax.data.sources import Source, documents
from gptjax.data.template_sandbox import ERRORS, BoundedEnvironment
from gptjax.data.tokenizer import start_of
from gptjax.errors import UserError, did_you_mean

PROMPTS = Path(__file__).parents[2] / "configs/prompts"

_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Example:
  """A record, `place` being where it comes from, FILE:LINE."""

  record: Mapping[str, Any]
  place: str

  def get(self, key: str) -> Any:
    """Raises UserError if there is no such key."""
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
    """Raises UserError for a template that is wrong, a variable that the example has not, or one
    that is written though it is null."""
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
    UserError: there is none, or it is no text; `key` says who asked for it.
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


class Prompts:
  """A source of records as one whose documents are the JSON of [prompt, answer, name]."""

  def __init__(self, records: Source, prompt: Template, answer: Template):
    self._records = records
    self._prompt, self._answer = prompt, answer

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> str:
    """UserError as of `Template.render`, or for an answer without text; '' for an empty line."""
    record = self._records[index]
    if not record:
      return ""
    example = Example(json.loads(record), self.name(index))
    prompt, answer = self._prompt.render(example), self._answer.render(example)
    if not answer.strip():
      raise UserError(f"{example.place}: {self._answer.place} makes an answer without text of it.")
    return json.dumps([prompt, answer, example.place])

  def name(self, index: int) -> str:
    return self._records.name(index)

  def sizes(self) -> np.ndarray:
    return self._records.sizes()

  def fingerprint(self) -> str:
    templates = json.dumps([self._prompt.source, self._answer.source]).encode()
    return f"prompts {hashlib.sha256(templates).hexdigest()} {self._records.fingerprint()}"


def texts(source: Prompts, indices: Iterable[int] | None = None) -> Iterator[str]:
  """Yields each prompt with its answer, all or those at `indices`."""
  for document in documents(source, indices):
    prompt, answer, _ = json.loads(document)
    yield prompt + answer


@dataclasses.dataclass(frozen=True)
class PromptEncoder(FlaggingEncoder):
  """For documents of `Prompts`.

  Of each it stores the start, prompt, answer and end of text. To be learnt are the answer and the
  end. Start and prompt are the tokens that `evals.subject.Subject.write` goes on from; no special
  token is parsed.
  """

  def fingerprint(self) -> str:
    return f"prompt {_VERSION} {self.tokenizer.fingerprint()}"

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Encodes each document to uint32 [its tokens]; UserError for what is no text, by its name."""
    return [self._encode(*json.loads(text)) for text in texts]

  def _encode(self, prompt: str, answer: str, name: str) -> np.ndarray:
    try:
      asked, answered = encode_pieces(self.tokenizer, [prompt, answer], parse_specials=False)
    except UserError as error:
      raise UserError(f"{name}: {error}") from error
    given = [*start_of(self.tokenizer), *asked]
    learnt = [*answered, self.tokenizer.end_of_text]
    stored = [*(2 * token for token in given), *(2 * token + 1 for token in learnt)]
    return np.array(stored, np.uint32)
