"""The measurements of `run.py`, each in a process of its own:

    python -m experiments.gpu.parts NAME OUTPUT [smoke]

Writes a JSON object to OUTPUT. With `smoke` the models are tiny, and any backend will do.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from gptjax import config as config_lib
from gptjax.data import tokenizer as tokenizers
from gptjax.data.batch import Batch
from gptjax.devices import chips, sharding
from gptjax.errors import UserError
from gptjax.inference.engine import Engine
from gptjax.inference.request import Request
from gptjax.inference.sampling import Sampling
from gptjax.model.attention import choose_kernel
from gptjax.model.gpt import GPT
from gptjax.training.checkpoints import checksum
from gptjax.training.metrics import read_metrics
from gptjax.training.pretrained import load_checkpoint
from gptjax.training.resolve import resolve
from gptjax.training.setup import Setup, make_setup
from gptjax.training.step import init_state

ROOT = Path(__file__).parents[2]
SMOKE = {
  **{"model.num_layers": 2, "model.embed_dim": 32, "model.num_heads": 2, "model.mlp_dim": 64},
  **{"model.vocab_size": 512, "sequence_length": 64},
}

# --- Losses equal to the CPU's -----------------------------------------------------------------

# dtype, documents a row, and by how much of a loss the card may differ: the roundings of a float32,
# 2^-24, and of a bfloat16, 2^-9, of which sums average many out. A row of 40 documents has more
# than cuDNN is given room for.
LOSSES = {
  "float32": ("float32", 4, 1e-4),
  "bfloat16": ("bfloat16", 4, 5e-3),
  "bfloat16, 40 documents a row": ("bfloat16", 40, 5e-3),
}
LOSS_STEPS = 5
SMALL = {
  **{"model.num_layers": 4, "model.embed_dim": 256, "model.num_heads": 4, "model.mlp_dim": 1024},
  **{"model.vocab_size": 4096, "sequence_length": 512, "batch_size": 8},
  **{"optim.warmup_percent": 0.0, "optim.learning_rate": 1e-3},
}


def measure_losses(smoke: bool) -> dict[str, Any]:
  """The losses of a few steps from one state on one batch, on the card and on the CPU."""
  sizes = SMALL | (SMOKE if smoke else {})
  devices = {"card": jax.devices()[0], "cpu": jax.devices("cpu")[0]}
  found = {}
  for case, (dtype, documents, tolerance) in LOSSES.items():
    setups = {
      name: make("gpt2-124m", sizes | {"model.dtype": dtype}, device)
      for name, device in devices.items()
    }
    losses = {name: few_losses(setups, name, documents) for name in setups}
    pairs = zip(losses["card"], losses["cpu"], strict=True)
    difference = max(abs(card - cpu) / cpu for card, cpu in pairs)
    found[case] = losses | {
      "attention": kernel_of(setups["card"]),
      "largest_difference": difference,
      "tolerance": tolerance,
      "equal": difference <= tolerance,
    }
    print(f"losses, {case}: differ by {difference:.1e}, tolerance {tolerance:.0e}", flush=True)
  return found


def few_losses(setups: Mapping[str, Setup], name: str, documents: int) -> list[float]:
  """Trains on one of the devices, from the CPU's initial state."""
  setup, cpu = setups[name], setups["cpu"]
  with jax.set_mesh(cpu.mesh):
    optimizer = cpu.make_optimizer(cpu.run_length)
    state = jax.device_get(init_state(cpu.model, optimizer, 0, cpu.abstract_state(optimizer)))
  optimizer = setup.make_optimizer(setup.run_length)
  # A float32 product is one of float32, not of TF32.
  with jax.set_mesh(setup.mesh), jax.default_matmul_precision("highest"):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract_state(optimizer))
    state = jax.device_put(state, shardings)
    step, losses = setup.make_train_step(optimizer), []
    # One batch again and again: what the gradients do shows in the next loss.
    batch = sharding.to_global(make_batch(setup, documents, seed=0), setup.mesh)
    for _ in range(LOSS_STEPS):
      state, metrics = step(state, batch)
      losses.append(float(metrics["loss"]))
  return losses


# --- Model FLOPs utilisation -------------------------------------------------------------------

# Rows and remat that are tried, in order, until one fits the memory.
TRAINING = {
  "gpt2-124m": ({"sequence_length": 1024}, [(32, "none"), (16, "none"), (16, "dots"), (8, "full")]),
  "gpt3-1.3b": (
    {"sequence_length": 2048, "model.layer_pattern": "full"},
    [(8, "dots"), (8, "full"), (4, "full"), (1, "full")],
  ),
}
WARMUP, TIMED = 3, 10


