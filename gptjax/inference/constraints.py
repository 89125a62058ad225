"""Languages that an answer has to be in: the JSON of a schema, a regular expression, a grammar.

    languages = Languages(tokenizer)
    request = Request(prompt, constraint=languages.json_schema({"type": "object"}))

llguidance (github.com/guidance-ai/llguidance) tells which tokens may come next.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError

# JSON as models are used to writing it. Free white space would let a model write nothing but that.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY_OBJECT = {"type": "object"}


class Languages:
  """Makes constraints for the answers in a tokenizer's tokens, which are prepared once."""

  def __init__(self, tokenizer: Tokenizer):
    try:
      import llguidance
    except ImportError as error:
      raise UserError('constraints need llguidance: pip install ".[serve]"') from error
    self._library = llguidance
    wrapped = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
    self._tokenizer = llguidance.LLTokenizer(wrapped, eos_token=sorted(tokenizer.stops))
    self._ends = np.zeros(tokenizer.vocab_size, bool)
    self._ends[sorted(tokenizer.stops)] = True

  def json_schema(self, schema: Mapping[str, Any], name: str = "schema") -> "LanguageConstraint":
    """JSON that a schema describes, in one line.

    Args:
      schema: a JSON Schema.
      name: the parameter that it came in, for errors.

    Raises:
      UserError: the schema is wrong, or says what cannot be enforced.
    """
    try:
      grammar = self._library.LLMatcher.grammar_from_json_schema(
        json.dumps(schema), overrides=_JSON_STYLE
      )
    except (ValueError, RecursionError) as error:
      raise UserError(f"{name} is no JSON Schema: {error}.") from error
    return self._make(grammar, name)

  def json_object(self) -> "LanguageConstraint":
    """Any JSON object."""
    return self.json_schema(_ANY_OBJECT)

  def regex(self, pattern: str, name: str = "regex") -> "LanguageConstraint":
    """Text that a regular expression matches as a whole; UserError if it is none."""
    return self._make(self._library.LLMatcher.grammar_from_regex(pattern), name)

  def lark(self, grammar: str, name: str = "grammar") -> "LanguageConstraint":
    """Text of a grammar in Lark's notation, as llguidance extends it; UserError if it is none."""
    return self._make(self._library.LLMatcher.grammar_from_lark(grammar), name)

  @staticmethod
  def styled(schema: Mapping[str, Any]) -> str:
    """A schema for `%json` in a grammar, whose JSON is written like that of `json_schema`."""
    return json.dumps({**schema, "x-guidance": _JSON_STYLE})

  def _make(self, grammar: str, name: str) -> "LanguageConstraint":
    matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0)
    if matcher.is_error():
      raise UserError(f"{name} cannot be enforced: {matcher.get_error().strip()}")
    return LanguageConstraint(matcher, self._ends)


class LanguageConstraint:
  """A language, and how far an answer has come in it (`request.Constraint`)."""

  def __init__(self, matcher: Any, ends: np.ndarray):
    self._matcher = matcher
    self._ends = ends
    # Whether the matcher took each token: it does not take those that end an answer.
    self._taken: list[bool] = []

  @property
  def error(self) -> str:
    """Why the language could not be followed to the end; empty if it could."""
    return self._matcher.get_error() if self._matcher.is_error() else ""

  def allowed(self) -> np.ndarray:
    """The tokens that may come next, bool [V]; only those that end it, where the language became
    too complex to follow (`error`)."""
    if not self._matcher.is_error():
      allowed = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) > 0
      if allowed.any():
        return allowed
    return self._ends

  def accept(self, token: int) -> None:
    """Takes the token that came."""
    is_end = self._ends[token] and self._matcher.is_accepting()
    self._taken.append(not is_end and bool(self._matcher.consume_token(token)))

  def take_back(self, count: int) -> None:
    """Forgets the last tokens."""
    kept = len(self._taken) - count
    self._matcher.rollback(sum(self._taken[kept:]))
    del self._taken[kept:]

  def copy(self) -> "LanguageConstraint":
    """Another answer's way through the language, from here on."""
    return LanguageConstraint(self._matcher.deep_copy(), self._ends)


class _Vocabulary:
  """A tokenizer as llguidance reads it: the bytes of each token, special ones by their names."""

  def __init__(self, tokenizer: Tokenizer):
    names = {token: text.encode() for text, token in tokenizer.specials.items()}
    self.tokens = [
      names.get(token) or tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)
    ]
    self.special_token_ids = sorted(names)
    self.bos_token_id = None
    self.eos_token_id = tokenizer.end_of_text
    self._encode = tokenizer.encode

  def __call__(self, text: bytes | str) -> list[int]:
    return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))
