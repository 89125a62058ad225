"""Prints the size and memory of a run without allocating anything."""

from typing import Any

import jax

from gptjax import tree
from gptjax.config import to_text
from gptjax.training.resolve import resolve
from gptjax.training.setup import make_setup


def dry_run(config: Any) -> None:
  """Traces the training step on abstract values and prints the memory that it would take."""
  setup = make_setup(resolve(config))
  config, length = setup.config, setup.run_length
  optimizer = setup.make_optimizer(length)
  with jax.set_mesh(setup.mesh):
    state = setup.abstract_state(optimizer)
    frozen = setup.frozen(setup.abstract_base(), setup.abstract_second())
    setup.make_train_step(optimizer).trace(state, setup.abstract_batch(), frozen)
  print(to_text(config))
  print(f"parameters: {setup.num_parameters}")
  if setup.num_trained != setup.num_parameters:
    print(f"trained: {setup.num_trained}")
  print(f"steps: {f'{config.total_epochs} epochs' if length is None else length.total_steps}")
  if setup.task.packs_batches:
    print(f"examples a step: {config.batch_size}")
  else:
    print(f"tokens a step: {config.batch_size * config.sequence_length}")
  mesh = ", ".join(f"{axis}={size}" for axis, size in setup.mesh.shape.items())
  print(f"mesh: {mesh} ({jax.devices()[0].device_kind})")
  for name, part in (
    ("parameters", (state.params, frozen)),
    ("optimizer", (state.opt_state, state.ema)),
  ):
    total, shard = tree.count_bytes(part)
    print(f"memory of {name}: {total / 2**20:.1f} MiB in all, {shard / 2**20:.1f} MiB a device")
