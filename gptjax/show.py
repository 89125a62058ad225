"""Shows a row of a config's training data, with the learnt targets highlighted.

    python -m gptjax.show --config=configs/finetune.py:task=chat --config.init_from=hf:FOLDER \\
      --config.data.path=chats.jsonl [--row=N] [--workdir=runs/chat]

The row is the N-th of training, from 0. Targets that count in the loss are bright, or between ⟦ ⟧
where the output is no terminal: of a task with labels the tokens that are scored, and the label
below. With --workdir the tokenizer is that of the run.
"""

import itertools
import json
import operator
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from gptjax import config as config_lib
from gptjax.data.batch import Batch
from gptjax.data.pipeline import Dataset
from gptjax.data.tokenizer import Tokenizer, open_saved
from gptjax.errors import UserError, check_number
from gptjax.objectives.task import Task, make_task
from gptjax.training.datasets import open_dataset
from gptjax.training.pretrained import TOKENIZER
from gptjax.training.resolve import resolve

FLAGS = flags.FLAGS

# Learnt, not learnt: bold green and faint of ECMA-48.
_COLOURS = (("\033[1;32m", "\033[0m"), ("\033[2m", "\033[0m"))
_MARKS = (("⟦", "⟧"), ("", ""))


def _define_flags() -> None:
  flags.DEFINE_string("config", None, "FILE or FILE:ARGUMENT.", required=True)
  flags.DEFINE_string("workdir", None, "A run, whose tokenizer to use.")
  flags.DEFINE_integer("row", 0, "Which row of training, from 0.")


def describe_row(
  row: Batch,
  tokenizer: Tokenizer,
  *,
  colours: bool,
  in_place: bool = False,
  labels: Mapping[int, Any] | None = None,
) -> Iterator[str]:
  """Yields the text of each segment of a row, fields [T], under a line that says how long it is.

  Args:
    row: its fields are NumPy arrays.
    tokenizer: of the row.
    colours: set apart what is learnt by colours, not by marks.
    in_place: a target is the token at its place, as of a masked text, not the one that follows.
    labels: {segment: what is to be said of it}; the targets are no tokens then.
  """
  learnt, other = _COLOURS if colours else _MARKS
  segments = int(row.segment_ids.max())
  yield (
    f"{segments} segments in {np.count_nonzero(row.segment_ids)} of {len(row.inputs)} places, "
    f"{np.count_nonzero(row.weights)} targets learnt"
  )
  for segment in range(1, segments + 1):
    inside = row.segment_ids == segment
    inputs, targets, counts = row.inputs[inside], row.targets[inside], row.weights[inside] > 0
    yield f"--- segment {segment}: {len(targets)} targets, {np.count_nonzero(counts)} learnt"
    if row.encoder_inputs is not None:
      yield text_of(tokenizer, row.encoder_inputs[row.encoder_segment_ids == segment].tolist())
    if labels is not None:
      tokens = zip(inputs, counts, strict=True)
    elif in_place:
      tokens = zip(np.where(counts, targets, inputs), counts, strict=True)
    else:
      tokens = zip([inputs[0], *targets], [False, *counts], strict=True)
    runs = itertools.groupby(tokens, key=lambda token: token[1])
    yield "".join(
      f"{before}{text_of(tokenizer, [int(token) for token, _ in run])}{after}"
      for is_learnt, run in runs
      for before, after in [learnt if is_learnt else other]
    )
    if labels and segment in labels:
      yield f"= {json.dumps(labels[segment], ensure_ascii=False)}"


def text_of(tokenizer: Tokenizer, tokens: list[int]) -> str:
  """The text of a piece of a document, special tokens by their names."""
  names = {token: text.encode() for text, token in tokenizer.specials.items()}
  pieces = (names.get(token) or tokenizer.decode_bytes([token]) for token in tokens)
  return b"".join(pieces).decode("utf-8", errors="replace")


def find_row(dataset: Dataset, task: Task, config: ConfigDict, number: int) -> tuple[int, Batch]:
  """The step, from 0, in which a row of training is, and a batch of that row alone."""
  # How many rows a batch has that is packed out of examples, only packing tells.
  step, number = (0, number) if task.packs_batches else divmod(number, config.batch_size)
  while True:
    batch = dataset.training_batch(step)
    rows = np.flatnonzero(batch.segment_ids.any(axis=1))
    if number < len(rows):
      alone = slice(rows[number], rows[number] + 1)
      return step, jax.tree.map(operator.itemgetter(alone), batch)
    step, number = step + 1, number - len(rows)


def labels_of_row(task: Any, row: Batch) -> dict[int, Any]:
  """{segment: what a task with labels wants said of it}, of a batch of one row."""
  scored = dict.fromkeys(row.segment_ids[row.weights > 0].tolist())
  nothing = np.zeros((*row.inputs.shape, task.num_labels), np.float32)
  answers = task.answers(row, nothing)
  return {segment: task.say(one.gold) for segment, one in zip(scored, answers, strict=True)}


def main(overrides: Mapping[str, str]) -> None:
  check_number("--row", FLAGS.row, at_least=0)
  config = resolve(config_lib.load(FLAGS.config, overrides))
  task = make_task(config.task)
  with tempfile.TemporaryDirectory() as folder:
    if FLAGS.workdir:  # Nothing is written there.
      tokenizer = open_saved(epath.Path(FLAGS.workdir) / TOKENIZER)
      if tokenizer is None:
        raise UserError(f"--workdir={FLAGS.workdir}: no run has kept its tokenizer there.")
      tokenizer.save(epath.Path(folder) / TOKENIZER)
    dataset = open_dataset(config, folder, progress=True)
    step, batch = find_row(dataset, task, config, FLAGS.row)
    print(f"row {FLAGS.row}, of step {step + 1}: ", end="")
    for line in describe_row(
      jax.tree.map(lambda field: field[0], batch),
      dataset.tokenizer,
      colours=sys.stdout.isatty(),
      in_place=config.model.visibility == "bidirectional",
      labels=None if task.predicts_tokens else labels_of_row(task, batch),
    ):
      print(line)


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
