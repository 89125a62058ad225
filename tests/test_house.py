"""The size of the house, and that imports run one way."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "gptjax").rglob("*.py"))


def lines(path: Path) -> int:
  return len(path.read_text().splitlines())


def module(path: Path) -> str:
  name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
  return name.removesuffix(".__init__")


def imports(path: Path) -> set[str]:
  """The modules of the package that a file imports, at its top or inside."""
  modules = {module(file) for file in FILES}
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    elif isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
  return found & modules - {"gptjax", module(path)}


def test_budgets():
  assert lines(ROOT / "gptjax/training/loop.py") <= 400
  assert {path.name: lines(path) for path in FILES if lines(path) > 600} == {}
  assert sum(map(lines, FILES)) <= 25_000


def test_no_import_runs_back_up():
  # Raises CycleError, which names the modules, if two files need each other.
  tuple(graphlib.TopologicalSorter({module(f): imports(f) for f in FILES}).static_order())


def test_the_model_and_the_data_know_nothing_of_each_other():
  for path in FILES:
    foreign = {
      "model": ("gptjax.data", "gptjax.optim.optimizer"),
      "data": ("gptjax.model", "gptjax.optim.optimizer"),
    }
    for other in foreign.get(path.parent.name, ()):
      assert not [name for name in imports(path) if name.startswith(other)], path
