"""Commands in the documents are accepted: every one of READMEs, docs/ and docstrings, and
the Python of docs/."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import jax
import pytest

from gptjax import config as config_lib
from gptjax import diagnose, sweep
from gptjax.compiler import gpu, topology
from gptjax.data import tokenizer as tokenizers
from gptjax.diagnosis.dry_run import dry_run
from gptjax.interop import huggingface
from gptjax.objectives import task
from gptjax.sweeps import definition

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
  ROOT / "README.md",
  *sorted(ROOT.glob("docs/**/*.md")),
  ROOT / "colab/README.md",
  *sorted(ROOT.glob("experiments/**/README.md")),
  *sorted(ROOT.glob("experiments/*/*.py")),
  *sorted(ROOT.glob("gptjax/*.py")),
  *sorted(ROOT.glob("configs/*.py")),
]
# What a reader is to fill in.
PLACEHOLDERS = {"BUCKET": "bucket", "DIR": "runs/x"}


def commands(module: str) -> list:
  """Every `python -m gptjax.MODULE ...` in the documents, once, its continuation lines joined."""
  found = {}
  for document in DOCUMENTS:
    text = re.sub(r"\\\\?\n\s*", "", document.read_text())
    for line in re.findall(rf"python -m gptjax\.{module} ([^\n`]*)", text):
      line = re.sub(r"\[[^\]]*\]| {3,}#.*", "", line).strip()
      found.setdefault(line, f"{document.parent.name}-{document.stem}")
  return [pytest.param(line, id=name) for line, name in found.items()]


@pytest.fixture(scope="module")
def foreign_model(tmp_path_factory, tiny_config, random_params):
  """A folder as Hugging Face's."""
  folder = tmp_path_factory.mktemp("foreign")
  # Of a text with so many tokens: the files do not tell of those that are not used.
  tokenizers.train("bpe:300", [Path(__file__).read_text()]).save(folder)
  config = tiny_config(vocab_size=300, **{"position.max_positions": 1024})
  huggingface.save(folder, config, random_params(config), huggingface.find_family(config))
  return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A folder of what is read before any training: labels and a vocabulary."""
  folder = tmp_path_factory.mktemp("data")
  labelled = [{"text": text, "hypothesis": "c", "label": label} for label, text in enumerate("ab")]
  tagged = [{"tokens": ["a", "b"], "tags": ["B-PER", "O"]}]
  records = {"train": labelled, "validation": labelled, "pairs": 20 * labelled, "tags": 20 * tagged}
  for name, found in records.items():
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)))
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
  "generate": ("generate", "inference/flags"),
  "chat": ("chat", "inference/flags"),
  "evaluate": ("evaluate",),
  "convert": ("convert",),
  "diagnose": ("diagnose",),
  "predict": ("predict",),
  "serve": ("serve", "inference/flags"),
  "show": ("show",),
  "sweep": ("sweep",),
}
# The words that may come first, and how many more follow.
WORDS_OF = {
  "diagnose": dict.fromkeys(diagnose.WORDS, 0) | {"spikes": 1},
  "sweep": {name: len(expected) for name, (_, expected) in sweep.COMMANDS.items()},
}


@pytest.mark.parametrize("program", FLAGS_OF)
def test_commands_have_words_flags_and_keys_that_exist(program):
  sources = [(ROOT / f"gptjax/{name}.py").read_text() for name in FLAGS_OF[program]]
  known = [flag for text in sources for flag in re.findall(r'DEFINE_\w+\(\s*"(\w+)"', text)]
  for parameters in commands(program):
    words, flags, overrides = [], {}, {}
    for argument in shlex.split(parameters.values[0]):
      if match := re.fullmatch(r"--config\.([\w.]+)=(.*)", argument):
        overrides[match[1]] = match[2]
      elif argument.startswith("--"):
        name, _, value = argument.removeprefix("--").partition("=")
        assert name in (*known, "help"), argument
        flags[name] = value
      else:
        words.append(argument)
    if words:
      first, *others = words
      assert len(others) == WORDS_OF[program][first], parameters.values[0]
    if "config" in flags:
      config_lib.load(flags["config"], overrides)
    if "NAME" not in flags.get("sweep", "NAME"):
      assert (ROOT / flags["sweep"]).exists()


def test_documents_have_commands():
  assert len(commands("sweep")) >= 4
  assert len(commands("train")) >= 20
  assert len(commands("compile")) >= 4
  assert len(commands("generate")) >= 2
  assert len(commands("convert")) >= 2
  assert len(commands("chat")) >= 1
  assert len(commands("serve")) >= 2
  assert len(commands("evaluate")) >= 3


def test_keys_that_pages_name_exist():
  config = config_lib.load("configs/pretrain.py").to_dict()
  keys = {key for key in config_lib.flatten(config) if not key.startswith("task.")}
  for name in task.TASKS:
    keys |= {f"task.{field.name}" for field in dataclasses.fields(task.find_task(name))}
  # A duration is named with any unit.
  known = {config_lib.DURATION.sub(r"\g<stem>", key) for key in keys}
  sections = "|".join(sorted({key.partition(".")[0] for key in keys if "." in key}))
  for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
    for key in re.findall(rf"`((?:{sections})\.\w+)(?:=[^`]*)?`", path.read_text()):
      assert config_lib.DURATION.sub(r"\g<stem>", key) in known, f"{path.name}: {key}"


def test_make_targets_exist():
  targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
  documents = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
  text = "\n".join(path.read_text() for path in documents)
  named = re.findall(r"(?:^    |`)make ([\w-]+)", text, re.MULTILINE)
  assert {"demo", "test", "docs"} <= set(named)
  assert set(named) <= set(targets)


def test_links_of_the_documents_exist():
  for document in DOCUMENTS:
    if document.suffix == ".md":
      for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_readme_is_a_front_page():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_is_in_the_navigation_and_the_table_of_capabilities():
  pages = {path.name for path in (ROOT / "docs").glob("*.md")}
  front_page = (ROOT / "README.md").read_text()
  assert set(re.findall(r"\(docs/(\w+\.md)\)", front_page)) == pages
  navigation = (ROOT / "docs/site/mkdocs.yml").read_text()
  assert {*re.findall(r"docs/(\w+\.md)", navigation), "reference.md"} == pages


def python_of(page: str) -> str:
  """The one block of Python in a page."""
  (block,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
  return block


def test_sweep_of_the_documents_is_accepted(monkeypatch, tmp_path):
  path = tmp_path / "sweep.py"
  path.write_text(python_of("docs/sweeps.md"))
  monkeypatch.chdir(ROOT)
  found = definition.load(str(path), {}, sample=lambda: None)
  assert found.baseline == "adamw"
  assert len(found.trials) == 6


def test_python_of_the_documents_runs(monkeypatch, tmp_path, capsys):
  block = python_of("docs/training.md")
  small = {
    "total_steps": 2,
    "batch_size": jax.device_count(),
    "sequence_length": 64,
    "tokenizer": "bpe:300",
    "data.source": "text",
    "data.path": str(ROOT / "gptjax/optim"),
    "data.cache_dir": str(tmp_path),
    "model.num_layers": 1,
    "model.embed_dim": 48,
  }
  load = config_lib.load
  monkeypatch.setattr(config_lib, "load", lambda spec, overrides: load(spec, overrides | small))
  monkeypatch.chdir(ROOT)
  exec(compile(block.replace("runs/notebook", str(tmp_path / "run")), "training.md", "exec"), {})
  assert "validation bits per byte" in capsys.readouterr().out
