"""Configs: loading by file and argument string, overriding by key, durations, saving.

A config file has `get_config(arg)` and returns a ConfigDict of plain values; this is the only
module that knows ml_collections. A duration is written as exactly one key whose suffix is its
unit, `eval.every_steps` or `eval.every_percent`, and setting one unit replaces the other.
"""

import ast
import contextlib
import dataclasses
import glob
import importlib.util
import inspect
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict

from gptjax.errors import UserError, check_number, did_you_mean
from gptjax.small_files import read_json, write_atomically
from gptjax.upgrades import upgrade

DURATION = re.compile(r"(?P<stem>\w+)_(?P<unit>steps|tokens|epochs|percent)")
CONFIG_FILE = "config.json"
# The folder configs/ of the repository; an installed package contains it.
PRESETS = Path(__file__).parent / "presets"


def parse_argument(arg: str | None, **parts: tuple[str, Sequence[str] | None]) -> dict[str, str]:
  """Reads "model=gpt2-124m,data=text" into a dict.

  Args:
    arg: the text behind the colon of --config=FILE:ARG, or None.
    parts: each part's default, and the names of its presets (None leaves the check to others).

  Raises:
    UserError: an item is not PART=NAME, or a part or a preset is unknown.
  """
  chosen = {part: default for part, (default, _) in parts.items()}
  for item in filter(None, (arg or "").split(",")):
    part, equals, name = item.partition("=")
    if not equals or part not in parts:
      raise UserError(
        f"config argument {item!r} is not PART=NAME with a part of {', '.join(parts)}. "
        f"{did_you_mean(part, parts)}"
      )
    presets = parts[part][1]
    if presets is not None and name not in presets:
      raise UserError(f"no {part} preset {name!r}. {did_you_mean(name, presets)}")
    chosen[part] = name
  return chosen


