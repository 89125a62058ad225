import json
import signal
import sys
from pathlib import Path

import pytest
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from gptjax import config as config_lib
from gptjax.config import RunLength
from gptjax.errors import UserError

ROOT = Path(__file__).parents[1]
PRETRAIN = f"{ROOT}/configs/pretrain.py"
PARTS = {"model": ("tiny", ("tiny", "gpt2-124m")), "data": ("text", None)}

# --- The argument string -----------------------------------------------------------------------


@pytest.mark.parametrize(
  ("arg", "chosen"),
  [
    (None, {"model": "tiny", "data": "text"}),
    ("", {"model": "tiny", "data": "text"}),
    ("model=gpt2-124m", {"model": "gpt2-124m", "data": "text"}),
    ("data=a+b,model=gpt2-124m", {"model": "gpt2-124m", "data": "a+b"}),
  ],
)
def test_an_argument_chooses_parts(arg, chosen):
  assert config_lib.parse_argument(arg, **PARTS) == chosen


@pytest.mark.parametrize(
  ("arg", "sentence"),
  [
    ("model=gpt2-125m", r"no model preset 'gpt2-125m'\. Did you mean 'gpt2-124m'\?"),
    ("modle=tiny", r"'modle=tiny' is not PART=NAME .*model, data.*Did you mean 'model'\?"),
    ("tiny", r"'tiny' is not PART=NAME"),
    ("model=tiny+gpt2-124m", r"no model preset 'tiny\+gpt2-124m'"),
  ],
)
def test_a_bad_argument_is_refused_with_the_nearest(arg, sentence):
  with pytest.raises(UserError, match=sentence):
    config_lib.parse_argument(arg, **PARTS)


@pytest.mark.parametrize(
  ("spec", "sentence"),
  [
    ("configs/nowhere.py", r"--config: no file 'configs/nowhere\.py'"),
    (f"{PRETRAIN}:model=gpt2-125m", r"pretrain\.py: no model preset 'gpt2-125m'. Did you mean"),
    (f"{PRETRAIN}:data=stdlib+fineweeb", r"pretrain\.py: no data preset 'fineweeb'.*'fineweb'"),
    (f"{PRETRAIN}:data=stdlib+stdlib", r"names a part twice"),
  ],
)
def test_a_bad_file_or_preset_is_named(spec, sentence):
  with pytest.raises(UserError, match=sentence):
    config_lib.load(spec)


@pytest.mark.parametrize(
  ("name", "content", "sentence"),
  [
    ("README.md", "# Title", "README.md: not a Python file with get_config"),
    ("none.py", "x = 1", r"none.py: no get_config\(arg\), which makes the config"),
    ("number.py", "get_config = lambda arg: 5", "number.py: get_config made int, not a ConfigDict"),
    ("syntax.py", "x = 1\ny = (\n", r"syntax.py:2: SyntaxError: '\(' was never closed.*\n  y = \("),
    ("name.py", "\nimport nosuch", "name.py:2: ModuleNotFoundError: .*'nosuch'\n  import nosuch"),
    (
      "fails.py",
      "def get_config(arg):\n  return {}[arg]",
      "fails.py:2: KeyError: None\n  return {}",
    ),
    ("foreign.json", '{"a": 1}', "foreign.json: not a config that a run saved"),
    ("bare.json", '{"model": {}}', "bare.json: not the config of a training run; .* 'data'"),
    ("cut.json", '{"model": {', "cut.json: not JSON"),
  ],
)
def test_a_file_that_is_no_config_is_refused_in_a_sentence(
  tmp_path, monkeypatch, name, content, sentence
):
  (tmp_path / name).write_text(content)
  monkeypatch.chdir(tmp_path)
  for path in (name, str(tmp_path / name)):
    with pytest.raises(UserError, match=sentence):
      config_lib.load(path)


def test_a_folder_is_no_config(tmp_path):
  with pytest.raises(UserError, match="is a folder; name a file in it"):
    config_lib.load(str(tmp_path))


def test_a_get_config_need_take_no_argument(tmp_path):
  path = tmp_path / "plain.py"
  path.write_text(
    "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({'a': 1})"
  )
  assert config_lib.load(str(path)).a == 1
  with pytest.raises(UserError, match="takes no argument, such as 'model=tiny'"):
    config_lib.load(f"{path}:model=tiny")


# --- Overrides ---------------------------------------------------------------------------------


def example():
  return ConfigDict(
    {
      "total_steps": 100,
      "rate": 0.5,
      "flag": False,
      "name": "x",
      "none": None,
      "sizes": (1, 2),
      "prompts": ("a", "b"),
      "part": {"every_steps": 10, "max_bytes": 5},
    }
  )


