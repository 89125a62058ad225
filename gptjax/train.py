"""Trains a model.

    python -m gptjax.train --config=configs/pretrain.py:model=tiny,data=text \\
      --config.data.path=corpus/ --workdir=runs/first [--config.KEY=VALUE ...] [--dry_run]

Run again with the same --workdir, it goes on from the newest checkpoint, bit for bit; --workdir
alone is enough for that. The work
directory holds config.json, tokenizer/, checkpoints/, metrics.jsonl, tensorboard/ and loss.png.
"""

from collections.abc import Mapping

from absl import flags
from etils import epath

from gptjax import config as config_lib
from gptjax import wings
from gptjax.devices.hosts import join_hosts, leaves_at_once
from gptjax.errors import UserError
from gptjax.training.loop import train

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_string(
    "config", None, "FILE or FILE:ARGUMENT; by default that of the run in --workdir."
  )
  flags.DEFINE_string("workdir", None, "Where the run lives; run again to resume.")
  flags.DEFINE_bool("dry_run", False, "Print what the run would be and take, and exit.")
  flags.DEFINE_bool(
    "distributed", False, "Join the other hosts of a TPU slice, a Slurm or an Open MPI job first."
  )
  flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where JAX finds no hosts.")
  flags.DEFINE_integer("num_processes", None, "With --coordinator: of the job.")
  flags.DEFINE_integer("process_id", None, "With --coordinator: of this process, from 0.")


def config_of_run(workdir: str | None) -> str:
  """The config file of the run that is to go on; UserError if there is none."""
  path = epath.Path(workdir or "").expanduser() / config_lib.CONFIG_FILE
  if not workdir or not path.exists():
    without = f", and --workdir={workdir} has no run to go on with" if workdir else ""
    raise UserError(
      f"--config is missing{without}: a file such as configs/pretrain.py:model=tiny,data=text."
    )
  return str(path)


def main(overrides: Mapping[str, str]) -> None:
  explicit = (FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
  if FLAGS.distributed or explicit != (None, None, None):
    join_hosts(*explicit)
  config = config_lib.load(FLAGS.config or config_of_run(FLAGS.workdir), overrides)
  if FLAGS.dry_run:
    wings.load("gptjax.diagnosis.dry_run:dry_run", "--dry_run")(config)
  elif not FLAGS.workdir:
    raise UserError("--workdir is missing: the directory that the run lives in.")
  else:
    with leaves_at_once():
      train(config, FLAGS.workdir)


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
