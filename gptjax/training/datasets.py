"""Opens the data of a run by its config and task, the same on all hosts."""

import json
import zlib
from typing import Any

import jax
from etils import epath

from gptjax.data import pipeline
from gptjax.data.pipeline import Dataset
from gptjax.devices.hosts import from_all_hosts
from gptjax.errors import UserError
from gptjax.objectives.task import make_task
from gptjax.small_files import read_json, write_atomically
from gptjax.training.setup import Setup

# The fingerprints of the data that a run was started with, in its folder.
DATA_FILE = "data.json"


def open_dataset(config: Any, workdir: epath.PathLike, **options: Any) -> Dataset:
  """Opens the data of a resolved config, with the options of `pipeline.open_dataset`."""
  return pipeline.open_dataset(config, workdir, make_task(config.task), **options)


def open_data(setup: Setup, workdir: epath.PathLike) -> Dataset:
  """Opens the data of a run on this host.

  Raises:
    UserError: as `pipeline.open_dataset`; the tokenizer has more tokens than the model; or hosts
      read different data.
  """
  dataset = pipeline.open_dataset(
    setup.config,
    workdir,
    setup.task,
    row_multiple=setup.row_multiple,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    progress=jax.process_index() == 0,
  )
  if dataset.tokenizer.vocab_size > setup.model.vocab_size:
    raise UserError(
      f"the tokenizer has {dataset.tokenizer.vocab_size} tokens, more than "
      f"model.vocab_size={setup.model.vocab_size}; set the latter to 0 to take the tokenizer's."
    )
  identity = json.dumps(dataset.fingerprints).encode()
  if len(set(from_all_hosts(zlib.crc32(identity)))) > 1:
    raise UserError(
      f"the hosts read different data: process {jax.process_index()} has {dataset.num_tokens:,} "
      "training tokens, another has others. Give all of them the same files."
    )
  return dataset


def check_data(dataset: Dataset, workdir: epath.Path, start: int) -> None:
  """Saves the fingerprints of a run's data; UserError if the run is resumed with other data.

  Args:
    dataset: the data that the run will use.
    workdir: folder of the run.
    start: the step that the run goes on from; 0 at its beginning.
  """
  path, found = workdir / DATA_FILE, dataset.fingerprints
  if start and path.exists():
    saved = read_json(path)
    changed = [name for name in {**found, **saved} if found.get(name) != saved.get(name)]
    if changed:
      raise UserError(
        f"{workdir}: at step {start}, but the run was started with another {', '.join(changed)}. "
        f"Give it its files back, or start in another --workdir (--config.init_from={workdir} "
        f"takes the weights along), or delete {path} to go on with what is there now."
      )
  elif jax.process_index() == 0:
    write_atomically(path, json.dumps(found, indent=2) + "\n")
