import json
import sys
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds

from gptjax.data import sources
from gptjax.data.options import PartOptions
from gptjax.errors import UserError
from gptjax.presets.parts import data as presets


class Texts:
  """Documents in memory."""

  def __init__(self, texts):
    self._texts = texts

  def __len__(self):
    return len(self._texts)

  def __getitem__(self, index):
    return self._texts[index]

  def name(self, index):
    return f"memory:{index}"

  def sizes(self):
    return np.array([len(text.encode()) for text in self._texts], np.int64)

  def fingerprint(self):
    return str(hash(tuple(self._texts)))


def read(source):
  return list(sources.documents(source))


def options(preset, **changes):
  return PartOptions("data", **(presets.PART_DEFAULTS | presets.DATA[preset] | changes))


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_split_is_disjoint_whole_and_near_the_fraction_of_bytes(fraction):
  texts = [f"{number} " + "x" * (number % 97) for number in range(1000)]
  train, validation = sources.split(Texts(texts), fraction, seed=0)
  assert sorted(read(train) + read(validation)) == sorted(texts)
  assert validation.sizes().sum() == pytest.approx(fraction * Texts(texts).sizes().sum(), rel=0.02)
  again = sources.split(Texts(texts), fraction, seed=0)
  assert [s.fingerprint() for s in again] == [train.fingerprint(), validation.fingerprint()]
  other = sources.split(Texts(texts), fraction, seed=1)
  assert other[1].fingerprint() != validation.fingerprint()


@pytest.mark.parametrize("fraction", [1e-6, 0.999999])
def test_both_sides_of_a_split_get_a_document(fraction):
  train, validation = sources.split(Texts(["a", "b"]), fraction, seed=0)
  assert sorted(read(train) + read(validation)) == ["a", "b"]
  assert len(train) == len(validation) == 1


def test_a_single_document_is_cut_at_the_nearest_line():
  lines = [f"line {number}\n" for number in range(100)]
  train, validation = sources.split(Texts(["".join(lines)]), 0.1, seed=0)
  assert train[0] + validation[0] == "".join(lines)
  assert validation[0].startswith("line 9")
  assert len(validation[0]) == pytest.approx(0.1 * len("".join(lines)), abs=8)
  assert train.fingerprint() != validation.fingerprint()


@pytest.mark.parametrize("text", ["ab", "one line only", "\n\n", "end\n"])
@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_a_single_line_is_cut_all_the_same(text, fraction):
  train, validation = sources.split(Texts([text]), fraction, seed=0)
  assert train[0]
  assert validation[0]
  assert train[0] + validation[0] == text


def test_a_single_character_cannot_be_split():
  with pytest.raises(UserError, match="memory:0: too short to split"):
    sources.split(Texts(["a"]), 0.5, seed=0)


def test_validation_may_be_files_of_its_own(tmp_path):
  (tmp_path / "train.txt").write_text("train")
  (tmp_path / "valid.txt").write_text("valid")
  train, validation = sources.open_pair(
    options("text", path=f"{tmp_path}/train.txt", validation_path=f"{tmp_path}/valid.txt")
  )
  assert (read(train), read(validation)) == (["train"], ["valid"])


def test_an_empty_corpus_is_named(tmp_path):
  (tmp_path / "a.jsonl").write_text("")
  with pytest.raises(UserError, match=r"a\.jsonl: no documents"):
    sources.open_pair(options("jsonl", path=f"{tmp_path}/a.jsonl"))


class TwoSplits(tfds.core.GeneratorBasedBuilder):
  """A dataset of our own, in the two splits that TFDS users expect."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": np.int64})
    )

  def _split_generators(self, manager):
    return {"train": self._generate_examples(30), "test": self._generate_examples(5)}

  def _generate_examples(self, count):
    for number in range(count):
      yield number, {"text": f"{count} 漢字 {number}", "n": number}


def test_tfds_reads_a_prepared_set_without_tensorflow(tmp_path):
  builder = TwoSplits(data_dir=tmp_path, file_format="array_record")
  builder.download_and_prepare()
  part = options("tfds", path="two_splits", validation_split="test", tfds_data_dir=str(tmp_path))
  train, validation = sources.open_pair(part)
  assert sorted(read(train)) == sorted(f"30 漢字 {number}" for number in range(30))
  assert train[3] == train[3]
  assert len(validation) == 5
  assert train.fingerprint() != validation.fingerprint()
  half = sources.open_tfds("two_splits", "train[:50%]", "text", str(tmp_path))
  assert len(half) == 15
  with pytest.raises(UserError, match=r"no key 'txt' \(found: .*'text'"):
    sources.open_tfds("two_splits", "train", "txt", str(tmp_path))
  with pytest.raises(UserError, match="split 'dev'"):
    sources.open_tfds("two_splits", "dev", "text", str(tmp_path))
  assert "tensorflow" not in sys.modules


def test_an_unknown_tfds_name_gets_a_suggestion():
  with pytest.raises(UserError, match=r"'tiny_shakespear' .* Did you mean 'tiny_shakespeare'"):
    sources.open_tfds("tiny_shakespear", "train", "text", "")


@pytest.mark.parametrize("preset", ["tiny_shakespeare", "lm1b"])
def test_tfds_presets_open_on_mock_data(preset):
  with tfds.testing.mock_data(num_examples=7):
    train, validation = sources.open_pair(options(preset))
    assert read(train)
    assert read(validation)
    assert all(isinstance(text, str) for text in read(train))


def fake_datasets(rows, column="text"):
  """Stands in for the part of `datasets` that we call."""

  class Records(list):
    column_names: tuple = (column, "url")
    _fingerprint = "abc"

    def select_columns(self, names):
      return Records({name: row[name] for name in names} for row in self)

  calls = []

  def load_dataset(name, config, split):
    calls.append((name, config, split))
    if name == "missing":
      raise FileNotFoundError("Dataset 'missing' doesn't exist on the Hub")
    return Records({column: f"{split} {row}", "url": ""} for row in range(rows))

  return types.SimpleNamespace(load_dataset=load_dataset, calls=calls)


@pytest.mark.parametrize("preset", ["fineweb", "c4", "wikipedia", "openwebtext"])
def test_hf_presets_against_a_fake_of_the_library(monkeypatch, preset):
  fake = fake_datasets(100)
  monkeypatch.setitem(sys.modules, "datasets", fake)
  train, validation = sources.open_pair(options(preset))
  name, _, config = presets.DATA[preset]["path"].partition(":")
  assert fake.calls[0] == (name, config or None, "train")
  assert read(train)
  assert read(validation)


def test_a_record_of_hf_can_be_a_document(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", fake_datasets(1))
  (record,) = read(sources.open_hf("x", "train", ""))
  assert json.loads(record) == {"text": "train 0", "url": ""}


def test_hf_errors_against_a_fake_of_the_library(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", fake_datasets(1))
  with pytest.raises(UserError, match="Hugging Face 'missing', split 'train': Dataset 'missing'"):
    sources.open_hf("missing", "train", "text")
  with pytest.raises(UserError, match=r"no key 'body' \(found: 'text', 'url'\)"):
    sources.open_hf("x", "train", "body")


def test_hf_without_the_library_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(UserError, match=r"pip install datasets"):
    sources.open_hf("x", "train", "text")


@pytest.mark.parametrize("source", ["tfds", "hf"])
def test_skipping_is_refused_by_sources_that_skip_nothing(source):
  part = options("text", source=source, path="name", undecodable="skip")
  with pytest.raises(UserError, match=r"name: data\.undecodable=skip is for text and jsonl"):
    sources.open_pair(part)
