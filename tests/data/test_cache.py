import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers
from tokenizers import models as tokenizer_models

from gptjax.data import cache, files
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from tests.data.conftest import DOCUMENTS

ROOT = Path(__file__).parents[2]
BYTES = tokenizers.load("bytes")


def source_of(folder):
  return files.TextFiles(files.find_files(str(folder)), "error")


def expected_stream(tokenizer=BYTES):
  end = tokenizer.end_of_text
  return [token for text in DOCUMENTS for token in [end, *tokenizer.encode(text)]] + [end]


def check(tokens, tokenizer=BYTES):
  assert tokens.tokens.tolist() == expected_stream(tokenizer)
  assert tokens.num_tokens == len(tokens.tokens)
  assert tokens.num_documents == len(DOCUMENTS)
  assert tokens.num_bytes == sum(len(text.encode()) for text in DOCUMENTS)
  assert (tokens.tokens[tokens.boundaries] == tokenizer.end_of_text).all()


@pytest.mark.parametrize("spec", ["bytes", "bpe:500", "bpe:70000"])
def test_stream_is_the_documents_between_separators(corpus, tmp_path, spec):
  tokenizer = tokenizers.train_or_load(spec, lambda: DOCUMENTS, tmp_path / "tokenizer")
  tokens = cache.open_or_build(source_of(corpus), tokenizer, str(tmp_path / "cache"))
  check(tokens, tokenizer)
  assert tokens.tokens.dtype == (np.uint32 if tokenizer.vocab_size > 65536 else np.uint16)


def test_long_documents_are_encoded_in_pieces_without_changing_a_token(
  corpus, tmp_path, monkeypatch
):
  monkeypatch.setattr(cache, "_PIECE_CHARACTERS", 50)
  monkeypatch.setattr(cache, "_CHUNK_CHARACTERS", 200)
  tokenizer = tokenizers.train("bpe:800", DOCUMENTS)
  check(cache.open_or_build(source_of(corpus), tokenizer, str(tmp_path / "cache")), tokenizer)


def test_a_tokenizer_that_adds_a_space_adds_one_a_document(corpus, tmp_path, monkeypatch):
  monkeypatch.setattr(cache, "_PIECE_CHARACTERS", 50)
  model = tokenizer_models.Unigram(
    [("<unk>", 0.0), ("</s>", 0.0), ("▁", -3.0), *((c, -4.0) for c in {*"".join(DOCUMENTS)})], 0
  )
  made = Tokenizer(model)
  made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  made.add_special_tokens(["</s>"])
  made.save(str(tmp_path / "tokenizer.json"))
  tokenizer = tokenizers.load(str(tmp_path / "tokenizer.json"))
  assert tokenizer.adds_space
  check(cache.open_or_build(source_of(corpus), tokenizer, str(tmp_path / "cache")), tokenizer)


def test_empty_documents_are_left_out(corpus, tmp_path):
  (corpus / "1b.txt").write_text("")
  check(cache.open_or_build(source_of(corpus), BYTES, str(tmp_path / "cache")))


def test_a_corpus_of_empty_documents_is_an_error(tmp_path):
  (tmp_path / "a.txt").write_text("")
  with pytest.raises(UserError, match=r"a\.txt: no text in any of 1 documents"):
    cache.open_or_build(source_of(tmp_path / "a.txt"), BYTES, str(tmp_path / "cache"))


def test_a_cache_is_built_once(corpus, tmp_path, monkeypatch):
  cache.open_or_build(source_of(corpus), BYTES, str(tmp_path / "cache"))
  monkeypatch.setattr(cache, "_build", None)
  check(cache.open_or_build(source_of(corpus), BYTES, str(tmp_path / "cache")))


def test_a_changed_file_is_noticed(corpus, tmp_path):
  cache.open_or_build(source_of(corpus), BYTES, str(tmp_path / "cache"))
  file = corpus / "5.txt"
  before = file.stat()
  file.write_text("SHORT")
  os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
  tokens = cache.open_or_build(source_of(corpus), BYTES, str(tmp_path / "cache"))
  assert tokens.tokens[-6:-1].astype(np.uint8).tobytes() == b"SHORT"


def test_another_tokenizer_gets_another_cache(corpus, tmp_path):
  cache.open_or_build(source_of(corpus), BYTES, str(tmp_path / "cache"))
  tokenizer = tokenizers.train("bpe:500", DOCUMENTS)
  check(cache.open_or_build(source_of(corpus), tokenizer, str(tmp_path / "cache")), tokenizer)