def measure_training(model: str, smoke: bool) -> dict[str, Any]:
  """Seconds of a step in bfloat16 and the MFU, one document a row."""
  shared, tries = TRAINING[model]
  for rows, remat in tries:
    layout = {"batch_size": rows, "model.execution.remat": remat}
    overrides = {"model.vocab_size": 50_304, "model.dtype": "bfloat16"} | shared | layout
    setup = make(model, overrides | (SMOKE if smoke else {}), jax.devices()[0])
    print(f"{model}: {rows} rows of {setup.config.sequence_length}, remat={remat}", flush=True)
    try:
      return {"rows": rows, "remat": remat} | time_training(setup)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
  raise UserError(f"{model} fits the memory of the card in none of {tries}.")


def time_training(setup: Setup) -> dict[str, Any]:
  optimizer = setup.make_optimizer(setup.run_length)
  device = setup.mesh.devices.flat[0]
  seconds = []
  with jax.set_mesh(setup.mesh):
    state = init_state(setup.model, optimizer, 0, setup.abstract_state(optimizer))
    step = setup.make_train_step(optimizer)
    batch = sharding.to_global(make_batch(setup, documents=1, seed=0), setup.mesh)
    for _ in range(WARMUP + TIMED):
      start = time.perf_counter()
      state, metrics = step(state, batch)
      jax.block_until_ready((state, metrics))
      seconds.append(time.perf_counter() - start)
  median = float(np.median(seconds[WARMUP:]))
  tokens = setup.config.batch_size * setup.config.sequence_length / median
  kind = {"device_kind": device.device_kind, "devices": 1}
  return {
    "sequence_length": setup.config.sequence_length,
    "attention": kernel_of(setup),
    "median_step_seconds": median,
    "tokens_per_second": tokens,
    "mfu": chips.mfu(tokens, setup.flops_per_token, **kind),
    "first_step_seconds": seconds[0],
    "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
  }


# --- Decoding ----------------------------------------------------------------------------------

PROMPT, WRITTEN = 64, 256


def measure_decoding(smoke: bool) -> dict[str, Any]:
  """Tokens that GPT-2 124M writes in a second in bfloat16, after the prompt has been read."""
  overrides = {"model.vocab_size": 50_304, "model.dtype": "bfloat16", "sequence_length": 1024}
  config = make("gpt2-124m", overrides | (SMOKE if smoke else {}), jax.devices()[0]).model
  prompt, written = (8, 16) if smoke else (PROMPT, WRITTEN)
  engine = Engine(GPT(config, nnx.Rngs(0)), tokenizers.load("bytes"), length=prompt + written + 1)
  found = {}
  for rows in (1, 8):
    seconds = [time_decoding(engine, rows, prompt, written) for _ in range(4)]
    rate = rows * written / float(np.median(seconds[1:]))
    found[str(rows)] = {"tokens_per_second": rate}
    print(f"decoding, batch {rows}: {rate:,.0f} tokens/s", flush=True)
  return found


def time_decoding(engine: Engine, rows: int, prompt: int, written: int) -> float:
  """Seconds for `written` tokens of each row after its first one."""
  texts = np.random.default_rng().integers(0, 256, (rows, prompt)).tolist()
  sampling = Sampling(temperature=0)
  answers = [engine.submit(Request(text, written + 1, sampling, ignore_end=True)) for text in texts]
  while not all(len(answer.tokens) > prompt for answer in answers):
    engine.step()
  start, before = time.perf_counter(), engine.counts.written_tokens
  while not engine.idle:
    engine.step()
  share = (engine.counts.written_tokens - before) / (rows * written)
  return (time.perf_counter() - start) / share


# --- Kill and resume ---------------------------------------------------------------------------

RESUME = {
  **{"batch_size": 16, "tokenizer": "bytes", "eval.every_steps": 0, "sample.every_steps": 0},
  **{"log.every_steps": 1, "log.tensorboard": False, "model.dtype": "bfloat16"},
}


