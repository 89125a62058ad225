"""Arms of a fine-tuning, each trained with several seeds, and judged by an accuracy."""

import csv
import json
import os
import random
import re
import sys

import numpy as np
import pytest

from gptjax.sweeps import definition, report, results
from gptjax.sweeps.devices import Slot
from gptjax.sweeps.runner import Worker
from gptjax.sweeps.study import Study, sample_trial
from gptjax.training.loop import train
from tests.training.test_loop import ROOT

SMALL = {
  "total_epochs": 6.0,
  "batch_size": 8,
  "sequence_length": 32,
  "tokenizer": "bytes",
  "model.num_layers": 1,
  "model.embed_dim": 16,
  "model.num_heads": 1,
  "model.mlp_dim": 16,
  "optim.learning_rate": 0.01,
  "log.tensorboard": False,
  "eval.patience": 2,
  "checkpoint.keep": 1,
}


@pytest.fixture
def sweep(tmp_path):
  """A sweep over the learning rate, of texts that are shouted or not, some labelled wrongly."""
  rng = random.Random(0)
  for name in ("train", "validation"):
    lines = []
    for _ in range(64):
      loud = rng.random() < 0.5
      text = " ".join(rng.choices(["yes", "no", "so", "it", "is"], k=rng.randint(1, 4)))
      label = "loud" if loud != (rng.random() < 0.1) else "quiet"
      lines.append(json.dumps({"text": text.upper() if loud else text, "label": label}))
    (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
  paths = {
    "data.path": str(tmp_path / "train.jsonl"),
    "data.validation_path": str(tmp_path / "validation.jsonl"),
  }
  path = tmp_path / "sweep.py"
  path.write_text(
    "from gptjax import config\n"
    "from gptjax.sweeps.definition import cross, seeds\n"
    "def base():\n"
    f"  return config.load('{ROOT}/configs/finetune.py:task=classification,model=debug',\n"
    f"                     {SMALL | paths})\n"
    "def sweep():\n"
    "  return cross({'idle': {'optim.learning_rate': 1e-9}, 'learns': {}}, seeds(2))\n"
  )
  return definition.load(str(path), {}, sample_trial)


@pytest.mark.slow
def test_the_arm_of_higher_accuracy_is_the_better_one(sweep, tmp_path, capsys):
  workdir = tmp_path / "run"
  workdir.mkdir()
  made = {"idle": [], "learns": []}
  for trial in sweep.trials.values():
    # Trained here, which needs no process that imports everything again for each.
    config = trial.config.copy_and_resolve_references()
    result = train(config, workdir / "trials" / trial.folder)
    made[trial.arm].append(result["val/accuracy"])
  study = Study(sweep, workdir, "journal")
  slots, command = [Slot({}, tuple(os.sched_getaffinity(0)))], [sys.executable, "-c", ""]
  states = Worker(sweep, study, workdir, slots, command=lambda folder: command).run()
  assert set(states.values()) == {"done"}
  runs = results.load_results(str(workdir)).runs
  assert all(run.exhausted for run in runs if run.arm == "idle")
  # The start and three epochs, of 6, of which the last two were not better.
  assert all(len(run.lines) == 4 for run in runs if run.arm == "idle")
  capsys.readouterr()
  assert report.report(str(workdir))
  printed = capsys.readouterr().out
  assert "Validation accuracy, higher is better" in printed
  assert re.search(r"Winner: learns, .* above idle|learns has the best mean", printed)
  with (workdir / "report.csv").open() as file:
    rows = {row["arm"]: row for row in csv.DictReader(file) if row["budget"] == "step"}
  assert np.mean(made["learns"]) > np.mean(made["idle"]) + 0.1
  for arm, accuracies in made.items():
    assert rows[arm]["n"] == "2"
    assert float(rows[arm]["mean"]) == pytest.approx(np.mean(accuracies))
    assert float(rows[arm]["sigma"]) == pytest.approx(np.std(accuracies, ddof=1))
  assert float(rows["learns"]["difference"]) > 0.1
  assert rows["learns"]["verdict"] != "worse"
