"""Turns records into a prompt and its answer by templates."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gptjax.data.sources import Source, documents
from gptjax.errors import UserError
from gptjax.finetuning.chat_encoding import FlaggingEncoder, encode_pieces
from gptjax.templates.prompts import Example, Template

_VERSION = 2


class Prompts:
  """Turns a source of records into documents with the JSON of [prompt, answer, name]."""

  def __init__(self, records: Source, prompt: Template, answer: Template):
    self._records = records
    self._prompt, self._answer = prompt, answer

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> str:
    """A document, '' for an empty line; UserError as `Template.render` or for an empty answer."""
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
  """Encodes documents of `Prompts` as start, prompt, answer and end of text.

  The answer and the end are learnt. Start and prompt are the tokens that
  `evals.subject.Subject.write` continues; no special token is parsed.
  """

  def fingerprint(self) -> str:
    return f"prompt {_VERSION} {self.tokenizer.fingerprint()}"

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Encodes each document to uint32 [tokens]; UserError, with its name, if it is not text."""
    return [self._encode(*json.loads(text)) for text in texts]

  def _encode(self, prompt: str, answer: str, name: str) -> np.ndarray:
    try:
      asked, answered = encode_pieces(self.tokenizer, [prompt, answer], parse_specials=False)
    except UserError as error:
      raise UserError(f"{name}: {error}") from error
    given = [*self.tokenizer.start, *asked] or [self.tokenizer.prefix]
    learnt = [*answered, self.tokenizer.end_of_text]
    stored = [*(2 * token for token in given), *(2 * token + 1 for token in learnt)]
    return np.array(stored, np.uint32)
