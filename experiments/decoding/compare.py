"""Decoding speed on this CPU: gptjax against llama.cpp and `transformers`, in turn.

    pip install ".[convert]" numba
    python -m venv LLAMA && LLAMA/bin/pip install llama-cpp-python==0.3.36
    python -m experiments.decoding.compare --llama_python=LLAMA/bin/python

Each engine loads a model of the same weights in a process of its own and waits. The engines are
asked one after the other, in another order each round, so that all of them are measured in the same
minutes. Writes results.csv, conditions.json and the tables of README.md; with --output=FOLDER these
files and table.md into that folder.
"""

import csv
import dataclasses
import datetime
import json
import os
import platform
import random
import re
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.decoding.models import FORMATS, MODELS, prepare
from experiments.decoding.readme import HERE, NOT_MEASURED, write_part
from experiments.decoding.worker import Failure, Worker
from gptjax import config as config_lib
from gptjax.errors import UserError, check_choice, check_number

FLAGS = flags.FLAGS
THREADS = 2
# Seconds that an engine may take to load a model, compile and choose a setting.
WARM_UP_SECONDS = 1800
# What the float32 engines go on with, to see that they are the same model.
TEXT, AGREEING_TOKENS = "The history of the bicycle begins", 32


@dataclasses.dataclass(frozen=True)
class Peer:
  """An engine that is measured: its module, the formats of its weights, and its name in tables."""

  module: str
  formats: Sequence[str]
  title: str


