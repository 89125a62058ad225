"""The files that the bad inputs of run.py are given, and the ways to damage a file."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_LINE = "The quick brown fox jumps over the lazy dog, and the dog looks at it.\n"

_RECORDS = {
  "labels.jsonl": [
    {"text": f"{word} day {n}", "label": label}
    for n in range(20)
    for word, label in (("bright", "good"), ("dark", "bad"))
  ],
  "one.jsonl": [{"text": f"bright day {n}", "label": "good"} for n in range(20)],
  "notlabels.jsonl": [{"text": f"day {n}", "label": f"label {n}"} for n in range(20)],
  "emptytext.jsonl": [{"text": "", "label": "good"}] * 20,
  "chat.jsonl": [
    {"messages": [{"role": r, "content": f"word {n}"} for r in ("user", "assistant")]}
    for n in range(40)
  ],
  "roles.jsonl": [{"messages": [{"role": "wizard", "content": "x"}]}] * 9,
  "noanswer.jsonl": [{"messages": [{"role": "user", "content": "x"}]}] * 9,
  "task.jsonl": [{"text": f"day {n}", "label": "ab"[n % 2]} for n in range(4)],
}
_TASK = {
  **{
    "kind": "classification",
    "data": "task.jsonl",
    "max_tokens": 8,
    "prompt": "prompt.jinja",
    "target": "label",
  },
  "labels": {"a": " good", "b": " bad"},
}
# What is changed of a task that is right; None takes the key out.
_TASKS = {
  "nokind": {"kind": None},
  "kind": {"kind": "clasification"},
  "nodata": {"data": None},
  "type": {"labels": ["a", "b"]},
  "key": {"lables": {}},
  "label": {"labels": {"a": " good", "c": " bad"}},
  "onelabel": {"labels": {"a": " good"}},
  "prompt": {"prompt": "nosuch.jinja"},
  "by": {"by": "chance"},
  "normalize": {"normalize": "words"},
  "k": {"k": [0]},
  "metrics": {"metrics": ["f2"]},
  "calibrate": {"by": "generation", "calibrate": True},
  "emptylabel": {"labels": {"a": " good", "b": " "}},
  "code": {"kind": "code"},
  "target": {"target": "nosuch"},
  "maxtokens": {"by": "generation", "max_tokens": -1},
  "temperature": {"by": "generation", "temperature": -1.0},
  "samples": {"samples": 0},
  "timeout": {"timeout_seconds": -1.0},
  "stop": {"by": "generation", "stop": [1]},
  "template": {"prompt": "broken.jinja"},
}
_BASE = "from gptjax import config\ndef base(): return config.load('base.json')\n"
_SWEEPS = {
  "none": _BASE,
  "both": _BASE + "def sweep(): return []\ndef search(trial): return {}\n",
  "number": "def base(): return 5\ndef sweep(): return []\n",
  "notrials": _BASE + "def sweep(): return []\n",
  "key": _BASE + "def sweep(): return [('a', {'optim.nosuch': 1}), ('b', {})]\n",
  "baseline": _BASE + "def sweep(): return [('a', {}), ('b', {'seed': 1})]\nBASELINE = 'c'\n",
  "metric": _BASE + "def sweep(): return [('a', {}), ('b', {'seed': 1})]\nMETRIC = 'val/x'\n",
  "search": _BASE + "def search(trial): return {}\nSEARCH = {'trails': 5}\n",
  "raises": _BASE + "def sweep(): return [1 / 0]\n",
  "twice": _BASE + "def sweep(): return [('a', {}), ('a', {})]\n",
  "strings": _BASE + "def sweep(): return ['a', 'b']\n",
  "value": _BASE + "def sweep(): return [('a', {'batch_size': 'many'})]\n",
  "good": _BASE + "def sweep(): return [('a', {}), ('b', {'optim.learning_rate': 0.1})]\n",
}


def _write(path: Path, content: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(content)


def make_files(folder: Path) -> None:
  """Writes the data of the cases."""
  for number in range(4):
    _write(folder / f"text/{number}.txt", _LINE * 200)
  for name, records in _RECORDS.items():
    _write(folder / name, "".join(f"{json.dumps(record)}\n" for record in records))
  for place in (folder, folder / "tasks"):
    _write(place / "task.jsonl", (folder / "task.jsonl").read_text())
    _write(place / "prompt.jinja", "{{ text }}:")
  _write(folder / "tasks/broken.jinja", "{{ text")
  for name, changes in {"../task": {}, **_TASKS}.items():
    task = {key: value for key, value in (_TASK | changes).items() if value is not None}
    _write(folder / f"tasks/{name}.json", json.dumps(task))
  for name, content in _SWEEPS.items():
    _write(folder / f"sweeps/{name}.py", content)
  _write(folder / "data.txt", _LINE)
  _write(folder / "words.csv", "word,number\nred,1\n")
  _write(folder / "syntax.py", "x = 1\ny = (\n")
  _write(folder / "number.py", "def get_config(arg):\n  return 5\n")
  for name in ("empty", "locked", "study"):
    (folder / name).mkdir()
  pq.write_table(pa.table({"text": [_LINE] * 50}), folder / "x.parquet")
  _write_gguf(folder / "x.gguf")


def make_runs(folder: Path) -> None:
  """Trains small runs and converts one, each by its command."""
  small = "--config.total_steps=2 --config.batch_size=4 --config.sequence_length=192"
  small += " --config.checkpoint.every_steps=1 --config.log.tensorboard=False --workdir"
  small = f"--config.data.cache_dir=cache --config.sample.every_steps=0 {small}"
  text = "--config=pretrain.py:model=debug,data=text --config.data.path=text"
  text = f"train {text} --config.tokenizer=bytes {small}"
  tune = (
    f"train --config=finetune.py:task={{}} --config.init_from=run --config.data.path={{}} {small}"
  )
  for command in (
    f"{text}=run",
    f"{text}=run2 --config.seed=1",
    tune.format("classification", "labels.jsonl") + "=labels",
    tune.format("chat", "chat.jsonl") + "=chats --config.task.chat_template=alpaca",
    "convert --from=run --to=hf --format=hf",
  ):
    name, *arguments = command.split()
    subprocess.run([sys.executable, "-m", f"gptjax.{name}", *arguments], cwd=folder, check=True)
  for config, run in (("base", "run"), ("label", "labels"), ("tune", "chats")):
    shutil.copy(folder / run / "config.json", folder / f"{config}.json")


def _write_gguf(path: Path) -> None:
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_block_count(2)
  writer.add_tensor("token_embd.weight", np.zeros((256, 32), np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _fresh(path: Path) -> Path:
  """The path, with nothing there."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  path.unlink(missing_ok=True)
  return path


