"""Devices as a mesh, logical axes as mesh axes, host batches as global arrays.

The model names the axes of its parameters and activations ('embed', 'heads', 'batch' ...); the
table below is the only place that says which mesh axes they are split over.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "context", "expert")

# Logical axis -> mesh axes that split it. Parameters are split over `fsdp` by their width and over
# `tensor` by heads, feed-forward width or vocabulary; activations by rows and positions.
RULES: dict[str | None, tuple[str, ...]] = {
  "batch": ("data", "fsdp", "expert"),
  "time": ("context",),
  "layers": (),
  "embed": ("fsdp",),
  "vocab": ("tensor",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "mlp": ("tensor",),
  "head_dim": (),
  "positions": (),
  "buckets": (),
  None: (),
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Arranges the devices by `config.mesh`, one size an axis; -1 takes what is left.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  shape = {axis: int(sizes[axis]) for axis in MESH_AXES}
  free = [axis for axis, size in shape.items() if size == -1]
  fixed = math.prod(size for size in shape.values() if size != -1)
  wanted = " x ".join(f"{axis}={size}" for axis, size in shape.items() if size != 1) or "of size 1"
  bad = [axis for axis, size in shape.items() if size < 1 and size != -1]
  if bad:
    raise UserError(f"mesh {wanted}: mesh.{bad[0]} must be positive, or -1 to fill.")
  if len(free) > 1:
    raise UserError(f"mesh {wanted}: only one axis can be -1, not {' and '.join(free)}.")
  if free and len(devices) % fixed == 0:
    shape[free[0]] = len(devices) // fixed
  elif free or fixed != len(devices):
    raise UserError(
      f"mesh {wanted} needs {'a multiple of ' if free else ''}{fixed} devices, this run sees "
      f"{len(devices)}. Set --config.mesh.data=-1 to fill."
    )
  return jax.make_mesh(
    tuple(shape.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices
  )


def mesh_axes(axes: Sequence[str | None]) -> list[tuple[str, ...]]:
  """The mesh axes that split each logical axis. One splits a single array axis: the first wins."""
  used: set[str] = set()
  split = []
  for axis in axes:
    free = tuple(name for name in RULES[axis] if name not in used)
    used.update(free)
    split.append(free)
  return split


def partition_spec(axes: Sequence[str | None]) -> P:
  return P(*(names or None for names in mesh_axes(axes)))


def parameter_shardings(parameters: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
  """The sharding of each parameter, by name.

  Args:
    parameters: {name: info}, where info has a `shape` and its logical `axes`.

  Raises:
    UserError: an axis has no rule, or its size does not divide over the mesh.
  """
  shardings = {}
  for name, info in parameters.items():
    unknown = [axis for axis in info.axes if axis not in RULES]
    if unknown:
      raise UserError(f"sharding: axis {unknown[0]!r} of parameter {name!r} is not in RULES.")
    for axis, size, names in zip(info.axes, info.shape, mesh_axes(info.axes), strict=True):
      parts = math.prod(mesh.shape[name] for name in names)
      if size % parts:
        raise UserError(
          f"sharding: axis {axis!r} of parameter {name!r} has size {size}, which the mesh's "
          f"{' x '.join(names)} = {parts} does not divide."
        )
    shardings[name] = NamedSharding(mesh, partition_spec(info.axes))
  return shardings


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins an activation to its logical axes. Outside `jax.set_mesh` it does nothing."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of every [B, T] field of a batch."""
  return NamedSharding(mesh, partition_spec(("batch", "time")))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def check_batch(batch_size: int, sequence_length: int, grad_accumulation: int, mesh: Mesh) -> None:
  """Raises UserError unless every micro-batch splits evenly over the mesh."""
  rows = math.prod(mesh.shape[axis] for axis in RULES["batch"])
  spans = math.prod(mesh.shape[axis] for axis in RULES["time"])
  if grad_accumulation < 1 or batch_size % (rows * grad_accumulation):
    raise UserError(
      f"batch_size={batch_size} does not divide into grad_accumulation={grad_accumulation} "
      f"micro-batches over {rows} device{'s' if rows > 1 else ''}: use a multiple of "
      f"{rows * max(grad_accumulation, 1)}."
    )
  if sequence_length % spans:
    raise UserError(f"sequence_length={sequence_length} is not divisible by mesh.context={spans}.")


def to_global(batch: Any, mesh: Mesh) -> Any:
  """Assembles global arrays from the rows of each host (NumPy [B / hosts, T] a field)."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch
  )
