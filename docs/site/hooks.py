"""The site mirrors the repository, so that one relative link works in both.

Pages are the README, docs/ and the reports of experiments/ and colab/. Any other file that a page
links to is copied as it is, but for Python modules of gptjax: a link to one leads to its place in
the API reference, which is made here, one page for each folder of the package.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gptjax"
SPINE = ("devices", "model", "data", "objectives", "optim", "training")
# What a link in Markdown leads to, without addresses of other sites and anchors.
_LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)\)")


def on_files(files: Files, config) -> Files:
  """Replaces the files of docs/ by those of the site."""
  theirs = [file for file in files if Path(file.src_dir) != Path(config.docs_dir)]
  pages = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "colab/README.md",
    *sorted(ROOT.glob("experiments/**/*.md")),
  ]
  css = [ROOT / "docs/site/extra.css"]
  paths = dict.fromkeys([*pages, *css, *_linked_files(pages)])
  ours = [
    File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)
    for path in paths
  ]
  reference = dict(_reference())
  generated = [File.generated(config, path, content=text) for path, text in reference.items()]
  reports = [_name(page) for page in pages if "experiments" in page.parts]
  config.nav += [
    {"Experiments": [{_title(report): report} for report in reports]},
    {"Reference": [{"Overview": "docs/reference.md"}, *reference]},
  ]
  return Files([*theirs, *ours, *generated])


def on_page_markdown(markdown: str, page, config, files) -> str:
  """Leads links to Python modules of gptjax to the reference."""
  del config, files

  def lead(link: re.Match) -> str:
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link[2]))
    if target == "gptjax" or not target.startswith("gptjax/"):
      return link[0]
    module = target.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"[{link[1]}][{module}]"

  return _LINK.sub(lead, markdown)


def _name(path: Path) -> str:
  return path.relative_to(ROOT).as_posix()


def _title(report: str) -> str:
  """The folder of a report, and its file's name where that is not README."""
  path = Path(report)
  folder = path.parent.name.replace("_", " ")
  return folder if path.stem == "README" else f"{folder}: {path.stem}"


def _linked_files(pages: list[Path]) -> Iterator[Path]:
  """Files that pages link to, beside each other and the package."""
  for page in pages:
    for _, target in _LINK.findall(page.read_text()):
      path = (page.parent / target).resolve()
      if path.is_file() and path.suffix != ".md" and PACKAGE not in path.parents:
        yield path


def _reference() -> Iterator[tuple[str, str]]:
  """Yields the path and the text of each page of the reference."""
  folders = [path.parent for path in sorted(PACKAGE.glob("*/__init__.py"))]
  # gptjax/presets is a link to configs/, whose files are shown as they are.
  wings = [path.name for path in folders if path.name not in SPINE and not path.is_symlink()]
  yield "reference/commands.md", "# Commands and the config\n\n" + _sections(PACKAGE.glob("*.py"))
  for folder in (*SPINE, *wings):
    kind = "spine" if folder in SPINE else "wing"
    modules = (PACKAGE / folder).rglob("*.py")
    yield f"reference/{folder}.md", f"# {folder} ({kind})\n\n{_sections(modules)}"


def _sections(modules) -> str:
  """Asks mkdocstrings for each module, a package before what is in it."""
  names = [path.relative_to(ROOT).with_suffix("").as_posix() for path in modules]
  names = sorted(name.removesuffix("/__init__").replace("/", ".") for name in names)
  return "\n\n".join(f"::: {name}" + _own_members(name) for name in names)


def _own_members(name: str) -> str:
  """A package is shown by its docstring: its modules follow."""
  is_package = (ROOT / name.replace(".", "/")).is_dir()
  return "\n    options:\n      members: false" if is_package else ""
