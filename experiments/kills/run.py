"""Kills training runs at random moments until they are done, and compares them with others.

    python -m experiments.kills.run --kills=504 --output=/tmp/kills

Seven kinds of runs (text, a mixture, chat, LoRA, moving averages with dropout, labels with early
stopping, distillation) each train undisturbed once. Then runs of the same configs are killed with
SIGKILL, each time a random moment after their start, and started again in the same work directory,
until they are done. Their losses, validations and parameters have to be the same bits.

A run is a child of a process that has imported the package, so that most of its life is training
and not importing: 500 kills take less than an hour on one core.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Compiled once, each run loads it.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from flax import nnx

from gptjax import config as config_lib
from gptjax.training.checkpoints import checksum
from gptjax.training.loop import train
from gptjax.training.metrics import read_metrics
from gptjax.training.pretrained import load_model

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
WORDS = ("the", "of", "a", "cat", "dog", "sees", "likes", "finds", "big", "small", "red")
SHAPE = {
  "model.num_layers": 2,
  "model.embed_dim": 16,
  "model.num_heads": 2,
  "model.mlp_dim": 32,
  "tokenizer": "bytes",
  "batch_size": 2,
  "sequence_length": 64,
  "log.every_steps": 1,
  "log.tensorboard": False,
  "eval.every_steps": 10,
  "checkpoint.every_steps": 5,
}
PRETRAIN = SHAPE | {"total_steps": 60, "sample.every_steps": 0}
LABELS = SHAPE | {
  "total_epochs": 12.0,
  "batch_size": 4,
  "model.dropout.residual": 0.1,
  "eval.patience": 6,
  "checkpoint.final": "best",
  "task.r_drop": 1.0,
}
# Name: (file and argument, overrides).
KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
  "text": ("pretrain.py:model=debug,data=text", PRETRAIN),
  "mixture": ("pretrain.py:model=debug,data=jsonl+text", PRETRAIN),
  "chat": (
    "finetune.py:task=chat,model=debug",
    SHAPE | {"total_epochs": 8.0, "task.chat_template": "alpaca", "sequence_length": 256},
  ),
  "lora": ("pretrain.py:model=init_from,data=text,peft=lora", PRETRAIN),
  "ema and dropout": (
    "pretrain.py:model=debug,data=text",
    PRETRAIN | {"optim.ema_decay": 0.9, "model.dropout.residual": 0.1, "grad_accumulation": 2},
  ),
  "labels": ("finetune.py:task=classification,model=debug", LABELS),
  "distillation": ("pretrain.py:model=debug,data=text,task=distill", PRETRAIN),
}


# A run is killed at the latest after this share of an undisturbed run's time, and so much later
# with each kill that it gets to its end, even on a machine that has become slower.
SHARE, MORE = 0.6, 0.05


def write_data(folder: Path) -> None:
  """Writes a text, conversations and labelled sentences of made-up words."""
  draw = random.Random(0)

  def words(count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))

  (folder / "text").mkdir(parents=True)
  for number in range(8):
    (folder / "text" / f"{number}.txt").write_text(words(400))
  chats = [
    {"messages": [{"role": role, "content": words(4)} for role in ("user", "assistant")]}
    for _ in range(60)
  ]
  texts = [{"text": words(100)} for _ in range(40)]
  labelled = [{"text": words(6), "label": draw.choice("ab")} for _ in range(60)]
  for name, records in (("chat", chats), ("labels", labelled), ("texts", texts)):
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))


def load(kind: str, data: Path) -> Any:
  argument, overrides = KINDS[kind]
  own = {"data.cache_dir": str(data / "cache" / kind)}
  if kind == "mixture":
    own |= {"data.mixture.text.path": str(data / "text")}
    own |= {"data.mixture.jsonl.path": str(data / "texts.jsonl")}
  elif kind in ("chat", "labels"):
    own |= {"data.path": str(data / f"{kind}.jsonl")}
  else:
    own |= {"data.path": str(data / "text")}
  if kind == "lora":
    shape = [key for key in overrides if key.startswith("model.")]
    overrides = {key: value for key, value in overrides.items() if key not in shape}
    own |= {"init_from": str(data.parent / "undisturbed" / "text"), "tokenizer": "init_from"}
  elif kind == "distillation":
    own |= {"task.teacher": str(data.parent / "undisturbed" / "text")}
  return config_lib.load(f"{CONFIGS}/{argument}", {**overrides, **own})


def start(config: Any, workdir: Path) -> int:
  """Trains in a child; returns its process id."""
  if child := os.fork():
    return child
  status = 1
  try:
    with open(f"{workdir}.log", "a") as log:
      os.dup2(log.fileno(), sys.stdout.fileno())
      os.dup2(log.fileno(), sys.stderr.fileno())
      train(config, workdir)
      status = 0
  except Exception:  # noqa: BLE001 - whatever it is, the log of the run tells it.
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wait(child: int, seconds: float) -> int | None:
  """The exit status of a child that ends within so many seconds; None if it was killed then."""
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    found, status = os.waitpid(child, os.WNOHANG)
    if found:
      return os.waitstatus_to_exitcode(status)
    time.sleep(0.01)
  os.kill(child, signal.SIGKILL)
  os.waitpid(child, 0)
  return None


def outcome(workdir: Path) -> dict[str, Any]:
  """Losses and validations by step, and a checksum of the parameters.

  They are read in a child, since JAX must not start in the process that forks."""
  reader, writer = os.pipe()
  if child := os.fork():
    os.close(writer)
    with open(reader) as file:
      found = json.loads(file.read())
    os.waitpid(child, 0)
    return found
  os.close(reader)

  lines = [
    {key: line[key] for key in line if key in ("step", "loss") or key.startswith("val/")}
    for line in read_metrics(workdir)
  ]
  model, _ = load_model(str(workdir))
  found = {
    "lines": sorted(lines, key=json.dumps),
    "parameters": checksum(nnx.to_pure_dict(nnx.state(model))),
  }
  with open(writer, "w") as file:
    json.dump(found, file)
  os._exit(0)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--kills", type=int, default=504)
  parser.add_argument("--output", type=Path, required=True)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
  parser.add_argument("--results", type=Path, default=HERE / "results.json")
  args = parser.parse_args()
  data = args.output / "data"
  write_data(data)
  draw = random.Random(args.seed)
  references, seconds = {}, {}
  # LoRA starts from the run on text, and distillation has it as teacher.
  for kind in dict.fromkeys(("text", *args.kinds)):
    for folder in ("undisturbed", "again"):  # The first compiles and makes tokens.
      workdir = args.output / folder / kind
      workdir.parent.mkdir(exist_ok=True)
      began = time.monotonic()
      if wait(start(load(kind, data), workdir), 600) != 0:
        sys.exit(f"{kind}: the undisturbed run failed; see {workdir}.log")
      seconds[kind] = time.monotonic() - began
    references[kind] = outcome(workdir)
    print(f"{kind}: {seconds[kind]:.1f} s undisturbed", flush=True)
  rows, each = [], -(-args.kills // len(args.kinds))
  for kind in args.kinds:
    kills = done = 0
    different: list[str] = []
    while kills < each:
      workdir = args.output / "killed" / f"{kind}-{done}"
      workdir.parent.mkdir(exist_ok=True)
      own, status = 0, None
      while status is None:
        until = draw.uniform(0, (SHARE + MORE * own) * seconds[kind])
        status = wait(start(load(kind, data), workdir), until)
        own += status is None
      kills, done = kills + own, done + 1
      if status != 0:
        different.append(f"{workdir.name}: failed with {status}")
      elif outcome(workdir) != references[kind]:
        different.append(f"{workdir.name}: another result")
    rows.append({"kind": kind, "kills": kills, "completed": done, "different": different})
    print(rows[-1], flush=True)
    args.results.write_text(json.dumps(rows, indent=2) + "\n")
  if any(row["different"] for row in rows):
    sys.exit("Some runs ended otherwise.")


if __name__ == "__main__":
  main()