def _each_file(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
  """A damage that changes the content of a file, which need not be there, or of all in a folder."""

  def damage(path: Path) -> None:
    for file in [*path.rglob("*")] if path.is_dir() else [path]:
      if not file.is_dir():
        file.write_bytes(change(file.read_bytes() if file.exists() else b""))

  return damage


def _folder(path: Path) -> None:
  _fresh(path).mkdir()


def _locked(path: Path) -> None:
  path.touch()
  path.chmod(0)


DAMAGES: dict[str, Callable[[Path], None]] = {
  "binary": _each_file(lambda _: bytes(range(256)) * 8),
  "cut": _each_file(lambda content: content[: len(content) // 2]),
  "deep": _each_file(lambda _: b'{"model": ' + b"[" * 100_000),
  "digits": _each_file(lambda _: b'{"model": {"num_layers": ' + b"9" * 5000 + b"}}"),
  "empty": _each_file(lambda _: b""),
  "header": _each_file(lambda content: content[:8] + b"[" * (len(content) - 8)),
  "hugegguf": _each_file(lambda content: content[:8] + b"\xff" * 16 + content[24:]),
  "hugeheader": _each_file(lambda content: b"\xff" * 7 + b"\x7f" + content[8:]),
  "list": _each_file(lambda _: b"[1]"),
  "nomodel": _each_file(lambda _: b'{"model": {}}'),
  "null": _each_file(lambda _: b"null"),
  "utf8": _each_file(lambda _: b'{"text": "\xff\xfe", "label": "good"}\n'),
  "dangling": lambda path: _fresh(path).symlink_to("nowhere"),
  "fifo": lambda path: os.mkfifo(_fresh(path)),
  "folder": _folder,
  "gone": lambda path: _fresh(path),
  "locked": _locked,
}
