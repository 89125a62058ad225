import base64
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from gptjax.data import tokenizer as tokenizers
from gptjax.data.tokenizer_formats import SPECIALS
from gptjax.errors import UserError
from tests.data.conftest import DOCUMENTS

TEXTS = [
  "Hello world, it's 12345678!",
  "def f(x):\n\n\n    return x\t\t\n  \r\n",
  "从明天起，做一个幸福的人。",
  "👩‍👩‍👧 é ﬁ \u00a0 \u2028",
  " ",
  "\n",
  "<|endoftext|><|fim_prefix|></s>",
]


@pytest.fixture(scope="module")
def bpe():
  return tokenizers.train("bpe:600", DOCUMENTS)


def parts_of(bpe):
  """Returns (vocabulary without the specials, merges) of a trained BPE."""
  model = json.loads(bpe._files["tokenizer.json"])["model"]
  words = [token for token in model["vocab"] if token not in SPECIALS]
  return words, [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def write_gpt2(folder, bpe, names):
  words, merges = parts_of(bpe)
  vocab = {token: number for number, token in enumerate([*words, "<|endoftext|>"])}
  (folder / names[0]).write_text(json.dumps(vocab))
  (folder / names[1]).write_text("\n".join(["#version: 0.2", *merges]) + "\n")
  return str(folder)


def write_tiktoken(folder, bpe, stem):
  # Ranks are ids in both formats: the bytes and then the merges, in order.
  ids = [number for number, size in enumerate(bpe.bytes_per_token()) if size]
  lines = [
    f"{base64.b64encode(bpe.decode_bytes([token])).decode()} {rank}"
    for rank, token in enumerate(ids)
  ]
  (folder / f"{stem}.tiktoken").write_text("\n".join(lines) + "\n")
  return str(folder / f"{stem}.tiktoken")


def write_sentencepiece(folder):
  stream = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter("\n".join(DOCUMENTS).splitlines()),
    model_writer=stream,
    vocab_size=600,
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    minloglevel=2,
  )
  (folder / "spm.model").write_bytes(stream.getvalue())
  return str(folder / "spm.model")


@pytest.fixture(params=["bytes", "bpe", "gpt2", "merges", "r50k_base", "cl100k_base", "o200k_base",
                        "tokenizer.json", "sentencepiece"])  # fmt: skip
def tokenizer(request, tmp_path, bpe):
  match request.param:
    case "bytes":
      return tokenizers.load("bytes")
    case "bpe":
      return bpe
    case "gpt2":
      return tokenizers.load(write_gpt2(tmp_path, bpe, ("encoder.json", "vocab.bpe")))
    case "merges":
      return tokenizers.load(write_gpt2(tmp_path, bpe, ("vocab.json", "merges.txt")))
    case "tokenizer.json":
      (tmp_path / "tokenizer.json").write_bytes(bpe._files["tokenizer.json"])
      return tokenizers.load(str(tmp_path / "tokenizer.json"))
    case "sentencepiece":
      return tokenizers.load(write_sentencepiece(tmp_path))
    case stem:
      return tokenizers.load(write_tiktoken(tmp_path, bpe, stem))


@pytest.mark.parametrize("text", TEXTS + DOCUMENTS)
def test_text_comes_back(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert max(ids) < tokenizer.vocab_size
  added = tokenizer._format.adds_space  # SentencePiece counts the space that it puts in front.
  assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode()) + added


@pytest.mark.parametrize("text", TEXTS)
def test_text_never_becomes_a_special_token(tokenizer, text):
  assert not set(tokenizer.encode(text)) & {tokenizer.end_of_text, *tokenizer.specials.values()}


def test_specials_stand_for_no_text(tokenizer):
  specials = {tokenizer.end_of_text, *tokenizer.specials.values()}
  assert tokenizer.decode_bytes(specials) == b""
  assert not tokenizer.bytes_per_token()[list(specials)].any()


