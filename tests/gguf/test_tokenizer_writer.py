"""Tokenizers of every format written into GGUF files and read back."""

import base64
import json
import logging

import gguf
import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.errors import UserError
from gptjax.gguf.tokenizer_writer import make_fields
from tests.data.test_tokenizer_formats import (
  BPE,
  TEXTS,
  UNIGRAM,
  sentencepiece_model,
  write_bert,
  write_byte_level,
  write_llama,
)
from tests.gguf.conftest import CONTROLS, split_then_bytes
from tests.gguf.test_tokenizer import TEMPLATE, WORDS

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
CHAT = "<|im_start|>Hi 12<|im_end|>"


@pytest.fixture
def write(tmp_path):
  """Returns a function that writes a tokenizer's fields: (the values of the file, read back)."""

  def write(tokenizer, spare=0):
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    adders = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    for name, value in make_fields(tokenizer, tokenizer.vocab_size + spare).items():
      adders.get(type(value), writer.add_array)(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(path).fields
    values = {name.rpartition(".")[2]: field.contents() for name, field in fields.items()}
    return values, tokenizer_lib.load(str(path))

  return write


@pytest.fixture
def plain(byte_level):
  """A tokenizer with GPT-2's words, to change."""
  made = tokenizers.Tokenizer.from_str(byte_level.to_str())
  made.pre_tokenizer, made.normalizer = WORDS["gpt-2"], None
  made.model.ignore_merges = False
  return made


def check_same(found, tokenizer):
  for text in TEXTS:
    assert found.encode(text) == tokenizer.encode(text), text
    assert found.decode(found.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert found.encode_prompt(text) == tokenizer.encode_prompt(text)
  assert found.encode_with_specials(CHAT) == tokenizer.encode_with_specials(CHAT)
  assert found.specials.items() >= tokenizer.specials.items()
  assert found.roles.items() >= tokenizer.roles.items()
  for name in ("end_of_text", "start", "stops", "prefix", "chat_template"):
    assert getattr(found, name) == getattr(tokenizer, name), name


def save(folder, made, **settings):
  """Writes a tokenizer of the Hugging Face library into a folder, with settings beside it."""
  folder.mkdir()
  description = json.loads(made.to_str())
  (folder / "tokenizer.json").write_text(json.dumps(description))
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  return tokenizer_lib.load(str(folder))


@pytest.mark.parametrize("spec", ["bytes", "bytes+mask", "bpe:400", "bpe:300+mask"])
def test_tokenizers_of_our_own(write, spec):
  own = spec.startswith("bytes")
  tokenizer = tokenizer_lib.load(spec) if own else tokenizer_lib.train(spec, TEXTS)
  values, found = write(tokenizer, spare=2)
  check_same(found, tokenizer)
  assert found.start == (tokenizer.end_of_text,)
  # GPT-4's words without Llama 3's rule that a word which is a token stays whole.
  assert values["pre"] == ("gpt-2" if own else "dbrx")
  assert values["model"] == "gpt2"
  size = tokenizer.vocab_size
  assert values["tokens"][size:] == [f"[PAD{size}]", f"[PAD{size + 1}]"]
  kinds = values["token_type"]
  assert kinds[size:] == [UNUSED, UNUSED]
  assert {i for i, kind in enumerate(kinds) if kind == CONTROL} == {*tokenizer.specials.values()}


@pytest.mark.parametrize("pre", WORDS)
def test_the_pattern_of_published_files_is_recognised(write, plain, tmp_path, pre):
  plain.pre_tokenizer = WORDS[pre]
  plain.model.ignore_merges = pre == "llama-bpe"
  plain.normalizer = normalizers.NFC() if pre == "qwen2" else None
  roles = {"bos_token": CONTROLS[1], "eos_token": CONTROLS[2], "pad_token": CONTROLS[0]}
  tokenizer = save(tmp_path / "hf", plain, chat_template=TEMPLATE, **roles)
  values, found = write(tokenizer)
  assert values["pre"] == pre
  assert (values["bos_token_id"], values["eos_token_id"], values["padding_token_id"]) == (1, 2, 0)
  assert values["add_bos_token"] is False
  check_same(found, tokenizer)
  # Once more, from the file.
  again, _ = write(found)
  assert again == values | {"architecture": again["architecture"]}


def test_a_start_and_more_ends_of_a_text(write, plain, tmp_path):
  tokenizer = save(tmp_path / "hf", plain, bos_token=CONTROLS[1], add_bos_token=True)
  (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
  tokenizer = tokenizer_lib.load(str(tmp_path / "hf"))
  assert (tokenizer.start, tokenizer.stops) == ((1,), {0, 2, 9})
  values, found = write(tokenizer)
  check_same(found, tokenizer)
  assert values["add_bos_token"] is True
  assert (values["eos_token_id"], values["eom_token_id"], values["eot_token_id"]) == (0, 2, 9)


def test_more_ends_than_a_file_can_name_are_told(plain, tmp_path, caplog):
  save(tmp_path / "hf", plain)
  (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [7, 8, 9]}')
  tokenizer = tokenizer_lib.load(str(tmp_path / "hf"))
  with caplog.at_level(logging.WARNING):
    make_fields(tokenizer, tokenizer.vocab_size)
  assert "llama.cpp will not end a text at the tokens [9]" in caplog.text


def test_added_tokens_that_are_not_special_are_found_in_plain_text(write, plain, tmp_path):
  plain.pre_tokenizer = WORDS["smollm"]
  plain.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
  tokenizer = save(tmp_path / "hf", plain)
  values, found = write(tokenizer)
  token = tokenizer.encode("<think>")
  assert token == found.encode("<think>") == [plain.token_to_id("<think>")]
  assert values["token_type"][token[0]] == USER_DEFINED
  check_same(found, tokenizer)


def test_a_vocabulary_and_a_list_of_merges(write, tmp_path):
  write_byte_level(tmp_path)
  values, found = write(tokenizer_lib.load(str(tmp_path)))
  assert values["pre"] == "gpt-2"
  check_same(found, tokenizer_lib.load(str(tmp_path)))


def test_bpe_of_sentencepiece(write, tmp_path):
  write_llama(tmp_path)
  tokenizer = tokenizer_lib.load(str(tmp_path))
  values, found = write(tokenizer, spare=1)
  assert (values["model"], values["add_space_prefix"]) == ("llama", True)
  assert values["unknown_token_id"] == 0
  assert len(values["scores"]) == len(values["tokens"]) == tokenizer.vocab_size + 1
  check_same(found, tokenizer)
  assert found.start == (1,)


NO_WAY = {
  "a pattern": split_then_bytes(r"\d{2}|\w+|\W+"),
  "what it does to matches": pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(r"\p{N}"), behavior="merged_with_previous"),
      pre_tokenizers.ByteLevel(False),
    ]
  ),
  "a space before texts": pre_tokenizers.ByteLevel(add_prefix_space=True),
  "digits by their number": pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)]
  ),
}


