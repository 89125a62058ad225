"""Fine-tunes and judges: each task, method and seed of tasks.py in processes of their own.

    python -m experiments.finetune.run --runs=runs/finetune [--only=sentiment_en,peft/lora]

Chinese needs `chinese_bert.py` run before, into RUNS/chinese_bert. What is in RUNS/results.jsonl
is not run again. `python -m experiments.finetune.table` makes tables of it.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.datasets import fetch
from experiments.finetune.tasks import (
  CHINESE,
  FULL,
  MINILM,
  NOTHING,
  SMOLLM2,
  TASKS,
  TESTS,
  Task,
)
from gptjax.training.metrics import read_metrics

FLAGS = flags.FLAGS
SEEDS = (0, 1, 2)


def checkpoint_of(model: str) -> str:
  match model:
    case "smollm2":
      (weights,) = fetch(SMOLLM2).glob("*.gguf")
      return f"gguf:{weights}"
    case "minilm":
      return f"hf:{fetch(MINILM)}"
  return str(Path(FLAGS.runs) / CHINESE)


def training_config(task: Task, method: str, seed: int) -> tuple[str, dict[str, Any]]:
  """(--config, its overrides) of gptjax.train."""
  data = fetch(task.data)
  overrides = {
    "data.path": data / "train.jsonl",
    "data.validation_path": data / "validation.jsonl",
    "seed": seed,
    **task.overrides,
    **task.methods[method],
  }
  if task.data == "alpaca_en":
    overrides |= both_languages("alpaca_en", "alpaca_zh")
  if task.model != NOTHING:
    overrides["init_from"] = checkpoint_of(task.model)
  peft = "" if method == FULL else f",peft={method.split('-')[0]}"
  return f"{task.config}{peft}", overrides


def training_command(task: Task, method: str, seed: int, workdir: Path) -> list[str]:
  config, overrides = training_config(task, method, seed)
  return [
    *("-m", "gptjax.train", f"--config={config}"),
    *(f"--config.{key}={value}" for key, value in overrides.items()),
    f"--workdir={workdir}",
  ]


def both_languages(*names: str) -> dict[str, Any]:
  """The paths of their examples as one file for training and one to validate on."""
  folder = Path(FLAGS.runs) / "+".join(names)
  folder.mkdir(parents=True, exist_ok=True)
  for split in ("train", "validation"):
    text = "".join((fetch(name) / f"{split}.jsonl").read_text() for name in names)
    (folder / f"{split}.jsonl").write_text(text)
  return {"data.path": folder / "train.jsonl", "data.validation_path": folder / "validation.jsonl"}


def evaluation_command(
  task: Task, checkpoint: str | Path, shots: int, seed: int, output: Path
) -> list[str]:
  name = f"labels:{fetch(task.data) / 'test.jsonl'}"
  if task.test != "labels":
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"{task.test}.json"
    files = {split: str(fetch(task.data) / f"{split}.jsonl") for split in ("test", "train")}
    file.write_text(
      json.dumps({**TESTS[task.test], "data": files["test"], "train": files["train"]})
    )
    name = str(file)
  return [
    *("-m", "gptjax.evaluate", f"--checkpoint={checkpoint}", f"--tasks={name}"),
    *(f"--shots={shots}", f"--seed={seed}", f"--limit={task.limit}", f"--output={output}"),
  ]


def run(command: list[str], log: Path) -> dict[str, float]:
  """Runs a program of Python, and tells its seconds, of them its processor's, and its memory."""
  start = time.monotonic()
  with log.open("w") as output:
    process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output)
    _, status, usage = os.wait4(process.pid, 0)
  if status:
    raise RuntimeError(f"{' '.join(command)}\n{log.read_text()[-2000:]}")
  # ru_maxrss is in KiB on Linux.
  return {
    "seconds": time.monotonic() - start,
    "processor_seconds": usage.ru_utime + usage.ru_stime,
    "peak_mib": usage.ru_maxrss / 1024,
  }


def jobs() -> Iterator[tuple[str, str, int]]:
  """(task, method or number of shots, seed)"""
  for name, task in TASKS.items():
    for shots in task.prompted:
      yield from ((name, f"{shots} shots", seed) for seed in (SEEDS if shots else SEEDS[:1]))
    for seed in SEEDS:
      yield from ((name, method, seed) for method in task.methods)


def do(name: str, method: str, seed: int) -> dict[str, Any]:
  task = TASKS[name]
  folder = Path(FLAGS.runs) / name / f"{method.replace(' ', '-')}-{seed}"
  folder.mkdir(parents=True, exist_ok=True)
  result: dict[str, Any] = {"task": name, "method": method, "seed": seed}
  checkpoint, shots = folder / "run", 0
  if method.endswith("shots"):
    checkpoint, shots = checkpoint_of(task.model), int(method.split()[0])
  else:
    command = training_command(task, method, seed, checkpoint)
    result |= {"command": ["python", *command], **run(command, folder / "train.txt")}
    result |= training_figures(checkpoint, folder / "train.txt")
  if task.test:
    # What is trained is judged by the same examples whatever its seed.
    command = evaluation_command(task, checkpoint, shots, seed if shots else 0, folder / "test")
    measured = run(command, folder / "test.txt")
    (of_task,) = json.loads((folder / "test/results.json").read_text())["tasks"].values()
    result["test"] = {metric: of_task["metrics"][metric] for metric in task.metrics}
    result |= {"evaluation_seconds": measured["seconds"]}
    result.setdefault("command", ["python", *command])
  return result


def training_figures(workdir: Path, log: Path) -> dict[str, Any]:
  """The results in metrics.jsonl, and the number of parameters that the program printed."""
  lines = read_metrics(workdir)
  validations = [line for line in lines if "val/loss" in line]
  (told,) = re.findall(
    r"^parameters: ([\d,]+)(?:, of which ([\d,]+) are trained)?$", log.read_text(), re.M
  )
  parameters, trained = (int(number.replace(",", "")) if number else None for number in told)
  last = validations[-1]
  return {
    "trained": trained or parameters,
    "parameters": parameters,
    "validations": validations,
    "training_seconds": last.get("seconds"),
    "steps": last["step"],
  }


def main(_: list[str]) -> None:
  results = Path(FLAGS.runs) / "results.jsonl"
  results.parent.mkdir(parents=True, exist_ok=True)
  for name, method, seed in jobs():
    done = (
      [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )
    if any((one["task"], one["method"], one["seed"]) == (name, method, seed) for one in done):
      continue
    keys = (name, f"{name}/{method}", f"{name}/{method}/{seed}")
    if FLAGS.only and not set(keys) & set(FLAGS.only):
      continue
    print(f"{name}, {method}, seed {seed}", flush=True)
    line = json.dumps(do(name, method, seed), default=str)
    with results.open("a") as file:
      file.write(f"{line}\n")


if __name__ == "__main__":
  flags.DEFINE_string("runs", "runs/finetune", "The folder of all runs.")
  flags.DEFINE_list("only", [], "TASK, TASK/METHOD or TASK/METHOD/SEED, by commas; empty is all.")
  app.run(main)
