"""Runs the trials of a sweep file, and compares their results.

    python -m gptjax.sweep --sweep=experiments/NAME/sweep.py [--parallel=N] [--workdir=DIR] \\
      [--config.KEY=VALUE ...] [--storage=journal|URL] [--retry_failed] [--dry_run]
    python -m gptjax.sweep report WORKDIR
    python -m gptjax.sweep compare RUN_A RUN_B [--exact]
    python -m gptjax.sweep scaling WORKDIR

Examples:

    python -m gptjax.sweep --sweep=experiments/learning_efficiency/sweep.py --dry_run
    python -m gptjax.sweep --sweep=experiments/transfer/sweep.py --workdir=runs/transfer
    python -m gptjax.sweep report runs/transfer

gptjax/sweeps/definition.py describes sweep files. Each trial is a `gptjax.train` in a process and a
work directory of its own. Stopped, killed or started again on other hosts that share the work
directory, the sweep goes on with what is missing; each trial is run once, and goes on from its last
checkpoint if its process was killed. The study lives in WORKDIR/study.db; where hosts share a
network file system use --storage=journal, or a database: --storage=postgresql://USER@HOST/DATABASE.
The exit status is 1 unless every trial is done or pruned, 128 + the number of the signal that
stopped it, and with `compare` 1 if the runs differ.
"""

import importlib.util
from collections.abc import Mapping, Sequence

from absl import flags

from gptjax import config as config_lib
from gptjax.errors import UserError, did_you_mean

FLAGS = flags.FLAGS


# Each command imports what it needs when it runs, which takes seconds.
def run(overrides: Mapping[str, str]) -> int:
  from gptjax.sweeps import runner

  if not FLAGS.sweep:
    raise UserError(f"--sweep is missing: the sweep file, or one of {', '.join(COMMANDS)}.")
  if "://" in (FLAGS.workdir or ""):
    raise UserError(f"--workdir={FLAGS.workdir}: a sweep needs a folder of a file system.")
  return runner.run(
    FLAGS.sweep,
    overrides,
    workdir=FLAGS.workdir,
    parallel=FLAGS.parallel,
    storage=FLAGS.storage,
    grace_seconds=FLAGS.grace_seconds,
    retry_failed=FLAGS.retry_failed,
    dry_run=FLAGS.dry_run,
  )


def report(workdir: str) -> None:
  from gptjax.sweeps import report

  report.report(workdir)


def compare(run_a: str, run_b: str) -> int:
  from gptjax.sweeps import compare

  return int(not compare.compare(run_a, run_b, exact=FLAGS.exact))


def scaling(workdir: str) -> None:
  from gptjax.sweeps import scaling

  scaling.scaling(workdir)


COMMANDS = {
  "report": (report, ("WORKDIR",)),
  "compare": (compare, ("RUN_A", "RUN_B")),
  "scaling": (scaling, ("WORKDIR",)),
}


def main(overrides: Mapping[str, str], words: Sequence[str]) -> int | None:
  for library in ("optuna", "statsmodels"):
    if importlib.util.find_spec(library) is None:
      raise UserError(f'{library} is not installed: pip install ".[sweep]"')
  if not words:
    return run(overrides)
  name, *arguments = words
  if name not in COMMANDS:
    raise UserError(f"no command {name!r}. {did_you_mean(name, COMMANDS)}")
  command, expected = COMMANDS[name]
  if len(arguments) != len(expected):
    raise UserError(f"{name}: expected {' '.join(expected)}, got {len(arguments)} words.")
  return command(*arguments)


def _define_flags() -> None:
  flags.DEFINE_string("sweep", None, "The sweep file; override its base with --config.KEY=VALUE.")
  flags.DEFINE_string("workdir", None, "Where the sweep lives; runs/NAME by default.")
  flags.DEFINE_integer("parallel", 1, "Trials at once on this host, each on its own devices.")
  flags.DEFINE_string("storage", "", "'journal' or a database's URL; WORKDIR/study.db by default.")
  flags.DEFINE_integer(
    "grace_seconds", 120, "Silence after which a worker is held for dead.", lower_bound=4
  )
  flags.DEFINE_bool("retry_failed", False, "Run the trials again that failed.")
  flags.DEFINE_bool("dry_run", False, "Print the arms and what they would take, and exit.")
  flags.DEFINE_bool("exact", False, "compare: the runs must agree bit for bit.")


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__, words=True)
