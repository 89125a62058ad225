"""Runs the trials of a sweep file, and compares what came out.

    python -m gptjax.sweep --sweep=experiments/NAME/sweep.py [--parallel=N] [--workdir=DIR] \\
      [--config.KEY=VALUE ...] [--storage=journal|URL] [--retry_failed] [--dry_run]
    python -m gptjax.sweep report WORKDIR
    python -m gptjax.sweep compare RUN_A RUN_B [--exact]
    python -m gptjax.sweep scaling WORKDIR

gptjax/sweeps/definition.py says what a sweep file is; its arms are compared by any metric that the
validation tells, as mean and deviation over their seeds. Each trial is a `gptjax.train` in a
process and a work directory of its own. Stopped, killed or started again on other hosts that share
the work directory, the sweep goes on with what is missing; each trial is run once. The study lives
in WORKDIR/study.db; where hosts share a network file system use --storage=journal, or a database:
--storage=postgresql://USER@HOST/DATABASE. The exit status is 1 unless every trial is done or
pruned, and of `compare` if the runs differ.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from gptjax import config as config_lib
from gptjax.errors import UserError, did_you_mean
from gptjax.training.checkpoints import lower_is_better
from gptjax.training.setup import length_without_data

FLAGS = flags.FLAGS


# What each command needs is imported when it runs: a report needs no Optuna.
def run(overrides: Mapping[str, str]) -> int:
  from gptjax.sweeps import definition, devices, preview, runner, study

  if not FLAGS.sweep:
    raise UserError(f"--sweep is missing: the sweep file, or one of {', '.join(COMMANDS)}.")
  if "://" in (FLAGS.workdir or ""):
    raise UserError(f"--workdir={FLAGS.workdir}: a sweep needs a folder of a file system.")
  host = devices.find_host(FLAGS.parallel)
  slots = devices.split(host, FLAGS.parallel)
  sweep = definition.load(FLAGS.sweep, overrides, study.sample_trial)
  workdir = Path(FLAGS.workdir or f"runs/{sweep.name}").expanduser().resolve()
  runner.check_unchanged(sweep, workdir)
  if FLAGS.dry_run:
    print(preview.preview(sweep, workdir, host, FLAGS.parallel))
    return 0
  workdir.mkdir(parents=True, exist_ok=True)
  search = sweep.search
  queue = study.Study(
    FLAGS.storage,
    workdir.name,
    workdir,
    sweep.trials,
    sampler=search and (lambda number: study.make_sampler(search.sampler, search.seed, number)),
    pruner=search and study.make_pruner(search.pruner, first_validation(sweep.base)),
    lower_is_better=lower_is_better(sweep.metric),
    grace_seconds=FLAGS.grace_seconds,
  )
  states = runner.Worker(sweep, queue, workdir, slots).run(retry_failed=FLAGS.retry_failed)
  counts = ", ".join(f"{count} {state}" for state, count in Counter(states.values()).items())
  print(f"{workdir}: {counts} of {len(states)} trials")
  return int(not {"done", "pruned"}.issuperset(states.values()))


def first_validation(config) -> int | str:
  """The step of the first validation after the start; 'auto' where only the data tells.

  Raises:
    UserError: there is none.
  """
  length = length_without_data(config)
  if length is None or "every_epochs" in config.eval:
    return "auto"
  steps = length.steps(config.eval, "every")
  if not steps:
    raise UserError("SEARCH['pruner']='halving' needs validations: set eval.every_steps.")
  return steps


def report(workdir: str) -> None:
  from gptjax.sweeps import report

  report.report(workdir)


def compare(run_a: str, run_b: str) -> int:
  from gptjax.sweeps import report

  return int(not report.compare(run_a, run_b, exact=FLAGS.exact))


def scaling(workdir: str) -> None:
  from gptjax.sweeps import scaling

  scaling.scaling(workdir)


COMMANDS = {
  "report": (report, ("WORKDIR",)),
  "compare": (compare, ("RUN_A", "RUN_B")),
  "scaling": (scaling, ("WORKDIR",)),
}


def main(overrides: Mapping[str, str], words: Sequence[str]) -> int | None:
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
  flags.DEFINE_float("grace_seconds", 120.0, "Silence after which a worker is held for dead.")
  flags.DEFINE_bool("retry_failed", False, "Run the trials again that failed.")
  flags.DEFINE_bool("dry_run", False, "Print the arms and what they would take, and exit.")
  flags.DEFINE_bool("exact", False, "compare: the runs must agree bit for bit.")


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__, words=True)
