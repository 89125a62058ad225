"""Training speed on this CPU against `transformers`, in turn, as a table.

    pip install torch==2.13.0 transformers
    python -m experiments.cpu_speed.compare [--rounds=3]

Each round runs gptjax and transformers one after the other, each in a process of its own, for both
shapes; the table has the medians over rounds and the ratio pair by pair. Writes results.csv.
"""

import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
STEPS = {"124m": 5, "char": 15}
TOKENS = {"124m": 4 * 256, "char": 12 * 256}


def median_seconds(implementation: str, shape: str) -> float:
  script = [sys.executable, "-m", "experiments.cpu_speed.step_time"]
  done = subprocess.run(
    [*script, implementation, shape, str(STEPS[shape])],
    capture_output=True,
    text=True,
    check=True,
    cwd=HERE.parents[1],
  )
  return json.loads(done.stdout.splitlines()[-1])["median_seconds"]


def main(rounds: int) -> None:
  rows = []
  for shape in STEPS:
    for number in range(rounds):
      ours = TOKENS[shape] / median_seconds("gptjax", shape)
      theirs = TOKENS[shape] / median_seconds("transformers", shape)
      rows.append({"shape": shape, "round": number, "gptjax": ours, "transformers": theirs})
      print(f"{shape}: {ours:.0f} against {theirs:.0f} tokens/s, ratio {ours / theirs:.2f}")
  with (HERE / "results.csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(
      {key: f"{v:.1f}" if isinstance(v, float) else v for key, v in row.items()} for row in rows
    )
  print("\n| shape | gptjax tokens/s | transformers tokens/s | ratio |\n|---|---|---|---|")
  for shape in STEPS:
    of_shape = [row for row in rows if row["shape"] == shape]
    ours, theirs = (
      statistics.median(row[name] for row in of_shape) for name in ("gptjax", "transformers")
    )
    ratio = statistics.median(row["gptjax"] / row["transformers"] for row in of_shape)
    print(f"| {shape} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
  main(int(sys.argv[1].removeprefix("--rounds=")) if len(sys.argv) > 1 else 3)
