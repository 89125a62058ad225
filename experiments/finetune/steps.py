"""Seconds of a training step of each method of `peft`, in turn with LoRA's.

    python -m experiments.finetune.steps [--only=full,ia3] [--rounds=5]

One process holds two runs of tasks.py, on the same batches: LoRA's, and another's. They take steps
in turn; steps.csv has the medians, and that of the ratio pair by pair.
"""

import csv
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags

from experiments.finetune.run import training_config
from experiments.finetune.tasks import LORA, TASKS
from gptjax import config as config_lib
from gptjax.config import RunLength
from gptjax.devices import sharding
from gptjax.devices.hosts import prepare_cpu
from gptjax.training.checkpoints import Checkpoints
from gptjax.training.loop import init_or_restore, open_data
from gptjax.training.resolve import resolve
from gptjax.training.setup import make_setup

FLAGS = flags.FLAGS
HERE = Path(__file__).parent
WARMUP = 2


def make_step(method: str, workdir: Path) -> Callable[[], float]:
  """The step that `gptjax.train` runs; tells its seconds."""
  spec, overrides = training_config(TASKS["peft"], method, seed=0)
  config = config_lib.load(spec, {name: str(value) for name, value in overrides.items()})
  setup = make_setup(resolve(config))
  dataset = open_data(setup, workdir)
  length = RunLength.from_config(config, dataset.tokens_per_step, dataset.steps_per_epoch)
  optimizer = setup.make_optimizer(length)
  train_step = setup.make_train_step(optimizer)
  with jax.set_mesh(setup.mesh), Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
    state, frozen = init_or_restore(setup, optimizer, checkpoints)
  batches = dataset.training_batches(0)

  def step() -> float:
    nonlocal state
    start = time.perf_counter()
    with jax.set_mesh(setup.mesh):
      batch = sharding.to_global(next(batches), setup.mesh)
      state, _ = train_step(state, batch, frozen)
      jax.block_until_ready(state)
    return time.perf_counter() - start

  for _ in range(WARMUP):
    step()
  return step


def main(_: list[str]) -> None:
  prepare_cpu()
  methods = FLAGS.only or [name for name in TASKS["peft"].methods if name != LORA]
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    lora = make_step(LORA, Path(folder) / LORA)
    for method in methods:
      step = make_step(method, Path(folder) / method)
      pairs = [(step(), lora()) for _ in range(FLAGS.rounds)]
      own, others = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
      ratio = statistics.median(seconds / other for seconds, other in pairs)
      rows.append([method, *(f"{value:.3f}" for value in (own, others, ratio))])
      print(f"| {' | '.join(rows[-1])} |", flush=True)
      del step  # Before the next is made.
      gc.collect()
  with (HERE / "steps.csv").open("w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([["method", "seconds", "lora_seconds", "ratio"], *rows])


if __name__ == "__main__":
  flags.DEFINE_list("only", [], "Methods of the task `peft`, by commas; empty is all.")
  flags.DEFINE_integer("rounds", 5, "Pairs of steps.")
  app.run(main)
