"""Trains a model.

    python -m gptjax.train --config=configs/pretrain.py:model=tiny,data=text \\
      --config.data.path=corpus/ --workdir=runs/first [--config.KEY=VALUE ...] [--dry_run]

Run again with the same --workdir, it goes on from the newest checkpoint, bit for bit. The work
directory holds config.json, tokenizer/, checkpoints/, metrics.jsonl, tensorboard/ and loss.png.
"""

from collections.abc import Mapping

from absl import flags

from gptjax import config as config_lib
from gptjax.devices.hosts import join_hosts, leaves_at_once
from gptjax.errors import UserError
from gptjax.training.dry_run import dry_run
from gptjax.training.loop import train

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_string(
    "config", None, "FILE or FILE:ARGUMENT; override with --config.KEY=VALUE.", required=True
  )
  flags.DEFINE_string("workdir", None, "Where the run lives; run again to resume.")
  flags.DEFINE_bool("dry_run", False, "Print what the run would be and take, and exit.")
  flags.DEFINE_bool(
    "distributed", False, "Join the other hosts of a TPU slice, a Slurm or an Open MPI job first."
  )
  flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where JAX finds no hosts.")
  flags.DEFINE_integer("num_processes", None, "With --coordinator: of the job.")
  flags.DEFINE_integer("process_id", None, "With --coordinator: of this process, from 0.")


def main(overrides: Mapping[str, str]) -> None:
  explicit = (FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
  if FLAGS.distributed or explicit != (None, None, None):
    join_hosts(*explicit)
  config = config_lib.load(FLAGS.config, overrides)
  if FLAGS.dry_run:
    dry_run(config)
  elif not FLAGS.workdir:
    raise UserError("--workdir is missing: the directory that the run lives in.")
  else:
    with leaves_at_once():
      train(config, FLAGS.workdir)


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
