"""Every key of the configs is read, where its section is read: the code is searched for it."""

import ast
import dataclasses
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from gptjax import config as config_lib
from gptjax.config import DURATION
from gptjax.data.options import PartOptions
from gptjax.devices.sharding import MESH_AXES
from gptjax.model.config import ModelConfig
from gptjax.objectives.task import TASKS, find_task
from gptjax.peft.config import DURATIONS, PeftConfig

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
# The platforms whose compilers take options.
PLATFORMS = ("cpu", "gpu", "tpu")
# A part of a mixture also has this.
_OF_MIXTURE = ("weight",)
# Functions whose parameter `config` is a section of the config, by the section.
TAKES_SECTION = {
  "optim": [(path, None) for path in sorted((ROOT / "gptjax/optim").glob("*.py"))],
  "profile": [(ROOT / "gptjax/training/loop.py", "profile")],
  "quantize": [(ROOT / "gptjax/compression/rounding.py", "from_config")],
  "sample": [(ROOT / "gptjax/inference/generate.py", "continue_prompts")],
}
# Where `config` is the whole one.
TAKES_ALL = [*(ROOT / "gptjax/training").glob("*.py"), ROOT / "gptjax/data/options.py"]


def attributes(tree):
  """Yields (value, name) of 'value.name' where it is read, and of 'value.get("name")'."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
      yield ast.unparse(node.value), node.attr
    match node:
      case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=name), *_]):
        yield ast.unparse(node.func.value), name


class Reads:
  """The reads of the code: attributes of everything and of sections, and durations."""

  def __init__(self):
    trees = {path: ast.parse(path.read_text()) for path in (ROOT / "gptjax").rglob("*.py")}
    read = [pair for tree in trees.values() for pair in attributes(tree)]
    # Of 'config.eval.patience', ('config.eval', 'patience'); `model` is a config of a model.
    self.pairs = {(".".join(value.split(".")[-2:]), name) for value, name in read}
    self.names = {name for _, name in read}
    self.whole = {
      name
      for path in TAKES_ALL
      for value, name in attributes(trees[path])
      if value.rpartition(".")[2] == "config"
    }
    for section, places in TAKES_SECTION.items():
      for path, function in places:
        for node in ast.walk(trees[path]):
          if isinstance(node, ast.FunctionDef) and function in (None, node.name):
            own = {name for value, name in attributes(node) if value == "config"}
            self.pairs |= {(f"config.{section}", name) for name in own}
    self.durations = {
      node.args[1].value
      for path in TAKES_ALL
      for node in ast.walk(trees[path])
      if isinstance(node, ast.Call)
      and ast.unparse(node.func).endswith("length.steps")
      and isinstance(node.args[1], ast.Constant)
    }

  def of_class(self, kind, name):
    """Whether a field of a dataclass, which refuses other keys, is there and is read."""
    fields = {field.name for field in dataclasses.fields(kind)}
    return name in fields and name in self.names

  def has(self, key):
    section, _, name = key.partition(".")
    if not name:
      duration = DURATION.fullmatch(section)
      return section in self.whole or (duration is not None and duration["stem"] == "total")
    if section not in self.whole:
      return False
    if section == "model":
      group, _, field = name.rpartition(".")
      chains = [f"{one}.{group}".rstrip(".") for one in ("config", "model", "self", "config.model")]
      return name in ModelConfig.kinds() and any((chain, field) in self.pairs for chain in chains)
    if section == "task":
      return any(self.of_class(find_task(task), name) or name == "name" for task in TASKS)
    if section == "data":
      part = name.split(".")[-1]
      is_whole = name in ("mixture", "cache_dir")
      return is_whole or (part in _OF_MIXTURE and part != name) or self.of_class(PartOptions, part)
    if section == "peft":
      duration = DURATION.fullmatch(name)
      is_stem = duration is not None and duration["stem"] in DURATIONS
      return is_stem or self.of_class(PeftConfig, name)
    if section == "mesh" and name in MESH_AXES:
      return True
    if section == "compile":
      return name in {f"options.{platform}" for platform in PLATFORMS}
    duration = DURATION.fullmatch(name)
    return (f"config.{section}", name) in self.pairs or (
      duration is not None and f"{section}.{duration['stem']}" in self.durations
    )


@pytest.fixture(scope="module")
def reads():
  return Reads()


def unread(config, reads):
  return [key for key in config_lib.flatten(config) if not reads.has(key)]


@pytest.mark.parametrize(
  "spec",
  [
    *("pretrain.py", "pretrain.py:data=stdlib+text,peft=adalora", "quickstart.py"),
    *(f"finetune.py:task={task}" for task in ("chat", "classification", "tagging", "span")),
  ],
)
def test_every_key_is_read(spec, reads):
  assert unread(config_lib.load(f"{CONFIGS}/{spec}"), reads) == []


# Names that the code reads of many things, so that each is found somewhere, and one of nothing.
INVENTED = ("shape", "dtype", "path", "values", "items", "config", "size", "number_of_wheels")


@pytest.mark.parametrize("name", INVENTED)
def test_an_invented_key_is_found_in_every_section(name, reads):
  config = config_lib.load(f"{CONFIGS}/pretrain.py:peft=lora")
  sections = [(), *((key,) for key in config if isinstance(config[key], ConfigDict))]
  sections += [("model", key) for key in config.model if isinstance(config.model[key], ConfigDict)]
  known = {*config_lib.flatten(config)}
  for path in sections:
    key = ".".join((*path, name))
    if key not in known:
      assert not reads.has(key), f"{key} passes for one that is read"
  for section in ("eval", "log", "optim", "checkpoint", "weather"):
    assert not reads.has(f"{section}.{name}_steps")
  assert not reads.has(f"{name}.every_steps")