PEERS = {
  "gptjax": Peer("experiments.decoding.gptjax_engine", FORMATS, "gptjax"),
  "llama.cpp": Peer("experiments.decoding.llama_engine", FORMATS, "llama.cpp"),
  "transformers": Peer(
    "experiments.decoding.transformers_engine", FORMATS[:2], "`transformers`, `generate`"
  ),
  "continuous": Peer(
    "experiments.decoding.continuous_engine", FORMATS[:2], "`transformers`, continuous batching"
  ),
  "memory": Peer("experiments.decoding.memory", FORMATS, "reading the weights once a step"),
}
LLAMA_FORMATS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is measured of each model: numbers of rows, of rounds, and of tokens of a row that are
  timed and of its prompt; and the interpreters of engines that have one of their own."""

  batches: Sequence[int]
  rounds: int
  tokens: int
  prompt: int
  pythons: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _define_flags() -> None:
  flags.DEFINE_list("models", ["gpt2-124m", "smollm2-135m"], f"Of {', '.join(MODELS)}.")
  flags.DEFINE_list("batches", ["1", "8", "32"], "Rows that are written together.")
  flags.DEFINE_list("peers", list(PEERS), "Engines to measure.")
  flags.DEFINE_integer("repeats", 5, "Rounds.")
  flags.DEFINE_integer("tokens", 64, "Tokens of each row that are timed.")
  flags.DEFINE_integer("prompt", 64, "Tokens of each row's prompt, which is not timed.")
  flags.DEFINE_string("llama_python", sys.executable, "Interpreter that has llama-cpp-python.")
  flags.DEFINE_string("output", None, "Folder to write, instead of the files beside this script.")


def main(overrides: Mapping[str, str]) -> int:
  if overrides:
    raise UserError(f"--config.{next(iter(overrides))}: nothing here is configured; see --help.")
  for name in FLAGS.models:
    check_choice("--models", name, MODELS)
  for name in FLAGS.peers:
    check_choice("--peers", name, PEERS)
  if wrong := [text for text in FLAGS.batches if not re.fullmatch(r"[1-9]\d*", text)]:
    raise UserError(f"--batches: {wrong[0]!r} is no number of rows.")
  for name in ("repeats", "tokens", "prompt"):
    check_number(f"--{name}", FLAGS[name].value, at_least=1)
  # Whoever ends this process ends the engines too.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  plan = Plan(
    [int(text) for text in FLAGS.batches],
    FLAGS.repeats,
    FLAGS.tokens,
    FLAGS.prompt,
    {"llama.cpp": FLAGS.llama_python},
  )
  conditions = describe_machine() | {
    **{"prompt": plan.prompt, "tokens": plan.tokens, "rounds": plan.rounds},
    **{"batches": plan.batches, "versions": {}, "models": {}},
  }
  rows: list[dict[str, Any]] = []
  for name in FLAGS.models:
    rows += measure_model(name, prepare(name), FLAGS.peers, plan, conditions)
    write(rows, conditions)
  print(table(rows, conditions))
  return 1 if any(found["failures"] for found in conditions["models"].values()) else 0


def describe_machine() -> dict[str, Any]:
  """Restricts this process and its children to `THREADS` processors, and describes them."""
  load = os.getloadavg()[0]
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
  os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(THREADS)))
  os.environ["JAX_PLATFORMS"] = "cpu"
  found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
  return {
    "date": datetime.date.today().isoformat(),
    "cpu": found[1] if found else platform.machine(),
    "threads": len(os.sched_getaffinity(0)),
    "load_before": round(load, 2),
    "python": platform.python_version(),
  }


# --- Measuring ---------------------------------------------------------------------------------


def measure_model(
  name: str, folder: Path, engines: Sequence[str], plan: Plan, conditions: dict[str, Any]
) -> list[dict[str, Any]]:
  """Starts engines with a model and measures them; a failure is noted, and the others go on."""
  text = _prompt(folder)
  longest = max(plan.prompt + plan.tokens + 1, len(text) + AGREEING_TOKENS)
  failures: dict[str, str] = {}
  workers: dict[tuple[str, str], Worker] = {}
  for engine in engines:
    for format in PEERS[engine].formats:
      python = plan.pythons.get(engine, sys.executable)
      arguments = (PEERS[engine].module, format, folder, max(plan.batches), longest)
      workers[engine, format] = Worker.start(python, *arguments)
  about: dict[str, Any] = {"failures": failures, "settings": {}, "agreement": {}}
  conditions["models"][name] = about

  def ask(peer: tuple[str, str], call: str, *arguments: Any, seconds: float = 600) -> Any:
    """None if the engine fails, which is then left out."""
    try:
      return workers[peer].ask(call, *arguments, seconds=seconds)
    except Failure as failure:
      failures[" ".join(peer)] = str(failure)
      print(f"{name}: {' '.join(peer)} fails: {failure}", flush=True)
      workers.pop(peer).stop()
      return None

  try:
    for peer in list(workers):
      print(f"{name}: {' '.join(peer)} warms up", flush=True)
      for batch in plan.batches:
        if peer in workers:
          ask(peer, "warm_up", batch, plan.prompt, plan.tokens, seconds=WARM_UP_SECONDS)
      if peer in workers and (found := ask(peer, "describe")):
        conditions["versions"][peer[0]] = found["version"]
        about["settings"] |= {" ".join(peer): found["setting"]} if found["setting"] else {}
    about["agreement"] = agreement(
      {
        engine: ask((engine, format), "write", text, AGREEING_TOKENS)
        for engine, format in list(workers)
        if format == "float32" and engine != "memory"
      }
    )
    print(f"{name}: tokens in common, of {AGREEING_TOKENS}: {about['agreement']}", flush=True)
    return list(_rounds(name, plan, workers, ask))
  finally:
    for worker in workers.values():
      worker.stop()


def _rounds(name: str, plan: Plan, workers: dict, ask: Any) -> Iterator[dict[str, Any]]:
  shuffled = random.Random(0)
  for number in range(plan.rounds):
    for batch in plan.batches:
      for peer in shuffled.sample(sorted(workers), len(workers)):
        time.sleep(0.2)  # Threads of the one before may still wait for more.
        busy, own, start = busy_seconds(), workers[peer].cpu_seconds, time.perf_counter()
        seconds = ask(peer, "measure", batch, plan.prompt, plan.tokens, number + 1)
        if seconds is None:
          continue
        others = busy_seconds() - busy - (workers[peer].cpu_seconds - own)
        rate = batch * plan.tokens / seconds
        print(f"{name}, batch {batch}, round {number}: {' '.join(peer)} {rate:.1f}", flush=True)
        yield {
          **{"model": name, "batch": batch, "round": number, "engine": peer[0], "format": peer[1]},
          "tokens_per_second": round(rate, 2),
          # How many processors others used meanwhile.
          "others": round(max(others, 0) / (time.perf_counter() - start), 2),
        }


def busy_seconds() -> float:
  """Seconds that all processors of the machine worked or were taken away so far; 0 where /proc does
  not tell."""
  try:
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
  except OSError:
    return 0.0
  user, nice, system, _, _, irq, softirq, steal = map(int, fields)
  return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def agreement(written: Mapping[str, Sequence[int] | None]) -> dict[str, int]:
  """How many tokens each engine writes as the first of them does, until they part."""
  found = {engine: tokens for engine, tokens in written.items() if tokens is not None}
  counts = {}
  for engine, tokens in found.items():
    first = next(iter(found.values()))
    pairs = zip(first, tokens, strict=True)
    counts[engine] = next((i for i, (a, b) in enumerate(pairs) if a != b), len(first))
  return counts


def _prompt(folder: Path) -> list[int]:
  from gptjax.data import tokenizer as tokenizers

  return tokenizers.load(str(folder / "hf")).encode(TEXT)


# --- Files and tables --------------------------------------------------------------------------


def write(rows: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any]) -> None:
  folder = Path(FLAGS.output) if FLAGS.output else HERE
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / "results.csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, rows[0] if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
  (folder / "conditions.json").write_text(json.dumps(conditions, indent=1) + "\n")
  if FLAGS.output:
    (folder / "table.md").write_text(table(rows, conditions))
  else:
    write_part("table", table(rows, conditions))


def read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """What `write` wrote into a folder; nothing if it did not."""
  if not (folder / "results.csv").exists():
    return [], {}
  with (folder / "results.csv").open(newline="") as file:
    rows = [
      row
      | {"batch": int(row["batch"]), "round": int(row["round"]), "others": float(row["others"])}
      | {"tokens_per_second": float(row["tokens_per_second"])}
      for row in csv.DictReader(file)
    ]
  return rows, json.loads((folder / "conditions.json").read_text())


def table(rows: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any]) -> str:
  """The results in Markdown, with reasons for missing ones."""
  lines = [_heading(rows, conditions)]
  for model in conditions.get("models", ["gpt2-124m", "smollm2-135m"]):
    about = conditions.get("models", {}).get(model, {})
    batches = conditions.get("batches", [1, 8, 32])
    lines += ["", f"**{model}**", ""]
    lines.append(f"| engine | weights | {' | '.join(f'batch {batch}' for batch in batches)} |")
    lines.append("|---|---|" + "---|" * len(batches))
    for engine, peer in PEERS.items():
      for format in peer.formats:
        why = about.get("failures", {}).get(f"{engine} {format}", "")
        cells = [_cell(rows, model, batch, engine, format) for batch in batches]
        if why and NOT_MEASURED in cells:
          cells[cells.index(NOT_MEASURED)] = f"{NOT_MEASURED}: {why}"
        weights = LLAMA_FORMATS[format] if engine == "llama.cpp" else format
        lines.append(f"| {peer.title} | {weights} | {' | '.join(cells)} |")
    if about:
      lines += ["", *_notes(about)]
  return "\n".join(lines) + "\n"


def _heading(rows: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any]) -> str:
  if not conditions:
    return f"Date, processor and versions: {NOT_MEASURED}."
  versions = dict.fromkeys(", ".join(conditions["versions"].values()).split(", "))
  heading = (
    f"{conditions['date']}, {conditions['threads']} threads on {conditions['cpu']}; Python "
    f"{conditions['python']}, {', '.join(versions)}. {conditions['tokens']} tokens after a prompt "
    f"of {conditions['prompt']}, medians of {conditions['rounds']} rounds. Load average before: "
    f"{conditions['load_before']}."
  )
  if rows:
    others = [row["others"] for row in rows]
    spread = statistics.median(_spreads(rows))
    heading += (
      f" Meanwhile others used {statistics.median(others):.2f} processors in the median and "
      f"{max(others):.2f} at most; the slowest round of an engine was {spread:.0%} below its "
      "fastest in the median."
    )
  return heading


def _spreads(rows: Sequence[Mapping[str, Any]]) -> list[float]:
  rates: dict[tuple, list[float]] = {}
  for row in rows:
    key = tuple(row[name] for name in ("model", "batch", "engine", "format"))
    rates.setdefault(key, []).append(row["tokens_per_second"])
  return [1 - min(found) / max(found) for found in rates.values()]


def _cell(
  rows: Sequence[Mapping[str, Any]], model: str, batch: int, engine: str, format: str
) -> str:
  """Tokens a second, and in brackets the ratios to llama.cpp in float32 and in the same format,
  medians of the ratios of each round."""

  def rates(engine: str, format: str) -> dict[int, float]:
    wanted = {"model": model, "batch": batch, "engine": engine, "format": format}
    return {
      row["round"]: row["tokens_per_second"]
      for row in rows
      if all(row[key] == value for key, value in wanted.items())
    }

  def ratio(reference: Mapping[int, float]) -> str:
    pairs = [found[number] / reference[number] for number in found if number in reference]
    return f"{statistics.median(pairs):.2f}" if pairs else "-"

  if not (found := rates(engine, format)):
    return NOT_MEASURED
  rate = statistics.median(found.values())
  shown = f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
  if engine == "memory":
    return shown
  ratios = dict.fromkeys(("float32", format))
  return f"{shown} ({', '.join(ratio(rates('llama.cpp', other)) for other in ratios)})"


def _notes(about: Mapping[str, Any]) -> Iterator[str]:
  counts = about["agreement"]
  if len(counts) > 1:
    first, *others = counts
    same = ", ".join(f"{PEERS[engine].title} {counts[engine]}" for engine in others)
    yield (
      f"- Greedy tokens after {TEXT!r} in float32 that are those of {PEERS[first].title}, of the "
      f"first {AGREEING_TOKENS}: {same}."
    )
  for peer, setting in about["settings"].items():
    yield f"- {peer}: {setting}."


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
