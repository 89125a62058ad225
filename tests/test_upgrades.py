"""Configs that runs of older versions saved, in tests/saved_configs, are read as today's."""

import json
from pathlib import Path

import pytest

from gptjax import config as config_lib
from gptjax.model.config import ModelConfig
from gptjax.objectives.task import make_task
from gptjax.training.loop import train
from gptjax.upgrades import OF_GROUPS, upgrade
from tests.training.test_loop import corpus, losses, small_config  # noqa: F401

SAVED = Path(__file__).parent / "saved_configs"
ROOT = Path(__file__).parents[1]

# The options of each, as they were given to the version that saved it.
GIVEN = {
  "text": (
    "pretrain.py:model=debug,data=text",
    {"name": "next_token", "z_loss": 0.001} | {"fim_rate": 0.25},
  ),
  "classification": (
    "finetune.py:task=classification,model=debug",
    {"name": "classification", "r_drop": 1.0, "label_smoothing": 0.1, "labels": ("0", "1")},
  ),
  "chat": ("finetune.py:task=chat,model=debug", {"name": "chat", "chat_template": "alpaca"}),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_saved_config_has_todays_keys_and_yesterdays_values(name, tmp_path):
  (tmp_path / "config.json").write_text((SAVED / f"{name}.json").read_text())
  config = config_lib.open_saved(tmp_path)
  spec, task = GIVEN[name]
  today = config_lib.load(f"{ROOT}/configs/{spec}")
  saved, now = ({*config_lib.flatten(one.to_dict())} for one in (config, today))
  assert saved <= now
  # What a model, adapters or rounding did not have yet is off by default.
  assert all(key.startswith(("model.", "peft.", "quantize.")) for key in now - saved)
  assert ModelConfig.from_config(config.model)
  assert config.task.to_dict() == today.task.to_dict() | task
  make_task(config.task)
  assert {**config.optim, "rules": ()} == {**today.optim, "rules": ()}


def test_todays_config_is_left_as_it_is():
  config = config_lib.load(f"{ROOT}/configs/pretrain.py:model=debug").to_dict()
  assert upgrade(config) == config


def test_a_run_of_an_older_version_goes_on_as_if_it_were_todays(corpus, tmp_path):  # noqa: F811
  for folder, steps in (("whole", 20), ("halves", 10)):
    train(
      small_config(corpus, total_steps=steps, **{"optim.schedule": "constant"}), tmp_path / folder
    )
  path = tmp_path / "halves" / "config.json"
  saved = json.loads(path.read_text())
  task = saved.pop("task")
  old = {"objective": task.pop("name"), "z_loss": task.pop("z_loss"), "r_drop": 0.0}
  saved["data"] |= task | {"format": "text", "mask_rate": 0.15, "label_key": "label"}
  model = saved.pop("model")
  groups = {name: model.pop(name) for name in OF_GROUPS}
  for name, fields in OF_GROUPS.items():
    model |= {older: groups[name][field] for field, older in fields.items()}
  saved["model"] = model
  path.write_text(json.dumps(saved | old | {"label_smoothing": 0.0}))
  config = config_lib.load(str(path), {"total_steps": 20})
  train(config, tmp_path / "halves")
  assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
