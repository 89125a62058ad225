"""Every sweep of experiments/ can be started: all its configs are checked, none is run."""

from pathlib import Path

import pytest

from experiments import datasets
from experiments.finetune import run as finetune
from experiments.finetune import tasks
from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.sweeps import definition, study

ROOT = Path(__file__).parents[1]
SWEEPS = [
  path
  for path in sorted(ROOT.glob("experiments/*/*.py"))
  if "\ndef sweep(" in path.read_text() or "\ndef search(" in path.read_text()
]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_sweep_can_be_started(path, monkeypatch, tmp_path):
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(datasets, "fetch", lambda name: tmp_path)
  sweep = definition.load(str(path), {}, study.sample_trial)
  assert len(sweep.trials) >= 2
  assert sweep.question.startswith(path.read_text().split('"""')[1][:40])
  assert (path.parent / "README.md").exists()


def test_there_are_sweeps():
  assert len(SWEEPS) >= 3


def test_an_unknown_data_set_is_answered_with_the_nearest():
  with pytest.raises(UserError, match=r"no data set 'pros'\. Did you mean 'prose'\?"):
    datasets.fetch("pros")


FINETUNING = [(name, method) for name, task in tasks.TASKS.items() for method in task.methods]


@pytest.mark.parametrize(("name", "method"), FINETUNING)
def test_a_run_of_the_fine_tuning_experiment_can_be_started(name, method, monkeypatch, tmp_path):
  monkeypatch.chdir(ROOT)
  for module in (datasets, finetune):
    monkeypatch.setattr(module, "fetch", lambda name: tmp_path)
  monkeypatch.setattr(finetune, "checkpoint_of", lambda model: "hf:model")
  monkeypatch.setattr(finetune, "both_languages", lambda *names: {})
  _, _, spec, *arguments = finetune.training_command(tasks.TASKS[name], method, 0, tmp_path)
  flags = [argument.removeprefix("--config.").partition("=") for argument in arguments[:-1]]
  config = config_lib.load(spec.removeprefix("--config="), {key: text for key, _, text in flags})
  assert config.seed == 0
  assert (config.peft.method == "none") == (method == "full")
