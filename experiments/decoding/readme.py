"""Parts of a README.md that scripts write: between `<!-- NAME -->` and `<!-- end of NAME -->`."""

import re
from pathlib import Path

HERE = Path(__file__).parent
NOT_MEASURED = "not measured"


def write_part(name: str, text: str, folder: Path = HERE) -> None:
  readme = folder / "README.md"
  part = re.compile(rf"(?<=<!-- {name} -->\n).*(?=<!-- end of {name} -->)", re.DOTALL)
  readme.write_text(part.sub(lambda _: text, readme.read_text()))
