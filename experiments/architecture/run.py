"""GPT-2's recipe against a modern one, at equal parameters and equal tokens.

    python experiments/architecture/run.py [--workdir=runs/architecture]

Question: how much of what changed between GPT-2 (2019) and today's recipes shows at 2.5 M
parameters and 0.8 M tokens of Python source? Three arms, three seeds each: GPT-2 with AdamW; RoPE,
RMSNorm, QK-norm and SwiGLU with AdamW; the same with Muon. Each run is an ordinary `gptjax.train`
in its own work directory, so the script may be stopped and started again. Writes curves.csv and
curves.png beside itself, and prints the table.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
BASELINE = "gpt2-adamw"
# Learning rates were chosen by the training loss of 300 steps of seed 0: see the README.
ARMS = {
  "gpt2-adamw": (
    "model=tiny-gpt2,data=stdlib,optim=adamw",
    {"optim.learning_rate": 3e-3, "model.max_positions": 256},
  ),
  "modern-adamw": ("model=tiny,data=stdlib,optim=adamw", {"optim.learning_rate": 3e-3}),
  "modern-muon": ("model=tiny,data=stdlib,optim=muon", {"optim.learning_rate": 5e-3}),
}
SHARED = {
  "total_steps": 400,
  "batch_size": 8,
  "sequence_length": 256,
  "tokenizer": "bpe:4096",
  "optim.warmup_percent": 10,
  "optim.schedule": "wsd",
  "optim.decay_percent": 40,
  "optim.final_fraction": 0,
  "eval.every_steps": 100,
  "checkpoint.every_steps": 200,
  "checkpoint.keep": 1,
  "sample.every_steps": 0,
  "log.tensorboard": False,
}


def train(arm: str, seed: int, workdir: Path) -> list[dict]:
  """Runs (or finishes, or finds finished) one trial and returns its lines of metrics."""
  argument, overrides = ARMS[arm]
  settings = SHARED | overrides | {"seed": seed}
  subprocess.run(
    [
      sys.executable,
      "-m",
      "gptjax.train",
      f"--config=configs/pretrain.py:{argument}",
      f"--workdir={workdir}",
      *(f"--config.{key}={value}" for key, value in settings.items()),
    ],
    check=True,
    stdout=subprocess.DEVNULL,
    cwd=HERE.parents[1],
  )
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def main(root: Path) -> None:
  curves = {}
  for seed in SEEDS:
    for arm in ARMS:
      lines = train(arm, seed, root / f"{arm}-{seed}")
      curves[arm, seed] = [
        (line["step"], line["val/bits_per_byte"]) for line in lines if "val/loss" in line
      ]
      print(f"{arm} seed {seed}: {curves[arm, seed][-1][1]:.4f} bits per byte", flush=True)
  write_csv(curves)
  draw(curves)
  print_table({arm: [curves[arm, seed][-1][1] for seed in SEEDS] for arm in ARMS})


def write_csv(curves: dict) -> None:
  with (HERE / "curves.csv").open("w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["arm", "seed", "step", "bits_per_byte"])
    for (arm, seed), points in curves.items():
      writer.writerows([arm, seed, step, f"{value:.5f}"] for step, value in points)


def draw(curves: dict) -> None:
  figure = Figure(figsize=(6, 4), layout="constrained")
  axes = figure.subplots()
  for color, arm in enumerate(ARMS):
    for seed in SEEDS:
      steps, values = zip(*curves[arm, seed][1:], strict=True)
      label = arm if seed == SEEDS[0] else None
      axes.plot(steps, values, f"C{color}", marker="o", markersize=3, linewidth=1, label=label)
  axes.set(xlabel="step", ylabel="validation bits per byte")
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(HERE / "curves.png", dpi=120)


def print_table(final: dict[str, list[float]]) -> None:
  """n, mean, standard deviation, difference to the baseline and its p (Welch's t, two-sided)."""
  print("| arm | n | mean | sigma | difference | p |\n|---|---|---|---|---|---|")
  base = final[BASELINE]
  for arm, values in final.items():
    row = f"| {arm} | {len(values)} | {np.mean(values):.4f} | {np.std(values, ddof=1):.4f} "
    if arm == BASELINE:
      print(f"{row}| | |")
    else:
      p = stats.ttest_ind(values, base, equal_var=False).pvalue
      print(f"{row}| {np.mean(values) - np.mean(base):+.4f} | {p:.1g} |")


if __name__ == "__main__":
  flag = sys.argv[1] if len(sys.argv) > 1 else "--workdir=runs/architecture"
  main(Path(flag.removeprefix("--workdir=")))
