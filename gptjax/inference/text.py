"""The text of a growing sequence of tokens: what of it is certain, and where it stops."""

import codecs
from collections.abc import Sequence

from gptjax.data.tokenizer import Tokenizer


class Writer:
  """Turns the tokens of one completion into text as they come, up to a stop string.

  Attributes:
    text: what is certain so far.
    tokens: the tokens of the completion, without one that ended it.
    finish_reason: 'stop' (the model ended the text or its turn, or wrote a stop string) or
      'length'; empty until then.
  """

  def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], stop_tokens: frozenset[int]):
    self.text = ""
    self.tokens: list[int] = []
    self.finish_reason = ""
    self._tokenizer = tokenizer
    self._stop = [string for string in stop if string]
    self._stop_tokens = stop_tokens
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
    self._decoded = ""

  def add(self, token: int, is_last: bool) -> str:
    """Takes the next token, and returns the text that became certain."""
    ended = token in self._stop_tokens
    if not ended:
      self.tokens.append(token)
      self._decoded += self._decoder.decode(self._tokenizer.decode_bytes([token]))
    if ended or is_last:
      self._decoded += self._decoder.decode(b"", final=True)
    text = self._tokenizer.trim(self._decoded)
    # A stop string ends in what is not certain yet.
    cuts = [at for string in self._stop if (at := text.find(string, len(self.text))) >= 0]
    if cuts:
      text, self.finish_reason = text[: min(cuts)], "stop"
      # Tokens of which no text is left.
      while self.tokens and self._tokenizer.decode(self.tokens[:-1]).startswith(text):
        self.tokens.pop()
    elif ended or is_last:
      self.finish_reason = "stop" if ended else "length"
    else:
      text = self._without_start_of_stop(text)
    new, self.text = text[len(self.text) :], text
    return new

  def _without_start_of_stop(self, text: str) -> str:
    """The text without the longest end that may be the start of a stop string."""
    starts = [
      size
      for string in self._stop
      for size in range(1, min(len(string) - 1, len(text)) + 1)
      if text.endswith(string[:size])
    ]
    return text[: len(text) - max(starts, default=0)]
