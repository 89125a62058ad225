"""Averages of fine-tunings beside the best single one and the ensemble of their logits.

    python -m experiments.compression.soups --runs=runs/soups

MiniLM is fine-tuned on the film reviews of `vader_movies` with the settings of `VARIANTS`, from one
head. The best single model and what is in the greedy soup are chosen by the validation file; the
test file judges. Runs that are there are not trained again. Writes soups.json and its part of
README.md.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx

from experiments.datasets import fetch
from gptjax import config as config_lib
from gptjax.compression.average import Params, greedy_soup, mean
from gptjax.compression.ensemble import Ensemble
from gptjax.compression.models import load_whole, params_of, with_params
from gptjax.data import files
from gptjax.data.options import read_options
from gptjax.devices.hosts import prepare_cpu
from gptjax.errors import UserError
from gptjax.finetuning.labels import LabelOutputs
from gptjax.finetuning.predict import config_of
from gptjax.objectives.task import make_task
from gptjax.scores import scores
from gptjax.training.step import make_eval_step

FLAGS = flags.FLAGS
HERE = Path(__file__).parent
# One seed, so that all have the same head at the start.
VARIANTS = (
  {"optim.learning_rate": 1e-4},
  {"optim.learning_rate": 5e-5},
  {"optim.learning_rate": 2e-4},
  {"optim.learning_rate": 2e-4, "batch_size": 16},
)
# Records that are put to a model at a time.
BATCH = 32
COMMON = {
  "total_epochs": 1.0,
  "batch_size": 8,
  "sequence_length": 64,
  "model.label_head.pooling": "mean",
  "log.tensorboard": False,
  "checkpoint.keep": 1,
}


def train(number: int, workdir: Path) -> None:
  """Fine-tunes a variant, by the command that a user would give."""
  data = fetch("vader_movies")
  paths = {"data.path": data / "train.jsonl", "data.validation_path": data / "validation.jsonl"}
  changes = {**COMMON, **VARIANTS[number], **paths, "init_from": f"hf:{fetch('minilm')}"}
  command = [
    sys.executable,
    "-m",
    "gptjax.train",
    "--config=configs/finetune.py:task=classification",
  ]
  command += [f"--config.{key}={value}" for key, value in changes.items()]
  subprocess.run([*command, f"--workdir={workdir}"], check=True)


class Judge:
  """Puts a file's records to models of one run's config, which are compiled once."""

  def __init__(self, run: Path):
    run_config = config_of(str(run))
    self.task, self.data = make_task(run_config.task), read_options(run_config)
    model, tokenizer = load_whole(str(run), progress=False)
    self.config, self.examples, self._steps = model.config, {}, {}
    for split in ("validation", "test"):
      lines = files.open_by_suffix(str(fetch("vader_movies") / f"{split}.jsonl"), "", "error")
      texts = self.task.read_records(lines, "text")
      encoded = self.task.encode(texts, tokenizer, self.data, progress=False)
      self.examples[split] = encoded.examples

  def right(self, params: Params | Ensemble, split: str) -> np.ndarray:
    """Whether each record of the file is given its label, booleans [N]."""
    model = params if isinstance(params, Ensemble) else with_params(self.config, params)
    graph, state = nnx.split(model)
    if graph not in self._steps:
      self._steps[graph] = make_eval_step(graph, self.task)
    found, examples = [], self.examples[split]
    for first in range(0, len(examples), BATCH):
      batch, packed = self.task.pack(examples[first : first + BATCH], self.data)
      outputs = LabelOutputs(self.task)
      outputs.add(jax.device_get(self._steps[graph](state, batch)[1]))
      found += [outputs.answers[place] for place in np.argsort(packed)]
    return np.array([one.gold == one.predicted for one in found])


def compare(models: list[Params], judge: Judge) -> list[dict[str, Any]]:
  """What each way gets right of the test file, and how it differs from the best single model."""
  validation = [judge.right(model, "validation").mean() for model in models]
  best = int(np.argmax(validation))
  soup, chosen = greedy_soup(models, lambda params: judge.right(params, "validation").mean())
  ways = {f"single {number}": judge.right(model, "test") for number, model in enumerate(models)}
  whole = Ensemble([with_params(judge.config, model) for model in models])
  ways["ensemble of all"] = judge.right(whole, "test")
  ways["mean of all"] = judge.right(mean(models), "test")
  ways[f"greedy soup of {len(chosen)}"] = judge.right(soup, "test")
  told = []
  for name, right in ways.items():
    own = right.astype(float)
    apart = own - ways[f"single {best}"]
    told.append(
      {
        "name": f"{name}, the best in validation" if name == f"single {best}" else name,
        "accuracy": _as_dict(scores.bootstrap(scores.mean_of(own), len(own))),
        "over best": _as_dict(scores.bootstrap(scores.mean_of(apart), len(own))),
        "passes": len(models) if name.startswith("ensemble") else 1,
      }
    )
    if name.startswith("single"):
      told[-1]["validation"] = validation[int(name.split()[1])]
      told[-1]["settings"] = VARIANTS[int(name.split()[1])]
  return told


def _as_dict(metric: scores.Metric) -> dict[str, float]:
  return {"value": metric.value, "low": metric.low, "high": metric.high}


def table(told: list[Mapping[str, Any]]) -> str:
  lines = [
    "| model | settings | validation | test | over the best single | forward passes |",
    "|---|---|---|---|---|---|",
  ]
  for one in told:
    settings = ", ".join(
      f"{key.rpartition('.')[2]} {x}" for key, x in one.get("settings", {}).items()
    )
    validation = f"{one['validation']:.3f}" if "validation" in one else ""
    figures = []
    for name, form in (("accuracy", ".3f"), ("over best", "+.3f")):
      value, low, high = one[name]["value"], one[name]["low"], one[name]["high"]
      figures.append(f"{value:{form}} [{low:{form}}, {high:{form}}]")
    cells = [one["name"], settings, validation, *figures, str(one["passes"])]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def main(overrides: Mapping[str, str]) -> None:
  if overrides:
    raise UserError("this takes no --config.KEY flags.")
  runs = [Path(FLAGS.runs) / str(number) for number in range(len(VARIANTS))]
  for number, run in enumerate(runs):
    train(number, run)  # Goes on, or finds that it is done.
  prepare_cpu()
  models = [jax.device_get(params_of(load_whole(str(run), progress=False)[0])) for run in runs]
  told = compare(models, Judge(runs[0]))
  (HERE / "soups.json").write_text(json.dumps(told, indent=2) + "\n")
  readme = HERE / "README.md"
  part = re.compile(r"(?<=<!-- soups -->\n).*(?=<!-- end of soups -->)", re.DOTALL)
  readme.write_text(part.sub(lambda _: table(told), readme.read_text()))


if __name__ == "__main__":
  flags.DEFINE_string("runs", "runs/soups", "The folder of all runs.")
  config_lib.run_app(main, __doc__)
