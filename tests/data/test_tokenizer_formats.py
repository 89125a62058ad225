"""Tokenizers of every format against those of `transformers`, on vocabularies trained here."""

import io
import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.errors import UserError
from tests.data.conftest import DOCUMENTS

TEXTS = [
  "Hello world, it's 12345678 and I'LL don't!",
  "def f(x):\n\n\n    return x\t\t\n  \r\n",
  "从明天起，做一个幸福的人。2024年",
  "👩‍👩‍👧 é ﬁ \u00a0 \u2028 e\u0301 Ünïcödé \ufffd",
  "   runs   of    blanks   ",
  "½²Ⅷ ١٢٣ ½",
  "\n",
  "",
]
# What `transformers` would parse is left out.
TEXTS += [document.replace("<|endoftext|>", "the end") for document in DOCUMENTS]
BPE, UNIGRAM = "bpe", "unigram"


def sentencepiece_model(model_type, **options):
  stream = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter("\n".join(DOCUMENTS).splitlines()),
    model_writer=stream,
    vocab_size=500,
    model_type=model_type,
    minloglevel=2,
    **options,
  )
  return stream.getvalue()


def write_json(folder, name, content):
  (folder / name).write_text(json.dumps(content))


def trained(model, trainer, normalizer, pre_tokenizer):
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
  tokenizer.train_from_iterator(DOCUMENTS, trainer)
  return json.loads(tokenizer.to_str())["model"]


def write_bert(folder, lowercase=True):
  model = trained(
    models.WordPiece(unk_token="[UNK]"),
    trainers.WordPieceTrainer(
      vocab_size=500, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    ),
    normalizers.BertNormalizer(lowercase=lowercase),
    pre_tokenizers.BertPreTokenizer(),
  )
  vocab = sorted(model["vocab"], key=model["vocab"].get)
  (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
  write_json(folder, "tokenizer_config.json", {"do_lower_case": lowercase})


def write_byte_level(folder):
  model = trained(
    models.BPE(),
    trainers.BpeTrainer(
      vocab_size=500,
      special_tokens=["<|endoftext|>"],
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    ),
    None,
    pre_tokenizers.ByteLevel(add_prefix_space=False),
  )
  write_json(folder, "vocab.json", model["vocab"])
  merges = [" ".join(merge) for merge in model["merges"]]
  (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def write_gpt1(folder):
  model = trained(
    models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
    trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], end_of_word_suffix="</w>"),
    normalizers.BertNormalizer(lowercase=True),
    pre_tokenizers.BertPreTokenizer(),
  )
  write_json(folder, "vocab.json", model["vocab"] | {"\n</w>": len(model["vocab"])})
  (folder / "merges.txt").write_text("\n".join(["#version", *map(" ".join, model["merges"])]))


def write_llama(folder):
  options = {"byte_fallback": True, "normalization_rule_name": "identity"}
  model = sentencepiece_model(BPE, remove_extra_whitespaces=False, **options)
  (folder / "tokenizer.model").write_bytes(model)
  roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
  write_json(folder, "tokenizer_config.json", {**roles, "add_bos_token": True, "legacy": False})


def write_t5(folder):
  ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
  (folder / "spiece.model").write_bytes(sentencepiece_model(UNIGRAM, **ids))
  roles = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
  write_json(folder, "tokenizer_config.json", {**roles, "extra_ids": 100})


FOLDERS = {
  "gpt1": (write_gpt1, "OpenAIGPTTokenizer"),
  "gpt2": (write_byte_level, "GPT2Tokenizer"),
  "bert": (write_bert, "BertTokenizer"),
  "bert_cased": (lambda folder: write_bert(folder, lowercase=False), "BertTokenizer"),
  "llama": (write_llama, "LlamaTokenizer"),
  "t5": (write_t5, "T5Tokenizer"),
}


@pytest.fixture(scope="session")
def transformers():
  import transformers

  return transformers


@pytest.fixture(scope="session")
def family(transformers, tmp_path_factory):
  """Returns a function: name of a family -> (the reference, the folder it wrote itself, ours)."""
  made = {}

  def make(name):
    if name not in made:
      write, reference = FOLDERS[name]
      folder, saved = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp(f"{name}_saved")
      write(folder)
      reference = getattr(transformers, reference).from_pretrained(folder)
      reference.save_pretrained(saved)
      made[name] = reference, folder, saved
    return made[name]

  return make


