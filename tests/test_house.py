"""The size of the house: the spine, each wing, each file, each command."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gptjax"
FILES = sorted(PACKAGE.rglob("*.py"))

# What a newcomer reads in a day to know how a model is trained.
SPINE = (
  *("config.py", "errors.py", "tree.py", "small_files.py", "upgrades.py", "wings.py"),
  *("data", "devices", "model", "objectives", "optim", "training"),
)
# A capability each; who may import whom is in pyproject.toml, and `make lint` checks it.
WINGS = (
  *("alignment", "compiler", "compression", "cpu", "diagnosis", "evals", "finetuning", "gguf"),
  *("inference", "interop", "peft", "quantization", "scores", "serving", "sweeps", "templates"),
)
COMMANDS = (
  *("chat", "compile", "compress", "convert", "diagnose", "evaluate"),
  *("generate", "predict", "serve", "show", "sweep", "train"),
)


def lines(*paths: Path) -> int:
  return sum(len(path.read_text().splitlines()) for path in paths)


def files_of(room: str) -> list[Path]:
  path = PACKAGE / room
  return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def test_the_spine_can_be_read_in_a_day():
  assert sum(lines(*files_of(room)) for room in SPINE) <= 12_000


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_can_be_read_in_an_hour_or_two(wing):
  assert lines(*files_of(wing)) <= 3_000


def test_files_and_commands_are_short():
  assert {path.name: lines(path) for path in FILES if lines(path) > 600} == {}
  commands = [PACKAGE / f"{name}.py" for name in COMMANDS]
  assert {path.name: lines(path) for path in commands if lines(path) > 150} == {}


def test_every_room_is_the_spine_or_a_wing_or_a_command():
  rooms = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
  known = {
    *SPINE,
    *WINGS,
    *(f"{name}.py" for name in COMMANDS),
    "__init__.py",
    "__main__.py",
    "presets",
  }
  assert rooms <= known