def test_pieces_of_a_character_can_be_streamed():
  tokenizer = tokenizers.load("bytes")
  ids = tokenizer.encode("漢")
  assert tokenizer.decode(ids[:2]) == "\ufffd"
  assert b"".join(tokenizer.decode_bytes([token]) for token in ids).decode() == "漢"


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
  folder = tmp_path / "run" / "tokenizer"
  tokenizer.save(folder)
  again = tokenizers.open_saved(folder)
  assert again.fingerprint() == tokenizer.fingerprint()
  assert (again.vocab_size, again.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
  assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
  (folder / "gptjax_tokenizer.json").unlink()  # As if the process had died before writing it.
  assert tokenizers.open_saved(folder) is None


def test_the_formats_agree(tmp_path, bpe):
  gpt2 = tokenizers.load(write_gpt2(tmp_path, bpe, ("encoder.json", "vocab.bpe")))
  r50k = tokenizers.load(write_tiktoken(tmp_path, bpe, "r50k_base"))
  cl100k = tokenizers.load(write_tiktoken(tmp_path, bpe, "cl100k_base"))
  assert len(gpt2.encode(DOCUMENTS[0])) < len(DOCUMENTS[0]) / 2
  for text in TEXTS + DOCUMENTS:
    assert [gpt2.decode_bytes([token]) for token in gpt2.encode(text)] == [
      r50k.decode_bytes([token]) for token in r50k.encode(text)
    ]
    assert [bpe.decode_bytes([token]) for token in bpe.encode(text)] == [
      cl100k.decode_bytes([token]) for token in cl100k.encode(text)
    ]


def test_published_ids_of_tiktoken(tmp_path, bpe):
  ends = {"r50k_base": 50256, "p50k_base": 50256, "cl100k_base": 100257, "o200k_base": 199999}
  for stem, end in ends.items():
    assert tokenizers.load(write_tiktoken(tmp_path, bpe, stem)).end_of_text == end


def test_training_is_deterministic_across_processes(bpe):
  code = (
    "from gptjax.data import tokenizer; from tests.data.conftest import DOCUMENTS; "
    "print(tokenizer.train('bpe:600', DOCUMENTS).fingerprint())"
  )
  command = [sys.executable, "-c", code]
  root = Path(__file__).parents[2]
  output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
  assert output.stdout.strip() == bpe.fingerprint()


@pytest.mark.parametrize("size", [260, 300, 5000])
def test_bpe_has_the_declared_size_whatever_the_text(size):
  tokenizer = tokenizers.train(f"bpe:{size}", ["a little text"])
  assert tokenizer.vocab_size == size == tokenizers.declared_vocab_size(f"bpe:{size}")
  assert tokenizer.decode(tokenizer.encode("漢 any text")) == "漢 any text"
  assert None not in (tokenizer.fim_prefix, tokenizer.fim_middle, tokenizer.fim_suffix)


def test_declared_size_of_files(tmp_path, bpe):
  assert tokenizers.declared_vocab_size("bytes") == 260
  words, _ = parts_of(bpe)
  folder = write_gpt2(tmp_path, bpe, ("encoder.json", "vocab.bpe"))
  assert tokenizers.declared_vocab_size(folder) == len(words) + 1


def test_specials_that_a_file_does_not_mark_are_not_parsed(tmp_path, bpe):
  description = json.loads(bpe._files["tokenizer.json"])
  for token in description["added_tokens"]:
    token["special"] = False
  (tmp_path / "tokenizer.json").write_text(json.dumps(description))
  tokenizer = tokenizers.load(str(tmp_path))
  assert tokenizer.end_of_text not in tokenizer.encode("<|endoftext|>")
  assert tokenizer.fim_middle not in tokenizer.encode("<|fim_middle|>")


def test_a_run_keeps_its_tokenizer(tmp_path):
  first = tokenizers.train_or_load("bpe:300", lambda: DOCUMENTS, tmp_path)

  def refuse():
    raise AssertionError("must not train again")

  again = tokenizers.train_or_load("bpe:300", refuse, tmp_path)
  assert again.fingerprint() == first.fingerprint()
  with pytest.raises(UserError, match=r"holds the tokenizer 'bpe:300', not 'bpe:400'"):
    tokenizers.train_or_load("bpe:400", refuse, tmp_path)


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_the_tokenizer_of_one_run_serves_another(spec, tmp_path):
  first = tokenizers.train_or_load(spec, lambda: DOCUMENTS, tmp_path / "first")
  folder = str(tmp_path / "first")
  for _ in range(2):  # Started, and resumed.
    second = tokenizers.train_or_load(folder, list, tmp_path / "second")
    assert second.encode(TEXTS[0]) == first.encode(TEXTS[0])
    assert (second.spec, second.is_own, second.start) == (folder, True, first.start)


def test_a_run_does_not_go_on_with_swapped_ids(tmp_path):
  tokenizers.train_or_load("bpe:300", lambda: DOCUMENTS, tmp_path)
  path = tmp_path / "tokenizer.json"
  description = json.loads(path.read_text())
  vocab = description["model"]["vocab"]
  vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
  path.write_text(json.dumps(description))
  with pytest.raises(UserError, match=r"tokenizer\.json is not what the run saved there"):
    tokenizers.open_saved(tmp_path)


@pytest.mark.parametrize(
  ("change", "problem"),
  [
    (
      {"files": ["../victim.py"]},
      r"'\.\./victim\.py' is not the name of a file in the same folder",
    ),
    ({"files": ["/etc/passwd"]}, "is not the name of a file in the same folder"),
    ({"files": ["gone.json"]}, "a file that it names cannot be read"),
    ({"files": 7}, "not what a run writes"),
    ({"vocab_size": 10**12}, "vocab_size=1000000000000 are of no tokenizer"),
    ({"kind": "pickle"}, "kind='pickle' .* are of no tokenizer"),
  ],
)
def test_a_tokenizer_of_a_run_from_elsewhere_reads_its_own_folder_alone(tmp_path, change, problem):
  folder = tmp_path / "tokenizer"
  tokenizers.train_or_load("bpe:300", lambda: DOCUMENTS, folder)
  (tmp_path / "victim.py").write_text("{}")
  path = folder / "gptjax_tokenizer.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(UserError, match=problem):
    tokenizers.open_saved(folder)


@pytest.mark.parametrize(
  ("spec", "problem"),
  [
    ("bpe:259", "whole number of 260 or more"),
    ("bpe:many", "whole number of 260 or more"),
    ("bytes+masks", "no suffix 'masks'. Did you mean 'mask'"),
    ("bpe:500+", "no suffix ''"),
    ("bpe:260+mask", "whole number of 261 or more"),
    ("bpe:300+sentinels", "whole number of 360 or more"),
    ("bpe:99999999999", ", and at most "),
    ("byts", "is no file or folder. Give 'bytes'"),
    (".", "holds no tokenizer that we read"),
  ],
)
def test_a_bad_spec_gets_one_sentence(spec, problem):
  with pytest.raises(UserError, match=problem):
    tokenizers.declared_vocab_size(spec)


@pytest.mark.parametrize(
  ("name", "content", "problem"),
  [
    ("my.tiktoken", "YQ== 0", "no published encoding 'my'"),
    ("r50k_base.tiktoken", "YQ== 0\nrubbish\n", r"r50k_base\.tiktoken:2: not a base64 token"),
    ("a.model", "rubbish", r"a\.model is not a SentencePiece model"),
    ("tokenizer.json", "{", r"tokenizer\.json: not JSON"),
    (
      "tokenizer.json",
      json.dumps({"model": {"type": "WordLevel"}, "added_tokens": []}),
      "is a WordLevel model",
    ),
  ],
)
def test_a_bad_file_gets_one_sentence(tmp_path, name, content, problem):
  (tmp_path / name).write_text(content)
  with pytest.raises(UserError, match=problem):
    tokenizers.load(str(tmp_path / name))


@pytest.mark.parametrize("pattern", ["(a+)+$", "(?:a|aa)+$", "(e|e)*!", "(?=(a*a*a*a*a*)[^a]$)a"])
def test_a_pattern_that_takes_for_ever_is_refused_when_it_is_read(tmp_path, pattern):
  tokenizers.train("bpe:300", DOCUMENTS).save(tmp_path)
  path = tmp_path / "tokenizer.json"
  description = json.loads(path.read_text())
  description["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
  path.write_text(json.dumps(description))
  started = time.monotonic()
  with pytest.raises(UserError, match=r"tokenizer\.json: one of its patterns takes too long"):
    tokenizers.load(str(path))
  assert time.monotonic() - started < 20


@pytest.mark.parametrize("content", ["[]", "{}", '{"model": {"type": "BPE", "vocab": 3}}', "null"])
def test_a_tokenizer_of_another_shape_is_refused(tmp_path, content):
  (tmp_path / "tokenizer.json").write_text(content)
  with pytest.raises(UserError, match=r"tokenizer\.json"):
    tokenizers.load(str(tmp_path))


@pytest.mark.parametrize("token", [10**12, -1])
def test_an_id_that_no_vocabulary_has_is_refused(tmp_path, token):
  tokenizers.train("bpe:300", DOCUMENTS).save(tmp_path)
  path = tmp_path / "tokenizer.json"
  description = json.loads(path.read_text())
  description["model"]["vocab"]["a"] = token
  path.write_text(json.dumps(description))
  with pytest.raises(UserError, match=r"tokenizer\.json"):
    tokenizers.load(str(path))


def test_batches_are_encoded_as_single_texts_are(tokenizer):
  batch = tokenizer.encode_batch(TEXTS)
  assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in TEXTS]
  assert all(ids.dtype == np.uint32 for ids in batch)


# --- Special tokens ----------------------------------------------------------------------------


def test_a_text_starts_as_its_own_library_has_it_and_ends_with_the_separator(tokenizer):
  # None of these libraries puts anything before a text; ours puts the separator there.
  assert tokenizer.start == ((tokenizer.end_of_text,) if tokenizer.is_own else ())
  assert tokenizer.encode_prompt("a") == [*tokenizer.start, *tokenizer.encode("a")]
  assert tokenizer.encode_prompt("") == [tokenizer.prefix] == [tokenizer.end_of_text]
  assert tokenizer.stops == {tokenizer.end_of_text}
  assert (tokenizer.mask, tokenizer.sentinels, tokenizer.chat_template) == (None, (), None)


@pytest.mark.parametrize("base", ["bytes", "bpe:400"])
def test_suffixes_add_special_tokens(base, tmp_path):
  mask = tokenizers.train_or_load(f"{base}+mask", lambda: DOCUMENTS, tmp_path / "mask")
  both = tokenizers.train_or_load(f"{base}+sentinels+mask", lambda: DOCUMENTS, tmp_path / "both")
  assert mask.decode_bytes([mask.mask]) == b""
  assert (mask.sentinels, len({*both.sentinels, both.mask})) == ((), 101)
  assert both.sentinels == tuple(range(both.sentinels[0], both.sentinels[0] + 100))
  assert not {*both.encode("<|mask|><|sentinel_0|>")} & {*both.specials.values()}
  again = tokenizers.open_saved(tmp_path / "both")
  assert (again.mask, again.sentinels) == (both.mask, both.sentinels)
  if base == "bytes":
    assert (mask.vocab_size, both.vocab_size) == (261, 361)
  else:
    assert mask.vocab_size == both.vocab_size == 400


def test_what_is_made_without_a_suffix_is_what_it_always_was(bpe):
  # Runs and caches on disk were made with these.
  digest = "277089d91c0bdf4f"
  assert tokenizers.load("bytes").fingerprint().startswith(digest)
  assert [bpe.specials[text] for text in SPECIALS] == [0, 1, 2, 3]


def test_special_tokens_are_parsed_where_they_are_asked_for(tokenizer):
  end, line = tokenizer.end_of_text, tokenizer.encode("\n")
  name = next(text for text, token in tokenizer.specials.items() if token == end)
  ids = tokenizer.encode_with_specials(f"ab{name}{name}\n")
  assert ids == [*tokenizer.encode("ab"), end, end, *line[tokenizer._format.adds_space :]]


def test_of_two_special_tokens_the_longer_is_parsed():
  tokenizer = tokenizers._make("bytes", "bytes", {"specials.json": b'["<a>", "<a>b", "<a>bc"]'})
  assert tokenizer.encode_with_specials("<a>b<a><a>bc") == [261, 260, 262]


@pytest.mark.parametrize("kind", ["encode", "encode_with_specials"])
def test_half_a_surrogate_pair_gets_one_sentence(tokenizer, kind):
  with pytest.raises(UserError, match=r"half of a surrogate pair \(U\+D83D\) at character 2"):
    getattr(tokenizer, kind)("ab\ud83d")