def load(spec: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
  """Loads "FILE" or "FILE:ARG", applies {dotted key: text or value} and locks the result.

  FILE is a Python file with `get_config(arg)`, or the config.json of a run, which takes no ARG.

  Raises:
    UserError: the file, a part, a key or a value is not valid.
  """
  if spec.endswith(".json"):
    if not epath.Path(spec).is_file():
      raise UserError(f"--config: no file {spec!r}.")
    config = _read(epath.Path(spec))
    if missing := [part for part in ("data", "model", "optim") if part not in config]:
      raise UserError(f"{spec}: not the config of a training run; it has no {missing[0]!r}.")
  else:
    path, _, arg = spec.partition(":")
    config = _get_config(find_file(path), arg)
  given: dict[str, str] = {}
  for key, value in (overrides or {}).items():
    if found := DURATION.fullmatch(key.rpartition(".")[2]):
      stem = key.removesuffix(found["unit"])
      if stem in given:
        raise UserError(f"--config.{key} and --config.{given[stem]} are one duration; give one.")
      given[stem] = key
    override(config, key, value)
  return config.lock()


def find_file(path: str) -> str:
  """The path of a config file: as given, or else a file that comes with the package, by its name
  ('pretrain.py') or its path in the repository ('configs/pretrain.py').

  Raises:
    UserError: there is none.
  """
  preset = PRESETS / Path(path).name
  if Path(path).is_file():
    return path
  if preset.is_file() and str(Path(path).parent) in (".", "configs"):
    return str(preset)
  if Path(path).is_dir():
    raise UserError(f"--config={path} is a folder; name a file in it.")
  names = sorted(found.name for found in PRESETS.glob("[a-z]*.py"))
  raise UserError(f"--config: no file {path!r}. {did_you_mean(Path(path).name, names)}")


def _get_config(path: str, arg: str) -> ConfigDict:
  with user_code(path):
    make = getattr(run_file(path), "get_config", None)
    if make is None:
      raise UserError("no get_config(arg), which makes the config.")
    if arg and not inspect.signature(make).parameters:
      raise UserError(f"its get_config takes no argument, such as {arg!r}.")
    config = make(arg or None) if inspect.signature(make).parameters else make()
    if not isinstance(config, ConfigDict):
      raise UserError(f"get_config made {type(config).__name__}, not a ConfigDict.")
  return config


@contextlib.contextmanager
def user_code(path: str) -> Iterator[None]:
  """Names a user's file in what is wrong with it: a sentence, or the line that fails."""
  try:
    yield
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  except Exception as error:
    places = [
      (one.filename, one.lineno, one.line) for one in traceback.extract_tb(error.__traceback__)
    ]
    said = str(error)
    if isinstance(error, SyntaxError):
      places.append((error.filename, error.lineno, (error.text or "").strip()))
      said = error.msg
    own = [place for place in places if Path(place[0] or "").absolute() == Path(path).absolute()]
    _, number, line = (own or [(path, 1, "")])[-1]
    raise UserError(f"{path}:{number}: {type(error).__name__}: {said}\n  {line}") from error


def run_file(path: str) -> ModuleType:
  """Runs a Python file as a module, under a name that cannot be imported."""
  if not path.endswith(".py"):
    raise UserError("not a Python file with get_config(arg), nor the config.json of a run.")
  module_spec = importlib.util.spec_from_file_location("config_file", path)
  module = importlib.util.module_from_spec(module_spec)
  module_spec.loader.exec_module(module)
  return module


def _read(path: epath.Path) -> ConfigDict:
  """Reads a config that `save` wrote, in this or an older version; lists in JSON become tuples."""
  values = read_json(path)
  if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
    raise UserError(f"{path}: not a config that a run saved; it has no object 'model'.")
  try:
    return ConfigDict(_tuples(upgrade(values)))
  except ValueError as error:  # A key that cannot be one, such as 'a.b'.
    raise UserError(f"{path}: {error}") from error


def _tuples(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def override(config: ConfigDict, key: str, value: Any) -> None:
  """Sets `config.a.b` by its dotted key, from a value or from the text of one.

  A duration replaces its sibling in another unit.

  Raises:
    UserError: the key does not exist, or the text does not fit the key's type.
  """
  *path, leaf = key.split(".")
  section = config
  for name in path:
    if not isinstance(section, ConfigDict) or name not in section:
      raise UserError(_unknown_key(config, key))
    section = section[name]
  if not isinstance(section, ConfigDict) or isinstance(section.get(leaf), ConfigDict):
    raise UserError(_unknown_key(config, key))
  replaced = leaf if leaf in section else _sibling(section, leaf)
  if replaced is None:
    raise UserError(_unknown_key(config, key))
  old = section[replaced]
  if replaced != leaf:
    old = 0.0 if leaf.endswith(("percent", "epochs")) else 0
  value = _parse(key, value, old) if isinstance(value, str) else value
  with section.unlocked(), section.ignore_type():
    del section[replaced]
    section[leaf] = value


def _sibling(section: Mapping[str, Any], leaf: str) -> str | None:
  """The key of the same duration in another unit, if the section has one."""
  wanted = DURATION.fullmatch(leaf)
  for key in section:
    found = DURATION.fullmatch(key)
    if wanted and found and wanted["stem"] == found["stem"]:
      return key
  return None


def _unknown_key(config: ConfigDict, key: str) -> str:
  return f"no config key {key!r}. {did_you_mean(key, flatten(config))}"


def _parse(key: str, text: str, old: Any) -> Any:
  """Parses text as the type of the key's present value; if that is None, as any type."""
  word = text.strip().lower()
  constants = {"true": True, "false": False, "none": None}
  if isinstance(old, bool):
    if word in ("true", "false", "1", "0"):
      return word in ("true", "1")
    raise UserError(f"config.{key}={text!r}: expected true or false.")
  if isinstance(old, str):
    return text
  try:
    if isinstance(old, int | float):
      number = float(text.replace("_", ""))
      if isinstance(old, float):
        return number
      if number != int(number):
        raise ValueError
      return int(number)
    if isinstance(old, tuple):
      return tuple(ast.literal_eval(text)) if text[:1] in "([" else tuple(text.split(","))
    return constants[word] if word in constants else ast.literal_eval(text)
  except (ValueError, SyntaxError, OverflowError, TypeError):
    if old is None:
      return text
    expected = {int: "a whole number", float: "a number", tuple: "a tuple"}[type(old)]
    raise UserError(f"config.{key}={text!r}: expected {expected}.") from None


def to_json(config: ConfigDict) -> str:
  return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def to_text(config: ConfigDict) -> str:
  """Formats a config as lines of "key = value", for the terminal."""
  flat = flatten(config)
  width = max(map(len, flat))
  return "\n".join(f"{key:<{width}} = {value!r}" for key, value in sorted(flat.items()))


def save(config: ConfigDict, workdir: epath.Path) -> None:
  """Writes `workdir/config.json`."""
  write_atomically(workdir / CONFIG_FILE, to_json(config) + "\n")


def changes(config: ConfigDict, workdir: epath.Path) -> list[str]:
  """Returns "key: old -> new" for keys that differ from `workdir/config.json`, if that exists."""
  path = workdir / CONFIG_FILE
  if not path.exists():
    return []
  old, new = (flatten(json.loads(to_json(one))) for one in (_read(path), config))
  return [
    f"{key}: {old.get(key)} -> {new.get(key)}"
    for key in sorted({*old, *new})
    if old.get(key) != new.get(key)
  ]


def open_saved(workdir: epath.Path) -> ConfigDict:
  """Reads the config that a run saved.

  Raises:
    UserError: the directory is not the work directory of a run.
  """
  path = epath.Path(workdir) / CONFIG_FILE
  if not path.exists():
    raise UserError(f"{workdir}: not the work directory of a run (it has no {CONFIG_FILE}).")
  return _read(path).lock()


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Flattens nested keys: {"a": {"b": 1}} -> {"a.b": 1}."""
  flat = {}
  for key, value in nested.items():
    is_nested = isinstance(value, dict | ConfigDict)
    flat |= flatten(value, f"{prefix}{key}.") if is_nested else {prefix + key: value}
  return flat


@dataclasses.dataclass(frozen=True)
class RunLength:
  """Length of a run, which turns durations into steps; None stands for an unknown length."""

  tokens_per_step: int | None
  steps_per_epoch: float | None
  total_steps: int | None = None

  @classmethod
  def from_config(
    cls, config: Mapping[str, Any], tokens_per_step: int | None, steps_per_epoch: float | None
  ) -> "RunLength":
    """Resolves `total_steps | total_tokens | total_epochs`."""
    length = cls(tokens_per_step, steps_per_epoch)
    total = length.steps(config, "total")
    if total < 1:
      raise UserError("total_steps: a run needs at least one step.")
    return dataclasses.replace(length, total_steps=total)

  def steps(self, config: Mapping[str, Any], name: str) -> int:
    """Steps of a duration such as 'total' or 'optim.warmup'; 0 means never.

    Raises:
      UserError: not exactly one key of the duration is there, or it is negative.
    """
    section, _, stem = name.rpartition(".")
    values = config[section] if section else config
    found = [key for key in values if (m := DURATION.fullmatch(key)) and m["stem"] == stem]
    if len(found) != 1:
      raise UserError(
        f"config needs exactly one of {name}_steps, {name}_tokens, {name}_epochs, {name}_percent; "
        f"it has {', '.join(found) or 'none'}."
      )
    unit, value = DURATION.fullmatch(found[0])["unit"], values[found[0]]
    key = f"config.{name}_{unit}"
    check_number(key, value)
    if value < 0:
      raise UserError(f"{key}={value} is negative; 0 means never.")
    if value == 0:
      return 0
    steps_of = {
      "steps": 1,
      "tokens": None if self.tokens_per_step is None else 1 / self.tokens_per_step,
      "epochs": self.steps_per_epoch,
      "percent": None if self.total_steps is None else self.total_steps / 100,
    }[unit]
    if steps_of is None:
      raise UserError(f"{key}: the length of {unit} is not known here; give steps.")
    return max(round(value * steps_of), 1)


def describe_absent_tpu() -> None:
  """Tells libtpu, where it is installed without a TPU, what it would print errors about."""
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")


def run_app(main: Callable[..., int | None], usage: str, *, words: bool = False) -> None:
  """Runs an entry point: absl parses flags, overrides are collected, user errors are one sentence.

  Args:
    main: called with {dotted key: text} of the `--config.KEY=VALUE` flags; may return the exit
      status of the program.
    usage: the text that --help starts with.
    words: call `main(overrides, words)` with the arguments that are not flags; otherwise they are
      an error.
  """
  overrides: dict[str, str] = {}
  positional: list[str] = []

  def parse_flags(argv: list[str]) -> list[str]:
    rest = argv[:1]
    for argument in argv[1:]:
      found = re.fullmatch(r"--config\.([\w.]+)=(.*)", argument, re.DOTALL)
      if found:
        overrides[found[1]] = found[2]
      elif re.fullmatch(r"--config\.[\w.]+", argument):
        sys.exit(f"error: {argument} has no value; write {argument}=VALUE, without a space.")
      else:
        rest.append(argument)
    try:
      positional.extend(flags.FLAGS(rest)[1:])
      if positional and not words:
        raise flags.Error(f"{positional[0]!r} is not a flag; flags look like --name=value.")
      return rest[:1]
    except flags.Error as error:
      sys.exit(f"error: {error} Try --help.")

  def run(_: list[str]) -> int | None:
    logging.set_verbosity(logging.WARNING)
    try:
      return main(overrides, positional) if words else main(overrides)
    except UserError as error:
      sys.exit(f"error: {error}")
    except OSError as error:
      if error.filename is None:
        raise
      sys.exit(f"error: {error.filename}: {error.strerror}.")
    except KeyboardInterrupt:
      sys.exit(128 + signal.SIGINT)

  if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
    describe_absent_tpu()
  sys.modules["__main__"].__doc__ = usage
  flags.FLAGS.set_gnu_getopt(words)
  try:
    app.run(run, flags_parser=parse_flags)
  except BrokenPipeError:
    sys.exit(128 + signal.SIGPIPE)
  finally:  # Whoever reads the output may have read enough, as `head` does.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
