"""Finds the words of tokenised text, Chinese included, with any tokenizer."""

import functools
import logging
import re
from collections.abc import Callable, Sequence

import numpy as np

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError

_HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Bytes that are no UTF-8, as "surrogateescape" decodes them: half a character at a window's edge.
_STRAY = "\udc80-\udcff"
_WORD = re.compile(rf"(?P<han>[{_HAN}]+)|[^\W_{_HAN}]+|\s+|[{_STRAY}]+|.", re.DOTALL)


def word_ids(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
  """Numbers the words of a window, so that no word is cut.

  Words are runs of letters and digits, the words that jieba finds in runs of Chinese characters,
  runs of white space, and other signs one by one. A special token is a word of its own. Where a
  token reaches over the end of a word, both words are one.

  Args:
    tokens: int32 [T]; the window may begin and end amid a word or a character.
    tokenizer: the tokenizer of the tokens.

  Returns:
    int32 [T], the word of each token, from 0.

  Raises:
    UserError: there is Chinese text, and jieba is not installed.
  """
  # A special token stands for no bytes; a zero byte keeps its neighbours apart.
  pieces = [tokenizer.decode_bytes([token]) or b"\0" for token in tokens.tolist()]
  text = b"".join(pieces).decode("utf-8", errors="surrogateescape")
  begins = np.isin(_starts(pieces), _starts([_encode(word) for word in _words(text)]))
  return np.cumsum(begins, dtype=np.int32) - 1


def _starts(pieces: Sequence[bytes]) -> np.ndarray:
  lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
  return np.cumsum(lengths) - lengths


def _encode(word: str) -> bytes:
  return word.encode("utf-8", errors="surrogateescape")


def _words(text: str) -> list[str]:
  words = []
  for match in _WORD.finditer(text):
    if match["han"]:
      words += _chinese_segmenter()(match["han"])
    else:
      words.append(match[0])
  return words


@functools.cache
def _chinese_segmenter() -> Callable[[str], list[str]]:
  try:
    import jieba
  except ImportError:
    raise UserError(
      "the text has Chinese words, which jieba finds: pip install jieba, or set "
      "--config.task.whole_words=False."
    ) from None
  jieba.setLogLevel(logging.WARNING)
  return jieba.lcut