def ids_of(reference, text):
  return reference(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_are_those_of_transformers(family, name):
  reference, folder, saved = family(name)
  ours = [tokenizer_lib.load(str(saved))]
  if name != "gpt1":  # Whose vocab.json and merges.txt are told from GPT-2's by tokenizer.json.
    ours.append(tokenizer_lib.load(str(folder)))
  for tokenizer in ours:
    for text in TEXTS:
      # Of a leading blank the Hugging Face library makes SentencePiece's own space before a text.
      if not (text.startswith(" ") and tokenizer._format.kind == "sentencepiece"):
        assert tokenizer.encode(text) == ids_of(reference, text), (tokenizer._format.kind, text)


@pytest.mark.parametrize("name", FOLDERS)
def test_special_tokens_are_parsed_where_they_are_asked_for(family, name):
  reference, _, saved = family(name)
  tokenizer = tokenizer_lib.load(str(saved))
  names = [text for text in tokenizer.specials if text != "\n</w>"]
  text = "".join(f"{special}Hello\nworld {special} it" for special in names)
  assert tokenizer.encode_with_specials(text) == ids_of(reference, text)
  plain = tokenizer.encode(text)
  unknown = tokenizer.specials.get(tokenizer.roles.get("unk_token"))
  assert not {*plain} & ({*tokenizer.specials.values()} - {unknown})


def test_specials_are_parsed_by_sentencepiece_too(family):
  for name in ("llama", "t5"):
    reference, folder, _ = family(name)
    tokenizer = tokenizer_lib.load(str(folder))
    for text in ("</s>Hello</s> world</s>", "Hello</s>world", "</s>"):
      assert tokenizer.encode_with_specials(text) == ids_of(reference, text), (name, text)


@pytest.mark.parametrize(
  ("name", "end", "start"),
  [
    ("gpt1", "\n</w>", None),
    ("gpt2", "<|endoftext|>", None),
    ("bert", "[SEP]", "[CLS]"),
    ("llama", "</s>", "<s>"),
    ("t5", "</s>", None),
  ],
)
def test_where_texts_start_and_end(family, name, end, start):
  reference, _, saved = family(name)
  tokenizer = tokenizer_lib.load(str(saved))
  assert tokenizer.end_of_text == reference.convert_tokens_to_ids(end)
  assert tokenizer.stops == {tokenizer.end_of_text}
  assert tokenizer.start == (() if start is None else (reference.convert_tokens_to_ids(start),))
  read = tokenizer.encode_prompt("it")
  assert read == reference("it").input_ids[: len(read)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_lossless_formats_come_back(family, name):
  _, folder, saved = family(name)
  for path in (folder, saved):
    tokenizer = tokenizer_lib.load(str(path))
    lossy = " " if name == "llama" and path == saved else ()  # As above.
    for text in TEXTS:
      if not text.startswith(lossy):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["gpt1", "bert", "t5"])
def test_other_formats_come_back_with_single_spaces(family, name):
  _, _, saved = family(name)
  tokenizer = tokenizer_lib.load(str(saved))
  assert tokenizer.decode(tokenizer.encode("the  list  of\nnames")) == "the list of names"


def test_added_tokens_of_blanks_and_tags_are_plain_text(family, tmp_path):
  """Gemma's tokenizer.json adds runs of '▁' and the tags of HTML, which are not special."""
  _, _, saved = family("llama")
  description = json.loads((saved / "tokenizer.json").read_text())
  renamed = {"<s>": "<bos>", "</s>": "<eos>"}
  vocab = {renamed.get(text, text): i for text, i in description["model"]["vocab"].items()}
  added = description["added_tokens"]
  for token in added:
    token["content"] = renamed.get(token["content"], token["content"])
  plain = {"special": False, "normalized": False, "lstrip": False, "rstrip": False}
  for text in ("▁▁▁▁", "▁▁", "</s>", "<table>"):
    token = vocab.setdefault(text, len(vocab))
    added.append(plain | {"id": token, "content": text, "single_word": False})
  description["model"] |= {"vocab": vocab}
  description |= {"post_processor": None}
  write_json(tmp_path, "tokenizer.json", description)
  tokenizer = tokenizer_lib.load(str(tmp_path))
  reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  assert tokenizer.end_of_text == vocab["<eos>"]
  for text in ("it</s><table>▁▁▁▁return", "def f():▁▁it"):
    ids = reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == tokenizer.encode_with_specials(text) == ids
    assert {*ids} & {vocab["▁▁▁▁"], vocab["▁▁"]}
    assert tokenizer.decode(ids) == reference.decode(ids).removeprefix(" ")


def test_sentencepiece_of_t5_alone_starts_no_text_with_a_separator(family, tmp_path):
  reference, folder, _ = family("t5")
  (tmp_path / "spiece.model").write_bytes((folder / "spiece.model").read_bytes())
  tokenizer = tokenizer_lib.load(str(tmp_path))
  ids = [*tokenizer.start, *tokenizer.encode("it"), tokenizer.end_of_text]
  assert ids == reference("it").input_ids


def test_masks_and_sentinels(family):
  reference, folder, saved = family("t5")
  expected = tuple(reference.convert_tokens_to_ids(f"<extra_id_{n}>") for n in range(100))
  for path in (folder, saved):
    assert tokenizer_lib.load(str(path)).sentinels == expected
  reference, _, saved = family("bert")
  assert tokenizer_lib.load(str(saved)).mask == reference.mask_token_id
  assert tokenizer_lib.load(str(saved)).sentinels == ()


def test_a_folder_is_saved_with_what_its_files_say(family, tmp_path):
  _, folder, _ = family("llama")
  tokenizer = tokenizer_lib.load(str(folder))
  tokenizer.save(tmp_path)
  again = tokenizer_lib.open_saved(tmp_path)
  assert (again.start, again.roles) == (tokenizer.start, tokenizer.roles)
  assert again.start != (again.end_of_text,)


def test_a_text_is_neither_cut_off_nor_filled_up(family, tmp_path):
  _, _, saved = family("bert")
  reference = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
  expected = reference.encode(TEXTS[0], add_special_tokens=False).ids
  reference.enable_truncation(4)
  reference.enable_padding(length=200)
  reference.save(str(tmp_path / "tokenizer.json"))
  tokenizer = tokenizer_lib.load(str(tmp_path))
  assert tokenizer.encode(TEXTS[0]) == tokenizer.encode_with_specials(TEXTS[0]) == expected


def test_old_files_do_not_name_their_model(family, tmp_path):
  for name in ("gpt2", "t5", "bert"):
    _, _, saved = family(name)
    description = json.loads((saved / "tokenizer.json").read_text())
    del description["model"]["type"]
    write_json(tmp_path, "tokenizer.json", description)
    tokenizer, same = tokenizer_lib.load(str(tmp_path)), tokenizer_lib.load(str(saved))
    assert tokenizer.encode(TEXTS[0]) == same.encode(TEXTS[0])


def test_a_line_of_vocab_txt_may_be_what_ends_lines_elsewhere(tmp_path):
  (tmp_path / "vocab.txt").write_bytes("[UNK]\r\n[CLS]\r\n[SEP]\r\n\u2028\r\nit\r\n".encode())
  tokenizer = tokenizer_lib.load(str(tmp_path / "vocab.txt"))
  assert (tokenizer.encode("it"), tokenizer.vocab_size) == ([4], 5)


def test_tokenizer_json_is_preferred(family):
  _, _, saved = family("gpt2")
  write_byte_level(saved)
  assert tokenizer_lib.load(str(saved))._format.kind == "tokenizer.json"


@pytest.mark.parametrize(
  ("description", "problem"),
  [
    ({}, "is a None model; BPE, Unigram and WordPiece are read"),
    ({"model": {"type": "WordLevel"}}, "is a WordLevel model"),
    ({"model": {"type": "BPE", "vocab": {}}}, "is neither byte-level nor does it write '▁'"),
    (
      {
        "model": {"type": "BPE", "vocab": {}},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"content": "<x>", "id": 0, "special": True}],
      },
      r"has no separator '<\|endoftext\|>' or .* \(special tokens: '<x>'\)",
    ),
  ],
)
def test_a_tokenizer_json_of_no_use_gets_one_sentence(tmp_path, description, problem):
  write_json(tmp_path, "tokenizer.json", description)
  with pytest.raises(UserError, match=problem):
    tokenizer_lib.load(str(tmp_path))


def test_a_vocabulary_without_separator_gets_one_sentence(tmp_path):
  (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\na\n")
  with pytest.raises(UserError, match=r"vocab\.txt has no '\[SEP\]'"):
    tokenizer_lib.load(str(tmp_path))