def measure_resume(smoke: bool) -> dict[str, Any]:
  """Whether a run that is killed with SIGKILL and started again ends in the bits of one that is
  not.

  Sums of several threads into one place come out as the threads come; the flag makes an order.
  """
  # The card is for the runs.
  jax.config.update("jax_platforms", "cpu")
  steps, every = (20, 5) if smoke else (300, 50)
  overrides = RESUME | {"total_steps": steps, "checkpoint.every_steps": every}
  overrides |= {"sequence_length": 64} if smoke else {"sequence_length": 512}
  with tempfile.TemporaryDirectory() as folder:
    corpus, whole, killed = (Path(folder) / name for name in ("corpus", "whole", "killed"))
    corpus.mkdir()
    for module in ("argparse.py", "tarfile.py", "typing.py", "turtle.py"):
      shutil.copy(Path(sysconfig.get_path("stdlib")) / module, corpus / f"{module}.txt")
    overrides |= {"data.path": corpus, "data.cache_dir": Path(folder) / "cache"}
    model = "debug" if smoke else "tiny"
    print(f"resume: {steps} steps", flush=True)
    start_training(model, overrides, whole, None)
    at = start_training(model, overrides, killed, every + every // 2)
    print(f"resume: killed at step {at}, goes on", flush=True)
    start_training(model, overrides, killed, None)
    params = [checksum(nnx.to_pure_dict(nnx.state(load_checkpoint(w)[0]))) for w in (whole, killed)]
    losses = [[line["loss"] for line in read_metrics(w) if "loss" in line] for w in (whole, killed)]
  equal = params[0] == params[1] and losses[0] == losses[1] and len(losses[0]) == steps
  print(f"resume: {'the same bits' if equal else 'other bits'}", flush=True)
  return {"steps": steps, "killed_at": at, "checksums": params, "equal": equal}


def start_training(
  model: str, overrides: Mapping[str, Any], workdir: Path, kill_at: int | None
) -> int | None:
  """Trains in a process of its own, kills it after it has reported a step, and returns the step."""
  flags = os.environ.get("XLA_FLAGS", "")
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "gptjax.train", f"--workdir={workdir}"),
      f"--config=configs/pretrain.py:model={model},data=text",
      *(f"--config.{key}={value}" for key, value in overrides.items()),
    ],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": f"{flags} --xla_gpu_deterministic_ops=true"},
    stdout=subprocess.DEVNULL,
  )
  told = 0
  while kill_at is not None and told < kill_at and process.poll() is None:
    time.sleep(0.02)
    told = max((line["step"] for line in read_metrics(workdir)), default=0)
  if kill_at is not None:
    process.send_signal(signal.SIGKILL)
  if process.wait() != (0 if kill_at is None else -signal.SIGKILL):
    raise UserError(f"the training run ended with exit status {process.returncode}.")
  return None if kill_at is None else told


# --- What they share ---------------------------------------------------------------------------


def make(model: str, overrides: Mapping[str, Any], device: jax.Device) -> Setup:
  config = config_lib.load(
    f"{ROOT}/configs/pretrain.py:model={model}",
    {"optim.schedule": "constant", "tokenizer": "bytes", **overrides},
  )
  return make_setup(resolve(config), [device])


def make_batch(setup: Setup, documents: int, seed: int) -> Batch:
  """Rows of random tokens, cut into documents at random places, other ones in each row."""
  rng = np.random.default_rng(seed)
  rows, length = setup.config.batch_size, setup.config.sequence_length
  tokens = rng.integers(0, setup.model.vocab_size, (rows, length + 1)).astype(np.int32)
  segments, positions = np.zeros((2, rows, length), np.int32)
  for row in range(rows):
    cuts = np.sort(rng.choice(np.arange(1, length), documents - 1, replace=False))
    starts = np.zeros(length, np.int32)
    starts[[0, *cuts]] = 1
    segments[row] = np.cumsum(starts)
    positions[row] = np.arange(length) - np.maximum.accumulate(np.arange(length) * starts)
  weights = np.ones((rows, length), np.float32)
  return Batch(tokens[:, :-1], tokens[:, 1:], weights, segments, positions)


def kernel_of(setup: Setup) -> str:
  """The attention kernel of a training step."""
  with jax.set_mesh(setup.mesh):
    return choose_kernel(setup.model, setup.config.sequence_length, cached=False, training=True)


def describe_device(smoke: bool) -> dict[str, Any]:
  """The card, its driver, and the versions that were measured."""
  del smoke
  device = jax.devices()[0]
  driver = None
  if shutil.which("nvidia-smi"):
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    driver = answer[0] if answer else None
  return {
    "is_cuda": "cuda" in device.client.platform_version.lower(),
    "card": device.device_kind,
    "driver": driver,
    "platform": device.client.platform_version,
    "jax": jax.__version__,
  }


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
  "device": describe_device,
  "losses": measure_losses,
  "gpt2-124m": lambda smoke: measure_training("gpt2-124m", smoke),
  "gpt3-1.3b": lambda smoke: measure_training("gpt3-1.3b", smoke),
  "decoding": measure_decoding,
  "resume": measure_resume,
}


def main(name: str, output: str, options: Sequence[str]) -> None:
  try:
    found = PARTS[name]("smoke" in options)
  except UserError as error:
    sys.exit(f"error: {error}")
  Path(output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], sys.argv[3:])
