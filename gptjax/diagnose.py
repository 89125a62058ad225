"""Diagnoses a training run, or one that is planned.

    python -m gptjax.diagnose coordinates --config=configs/pretrain.py:model=tiny,data=stdlib \\
      --config.model.transfer.parametrization=mup --config.model.transfer.base_embed_dim=64 \\
      --widths=64,128,256,512,1024 --workdir=runs/coordinates
    python -m gptjax.diagnose learning_rate --config=configs/pretrain.py:model=tiny,data=stdlib \\
      --workdir=runs/range
    python -m gptjax.diagnose noise_scale --checkpoint=runs/first
    python -m gptjax.diagnose spikes runs/first

coordinates: does the size of activations depend on width? learning_rate: between which rates does
the loss fall? noise_scale: how large a batch is worth it? spikes: which batches did the loss jump
on? The first two train the config briefly, the others read a run. Statistics of each layer during
training: --config.log.layers_every_steps=N of gptjax.train.
"""

from collections.abc import Mapping, Sequence

from absl import flags
from etils import epath

from gptjax import config as config_lib
from gptjax.devices.hosts import prepare_cpu
from gptjax.diagnosis import coordinates, learning_rate, noise_scale, spikes
from gptjax.errors import UserError, did_you_mean
from gptjax.training.loop import open_data
from gptjax.training.resolve import resolve
from gptjax.training.setup import make_setup
from gptjax.training.workdir import make_workdir

FLAGS = flags.FLAGS
WORDS = ("coordinates", "learning_rate", "noise_scale", "spikes")


def train_briefly(word: str, overrides: Mapping[str, str]) -> None:
  """Runs one of the diagnoses that train a config."""
  if not FLAGS.config or not FLAGS.workdir:
    raise UserError(f"{word} needs --config=FILE and --workdir=DIR, where tables and pictures go.")
  if not all(width.isdigit() for width in FLAGS.widths):
    raise UserError(f"--widths={','.join(FLAGS.widths)}: give whole numbers, as in 64,128,256.")
  config = config_lib.load(FLAGS.config, overrides)
  setup, workdir = make_setup(resolve(config)), make_workdir(FLAGS.workdir)
  dataset, steps = open_data(setup, workdir), FLAGS.steps
  if word == "coordinates":
    coordinates.check(
      config,
      dataset,
      workdir,
      widths=[int(width) for width in FLAGS.widths],
      steps=5 if steps is None else steps,
      seeds=FLAGS.seeds,
    )
  else:
    steps = 200 if steps is None else steps
    learning_rate.range_test(setup, dataset, workdir, low=FLAGS.low, high=FLAGS.high, steps=steps)


def main(overrides: Mapping[str, str], words: Sequence[str]) -> None:
  prepare_cpu()
  match [*words]:
    case ["coordinates" | "learning_rate" as word]:
      train_briefly(word, overrides)
    case ["noise_scale"]:
      if not FLAGS.checkpoint:
        raise UserError("--checkpoint is missing: the work directory of a run.")
      noise_scale.report(epath.Path(FLAGS.checkpoint), FLAGS.batches)
    case ["spikes", workdir]:
      spikes.report(epath.Path(workdir), FLAGS.window, FLAGS.threshold)
    case ["spikes", *_]:
      raise UserError("spikes WORKDIR: give the work directory of one run.")
    case [word, *_] if word not in WORDS:
      raise UserError(f"no diagnosis {word!r}. {did_you_mean(word, WORDS)}")
    case _:
      raise UserError(f"give one word of {', '.join(WORDS)}, and flags after it.")


def _define_flags() -> None:
  flags.DEFINE_string("config", None, "FILE or FILE:ARGUMENT; override with --config.KEY=VALUE.")
  flags.DEFINE_string("workdir", None, "Where tables and pictures go.")
  flags.DEFINE_string("checkpoint", None, "Work directory of the run, for noise_scale.")
  flags.DEFINE_integer("steps", None, "Of training; 5 for coordinates, 200 for learning_rate.")
  flags.DEFINE_list("widths", "64,128,256,512,1024", "Values of model.embed_dim, for coordinates.")
  flags.DEFINE_integer("seeds", 2, "Models of each width, for coordinates.")
  flags.DEFINE_float("low", 1e-5, "The first learning rate, for learning_rate.")
  flags.DEFINE_float("high", 1.0, "The last learning rate, for learning_rate.")
  flags.DEFINE_integer("batches", 32, "Micro-batches to measure, for noise_scale.")
  flags.DEFINE_integer("window", 50, "Logged steps that a loss is compared with, for spikes.")
  flags.DEFINE_float("threshold", 8.0, "Median absolute deviations above them, for spikes.")


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__, words=True)
