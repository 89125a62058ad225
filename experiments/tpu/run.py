"""The TPU compiler's estimates for GPT models on slices of 16 to 4,096 chips.

    python -m experiments.tpu.run [--only=NAME,...] [--processes=N] [--tries=N]

Searches a layout for each row of ROWS with `gptjax.compiler.search`, compiles the rows of
WEAK_SCALING as they are, and writes results.json and results.md beside itself. What was compiled is
remembered, so the script may be stopped and started again. Needs no accelerator, but the TPU
compiler: pip install 'jax[tpu]'.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from gptjax.compiler import search
from gptjax.compiler.topology import find_slice

HERE = Path(__file__).parent

# The vocabulary is padded to a multiple of 128; all layers see the whole past.
_GPT3 = {"model.vocab_size": 50_304, "model.layer_pattern": "full", "sequence_length": 2048}
_GPT2 = {"model.vocab_size": 50_304, "sequence_length": 1024}

# Name: model, slice, rows a step, other settings.
ROWS = {
  "124m-v5e": ("gpt2-124m", "v5e-16", 512, _GPT2),
  "1.3b-v5e": ("gpt3-1.3b", "v5e-16", 64, _GPT3),
  "1.3b-v6e": ("gpt3-1.3b", "v6e-16", 128, _GPT3),
  "1.3b-v5p": ("gpt3-1.3b", "v5p-64", 256, _GPT3),
  "6.7b-v5p": ("gpt3-6.7b", "v5p-64", 256, _GPT3),
  "6.7b-v6e": ("gpt3-6.7b", "v6e-64", 256, _GPT3),
  "13b-v5p": ("gpt3-13b", "v5p-128", 512, _GPT3),
  "175b-v5p": ("gpt3-175b", "v5p-1024", 1024, _GPT3),
  "175b-v6e": ("gpt3-175b", "v6e-256", 512, _GPT3),
  "llama3.1-8b-v6e": ("llama3.1-8b", "v6e-256", 512, {"sequence_length": 8192}),
  "llama2-70b-v5p": ("llama2-70b", "v5p-512", 1024, {"sequence_length": 4096}),
}
# 4 rows a chip, fsdp 16 within and data across: what is sent for each chip should not grow.
WEAK_SCALING = {
  f"weak-{chips}": (
    "gpt3-6.7b",
    f"v5p-{2 * chips}",
    4 * chips,
    _GPT3 | {"model.execution.remat": "dots", "mesh.fsdp": 16, "mesh.data": chips // 16},
  )
  for chips in (16, 64, 256, 1024, 4096)
}

FLAGS = flags.FLAGS
flags.DEFINE_list("only", None, "Names of rows; all by default.")
flags.DEFINE_integer("processes", 1, "Compilations side by side.")
flags.DEFINE_integer("rounds", 3, "Of a search: mesh; remat and micro-batches; kernel and options.")
flags.DEFINE_integer("tries", 4, "Compilations a round of a search, at most.")


def find(name: str) -> list[dict[str, Any]]:
  """Everything that was tried for a row, the fastest first."""
  model, topology, rows, settings = (ROWS | WEAK_SCALING)[name]
  spec = f"configs/pretrain.py:model={model}"
  overrides = {key: str(value) for key, value in settings.items()}
  overrides |= {"batch_size": str(rows), "model.dtype": "bfloat16"}
  target = find_slice(topology)
  if name in ROWS:
    found = search.search(
      spec, overrides, target, processes=FLAGS.processes, rounds=FLAGS.rounds, tries=FLAGS.tries
    )
  else:
    found = [search.try_one(spec, overrides, {}, target, search.default_cache())]
  return [{"overrides": f.overrides, "report": f.report, "reason": f.reason} for f in found]


def main(_: list[str]) -> None:
  jax.config.update("jax_platforms", "cpu")
  path = HERE / "results.json"
  results = json.loads(path.read_text()) if path.exists() else {}
  for name in FLAGS.only or [*ROWS, *WEAK_SCALING]:
    print(name, flush=True)
    results[name] = find(name)
    path.write_text(json.dumps(results, indent=1) + "\n")
  (HERE / "results.md").write_text(tables(results))
  print(tables(results))


def tables(results: Mapping[str, list[dict[str, Any]]]) -> str:
  """The best layout of each row, and the weak scaling, in Markdown."""
  lines = [
    "| model | slice | rows a chip | layout | HBM | sent a chip | step | MFU | bound |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for name, (model, topology, rows, _) in ROWS.items():
    if name in results:
      lines.append(_row(model, topology, rows, results[name][0]))
  lines += [
    "",
    "| chips | mesh | HBM | sent a chip | step | MFU | bound |",
    "|---|---|---|---|---|---|---|",
  ]
  for name, (_, _, _, settings) in WEAK_SCALING.items():
    if name in results:
      report = results[name][0]["report"]
      mesh = f"data {settings['mesh.data']} x fsdp {settings['mesh.fsdp']}"
      lines.append(f"| {report['chips']:,} | {mesh} | {_figures(report)} |")
  return "\n".join(lines) + "\n"


def _row(model: str, topology: str, rows: int, best: Mapping[str, Any]) -> str:
  report = best["report"]
  layout = search.describe(
    {key: value for key, value in best["overrides"].items() if key != "compile.options.tpu"}
  )
  return f"| {model} | {topology} | {rows / report['chips']:g} | {layout} | {_figures(report)} |"


def _figures(report: Mapping[str, Any]) -> str:
  sent = sum(kind["bytes"] for kind in report["collectives"].values())
  bound = max(report["bound_seconds"].values())
  return (
    f"{report['hbm_bytes_per_chip']['total'] / 2**30:.1f} GiB | {sent / 1e9:.1f} GB | "
    f"{report['estimated_step_seconds']:.3f} s | {report['estimated_mfu']:.3f} | {bound:.3f} s"
  )


if __name__ == "__main__":
  app.run(main)
