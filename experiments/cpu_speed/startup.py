"""Times from a training command to its first step: with an empty cache of programs, and again.

    python -m experiments.cpu_speed.startup [--model=gpt2-124m] [--rounds=3]

Each start is a process of its own with a fresh work directory, on a small corpus whose tokens are
cached by an untimed start before. It prints the seconds until Python has imported the loop, and
those until metrics.jsonl has the first step, which a validation of a few rows comes before.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
_TEXT = "The quick brown fox jumps over the lazy dog, and the dog looks at it.\n"
_OVERRIDES = {
  "tokenizer": "bytes",
  "model.vocab_size": 50257,
  "total_steps": 1,
  "batch_size": 1,
  "sequence_length": 128,
  "sample.every_steps": 0,
  "log.every_steps": 1,
  "log.tensorboard": False,
}


def start(folder: Path, cache: Path, number: int) -> float:
  """Trains one step in a fresh work directory; returns the seconds until it is logged."""
  workdir = folder / f"run{number}"
  overrides = _OVERRIDES | {"data.path": str(folder / "corpus"), "data.cache_dir": str(folder)}
  command = [sys.executable, "-m", "gptjax.train", f"--workdir={workdir}"]
  command.append(f"--config=configs/pretrain.py:model={FLAGS.model},data=text")
  command += [f"--config.{key}={value}" for key, value in overrides.items()]
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
  begin = time.perf_counter()
  with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as program:
    log = workdir / "metrics.jsonl"
    while program.poll() is None and not (log.exists() and '"loss"' in log.read_text()):
      time.sleep(0.02)
    seconds = time.perf_counter() - begin
    program.wait()
  if program.returncode:
    raise SystemExit(f"{' '.join(command)} ended with {program.returncode}.")
  return seconds


def imports() -> float:
  """Returns the seconds that a process takes to import the loop."""
  begin = time.perf_counter()
  subprocess.run([sys.executable, "-c", "import gptjax.training.loop"], check=True)
  return time.perf_counter() - begin


def main(_) -> None:
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "corpus").mkdir()
    for number in range(8):
      (folder / "corpus" / f"{number}.txt").write_text(_TEXT * 4)
    start(folder, folder / "compiled", 0)
    rounds = range(1, FLAGS.rounds + 1)
    cold = [start(folder, folder / f"compiled{number}", number) for number in rounds]
    warm = [start(folder, folder / "compiled", 100 + number) for number in rounds]
    found = {
      "imports": statistics.median(imports() for _ in rounds),
      "first start": statistics.median(cold),
      "second start": statistics.median(warm),
    }
  print(json.dumps({what: round(seconds, 1) for what, seconds in found.items()}))


if __name__ == "__main__":
  flags.DEFINE_string("model", "gpt2-124m", "A preset of configs/pretrain.py.")
  flags.DEFINE_integer("rounds", 3, "Starts of each kind; the median is printed.", lower_bound=1)
  app.run(main)
