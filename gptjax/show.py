"""What a model is trained on: a row of a config's data, what is learnt in it set apart.

    python -m gptjax.show --config=configs/finetune.py:task=chat --config.init_from=hf:FOLDER \\
      --config.data.path=chats.jsonl [--row=N] [--workdir=runs/chat]

The row is the N-th of training, from 0. Targets that count in the loss are bright, or between ⟦ ⟧
where the output is no terminal. With --workdir the tokenizer is that of the run.
"""

import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from absl import flags
from etils import epath

from gptjax import config as config_lib
from gptjax.data import pipeline
from gptjax.data.batch import Batch
from gptjax.data.tokenizer import Tokenizer, open_saved
from gptjax.errors import UserError
from gptjax.plan import INIT_FROM
from gptjax.pretrained import TOKENIZER, tokenizer_of

FLAGS = flags.FLAGS
# Learnt, not learnt: bold green and faint of ECMA-48.
_COLOURS = (("\033[1;32m", "\033[0m"), ("\033[2m", "\033[0m"))
_MARKS = (("⟦", "⟧"), ("", ""))


def describe_row(row: Batch, tokenizer: Tokenizer, *, colours: bool) -> Iterator[str]:
  """Yields the text of each segment of a row, fields [T], under a line that says how long it is."""
  learnt, other = _COLOURS if colours else _MARKS
  segments = int(row.segment_ids.max())
  yield (
    f"{segments} segments in {np.count_nonzero(row.segment_ids)} of {len(row.inputs)} places, "
    f"{np.count_nonzero(row.weights)} targets learnt"
  )
  for segment in range(1, segments + 1):
    inside = row.segment_ids == segment
    targets, weights = row.targets[inside], row.weights[inside]
    yield f"--- segment {segment}: {len(targets)} targets, {np.count_nonzero(weights)} learnt"
    tokens = zip([row.inputs[inside][0], *targets], [False, *(weights > 0)], strict=True)
    runs = itertools.groupby(tokens, key=lambda token: token[1])
    yield "".join(
      f"{before}{text_of(tokenizer, [int(token) for token, _ in run])}{after}"
      for is_learnt, run in runs
      for before, after in [learnt if is_learnt else other]
    )


def text_of(tokenizer: Tokenizer, tokens: list[int]) -> str:
  """The text of a piece of a document, special tokens by their names."""
  names = {token: text.encode() for text, token in tokenizer.specials.items()}
  pieces = (names.get(token) or tokenizer.decode_bytes([token]) for token in tokens)
  return b"".join(pieces).decode("utf-8", errors="replace")


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
    dataset = pipeline.open_dataset(config, folder, progress=True)
    step, number = divmod(FLAGS.row, config.batch_size)
    row = jax.tree.map(lambda field: field[number], dataset.training_batch(step))
    print(f"row {FLAGS.row}, of step {step + 1}: ", end="")
    for line in describe_row(row, dataset.tokenizer, colours=sys.stdout.isatty()):
      print(line)


def _define_flags() -> None:
  flags.DEFINE_string("config", None, "FILE or FILE:ARGUMENT.", required=True)
  flags.DEFINE_string("workdir", None, "A run, whose tokenizer to use.")
  flags.DEFINE_integer("row", 0, "Which row of training, from 0.")


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