@pytest.mark.parametrize("name", ["tokens.bin", "boundaries.npy", "meta.json"])
def test_a_damaged_cache_is_built_again(corpus, tmp_path, name):
  cache.open_or_build(source_of(corpus), BYTES, str(tmp_path / "cache"))
  (file,) = (tmp_path / "cache").glob(f"tokens/*/{name}")
  file.write_bytes(file.read_bytes()[:-8])
  check(cache.open_or_build(source_of(corpus), BYTES, str(tmp_path / "cache")))


@pytest.mark.parametrize("name", ["tokens.bin", "boundaries.npy"])
def test_a_flipped_bit_is_noticed_and_the_cache_built_again(corpus, tmp_path, name):
  cache.open_or_build(source_of(corpus), BYTES, str(tmp_path / "cache"))
  (file,) = (tmp_path / "cache").glob(f"tokens/*/{name}")
  content = bytearray(file.read_bytes())
  content[-10] ^= 1
  file.write_bytes(content)
  check(cache.open_or_build(source_of(corpus), BYTES, str(tmp_path / "cache")))


@pytest.mark.parametrize("meta", ["[]", "{}", '{"dtype": "rubbish"}', "\0", "[" * 10_000])
def test_a_cache_with_rubbish_for_its_description_is_built_again(corpus, tmp_path, meta):
  cache.open_or_build(source_of(corpus), BYTES, str(tmp_path / "cache"))
  (file,) = (tmp_path / "cache").glob("tokens/*/meta.json")
  file.write_text(meta)
  check(cache.open_or_build(source_of(corpus), BYTES, str(tmp_path / "cache")))


KILLED = """
import sys, time
import tests.data.test_cache as t
from gptjax.data import cache
cache._CHUNK_CHARACTERS = 1
class Slow:
  def __init__(self, source): self.source = source
  def __getattr__(self, name): return getattr(self.source, name)
  def __len__(self): return len(self.source)
  def __getitem__(self, index):
    if index == len(self.source) - 1:
      print("last", flush=True)
      time.sleep(60)
    return self.source[index]
cache.open_or_build(Slow(t.source_of(sys.argv[1])), t.BYTES, sys.argv[2])
"""


def test_a_killed_build_is_never_half_used(corpus, tmp_path):
  folder = str(tmp_path / "cache")
  command = [sys.executable, "-c", KILLED, str(corpus), folder]
  with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
    assert process.stdout.readline() == b"last\n"
    process.send_signal(signal.SIGKILL)
  (left,) = (tmp_path / "cache" / "tokens").glob("*/")
  assert left.suffix == ".partial"
  check(cache.open_or_build(source_of(corpus), BYTES, folder))
  assert [path.suffix for path in (tmp_path / "cache" / "tokens").glob("*/")] == [""]


def build_and_check(corpus, folder, barrier):
  barrier.wait()
  check(cache.open_or_build(source_of(corpus), BYTES, folder))


def test_processes_that_build_at_once_agree(corpus, tmp_path):
  context = multiprocessing.get_context("spawn")
  barrier = context.Barrier(3)
  arguments = (corpus, str(tmp_path / "cache"), barrier)
  processes = [context.Process(target=build_and_check, args=arguments) for _ in range(3)]
  for process in processes:
    process.start()
  for process in processes:
    process.join(60)
  assert [process.exitcode for process in processes] == [0, 0, 0]


FULL = """
import resource, sys
import tests.data.test_cache as t
from gptjax.data import cache
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
cache.open_or_build(t.source_of(sys.argv[1]), t.BYTES, sys.argv[2])
"""


def test_a_full_disk_is_named_and_leaves_nothing(corpus, tmp_path):
  command = [sys.executable, "-c", FULL, str(corpus), str(tmp_path / "cache")]
  result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert f"UserError: {tmp_path / 'cache'}" in result.stderr
  assert "Set --config.data.cache_dir=" in result.stderr
  assert not list((tmp_path / "cache" / "tokens").glob("*/"))


def test_a_folder_that_cannot_be_made_is_named(corpus, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"file/cache.*cannot keep .*--config\.data\.cache_dir="):
    cache.open_or_build(source_of(corpus), BYTES, str(tmp_path / "file" / "cache"))


def test_default_folder_is_that_of_the_user(corpus, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  cache.open_or_build(source_of(corpus), BYTES, "")
  (meta,) = (tmp_path / "xdg" / "gptjax" / "tokens").glob("*/meta.json")
  assert json.loads(meta.read_text())["num_documents"] == len(DOCUMENTS)


def test_progress_goes_to_stderr_and_only_if_wanted(corpus, tmp_path, capfd):
  cache.open_or_build(source_of(corpus), BYTES, str(tmp_path / "one"))
  assert "Tokenising" not in "".join(capfd.readouterr())
  cache.open_or_build(source_of(corpus), BYTES, str(tmp_path / "two"), progress=True)
  output = capfd.readouterr()
  assert "Tokenising" in output.err
  assert not output.out
