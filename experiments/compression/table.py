"""The tables of README.md and the pictures, of what `quantize.py` has measured.

python -m experiments.compression.table smollm2 quickstart
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

HERE = Path(__file__).parent
TEXTS = {"english": "English", "code": "code"}


def table(told: Mapping[str, Any]) -> str:
  """Markdown: a row for each way."""
  results, machine = told["results"], told["machine"]
  texts = [name for name in TEXTS if name in results[0]["quality"]]
  whole = results[0]
  heads = ["way", "MiB", "resident MiB"]
  for name in texts:
    heads += [f"perplexity, {TEXTS[name]}", "over float32", "KL", "same top-1"]
  heads += ["right of 4", "tokens/s, 1 row", "over float32", "8 rows", "over float32", "seconds"]
  lines = [heads, ["---"] * len(heads)]
  for result in results:
    cells = [result["name"], f"{result['bytes'] / 2**20:.1f}", f"{result['resident'] / 2**20:.0f}"]
    for name in texts:
      quality = result["quality"][name]
      cells += [
        f"{quality['perplexity']['value']:.3f}",
        _with_interval(quality["ratio"]),
        f"{quality['kl']['value']:.4f}",
        f"{quality['agreement']['value']:.3f}",
      ]
    cells.append(_with_interval(result["accuracy"]))
    for rows in ("1", "8"):
      median, ratio, least = result["speed"][rows]
      cells += [f"{median:.1f}", f"{ratio:.2f} (least {least:.2f})"]
    cells.append(f"{result['seconds']:.0f}")
    lines.append(cells)
  text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
  won = [
    f"- {line}" for group in _groups(results) for name in texts for line in _won(group, name, whole)
  ]
  told_cache = _caches(told["caches"], texts)
  head = (
    f"{machine['date']}, {machine['threads']} threads on {machine['cpu']}, load average before "
    f"{machine['load_before']}."
  )
  return "\n".join([head, "", text, "", *won, *told_cache, ""])


def _with_interval(metric: Mapping[str, float]) -> str:
  return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"


def _groups(results: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
  """Results of one format by all methods, rounding to the nearest first."""
  groups: dict[str, list[Mapping[str, Any]]] = {}
  for result in results:
    groups.setdefault(result["name"].rpartition(", ")[0], []).append(result)
  return [group for group in groups.values() if len(group) > 1]


def _won(group: Sequence[Mapping[str, Any]], text: str, whole: Mapping[str, Any]) -> list[str]:
  """How much of the loss of rounding to the nearest each method wins back, in log perplexity."""
  original = math.log(whole["quality"][text]["perplexity"]["value"])
  losses = [math.log(one["quality"][text]["perplexity"]["value"]) - original for one in group]
  lines = []
  for one, loss in zip(group[1:], losses[1:], strict=True):
    share = 1 - loss / losses[0]
    lines.append(f"{one['name']}, {TEXTS[text]}: wins back {share:.0%} of what rounding loses")
  return lines


def _caches(caches: Mapping[str, Any], texts: Sequence[str]) -> list[str]:
  lines = []
  for cache in ("int8", "int4"):
    changes = []
    for name in texts:
      change = math.exp(caches[cache][name] - caches["None"][name]) - 1
      changes.append(f"{TEXTS[name]} {change:+.3%}")
    lines.append(f"- cache in {cache}, change of perplexity: {', '.join(changes)}")
  return lines


def draw(told: Mapping[str, Any], path: Path) -> None:
  """Quality against size, and against speed."""
  results = told["results"]
  text = next(name for name in TEXTS if name in results[0]["quality"])
  figure = Figure(figsize=(11, 4.5), layout="constrained")
  by_size, by_speed = figure.subplots(1, 2, sharey=True)
  for result in results:
    loss = (result["quality"][text]["ratio"]["value"] - 1) * 100
    for axes, x in ((by_size, result["bytes"] / 2**20), (by_speed, result["speed"]["1"][0])):
      axes.plot(x, max(loss, 0.05), "o")
      axes.annotate(result["name"], (x, max(loss, 0.05)), fontsize=6, xytext=(3, 3),
                    textcoords="offset points")  # fmt: skip
      axes.set_yscale("log")
  by_size.set_ylabel(f"perplexity above float32, %, {TEXTS[text]}")
  by_size.set_xlabel("parameters, MiB")
  by_speed.set_xlabel("tokens a second, one row")
  figure.savefig(path, dpi=120)


def main(names: Sequence[str]) -> None:
  readme = HERE / "README.md"
  for name in names:
    told = json.loads((HERE / f"{name}.json").read_text())
    part = re.compile(rf"(?<=<!-- {name} -->\n).*(?=<!-- end of {name} -->)", re.DOTALL)
    made = table(told)
    readme.write_text(part.sub(lambda _, made=made: made, readme.read_text()))
    draw(told, HERE / f"{name}.png")


if __name__ == "__main__":
  main(sys.argv[1:])
