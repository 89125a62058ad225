"""The TPU compiler's estimates for decoding with 7B models on eight chips of v5e.

    python -m experiments.tpu.decode

Compiles the engine's step for each row of ROWS, as `python -m gptjax.compile --mode=decode` does,
and writes decode.json and decode.md beside itself, in about three minutes on two cores. Needs no
accelerator, but the TPU compiler: pip install 'jax[tpu]'.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import app

from gptjax import config as config_lib
from gptjax.compiler.decoding import compile_decoding, make_decoding_plan
from gptjax.compiler.estimate import KERNEL_EFFICIENCY
from gptjax.compiler.topology import find_slice

HERE = Path(__file__).parent
TOPOLOGY, CHIPS = "v5e-8", 8
# Model, rows, context.
ROWS = [
  ("llama2-7b", 8, 2048),
  ("llama2-7b", 32, 2048),
  ("mistral-7b", 8, 2048),
  ("mistral-7b", 32, 4096),
]
# What a later version of the kernel reached on TPU7x at best (Jiang et al. 2026, arXiv:2604.15464).
PUBLISHED = 0.86


def compile_row(model: str, rows: int, context: int, weights: str) -> dict[str, Any]:
  """What the compiler says of a row; seconds and bytes are of one chip and step."""
  target = find_slice(TOPOLOGY)
  overrides = {"model.dtype": "bfloat16", "mesh.tensor": str(CHIPS), "mesh.data": "1"}
  config = config_lib.load(f"configs/pretrain.py:model={model}", overrides)
  setup = make_decoding_plan(config, target.devices, rows, context)
  report = compile_decoding(setup, target, weights)
  times = report.costs.estimate
  return {
    **{"model": model, "rows": rows, "context": context, "weights": weights},
    **{"hbm_bytes": report.total, "read_bytes": dict(report.work.read)},
    "bound_seconds": report.roofline["hbm"],
    "step_seconds": report.seconds,
    "fused_seconds": times.fused,
    "kernel_seconds": times.kernels,
    "exposed_seconds": times.exposed,
  }


def table(results: list[Mapping[str, Any]]) -> str:
  """The results in Markdown, times in milliseconds."""
  lines = [
    "| model | rows | context | weights | HBM | reads: weights, cache | bound | step | "
    f"= products | + attention | + sent | step / bound | at {PUBLISHED:.0%} |",
    "|---" * 13 + "|",
  ]
  for row in results:
    bound, kernel = row["bound_seconds"], row["kernel_seconds"]
    faster = row["step_seconds"] - kernel * (1 - KERNEL_EFFICIENCY / PUBLISHED)
    times = ("bound", "step", "fused", "kernel", "exposed")
    read = ", ".join(f"{size / 2**30:.2f}" for size in row["read_bytes"].values())
    cells = [
      *(str(row[key]) for key in ("model", "rows", "context", "weights")),
      f"{row['hbm_bytes'] / 2**30:.1f} GiB",
      f"{read} GiB",
      *(f"{1e3 * row[name + '_seconds']:.2f}" for name in times),
      f"{row['step_seconds'] / bound:.2f}",
      f"{faster / bound:.2f}",
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def main(_: list[str]) -> None:
  jax.config.update("jax_platforms", "cpu")
  results = []
  for model, rows, context in ROWS:
    for weights in ("bfloat16", "int8"):
      print(model, rows, context, weights, flush=True)
      results.append(compile_row(model, rows, context, weights))
  (HERE / "decode.json").write_text(json.dumps(results, indent=1) + "\n")
  (HERE / "decode.md").write_text(table(results))
  print(table(results))


if __name__ == "__main__":
  app.run(main)