@pytest.mark.parametrize("words", NO_WAY.values(), ids=NO_WAY)
def test_words_that_llama_cpp_does_not_know_get_one_sentence(plain, tmp_path, words):
  plain.pre_tokenizer = words
  tokenizer = save(tmp_path / "hf", plain)
  with pytest.raises(UserError, match=r"llama\.cpp knows no tokenizer of the kind BPE with"):
    make_fields(tokenizer, tokenizer.vocab_size)


@pytest.mark.parametrize(
  "changes",
  [
    {"normalizer": {"type": "NFC"}},
    {"normalizer": {"type": "Lowercase"}},
    {"ignore_merges": True},
    {"end_of_word_suffix": "</w>"},
  ],
)
def test_what_llama_cpp_does_with_other_words_alone_is_refused(plain, tmp_path, changes):
  tokenizer = save(tmp_path / "hf", plain)
  path = tmp_path / "hf" / "tokenizer.json"
  description = json.loads(path.read_text())
  if "normalizer" in changes:
    description |= changes
  else:
    description["model"] |= changes
  path.write_text(json.dumps(description))
  tokenizer = tokenizer_lib.load(str(tmp_path / "hf"))
  with pytest.raises(UserError, match=r"llama\.cpp knows no tokenizer of the kind BPE with"):
    make_fields(tokenizer, tokenizer.vocab_size)


def write_tiktoken(folder):
  lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
  (folder / "r50k_base.tiktoken").write_text("".join(lines))
  return folder / "r50k_base.tiktoken"


def write_unigram(folder):
  (folder / "x.model").write_bytes(sentencepiece_model(UNIGRAM))
  return folder / "x.model"


def write_normalising(folder):
  (folder / "x.model").write_bytes(sentencepiece_model(BPE))
  return folder / "x.model"


@pytest.mark.parametrize(
  ("write", "reason"),
  [
    (write_bert, "hold byte-level BPE or SentencePiece's BPE, not wordpiece"),
    (write_tiktoken, "not tiktoken"),
    (write_unigram, "'llama' is a BPE that leaves characters and blanks as they are"),
    (write_normalising, "'llama' is a BPE that leaves characters and blanks as they are"),
  ],
)
def test_other_kinds_get_one_sentence(tmp_path, write, reason):
  tokenizer = tokenizer_lib.load(str(write(tmp_path) or tmp_path))
  with pytest.raises(UserError) as error:
    make_fields(tokenizer, tokenizer.vocab_size)
  assert reason in str(error.value)
  assert "\n" not in str(error.value)


def test_a_token_that_takes_the_blanks_around_it_is_refused(plain, tmp_path):
  plain.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
  tokenizer = save(tmp_path / "hf", plain)
  with pytest.raises(UserError, match=r"llama\.cpp does not take the blanks around '<mask>'"):
    make_fields(tokenizer, tokenizer.vocab_size)


def test_two_tokens_before_a_text_are_refused(plain, tmp_path):
  plain.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"{CONTROLS[0]} {CONTROLS[1]} $A",
    special_tokens=[(CONTROLS[0], 0), (CONTROLS[1], 1)],
  )
  tokenizer = save(tmp_path / "hf", plain)
  assert tokenizer.start == (0, 1)
  with pytest.raises(UserError, match=r"begins a text with 2 tokens, llama\.cpp with one"):
    make_fields(tokenizer, tokenizer.vocab_size)
