"""Estimates memory and time of a config on accelerators that are not here, by their own compiler.

    python -m gptjax.compile --topology=v5e-16 \\
      --config=configs/pretrain.py:model=gpt3-1.3b,mesh=fsdp --config.batch_size=64 \\
      --config.sequence_length=2048 --config.model.dtype=bfloat16 \\
      --config.model.execution.remat=dots

With --mode=decode, the estimate is of writing text: one token for each of --batch rows, with a
key-value cache of --context positions, by the engine that `gptjax.generate` runs. --weights=int8
keeps the weights in int8, bfloat16 in half of float32; by default they have the model's dtype.

    python -m gptjax.compile --mode=decode --batch=16 --context=2048 --topology=v5e-4 \\
      --config=configs/pretrain.py:model=gpt3-1.3b --config.model.dtype=bfloat16

With --search, it looks for the fastest layout: tries meshes, recomputation, micro-batches,
attention kernels and compiler options, and ranks them.
--write=configs/parts/tuned/NAME.json keeps the best, for configs/pretrain.py:model=...,tuned=NAME.

Needs no accelerator, but its compiler: pip install 'jax[tpu]' for TPUs, on Linux and x86-64, or
'jax[cuda13]' for NVIDIA GPUs (--topology=h100-8).
"""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
from absl import flags
from etils import epath

from gptjax import config as config_lib
from gptjax.compiler import search
from gptjax.compiler.decoding import compile_decoding, make_decoding_plan
from gptjax.compiler.gpu import find_gpus, is_name
from gptjax.compiler.report import Report, Work, compile_report, to_text
from gptjax.compiler.topology import Slice, Target, find_slice
from gptjax.errors import UserError
from gptjax.inference.form import WEIGHTS
from gptjax.training.resolve import resolve
from gptjax.training.setup import Setup, make_setup

FLAGS = flags.FLAGS


def compile_training(setup: Setup, target: Target) -> Report:
  """Compiles the step that `gptjax.train` would run, and reports on it."""
  optimizer = setup.make_optimizer(setup.run_length)
  frozen = setup.frozen(setup.abstract_base(), setup.abstract_second())
  arguments = (setup.abstract_state(optimizer), setup.abstract_batch(), frozen)
  tokens = setup.config.batch_size * setup.config.sequence_length
  work = Work(tokens, tokens * setup.flops_per_token)
  return compile_report(setup, target, setup.make_train_step(optimizer), arguments, work)


def find_target(name: str, num_slices: int) -> Target:
  """The target that --topology names.

  Raises:
    UserError: there is no such topology, or its compiler is not installed.
  """
  if not is_name(name):
    return find_slice(name, num_slices)
  if num_slices != 1:
    raise UserError(f"--num_slices={num_slices} is of TPUs; several nodes are --topology=h100-16.")
  return find_gpus(name)


def find_layout(target: Target, overrides: Mapping[str, str]) -> None:
  """Searches, prints the ranking, and writes the best layout to the file of --write."""
  if not isinstance(target, Slice) or FLAGS.mode != "train":
    raise UserError("--search is of the training step on TPUs: elsewhere there is no estimate.")
  found = search.search(
    FLAGS.config,
    overrides,
    target,
    processes=FLAGS.processes,
    tries=FLAGS.tries,
  )
  print(search.table(found))
  if FLAGS.write:
    search.write(found[0], Path(FLAGS.write))
    print(f"wrote {FLAGS.write}")


def _define_flags() -> None:
  flags.DEFINE_string(
    "config", None, "FILE or FILE:ARGUMENT; override with --config.KEY=VALUE.", required=True
  )
  flags.DEFINE_string("topology", None, "v5e-16, v5p-128, v5p:4x4x4, h100-8 ...", required=True)
  flags.DEFINE_integer(
    "num_slices", 1, "Slices, joined by the data centre's network.", lower_bound=1
  )
  flags.DEFINE_enum("mode", "train", ["train", "decode"], "The step to compile.")
  flags.DEFINE_integer(
    "batch", None, "Rows that are decoded at once, with --mode=decode.", lower_bound=1
  )
  flags.DEFINE_integer(
    "context", None, "Positions of the cache of a row, with --mode=decode.", lower_bound=1
  )
  flags.DEFINE_enum("weights", None, WEIGHTS, "In what the weights are kept, with --mode=decode.")
  flags.DEFINE_bool("search", False, "Look for the fastest layout on a TPU slice.")
  flags.DEFINE_integer("tries", 6, "Compilations a round, at most, with --search.", lower_bound=1)
  flags.DEFINE_integer("processes", 1, "Compilations side by side, with --search.", lower_bound=1)
  flags.DEFINE_string("write", None, "Where to keep the best layout, with --search: a .json file.")
  flags.DEFINE_string("json", None, "Write the report to this file too.")
  flags.DEFINE_string("dump_hlo", None, "Write the optimised program to this file.")


def main(overrides: Mapping[str, str]) -> None:
  jax.config.update("jax_platforms", "cpu")
  decode = FLAGS.mode == "decode"
  sizes = (FLAGS.batch, FLAGS.context)
  if decode and None in sizes:
    raise UserError("--mode=decode needs --batch=ROWS and --context=POSITIONS.")
  if not decode and (*sizes, FLAGS.weights) != (None,) * 3:
    raise UserError(
      "--batch, --context and --weights are of --mode=decode; a training step has its config."
    )
  if FLAGS.write and not FLAGS.search:
    raise UserError("--write keeps what --search finds; give both.")
  for flag in ("write", "json", "dump_hlo"):
    if (path := FLAGS[flag].value) and not epath.Path(path).parent.is_dir():
      raise UserError(f"--{flag}={path}: no folder {epath.Path(path).parent}.")
  config = config_lib.load(FLAGS.config, overrides)
  target = find_target(FLAGS.topology, FLAGS.num_slices)
  if FLAGS.search:
    find_layout(target, overrides)
    return
  if decode:
    setup = make_decoding_plan(config, target.devices, *sizes)
    report = compile_decoding(setup, target, FLAGS.weights or setup.model.dtype)
  else:
    setup = make_setup(resolve(config), target.devices)
    report = compile_training(setup, target)
  print(to_text(report, setup))
  if FLAGS.json:
    epath.Path(FLAGS.json).write_text(json.dumps(report.to_json(), indent=2) + "\n")
  if FLAGS.dump_hlo:
    if not report.program:
      raise UserError("--dump_hlo: there is no program, since it does not fit.")
    epath.Path(FLAGS.dump_hlo).write_text(report.program)


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
