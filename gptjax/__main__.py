"""All commands by one name.

    gptjax train --config=pretrain.py:model=tiny,data=text --config.data.path=PATH --workdir=DIR
    gptjax generate --checkpoint=DIR --prompt="Once upon a time"
    gptjax models

`gptjax NAME ...` is `python -m gptjax.NAME ...`, and `gptjax NAME --help` says how it is used. The
words models, data, optimizers, meshes, adapters and tasks list the presets that --config takes.
"""

import ast
import importlib
import runpy
import signal
import sys
from pathlib import Path

from gptjax.errors import did_you_mean

_PACKAGE = Path(__file__).parent
# Word that lists presets -> (module, name of the table in it).
_PRESETS = {
  "models": ("gptjax.presets.parts.models", "MODELS"),
  "data": ("gptjax.presets.parts.data", "DATA"),
  "optimizers": ("gptjax.presets.parts.optim", "OPTIMIZERS"),
  "meshes": ("gptjax.presets.parts.mesh", "MESHES"),
  "adapters": ("gptjax.presets.parts.peft", "PEFT"),
  "tasks": ("gptjax.objectives.task", "TASKS"),
}
# How a command ends, and no module beside the commands.
_RUNS = '\nif __name__ == "__main__":\n'


def commands() -> dict[str, str]:
  """{name: the first sentence of its help}, without importing any."""
  found = {}
  for path in sorted(_PACKAGE.glob("[a-z]*.py")):
    if _RUNS in (code := path.read_text(encoding="utf-8")):
      found[path.stem] = ast.get_docstring(ast.parse(code)).split("\n")[0]
  return found


def main() -> None:
  """Runs a command, or lists presets."""
  name, *arguments = sys.argv[1:] or ["--help"]
  known = commands()
  if name in known:
    sys.argv = [f"gptjax {name}", *arguments]
    runpy.run_module(f"gptjax.{name}", run_name="__main__", alter_sys=False)
    return
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # A list may be cut short, as by `| head`.
  if name in _PRESETS:
    module, table = _PRESETS[name]
    print("\n".join(getattr(importlib.import_module(module), table)))
  elif name in ("--help", "-h", "help"):
    print(__doc__)
    width = max(map(len, known))
    print("\n".join(f"  {one:<{width}}  {sentence}" for one, sentence in known.items()))
  else:
    sys.exit(f"error: no command {name!r}. {did_you_mean(name, [*known, *_PRESETS])}")


if __name__ == "__main__":
  main()
