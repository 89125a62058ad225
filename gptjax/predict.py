"""Labels for new texts, by a fine-tuned classifier or tagger.

    python -m gptjax.predict --checkpoint=runs/sentiment --input=new.jsonl --output=labelled.jsonl
    python -m gptjax.predict --checkpoint=hf:FOLDER --input=new.jsonl --output=labelled.csv

The input has records like those of training; labels that they have are not read. The output has a
line for each, in the same order: its text, the label (the labels, the number, or the tag of each
word) and the probabilities; .csv is a table. A text that is longer than a row is read in windows,
whose probabilities are averaged, or with --overlong=head_tail or head only in part, which its line
then says.
"""

from collections.abc import Mapping
from pathlib import Path

from absl import flags

from gptjax import config as config_lib
from gptjax.devices.hosts import prepare_cpu
from gptjax.errors import UserError
from gptjax.finetuning.predict import OVERLONG, config_of, predict, write
from gptjax.training.pretrained import load_model

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_string(
    "checkpoint", None, "A run, or a folder of Hugging Face's with a head of labels.", required=True
  )
  flags.DEFINE_bool("ema", False, "Use the exponential moving average of the weights.")
  flags.DEFINE_string("input", None, "Records to label.", required=True)
  flags.DEFINE_string(
    "output", None, "FILE.jsonl or FILE.csv, which must not exist.", required=True
  )
  flags.DEFINE_enum("overlong", "windows", OVERLONG, "What is read of a text longer than a row.")
  flags.DEFINE_integer("max_length", 0, "Tokens of a row; 0 is that of training.", lower_bound=0)
  flags.DEFINE_integer("batch_size", 32, "Texts of a batch.", lower_bound=1)
  flags.DEFINE_string("text_key", "", "Where the text of a record is; by default as in training.")


def main(overrides: Mapping[str, str]) -> None:
  if overrides:
    raise UserError("gptjax.predict takes no --config.KEY flags; a run's config comes with it.")
  output = Path(FLAGS.output).expanduser()
  if output.exists():
    raise UserError(f"--output={FLAGS.output} is there already; nothing is overwritten.")
  if not output.parent.is_dir():
    raise UserError(f"--output={FLAGS.output}: no folder {output.parent}.")
  prepare_cpu()
  config = config_of(FLAGS.checkpoint)
  model, tokenizer = load_model(FLAGS.checkpoint, ema=FLAGS.ema)
  predictions = predict(
    FLAGS.input,
    config,
    model,
    tokenizer,
    overlong=FLAGS.overlong,
    max_length=FLAGS.max_length,
    batch_size=FLAGS.batch_size,
    text_key=FLAGS.text_key,
    progress=True,
  )
  print(write(FLAGS.output, predictions))


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
