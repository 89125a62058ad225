"""Shows a row of a config's training data, with the learnt targets highlighted.

    python -m gptjax.show --config=configs/finetune.py:task=chat --config.init_from=hf:FOLDER \\
      --config.data.path=chats.jsonl [--row=N] [--workdir=runs/chat]

The row is the N-th of training, from 0. Targets that count in the loss are bright, or between ⟦ ⟧
if the output is no terminal. With --workdir the tokenizer of that run is used.
"""

import sys
import tempfile
from collections.abc import Mapping

import jax
from absl import flags
from etils import epath

from gptjax import config as config_lib
from gptjax.data.tokenizer import open_saved
from gptjax.errors import UserError
from gptjax.training.datasets import open_dataset
from gptjax.training.pretrained import TOKENIZER, tokenizer_of
from gptjax.training.resolve import INIT_FROM
from gptjax.training.show import describe_row

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_string("config", None, "FILE or FILE:ARGUMENT.", required=True)
  flags.DEFINE_string("workdir", None, "A run, whose tokenizer to use.")
  flags.DEFINE_integer("row", 0, "Which row of training, from 0.")


def main(overrides: Mapping[str, str]) -> None:
  config = config_lib.load(FLAGS.config, overrides)
  if config.objective != "next_token":
    raise UserError(f"objective={config.objective!r}: only rows of 'next_token' are shown.")
  if FLAGS.row < 0:
    raise UserError(f"--row={FLAGS.row}: rows are numbered from 0.")
  with config.unlocked():
    if config.tokenizer == INIT_FROM:
      config.tokenizer = tokenizer_of(config.init_from)
  with tempfile.TemporaryDirectory() as folder:
    if FLAGS.workdir:  # Nothing is written there.
      tokenizer = open_saved(epath.Path(FLAGS.workdir) / TOKENIZER)
      if tokenizer is None:
        raise UserError(f"--workdir={FLAGS.workdir}: no run has kept its tokenizer there.")
      tokenizer.save(epath.Path(folder) / TOKENIZER)
    dataset = open_dataset(config, folder, progress=True)
    step, number = divmod(FLAGS.row, config.batch_size)
    row = jax.tree.map(lambda field: field[number], dataset.training_batch(step))
    print(f"row {FLAGS.row}, of step {step + 1}: ", end="")
    for line in describe_row(row, dataset.tokenizer, colours=sys.stdout.isatty()):
      print(line)


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
