"""A wing can be deleted: in a copy of the tree without it, what remains still runs."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The wings, and what goes with each: the wings that stand on it, commands and presets.
GOES_WITH = {
  "alignment": {"presets": ["align.py"]},
  "compiler": {"commands": ["compile"]},
  "compression": {"commands": ["compress"]},
  "cpu": {},
  "diagnosis": {"commands": ["diagnose"]},
  "evals": {"commands": ["evaluate"]},
  "finetuning": {
    "wings": ["alignment", "compression"],
    "commands": ["compress", "predict"],
    "presets": ["align.py", "finetune.py"],
  },
  "inference": {
    "wings": ["compiler", "compression", "evals", "serving"],
    "commands": ["chat", "compile", "compress", "evaluate", "generate", "serve"],
  },
  "gguf": {},
  "interop": {"wings": ["gguf", "peft"], "commands": ["convert"]},
  "peft": {},
  "quantization": {
    "wings": ["compiler", "compression", "cpu", "evals", "inference", "peft", "serving"],
    "commands": ["chat", "compile", "compress", "evaluate", "generate", "serve"],
  },
  "scores": {
    "wings": ["alignment", "compression", "evals", "finetuning"],
    "commands": ["compress", "evaluate", "predict"],
    "presets": ["align.py", "finetune.py"],
  },
  "serving": {"commands": ["serve"]},
  "sweeps": {"commands": ["sweep"]},
  "templates": {
    "wings": [
      *("alignment", "compiler", "compression", "evals", "finetuning", "inference", "serving"),
    ],
    "commands": ["chat", "compile", "compress", "evaluate", "generate", "predict", "serve"],
    "presets": ["align.py", "finetune.py"],
  },
}

# Every module that is left is imported, every command says how it is used, a model is trained, and
# what needed the wing says so.
SMOKE = textwrap.dedent("""
  import importlib.util, pathlib, pkgutil, runpy, sys

  # An editable installation would find the wing where it was installed from.
  sys.meta_path[:] = [one for one in sys.meta_path if "__editable__" not in repr(one)]
  import gptjax

  assert importlib.util.find_spec(f"gptjax.{sys.argv[1]}") is None
  for module in pkgutil.walk_packages(gptjax.__path__, "gptjax."):
    # Programs, which run when they are imported.
    if module.name not in ("gptjax.__main__", "gptjax.evals.sandbox_probe"):
      importlib.import_module(module.name)
  assert pathlib.Path(gptjax.__file__).is_relative_to(pathlib.Path.cwd())

  from gptjax import config
  from gptjax.training.loop import train

  small = {"total_steps": 2, "batch_size": 2, "sequence_length": 32, "tokenizer": "bytes",
           "model.num_layers": 1, "model.embed_dim": 8, "model.num_heads": 1, "model.mlp_dim": 8,
           "data.path": "corpus", "data.cache_dir": "cache", "log.tensorboard": False}
  small |= {"sample.every_steps": int("inference" not in sys.argv)}
  result = train(config.load("configs/pretrain.py:model=debug,data=text", small), "run")
  assert 4 < result["val/loss"] < 7, result
""")


@pytest.mark.parametrize(
  "wing",
  [pytest.param(wing, marks=[] if wing == "inference" else pytest.mark.slow) for wing in GOES_WITH],
)
def test_what_remains_without_a_wing_runs(wing, cpu_devices, tmp_path):
  keep = shutil.ignore_patterns("__pycache__")
  for folder in ("gptjax", "configs"):
    shutil.copytree(ROOT / folder, tmp_path / folder, ignore=keep)
  gone = GOES_WITH[wing]
  for name in (wing, *gone.get("wings", ())):
    shutil.rmtree(tmp_path / "gptjax" / name)
  for name in gone.get("commands", ()):
    (tmp_path / "gptjax" / f"{name}.py").unlink()
  for name in gone.get("presets", ()):
    (tmp_path / "configs" / name).unlink()
  (tmp_path / "corpus").mkdir()
  for number in range(4):
    (tmp_path / "corpus" / f"{number}.txt").write_text(
      f"A text of some length, number {number}.\n" * 9
    )
  (tmp_path / "smoke.py").write_text(SMOKE)
  environment = os.environ | cpu_devices(1) | {"PYTHONPATH": str(tmp_path)}
  found = subprocess.run(
    [sys.executable, "smoke.py", wing],
    env=environment,
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert found.returncode == 0, found.stderr[-3000:]


# What asks for a wing that is not there, and the sentence that answers.
ASKS = {
  "interop": (
    {"init_from": "hf:somewhere", "model.num_layers": 0},
    "hf:somewhere needs gptjax.interop",
  ),
  "peft": ({"peft.method": "lora", "init_from": "x"}, "peft.method='lora' needs gptjax.peft"),
  "finetuning": ({"task.name": "chat"}, "task='chat' needs gptjax.finetuning"),
  "compression": ({"task.name": "distill"}, "task='distill' needs gptjax.compression"),
}


@pytest.mark.parametrize("wing", ASKS)
def test_what_asks_for_a_wing_that_is_not_there_says_so(wing, monkeypatch):
  from gptjax import config
  from gptjax.errors import UserError
  from gptjax.training.resolve import resolve
  from gptjax.training.setup import make_setup

  overrides, sentence = ASKS[wing]
  loaded = config.load(f"{ROOT}/configs/pretrain.py:model=tiny", overrides)
  monkeypatch.setattr(sys, "path", [*sys.path])
  for name in [name for name in sys.modules if name.startswith(f"gptjax.{wing}")]:
    monkeypatch.delitem(sys.modules, name)

  class Missing:
    """Finds no wing."""

    def find_spec(self, name, path=None, target=None):
      if name.startswith(f"gptjax.{wing}"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=f"gptjax.{wing}")

  monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
  with pytest.raises(UserError) as error:
    make_setup(resolve(loaded))
  assert str(error.value).startswith(sentence)
