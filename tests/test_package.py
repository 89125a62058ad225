"""The installation: one package with its presets, and one command for all."""

import glob
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gptjax import config as config_lib
from gptjax.__main__ import commands
from gptjax.errors import UserError
from tests.test_house import COMMANDS

ROOT = Path(__file__).parents[1]


def call(*arguments, cwd=ROOT, **environment):
  return subprocess.run(
    [sys.executable, *arguments],
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    cwd=cwd,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize("name", ["pretrain.py", "configs/pretrain.py"])
def test_a_preset_is_found_from_any_folder(name, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert config_lib.load(f"{name}:model=debug").model.num_layers > 0
  mine = tmp_path / "pretrain.py"
  mine.write_text(
    "from gptjax.presets.pretrain import get_config as base\n"
    "def get_config(arg):\n  config = base(arg)\n  config.seed = 7\n  return config\n"
  )
  assert config_lib.load("pretrain.py:model=debug").seed == 7
  with pytest.raises(UserError, match=r"no file 'pretrian\.py'\. Did you mean 'pretrain\.py'"):
    config_lib.load("pretrian.py")
  with pytest.raises(UserError, match=r"no file 'elsewhere/quickstart\.py'"):
    config_lib.load("elsewhere/quickstart.py")


def test_one_command_names_the_others():
  shown = call("-m", "gptjax").stdout
  for name in ("train", "generate", "sweep"):
    assert f"  {name} " in shown
  assert "gpt2-124m" in call("-m", "gptjax", "models").stdout.split()
  assert "next_token" in call("-m", "gptjax", "tasks").stdout.split()
  wrong = call("-m", "gptjax", "trian")
  assert wrong.returncode == 1
  assert wrong.stderr == "error: no command 'trian'. Did you mean 'train'?\n"
  refused = call("-m", "gptjax", "train", "--config=pretrain.py:model=gpt2-125m", "--dry_run")
  assert "no model preset 'gpt2-125m'. Did you mean" in refused.stderr
  assert "Traceback" not in refused.stderr


def test_a_tpu_that_is_not_there_is_not_complained_about():
  if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
    pytest.skip("there may be a TPU here")
  config = "--config=pretrain.py:model=debug,data=stdlib"
  # The libtpu of this process holds the lock.
  environment = {"JAX_PLATFORMS": "", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  done = call("-m", "gptjax.train", config, "--dry_run", **environment)
  assert (done.returncode, done.stderr) == (0, "")


def test_the_commands_are_those_that_can_be_run():
  assert [*commands()] == [*COMMANDS]


@pytest.mark.parametrize("words", [["train", "--help"], ["--help"], ["models"]])
def test_output_that_nobody_reads_to_its_end_is_no_error(words):
  reader, writer = os.pipe()
  os.close(reader)
  with open(writer, "w") as closed:
    program = subprocess.run(
      [sys.executable, "-m", "gptjax", *words],
      stdout=closed,
      stderr=subprocess.PIPE,
      text=True,
      check=False,
    )
  assert program.stderr == ""


@pytest.mark.parametrize("name", ["chat", "generate"])
def test_help_shows_the_flags_that_commands_share(name):
  shown = call("-m", "gptjax", name, "--help").stdout
  for flag in ("--checkpoint", "--[no]ema", "--temperature", "--system", "--max_tokens"):
    assert f"  {flag}: " in shown, flag


@pytest.mark.slow
def test_one_package_is_installed_with_its_presets(tmp_path):
  # Of a copy, since building leaves files behind.
  files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
  for name in files.stdout.split():
    if not name.startswith(("tests/", "experiments/", "docs/", "colab/")):
      (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(ROOT / name, tmp_path / "tree" / name, follow_symlinks=False)
  made = call("-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(tmp_path / "tree"))
  assert made.returncode == 0, made.stderr
  (wheel,) = tmp_path.glob("*.whl")
  with zipfile.ZipFile(wheel) as files:
    names = files.namelist()
    files.extractall(tmp_path / "site")
  assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"gptjax"}
  assert any(name.startswith("gptjax/presets/parts/tuned/") for name in names)
  assert "gptjax/presets/prompts/sentiment.jinja" in names
  config = "--config=pretrain.py:model=tiny,tuned=gpt3-1.3b_v5e-16"
  path = {"PYTHONPATH": str(tmp_path / "site")}
  # Of a TPU's layout, only that it is found.
  dry = call("-m", "gptjax", "train", config, "--dry_run", cwd=tmp_path, **path)
  assert "needs 16 devices" in dry.stderr


@pytest.mark.parametrize(
  ("command", "problem"),
  [
    ("generate --checkpoint=x --top_p=2", "top_p is 2.0; it must be above 0 and at most 1."),
    ("evaluate --checkpoint=x --tasks=y --output=README.md", "README.md: File exists."),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ("generate --checkpoint=x --stop=", "--stop is empty; give a text that ends a completion."),
        ("generate --checkpoint=x --max_tokens=0", "--max_tokens is 0; it must be at least 1."),
        ("chat --checkpoint=x --temperature=-1", "temperature is -1.0; it must be at least 0."),
        ("compile --config=x --topology=y --json=nosuch/x", "--json=nosuch/x: no folder nosuch."),
      )
    ),
  ],
)
def test_flags_are_checked_before_a_model_is_looked_for(command, problem):
  assert call("-m", "gptjax", *command.split()).stderr == f"error: {problem}\n"


@pytest.mark.parametrize(
  "flag",
  [
    "tries",
    *(
      pytest.param(flag, marks=pytest.mark.slow)
      for flag in ("processes", "num_slices", "batch", "context")
    ),
  ],
)
def test_compile_refuses_a_count_of_nothing(flag):
  refused = call("-m", "gptjax.compile", "--config=x", "--topology=y", f"--{flag}=0")
  assert refused.stderr.startswith(f"error: flag --{flag}=0: 0 is not a positive integer")
