import sys

import numpy as np
import pytest

from gptjax.data import tokenizer as tokenizers
from gptjax.data import words
from gptjax.data.words import word_ids
from gptjax.errors import UserError
from tests.data.conftest import DOCUMENTS

BYTES = tokenizers.load("bytes")
BPE = tokenizers.train("bpe:900", DOCUMENTS * 2)


def words_of(tokens, tokenizer):
  """Returns the text of each word, tokens of a number joined."""
  tokens = np.asarray(tokens, np.int32)
  ids = word_ids(tokens, tokenizer)
  assert ids.dtype == np.int32
  assert ids[0] == 0
  assert set(np.diff(ids)) <= {0, 1}
  groups = [tokens[ids == word].tolist() for word in range(ids[-1] + 1)]
  return [tokenizer.decode_bytes(group).decode("utf-8", errors="replace") for group in groups]


def test_words_are_runs_of_letters_and_digits_and_every_other_sign_is_its_own():
  found = words_of(BYTES.encode("naïve Ünïx2, x_1  (ok)!"), BYTES)
  assert found == ["naïve", " ", "Ünïx2", ",", " ", "x", "_", "1", "  ", "(", "ok", ")", "!"]


def test_chinese_words_are_those_of_jieba():
  found = words_of(BYTES.encode("中国人民爱北京天安门, GPT很好。"), BYTES)
  assert found == ["中国", "人民", "爱", "北京", "天安门", ",", " ", "GPT", "很", "好", "。"]


def test_a_special_token_is_a_word_and_parts_its_neighbours():
  tokens = [*BYTES.encode("ab"), BYTES.end_of_text, *BYTES.encode("cd")]
  assert word_ids(np.array(tokens), BYTES).tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("text", DOCUMENTS[:5])
def test_no_word_is_cut_whatever_the_tokenizer(text):
  text = text[:400]
  of_bytes = words_of(BYTES.encode(text), BYTES)
  of_bpe = words_of(BPE.encode(text), BPE)
  assert "".join(of_bpe) == "".join(of_bytes) == text
  ends = {len("".join(of_bytes[:count])) for count in range(len(of_bytes) + 1)}
  assert {len("".join(of_bpe[:count])) for count in range(len(of_bpe) + 1)} <= ends
  assert len(of_bpe) > 30


def test_a_window_may_begin_and_end_amid_a_character():
  tokens = BYTES.encode("漢天安门字")[1:-1]
  ids = word_ids(np.array(tokens), BYTES).tolist()
  assert ids == [0, 0, *[1] * 9, 2, 2]


def test_chinese_without_jieba_says_what_to_install(monkeypatch):
  words._chinese_segmenter.cache_clear()
  monkeypatch.setitem(sys.modules, "jieba", None)
  assert words_of(BYTES.encode("no Chinese"), BYTES)
  with pytest.raises(UserError, match=r"pip install jieba.*--config\.task\.whole_words=False"):
    word_ids(np.array(BYTES.encode("中国")), BYTES)
