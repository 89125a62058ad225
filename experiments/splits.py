"""Examples of a recipe, without duplicates, as train, validation and test files and their card."""

import collections
import dataclasses
import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.packages import Package
from gptjax.errors import UserError

SPLITS = ("train", "validation", "test")


class Example(NamedTuple):
  """A record and what it may not be parted from: all examples of a group are in one split. A name
  of SPLITS is itself a group, for a set whose order or makers decide."""

  group: str
  record: Mapping[str, Any]


class LeftOut(NamedTuple):
  """An example that is not taken; the card counts the reasons."""

  reason: str


def letters(text: str) -> str:
  """A key that is equal for texts that differ only in case, spaces or punctuation."""
  return re.sub(r"\W+", "", text).casefold() or text


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a set is made.

  what, split, notes, licence: of the card. examples: of the files of all packages, content by path.
  unique: keys whose values are in one record alone; values are equal if `same` of them are.
  """

  what: str
  packages: tuple[Package, ...]
  licence: str
  examples: Callable[[Mapping[str, bytes]], Iterable[Example | LeftOut]]
  unique: tuple[str, ...]
  split: str
  notes: str = ""
  same: Callable[[str], str] = letters

  @property
  def version(self) -> str:
    return self.packages[0].version if self.packages else platform.python_version()


def write(name: str, recipe: Recipe, files: Mapping[str, bytes], folder: Path) -> None:
  """Writes train.jsonl, validation.jsonl, test.jsonl and CARD.md.

  Of equal examples the first is kept; none is, if their labels differ. Groups go by the order of
  their hashes to test and validation, until each has a tenth of the examples, and then to train.

  Raises:
    UserError: a split is empty.
  """
  found = list(recipe.examples(files))
  reasons = collections.Counter(one.reason for one in found if isinstance(one, LeftOut))
  examples = [one for one in found if isinstance(one, Example)]
  splits = {split: [] for split in SPLITS}
  distinct = _distinct(examples, recipe)
  split_of = _split_of_groups(distinct)
  for example in distinct:
    splits[split_of[example.group]].append(example.record)
  for split, records in splits.items():
    if not records:
      raise UserError(f"{name}: no example of {len(examples)} is in the split {split!r}.")
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
  card = _card(name, recipe, len(examples), splits, reasons)
  (folder / "CARD.md").write_text(card, encoding="utf-8")


def _split_of_groups(examples: Iterable[Example]) -> dict[str, str]:
  """Groups differ in size, so it is not the hashes alone that decide but their order."""
  sizes = collections.Counter(example.group for example in examples)
  splits, before = {}, 0
  for group in sorted(sizes, key=lambda group: hashlib.sha256(group.encode()).digest()):
    tenth = 10 * before // sizes.total()
    splits[group] = {0: "test", 1: "validation"}.get(tenth, "train")
    before += sizes[group]
  return splits | {split: split for split in SPLITS}


def _distinct(examples: Iterable[Example], recipe: Recipe) -> list[Example]:
  def keys(record):
    return [(key, recipe.same("".join(record[key]))) for key in recipe.unique]

  labels = collections.defaultdict(set)
  for _, record in examples:
    for key in keys(record):
      labels[key].add(record.get("label"))
  seen = {key for key, found in labels.items() if len(found) > 1}
  kept = []
  for example in examples:
    its_keys = keys(example.record)
    if seen.isdisjoint(its_keys):
      kept.append(example)
      seen.update(its_keys)
  return kept


def _labels(record: Mapping[str, Any]) -> list[str]:
  """The label, or the kinds of the entities."""
  if "label" in record:
    return [record["label"]]
  return [tag.removeprefix("B-") for tag in record.get("tags", ()) if tag.startswith("B-")]


def _card(
  name: str,
  recipe: Recipe,
  before: int,
  splits: Mapping[str, list[Mapping[str, Any]]],
  reasons: Mapping[str, int],
) -> str:
  counts = {
    split: collections.Counter(label for record in records for label in _labels(record))
    for split, records in splits.items()
  }
  labels = sorted(set().union(*counts.values()))
  rows = [("split", "examples", *labels), ("---",) * (2 + len(labels))]
  rows += [
    (split, len(records), *(counts[split][label] for label in labels))
    for split, records in splits.items()
  ]
  table = "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
  sources = "\n".join(f"- {one.name} {one.version}, sha256 {one.sha256}" for one in recipe.packages)
  left_out = "; ".join(f"{reason} ({count})" for reason, count in sorted(reasons.items()))
  notes = f"\n- {recipe.notes}" if recipe.notes else ""
  after = sum(map(len, splits.values()))
  return f"""# {name}

{recipe.what}

{sources or f"- The standard library of Python {recipe.version}, which made this."}
- Licence: {recipe.licence}
- Examples: {before}; {after} of them without duplicates, and without texts of several labels.
- Split: {recipe.split}
- Left out: {left_out or "nothing"}.{notes}

{table}
"""
