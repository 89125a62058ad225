"""A report that people read: Markdown with its pictures beside it, and one page of HTML."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from gptjax.sweeps import plots

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;display:block;overflow-x:auto}img{max-width:100%}
th,td{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}
p{white-space:pre-line}strong{font-size:1.2rem}"""


class Page:
  """A report that grows as Markdown; `write` makes the page of HTML from it."""

  def __init__(self, workdir: Path, title: str):
    self._workdir, self._title = workdir, title
    self._parts: list[str] = []
    self._pictures: dict[str, bytes] = {}
    self.text(f"# {title}")

  def text(self, text: str) -> None:
    self._parts.append(text)

  def heading(self, text: str) -> None:
    self.text(f"## {text}")

  def bold(self, text: str) -> None:
    self.text(f"**{text}**")

  def table(self, header: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    rows = (header, ["---"] * len(header), *cells)
    clean = [[cell.replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    self.text("\n".join(f"| {' | '.join(row)} |" for row in clean))

  def image(self, name: str, alt: str, figure: Figure) -> None:
    self._pictures[name] = plots.png(figure)
    self.text(f"![{alt}]({name})")

  def write(self) -> None:
    """Writes report.md, its pictures and report.html, and prints the first."""
    markdown = "\n\n".join(filter(None, self._parts)) + "\n"
    (self._workdir / "report.md").write_text(markdown)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    for name, png in self._pictures.items():
      (self._workdir / name).write_bytes(png)
      data = base64.b64encode(png).decode()
      body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{data}"')
    head = f"<meta charset=utf-8><title>{html.escape(self._title)}</title><style>{_STYLE}</style>"
    page = f"<!doctype html><html lang=en><head>{head}</head><body>{body}</body></html>\n"
    (self._workdir / "report.html").write_text(page)
    print(markdown)
