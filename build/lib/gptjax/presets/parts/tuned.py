"""Layouts that `python -m gptjax.compile --search --write=configs/parts/tuned/NAME.json` found.

Each file is {config key: value}; `--config=configs/pretrain.py:model=...,tuned=NAME` applies it.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "tuned"


def names() -> list[str]:
  return sorted(path.stem for path in FOLDER.glob("*.json"))


def get(name: str) -> dict[str, Any]:
  """The overrides of a layout; none of 'none'."""
  return {} if name == "none" else json.loads((FOLDER / f"{name}.json").read_text())
