import dataclasses
import io
import itertools

import numpy as np
import pytest
import sentencepiece

from gptjax.data import tokenizer as tokenizers
from gptjax.data.fim import FillInTheMiddle
from gptjax.data.tokenizer_formats import SPECIALS
from gptjax.errors import UserError
from tests.data.conftest import DOCUMENTS

BPE = tokenizers.train("bpe:600", DOCUMENTS)
BYTES = tokenizers.load("bytes")


def undo(tokens, tokenizer):
  """Returns (original text, 'PSM' | 'SPM' | 'plain') of a reordered document."""
  tokens = list(tokens)
  prefix, middle, suffix = (
    tokens.index(token) if token in tokens else None
    for token in (tokenizer.fim_prefix, tokenizer.fim_middle, tokenizer.fim_suffix)
  )
  if prefix is None:
    return tokenizer.decode(tokens), "plain"
  assert prefix == 0
  head, tail = tokens[1:suffix], tokens[suffix + 1 : middle]
  rest = tokens[middle + 1 :]
  # SPM puts prefix and middle after the suffix, and nothing before it.
  return tokenizer.decode(head + rest + tail), "PSM" if head else "SPM"


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
@pytest.mark.parametrize(("fim_rate", "spm_rate"), [(1, 0), (1, 1), (0.5, 0.5)])
@pytest.mark.parametrize("text", DOCUMENTS[:4])
def test_undoing_the_order_gives_the_text(tokenizer, fim_rate, spm_rate, text):
  fim = FillInTheMiddle(tokenizer, fim_rate, spm_rate)
  window = np.array(tokenizer.encode(text), np.int32)
  room = np.full(2000, tokenizer.end_of_text, np.int32)  # So that nothing is pushed out.
  for seed in range(5):
    result = fim(np.concatenate([window, room]), np.random.default_rng(seed))
    document = result[: list(result).index(tokenizer.end_of_text)]
    assert undo(document, tokenizer)[0] == text


def test_rates_of_documents_and_modes():
  fim = FillInTheMiddle(BYTES, 0.6, 0.25)
  text = "The quick brown fox jumps over the lazy dog. " * 2
  window = np.array([BYTES.end_of_text, *BYTES.encode(text), BYTES.end_of_text], np.int32)
  window = np.pad(window, (0, 50), constant_values=BYTES.end_of_text)
  modes = []
  for seed in range(2000):
    result = fim(window, np.random.default_rng(seed)).tolist()
    assert result[0] == BYTES.end_of_text
    modes.append(undo(result[1 : result.index(BYTES.end_of_text, 1)], BYTES)[1])
  assert modes.count("plain") / 2000 == pytest.approx(0.4, abs=0.04)
  # A PSM document with an empty prefix looks like SPM here: 2 in 91 of them.
  assert modes.count("SPM") / 2000 == pytest.approx(0.6 * 0.25, abs=0.04)


def test_documents_of_a_row_stay_apart_and_in_order():
  fim = FillInTheMiddle(BPE, 1, 0.5)
  end = [BPE.end_of_text]
  texts = ["first document", "second one", "third"]
  window = [token for text in texts for token in end + BPE.encode(text)] + end * 30
  result = fim(np.array(window, np.int32), np.random.default_rng(0))
  cuts = np.flatnonzero(result == BPE.end_of_text)
  documents = [result[a + 1 : b] for a, b in itertools.pairwise(cuts) if b > a + 1]
  assert [undo(document, BPE)[0] for document in documents] == texts


def test_cuts_fall_within_tokens():
  fim = FillInTheMiddle(BPE, 1, 0)
  ids = BPE.encode(DOCUMENTS[0][:300])
  ends = {len(BPE.decode(ids[:count])) for count in range(len(ids) + 1)}
  window = np.array(ids + [BPE.end_of_text] * 50, np.int32)
  cuts = []
  for seed in range(50):
    result = fim(window, np.random.default_rng(seed)).tolist()
    cuts.append(len(BPE.decode(result[1 : result.index(BPE.fim_suffix)])))
  assert sum(cut not in ends for cut in cuts) > 10


def test_a_tokenizer_that_adds_spaces_gets_none_into_the_text(tmp_path):
  stream = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(DOCUMENTS[0].splitlines()),
    model_writer=stream,
    vocab_size=400,
    normalization_rule_name="identity",
    control_symbols=list(SPECIALS),
    minloglevel=2,
  )
  (tmp_path / "a.model").write_bytes(stream.getvalue())
  tokenizer = tokenizers.load(str(tmp_path / "a.model"))
  fim = FillInTheMiddle(tokenizer, 1, 0.5)
  text = "the quick brown fox jumps over the lazy dog"
  window = np.array(tokenizer.encode(text) + [tokenizer.end_of_text] * 50, np.int32)
  for seed in range(20):
    result = fim(window, np.random.default_rng(seed)).tolist()
    assert undo(result[: result.index(tokenizer.end_of_text)], tokenizer)[0] == text


def test_half_a_character_at_the_edge_is_cut_between_tokens():
  fim = FillInTheMiddle(BYTES, 1, 0.5)
  window = np.frombuffer("漢字".encode()[1:], np.uint8).astype(np.int32)
  for seed in range(20):
    result = fim(np.pad(window, (0, 9), constant_values=256), np.random.default_rng(seed))
    tokens = [token for token in result.tolist() if token < 256]
    assert sorted(tokens) == sorted(window.tolist())


def test_length_never_grows_and_randomness_is_the_generator():
  fim = FillInTheMiddle(BPE, 1, 0.5)
  window = np.array(BPE.encode(DOCUMENTS[0])[:129], np.int32)
  one, two = (fim(window, np.random.default_rng(7)) for _ in range(2))
  np.testing.assert_array_equal(one, two)
  assert len(one) <= 129
  assert one.dtype == np.int32


def test_a_tokenizer_without_the_separators_is_refused():
  plain = dataclasses.replace(BYTES._format, specials={"<|endoftext|>": 256})
  with pytest.raises(UserError, match=r"'bytes' has no fill-in-the-middle tokens.*fim_rate=0"):
    FillInTheMiddle(dataclasses.replace(BYTES, _format=plain), 0.5, 0.5)
