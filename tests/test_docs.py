"""What the documents tell to run is accepted: every command of READMEs and docstrings, and the
Python of the README."""

import re
import shlex
from pathlib import Path

import jax
import pytest

from gptjax import config as config_lib
from gptjax.compiler import gpu, topology
from gptjax.data import tokenizer as tokenizers
from gptjax.interop import huggingface
from gptjax.training.dry_run import dry_run

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
  ROOT / "README.md",
  ROOT / "colab/README.md",
  *sorted(ROOT.glob("experiments/**/README.md")),
  *sorted(ROOT.glob("experiments/*/*.py")),
  *sorted(ROOT.glob("gptjax/*.py")),
  *sorted(ROOT.glob("configs/*.py")),
]
# What a reader is to fill in.
PLACEHOLDERS = {"BUCKET": "bucket", "DIR": "runs/x"}


def commands(module: str) -> list:
  """Every `python -m gptjax.MODULE ...` in the documents, its continuation lines joined."""
  found = []
  for document in DOCUMENTS:
    text = re.sub(r"\\\\?\n\s*", "", document.read_text())
    for line in re.findall(rf"python -m gptjax\.{module} (--[^\n`]*)", text):
      line = re.sub(r"\[[^\]]*\]", "", line)
      found.append(pytest.param(line.strip(), id=f"{document.parent.name}-{document.stem}"))
  return found


@pytest.fixture(scope="module")
def foreign_model(tmp_path_factory, tiny_config, random_params):
  """A folder as Hugging Face's."""
  folder = tmp_path_factory.mktemp("foreign")
  tokenizers.train("bpe:300", ["A text to make a few tokens of."]).save(folder)
  config = tiny_config(vocab_size=300, max_positions=1024)
  huggingface.save(folder, config, random_params(config), huggingface.find_family(config))
  return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A folder of what is read before any training: labels and a vocabulary."""
  folder = tmp_path_factory.mktemp("data")
  for name in ("train", "validation"):
    (folder / f"{name}.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
  (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n")
  return folder


@pytest.mark.parametrize("arguments", commands("train"))
def test_train_command_is_accepted(arguments, foreign_model, data, capsys):
  spec, overrides = None, {}
  for argument in shlex.split(arguments):
    folders = {"FOLDER": str(foreign_model), "PATH": str(data)}
    for placeholder, value in (PLACEHOLDERS | folders).items():
      argument = argument.replace(placeholder, value)
    if match := re.fullmatch(r"--config\.([\w.]+)=(.*)", argument):
      overrides[match[1]] = match[2]
    elif argument.startswith("--config="):
      spec = argument.removeprefix("--config=")
    else:
      assert re.fullmatch(r"--workdir=\S+|--dry_run|--distributed", argument)
  config = config_lib.load(spec, overrides)
  # As many devices as there are: a document does not know how many a reader has.
  dry_run(config)
  assert "parameters: " in capsys.readouterr().out


@pytest.mark.parametrize("arguments", commands("compile"))
def test_compile_command_is_accepted(arguments):
  known = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / "gptjax/compile.py").read_text())
  spec, overrides = "configs/pretrain.py", {}
  for argument in shlex.split(arguments):
    if match := re.fullmatch(r"--config\.([\w.]+)=(.*)", argument):
      overrides[match[1]] = match[2]
      continue
    assert re.fullmatch(rf"--({'|'.join(known)})(=.*)?", argument), argument
    name, _, value = argument.removeprefix("--").partition("=")
    if name == "config":
      spec = value
    elif name == "topology":
      (gpu.parse_name if gpu.is_name(value) else topology.parse_name)(value)
  config_lib.load(spec, overrides)


# Where the flags of a program are defined.
FLAGS_OF = {
  "generate": ("generate",),
  "chat": ("chat", "generate"),
  "evaluate": ("evaluate",),
  "convert": ("convert",),
  "show": ("show",),
  "sweep": ("sweep",),
}


@pytest.mark.parametrize("program", FLAGS_OF)
def test_commands_have_flags_that_exist(program):
  sources = [(ROOT / f"gptjax/{name}.py").read_text() for name in FLAGS_OF[program]]
  known = [flag for text in sources for flag in re.findall(r'DEFINE_\w+\(\s*"(\w+)"', text)]
  for parameters in commands(program):
    for argument in shlex.split(parameters.values[0]):
      if argument.startswith("--config."):
        continue
      assert re.fullmatch(rf"--({'|'.join(known)})(=.*)?", argument), argument
      if argument.startswith("--sweep=") and "NAME" not in argument:
        assert (ROOT / argument.removeprefix("--sweep=")).exists()


def test_documents_have_commands():
  assert len(commands("sweep")) >= 4
  assert len(commands("train")) >= 4
  assert len(commands("compile")) >= 4
  assert len(commands("generate")) >= 2
  assert len(commands("convert")) >= 2
  assert len(commands("chat")) >= 1
  assert len(commands("evaluate")) >= 3


def test_make_targets_exist():
  targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
  named = re.findall(r"^    make ([\w-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)
  assert named
  assert set(named) <= set(targets)


def test_links_of_the_documents_exist():
  for document in DOCUMENTS:
    if document.suffix == ".md":
      for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_python_of_the_readme_runs(monkeypatch, tmp_path, capsys):
  (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
  small = {
    "total_steps": 2,
    "batch_size": jax.device_count(),
    "sequence_length": 64,
    "tokenizer": "bpe:300",
    "data.source": "text",
    "data.path": str(ROOT / "gptjax"),
    "data.cache_dir": str(tmp_path),
    "model.num_layers": 1,
    "model.embed_dim": 48,
  }
  load = config_lib.load
  monkeypatch.setattr(config_lib, "load", lambda spec, overrides: load(spec, overrides | small))
  monkeypatch.chdir(ROOT)
  exec(compile(block.replace("runs/notebook", str(tmp_path / "run")), "README.md", "exec"), {})
  assert "validation bits per byte" in capsys.readouterr().out
