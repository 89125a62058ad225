"""The model card of a run, README.md beside the weights that are written for `transformers`."""

from pathlib import Path
from string import Template

from etils import epath

from gptjax import config as config_lib
from gptjax.objectives.task import Task, find_task
from gptjax.training.metrics import read_metrics


def model_card(run: epath.Path, step: int, architecture: str) -> str:
  """Tells what a run trained to a step, on which data, and what it measured at that step."""
  config = config_lib.open_saved(run)
  parts = config.data.mixture.values() or [config.data]
  lines = [line for line in read_metrics(run) if line["step"] == step]
  measured = {name: x for line in lines for name, x in line.items() if name.startswith("val/")}
  rows = [f"| {name} | {x:.4f} |" for name, x in measured.items() if x is not None]
  return Template(Path(__file__).with_suffix(".md").read_text()).substitute(
    architecture=architecture,
    base=config.init_from or "none, from random weights",
    task=config.task.name,
    data=", ".join(f"{part.source} {part.path}".strip() for part in parts),
    step=step,
    measured="\n".join(rows or ["| nothing was measured | |"]),
    command=_command(find_task(config.task.name)),
  )


def _command(task: type[Task]) -> str:
  """The command for which a model of the task has been trained."""
  if task.writes_text:
    return "generate --checkpoint=FOLDER --prompt=TEXT"
  if not task.predicts_tokens:
    return "predict --checkpoint=FOLDER --input=FILE --output=FILE"
  return "train --config=finetune.py --config.init_from=FOLDER --workdir=DIR"