@pytest.mark.parametrize(
  ("key", "text", "value"),
  [
    ("total_steps", "7", 7),
    ("total_steps", "1e6", 1_000_000),
    ("total_steps", "1_000", 1000),
    ("total_steps", "-1", -1),
    ("rate", "2", 2.0),
    ("rate", "3e-4", 3e-4),
    ("flag", "true", True),
    ("flag", "False", False),
    ("flag", "1", True),
    ("name", "12", "12"),
    ("name", "", ""),
    ("name", "a=b,c", "a=b,c"),
    ("sizes", "(3, 4)", (3, 4)),
    ("sizes", "[3]", (3,)),
    ("prompts", "def ,class ", ("def ", "class ")),
    ("none", "3", 3),
    ("none", "text", "text"),
    ("none", "none", None),
    ("part.max_bytes", "6", 6),
    ("part.max_bytes", 6, 6),
  ],
)
def test_a_text_is_read_as_the_type_of_its_key(key, text, value):
  config = example()
  config_lib.override(config, key, text)
  for name in key.split("."):
    config = config[name]
  assert config == value
  assert type(config) is type(value)


@pytest.mark.parametrize(
  ("key", "text", "sentence"),
  [
    ("total_steps", "many", r"config\.total_steps='many': expected a whole number"),
    ("total_steps", "1.5", r"expected a whole number"),
    ("total_steps", "", r"expected a whole number"),
    ("total_steps", "inf", r"expected a whole number"),
    ("rate", "fast", r"config\.rate='fast': expected a number"),
    ("flag", "maybe", r"config\.flag='maybe': expected true or false"),
    ("sizes", "(1, 2", r"config\.sizes=.*expected a tuple"),
    ("rat", "1", r"no config key 'rat'\. Did you mean 'rate'"),
    ("part.max_byte", "1", r"no config key 'part\.max_byte'\. Did you mean 'part\.max_bytes'"),
    ("part", "1", r"no config key 'part'"),
    ("prt.max_bytes", "1", r"no config key 'prt\.max_bytes'\. Did you mean 'part\.max_bytes'"),
    ("rate.x", "1", r"no config key 'rate\.x'"),
    ("total_stepz", "1", r"Did you mean 'total_steps'"),
    ("part.some_tokens", "1", r"no config key 'part\.some_tokens'"),
  ],
)
def test_a_bad_override_is_refused_by_its_key(key, text, sentence):
  with pytest.raises(UserError, match=sentence):
    config_lib.override(example(), key, text)


@pytest.mark.parametrize(
  ("key", "text", "value"),
  [("total_tokens", "1e9", 10**9), ("total_epochs", "1.5", 1.5), ("part.every_percent", "5", 5.0)],
)
def test_a_duration_takes_the_place_of_its_sibling(key, text, value):
  config = example()
  config_lib.override(config, key, text)
  section = config.part if key.startswith("part") else config
  name = key.split(".")[-1]
  assert section[name] == value
  assert len([k for k in section if k.startswith(name.split("_")[0] + "_")]) == 1


def test_a_loaded_config_is_locked_and_overridden():
  config = config_lib.load(PRETRAIN, {"model.num_layers": "6", "total_tokens": "1e6"})
  assert config.model.num_layers == 6
  assert "total_steps" not in config
  with pytest.raises((AttributeError, KeyError)):
    config.totl_steps = 3
  with pytest.raises((AttributeError, KeyError)):
    config.model.num_layer = 3


# --- Durations ---------------------------------------------------------------------------------


def length(total_steps=None, steps_per_epoch=50.0):
  return RunLength(tokens_per_step=1000, steps_per_epoch=steps_per_epoch, total_steps=total_steps)


@pytest.mark.parametrize(
  ("section", "steps"),
  [
    ({"every_steps": 7}, 7),
    ({"every_tokens": 20_000}, 20),
    ({"every_epochs": 0.5}, 25),
    ({"every_percent": 5.0}, 10),
    ({"every_steps": 0}, 0),
    ({"every_percent": 0.0}, 0),
    ({"every_tokens": 1}, 1),  # not never
    ({"every_steps": 7, "keep_every_steps": 3, "total_steps": 9}, 7),
  ],
)
def test_a_duration_in_every_unit(section, steps):
  assert length(total_steps=200).steps({"eval": section}, "eval.every") == steps
  assert length(total_steps=200).steps(section, "every") == steps


@pytest.mark.parametrize(
  ("section", "run", "sentence"),
  [
    ({}, {}, r"exactly one of eval\.every_steps, .*, eval\.every_percent; it has none"),
    ({"every_steps": 1, "every_tokens": 2}, {}, r"it has every_steps, every_tokens"),
    ({"every_steps": -1}, {}, r"config\.eval\.every_steps=-1 is negative; 0 means never"),
    (
      {"every_percent": 5.0},
      {},
      r"config\.eval\.every_percent: the length of percent is not known",
    ),
    ({"every_epochs": 1}, {"steps_per_epoch": None}, r"every_epochs: the length of epochs is not"),
  ],
)
def test_a_duration_that_says_nothing_is_refused(section, run, sentence):
  with pytest.raises(UserError, match=sentence):
    length(**run).steps({"eval": section}, "eval.every")


