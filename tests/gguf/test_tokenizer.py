"""Tokenizers in GGUF files against the tokenizers that they were made of."""

import builtins
import json

import gguf
import pytest
import sentencepiece
from tokenizers import normalizers, pre_tokenizers

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.errors import UserError
from tests.data.test_tokenizer_formats import BPE, TEXTS, sentencepiece_model
from tests.gguf.conftest import CONTROLS, split_then_bytes

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
GPT4 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
# The pre-tokenizers of the tokenizer.json files of GPT-2, SmolLM2, Llama 3 and Qwen 2.
WORDS = {
  "gpt-2": GPT2_WORDS,
  "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2_WORDS]),
  "llama-bpe": split_then_bytes(GPT4),
  "qwen2": split_then_bytes(GPT4.replace("{1,3}", "")),
}


def write(path, **values):
  """Writes a GGUF file without tensors."""
  writer = gguf.GGUFWriter(path, "llama")
  writers = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
  for name, value in values.items():
    key = "tokenizer.chat_template" if name == "chat_template" else f"tokenizer.ggml.{name}"
    writers.get(type(value), writer.add_array)(key, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  return str(path)


@pytest.fixture
def write_byte_level(tmp_path, byte_level):
  def make(**changes):
    model = json.loads(byte_level.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    values = {
      "model": "gpt2",
      "pre": "smollm",
      "tokens": tokens,
      "token_type": [CONTROL if token in CONTROLS else NORMAL for token in tokens],
      "merges": [" ".join(merge) for merge in model["merges"]],
      "bos_token_id": 1,
      "eos_token_id": 2,
      "chat_template": TEMPLATE,
    }
    return write(tmp_path / "model.gguf", **values | changes)

  return make


@pytest.mark.parametrize("pre", WORDS)
def test_byte_level_ids_are_those_of_the_original(write_byte_level, byte_level, pre):
  tokenizer = tokenizer_lib.load(write_byte_level(pre=pre))
  byte_level.pre_tokenizer = WORDS[pre]
  byte_level.model.ignore_merges = pre == "llama-bpe"
  byte_level.normalizer = normalizers.NFC() if pre == "qwen2" else None
  for text in TEXTS:
    assert tokenizer.encode(text) == byte_level.encode(text).ids, text
    assert pre == "qwen2" or tokenizer.decode(tokenizer.encode(text)) == text
  chat = "<|im_start|>Hi 12<|im_end|>"
  assert tokenizer.encode_with_specials(chat) == byte_level.encode(chat).ids
  assert not {*tokenizer.encode(chat)} & {*tokenizer.specials.values()}


def test_a_word_of_the_vocabulary_needs_no_merges_where_the_original_needs_none(write_byte_level):
  tokens = ["<|endoftext|>", "a", "b", "ab", "ba"]
  values = {"tokens": tokens, "token_type": [CONTROL, *[NORMAL] * 4], "merges": ["b a"]}
  tokenizer = tokenizer_lib.load(write_byte_level(pre="llama-bpe", **values))
  assert tokenizer.encode("ab") == [3]
  tokenizer = tokenizer_lib.load(write_byte_level(pre="gpt-2", **values))
  assert tokenizer.encode("ab") == [1, 2]


def test_patterns_differ(write_byte_level):
  ids = {
    pre: tuple(tokenizer_lib.load(write_byte_level(pre=pre)).encode("".join(TEXTS)))
    for pre in (*WORDS, "default")
  }
  assert len({*ids.values()}) == len(ids)


def test_what_the_file_says_of_special_tokens(write_byte_level):
  tokenizer = tokenizer_lib.load(write_byte_level())
  assert tokenizer.end_of_text == 0
  assert tokenizer.start == ()
  assert tokenizer.encode_prompt("") == [1]
  assert tokenizer.stops == {0, 2}
  assert tokenizer.chat_template == TEMPLATE
  assert tokenizer.roles == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
  assert tokenizer_lib.load(write_byte_level(add_bos_token=True)).start == (1,)
  assert tokenizer_lib.load(write_byte_level(pre="llama-bpe")).start == (1,)
  assert tokenizer_lib.load(write_byte_level(eot_token_id=7)).stops == {0, 2, 7}


def test_it_is_saved_without_the_weights(write_byte_level, tmp_path):
  tokenizer = tokenizer_lib.load(write_byte_level())
  tokenizer.save(tmp_path / "saved")
  assert not list((tmp_path / "saved").glob("*.gguf"))
  again = tokenizer_lib.open_saved(tmp_path / "saved")
  assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
  assert (again.chat_template, again.stops) == (TEMPLATE, tokenizer.stops)


def test_ids_by_scores_are_those_of_sentencepiece(tmp_path):
  options = {"byte_fallback": True, "normalization_rule_name": "identity"}
  content = sentencepiece_model(BPE, remove_extra_whitespaces=False, **options)
  original = sentencepiece.SentencePieceProcessor(model_proto=content)
  ids = range(original.vocab_size())
  kinds = [(original.is_unknown, UNKNOWN), (original.is_control, CONTROL), (original.is_byte, BYTE)]
  path = write(
    tmp_path / "model.gguf",
    model="llama",
    tokens=[original.id_to_piece(i) for i in ids],
    scores=[original.get_score(i) for i in ids],
    token_type=[next((kind for test, kind in kinds if test(i)), NORMAL) for i in ids],
    bos_token_id=1,
    eos_token_id=2,
    unknown_token_id=0,
  )
  tokenizer = tokenizer_lib.load(path)
  for text in TEXTS:
    assert tokenizer.encode(text) == original.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
  assert (tokenizer.start, tokenizer.end_of_text, tokenizer.stops) == ((1,), 2, {2})


@pytest.mark.parametrize(
  ("changes", "problem"),
  [
    ({"pre": "smolm"}, r"no known tokenizer\.ggml\.pre 'smolm'\. Did you mean 'smollm'"),
    ({"model": "rwkv"}, r"tokenizer\.ggml\.model is 'rwkv'; 'gpt2' and 'llama' are read"),
  ],
)
def test_an_unknown_kind_gets_one_sentence(write_byte_level, changes, problem):
  path = write_byte_level(**changes)
  with pytest.raises(UserError, match=problem):
    tokenizer_lib.load(path)


def test_a_file_that_is_no_gguf_gets_one_sentence(tmp_path):
  path = tmp_path / "x.gguf"
  for content in (b"", b"rubbish, and more of it", b"GGUF"):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.gguf: not a GGUF file"):
      tokenizer_lib.load(str(path))


def test_without_the_library_it_says_what_to_install(write_byte_level, monkeypatch):
  path, real = write_byte_level(), builtins.__import__

  def without_gguf(name, *rest):
    if name == "gguf":
      raise ImportError(name)
    return real(name, *rest)

  monkeypatch.setattr(builtins, "__import__", without_gguf)
  with pytest.raises(UserError, match="pip install gguf"):
    tokenizer_lib.load(path)
