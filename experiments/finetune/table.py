"""Tables of what `run.py` and `baselines.py` measured.

    python -m experiments.finetune.table --runs=runs/finetune

prints Markdown, and keeps every run's figures and its command in experiments/finetune/results.jsonl
and commands.txt, where $DATA has the folders that `python -m experiments.datasets NAME` prints and
$RUNS is that of the runs.
"""

import collections
import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments.finetune.tasks import FULL, LORA, TASKS, Task
from gptjax.devices.hosts import cache_root

FOLDER = Path(__file__).parent
FLAGS = flags.FLAGS

# Of the training program, from its start to its end.
COSTS = {"seconds": "seconds", "processor_seconds": "of a processor", "peak_mib": "peak MiB"}

Results = dict[tuple[str, str], list[dict[str, Any]]]


def group(results: Sequence[dict[str, Any]]) -> Results:
  """(task, method) -> its seeds."""
  groups = collections.defaultdict(list)
  for result in results:
    groups[result["task"], result["method"]].append(result)
  return dict(groups)


def spread(values: Sequence[float], digits: int = 3) -> str:
  """The mean, and with several seeds the standard deviation of a sample."""
  mean = f"{np.mean(values):.{digits}f}"
  return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def row(cells: Sequence[Any]) -> str:
  return f"| {' | '.join(map(str, cells))} |"


def results_table(name: str, results: Results) -> list[str]:
  """The methods of a task, with the steps of `steps.py` where it has them."""
  metrics = TASKS[name].metrics or ("val/loss",)
  ratios = step_ratios() if name == "peft" else {}
  cost = ["seeds", "trained", "share", *COSTS.values(), *(["a step"] if ratios else [])]
  heads = ["", *(metric.removeprefix("val/").replace("_", " ") for metric in metrics), *cost]
  lines = [row(heads), row(["---"] * len(heads))]
  for method in methods_of(TASKS[name]):
    if (name, method) not in results:
      continue
    runs = results[name, method]
    cells = [spread([value_of(run, metric) for run in runs]) for metric in metrics]
    cells += [str(len(runs)), *([""] * 2)]
    if "trained" in runs[0]:
      trained, parameters = runs[0]["trained"], runs[0]["parameters"]
      cells[-2:] = [f"{trained:,}", f"{trained / parameters:.2%}"]
    for key in COSTS:
      known = [run[key] for run in runs if key in run]
      cells.append(spread(known, 0) if known else "")
    lines.append(row([method, *cells, *([ratios.get(method, "")] if ratios else [])]))
  return lines


def step_ratios() -> dict[str, str]:
  """The time of a step of each method of `peft`, relative to LoRA's."""
  path = FOLDER / "steps.csv"
  if not path.exists():
    return {}
  with path.open(newline="") as file:
    found = {one["method"]: f"{float(one['ratio']):.2f}" for one in csv.DictReader(file)}
  return {LORA: "1.00", **found}


def value_of(run: dict[str, Any], metric: str) -> float:
  """The value on the test set; of validation alone, at its best after the start."""
  if metric in run.get("test", {}):
    return run["test"][metric]["value"]
  return min(line[metric] for line in run["validations"] if line["step"])


def summary(results: Results) -> list[str]:
  """One row a task that has test examples, with its first metric."""
  heads = ["", "measure", "naive", "TF-IDF", "0 shots", "few shots", LORA, FULL]
  lines = [row(heads), row(["---"] * len(heads))]
  for name, task in TASKS.items():
    if not task.test or not any(of == name for of, _ in results):
      continue
    metric = task.metrics[0]
    known = [one["measures"][metric]["value"] for one in baselines_of(task.data)]
    # The first looks at no text, the last at all of the training examples.
    cells = [f"{value:.3f}" for value in known[:1] + known[1:][-1:]]
    cells += [""] * (2 - len(cells))
    few = [f"{shots} shots" for shots in task.prompted if shots]
    for method in ("0 shots", *(few or ["few shots"]), LORA, FULL):
      runs = results.get((name, method), [])
      cells.append(spread([value_of(run, metric) for run in runs]) if runs else "")
    lines.append(row([name, metric.replace("_", " "), *cells]))
  return lines


def baselines_of(data: str) -> list[dict[str, Any]]:
  found = json.loads((FOLDER / "baselines.json").read_text())
  return [one for one in found if one["data"] == data]


def baselines_table(data: str) -> list[str]:
  lines = [row(["baseline", "trained on", "chosen", "test"]), row(["---"] * 4)]
  for one in baselines_of(data):
    measured = ", ".join(
      f"{name.replace('_', ' ')} {m['value']:.3f}" for name, m in one["measures"].items()
    )
    lines.append(row([one["baseline"], f"{one['trained_on']:,}", one["chosen"], measured]))
  return lines


def place(run: dict[str, Any]) -> tuple[int, int, int]:
  """The place in the order of tasks.py."""
  methods = methods_of(TASKS[run["task"]])
  return [*TASKS].index(run["task"]), methods.index(run["method"]), run["seed"]


def methods_of(task: Task) -> list[str]:
  """The methods of a task; those without training come first."""
  return [*(f"{shots} shots" for shots in task.prompted), *task.methods]


def quote(argument: str) -> str:
  """Quotes for a shell, in which $DATA and $RUNS still are what they are."""
  return f'"{argument}"' if re.search(r"[^\w$=:,./-]", argument) else argument


def main(_: list[str]) -> None:
  text = (Path(FLAGS.runs) / "results.jsonl").read_text()
  # Where they lie on the machine that it ran on is no result.
  for folder, name in ((cache_root() / "datasets", "$DATA"), (FLAGS.runs, "$RUNS")):
    text = text.replace(str(folder), name)
  found = sorted(map(json.loads, text.splitlines()), key=place)
  commands = [" ".join(map(quote, one.pop("command"))) for one in found]
  (FOLDER / "commands.txt").write_text("".join(f"{command}\n" for command in commands))
  (FOLDER / "results.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in found))
  results = group(found)
  print("\n".join(summary(results)))
  for name, task in TASKS.items():
    if not any(of == name for of, _ in results):
      continue
    print(f"\n### {name}: {task.model} on {task.data}\n")
    print("\n".join(baselines_table(task.data)), end="\n\n")
    print("\n".join(results_table(name, results)))


if __name__ == "__main__":
  flags.DEFINE_string("runs", "runs/finetune", "The folder that run.py wrote to.")
  app.run(main)