@pytest.mark.parametrize(
  ("total", "steps"),
  [({"total_steps": 30}, 30), ({"total_tokens": 64_000}, 1000), ({"total_epochs": 2.0}, 100)],
)
def test_the_length_of_a_run(total, steps):
  config = ConfigDict({"batch_size": 8, "sequence_length": 8, **total})
  run = RunLength.from_config(config, 64, steps_per_epoch=50)
  assert run.total_steps == steps
  assert run.tokens_per_step == 64


def test_a_run_of_no_steps_is_refused():
  config = ConfigDict({"batch_size": 8, "sequence_length": 8, "total_steps": 0})
  with pytest.raises(UserError, match="at least one step"):
    RunLength.from_config(config, 64, 1.0)


# --- Saving ------------------------------------------------------------------------------------


def test_a_saved_config_is_opened_as_it_was(tmp_path):
  config = config_lib.load(PRETRAIN)
  assert config_lib.changes(config, epath.Path(tmp_path)) == []
  config_lib.save(config, epath.Path(tmp_path))
  opened = config_lib.open_saved(tmp_path)
  assert json.loads(config_lib.to_json(opened)) == json.loads(config_lib.to_json(config))
  assert opened.is_locked
  assert config_lib.changes(config, epath.Path(tmp_path)) == []
  config_lib.save(config, epath.Path(tmp_path))


def test_saving_reports_what_has_changed(tmp_path):
  workdir = epath.Path(tmp_path)
  config_lib.save(config_lib.load(PRETRAIN), workdir)
  changed = config_lib.load(PRETRAIN, {"seed": 1, "total_tokens": "100", "optim.b2": "0.99"})
  assert config_lib.changes(changed, workdir) == [
    "optim.b2: 0.95 -> 0.99",
    "seed: 0 -> 1",
    "total_steps: 1000 -> None",
    "total_tokens: None -> 100",
  ]
  config_lib.save(changed, workdir)
  assert config_lib.changes(changed, workdir) == []


def test_the_config_of_a_run_is_loaded_and_overridden(tmp_path):
  config = config_lib.load(f"{PRETRAIN}:optim=muon", {"model.layer_pattern": ("full", "full")})
  config_lib.save(config, epath.Path(tmp_path))
  loaded = config_lib.load(f"{tmp_path}/config.json")
  assert loaded.to_dict() == config.to_dict()  # Tuples are tuples again, also inside of rules.
  assert loaded.is_locked
  assert loaded.optim.rules == config_lib.open_saved(tmp_path).optim.rules == config.optim.rules
  overrides = {"model.layer_pattern": "full,local", "total_tokens": "1e6"}
  changed = config_lib.load(f"{tmp_path}/config.json", overrides)
  assert changed.model.layer_pattern == ("full", "local")
  assert changed.total_tokens == 1_000_000


def test_a_saved_config_that_is_none_is_named(tmp_path):
  with pytest.raises(UserError, match=r"--config: no file '.*x\.json'"):
    config_lib.load(f"{tmp_path}/x.json")
  (tmp_path / "x.json").write_text("{")
  with pytest.raises(UserError, match=r"x\.json: not JSON"):
    config_lib.load(f"{tmp_path}/x.json")


def test_a_dotted_key_in_a_saved_config_is_named(tmp_path):
  (tmp_path / "config.json").write_text('{"model": {"norm": {"kind.of": "rmsnorm"}}}')
  with pytest.raises(UserError, match=r"config\.json: .*kind\.of"):
    config_lib.open_saved(tmp_path)


def test_a_directory_without_a_run_is_named(tmp_path):
  with pytest.raises(UserError, match=rf"{tmp_path}: not the work directory of a run"):
    config_lib.open_saved(tmp_path)


def test_the_text_has_every_key_once():
  config = config_lib.load(PRETRAIN)
  keys = [line.split(" = ")[0].strip() for line in config_lib.to_text(config).splitlines()]
  assert keys == sorted(config_lib.flatten(config))


# --- Commands ----------------------------------------------------------------------------------


def test_a_file_that_the_system_refuses_is_named_without_a_traceback(monkeypatch, tmp_path):
  monkeypatch.setattr(config_lib.app, "run", lambda run, flags_parser: run([]))
  monkeypatch.setattr(config_lib.flags, "FLAGS", flags.FlagValues())
  monkeypatch.setattr(signal, "signal", lambda number, handler: None)
  monkeypatch.setattr(sys.modules["__main__"], "__doc__", "")
  with pytest.raises(SystemExit, match=f"^error: {tmp_path}: Is a directory.$"):
    config_lib.run_app(lambda overrides: tmp_path.read_text(), config_lib.__doc__)
