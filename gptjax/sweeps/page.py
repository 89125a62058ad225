"""A report that people read: Markdown with its pictures beside it, and one page of HTML."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;display:block;overflow-x:auto}img{max-width:100%}
th,td{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}
p{white-space:pre-line}strong{font-size:1.2rem}"""


class Page:
  """A report that grows as Markdown, with its pictures beside it, and as one page of HTML."""

  def __init__(self, workdir: Path, title: str):
    self._workdir, self._title = workdir, title
    self._markdown: list[str] = []
    self._html: list[str] = []
    self.text(title, "h1")

  def text(self, text: str, tag: str = "p") -> None:
    before, after = {"h1": ("# ", ""), "h2": ("## ", ""), "strong": ("**", "**")}.get(tag, ("", ""))
    self._markdown.append(f"{before}{text}{after}")
    self._html.append(f"<{tag}>{html.escape(text)}</{tag}>")

  def table(self, header: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    lines = [
      f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in row)} |"
      for row in (header, ["---"] * len(header), *cells)
    ]
    self._markdown.append("\n".join(lines))
    tagged = [("th", header), *(("td", row) for row in cells)]
    body = ["".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in row) for tag, row in tagged]
    self._html.append(f"<table><tr>{'</tr><tr>'.join(body)}</tr></table>")

  def image(self, name: str, alt: str, png: bytes) -> None:
    (self._workdir / name).write_bytes(png)
    data = base64.b64encode(png).decode()
    self._markdown.append(f"![{alt}]({name})")
    self._html.append(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">')

  def write(self) -> None:
    """Writes report.md and report.html, and prints the former."""
    markdown = "\n\n".join(filter(None, self._markdown)) + "\n"
    (self._workdir / "report.md").write_text(markdown)
    head = f"<meta charset=utf-8><title>{html.escape(self._title)}</title><style>{_STYLE}</style>"
    page = f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(self._html)}</body>"
    (self._workdir / "report.html").write_text(page + "</html>\n")
    print(markdown)
