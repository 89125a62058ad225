"""Devices as a mesh, logical axes as mesh axes, host batches as global arrays.

The model names the axes of its parameters and activations ('embed', 'heads', 'batch' ...); the
table below is the only place that says which mesh axes they are split over.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "context", "expert")
# Largest ring of permutations, in devices: each hop is a separate operation in the program.
MAX_RING = 32
_NOT_FSDP = tuple(axis for axis in MESH_AXES if axis != "fsdp")
# In which gradients are added up over devices.
REDUCE_DTYPES = ("float32", "bfloat16")
_reduce_dtype = contextvars.ContextVar("reduce_dtype", default="float32")

# Logical axis -> mesh axes that split it. Parameters are split over `fsdp` by their width and over
# `tensor` by heads, feed-forward width or vocabulary; activations by rows and positions.
RULES: dict[str | None, tuple[str, ...]] = {
  "batch": ("data", "fsdp", "expert"),
  "time": ("context",),
  # Between the blocks, where positions are independent (Korthikanti et al. 2022,
  # arXiv:2205.05198, section 4.2.2).
  "residual_time": ("context", "tensor"),
  "layers": (),
  "embed": ("fsdp",),
  "vocab": ("tensor",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "mlp": ("tensor",),
  "experts": ("expert",),
  "head_dim": (),
  "positions": (),
  "buckets": (),
  "labels": (),
  "rank": (),
  "terms": (),
  "types": (),
  None: (),
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Arranges the devices by `config.mesh`, one size per axis; -1 takes the devices that are left.

  With several slices, `data` is the axis that crosses the network between them.

  Raises:
    UserError: the sizes do not multiply to the number of devices, or `data` is no multiple of the
      number of slices.
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
  slices = len({getattr(device, "slice_index", None) for device in devices})
  if shape["data"] % slices:
    raise UserError(
      f"mesh {wanted}: only mesh.data may cross the network between the {slices} slices; make it a "
      f"multiple of {slices}."
    )
  # Neighbours in the mesh are neighbours on the torus, as far as its shape allows.
  within = tuple((shape | {"data": shape["data"] // slices}).values())
  across = tuple(slices if axis == "data" else 1 for axis in shape)
  split = {"allow_split_physical_axes": True}
  if slices == 1:
    grid = mesh_utils.create_device_mesh(within, devices, **split)
  else:
    grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, **split)
  return Mesh(
    _as_rings(grid, MESH_AXES.index("fsdp")), MESH_AXES, axis_types=(AxisType.Auto,) * len(shape)
  )


def _as_rings(grid: np.ndarray, axis: int) -> np.ndarray:
  """Reorders an axis of a grid of TPUs so that each is wired to the next, for `_ring_scatter`.

  The order stays unless the devices have coordinates and fill the same box of the torus everywhere
  along the axis.
  """
  lines = np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis])
  if not all(hasattr(device, "coords") for device in lines[0]):
    return grid
  coords = np.array([[device.coords for device in line] for line in lines])
  offsets = coords - coords.min(axis=1, keepdims=True)
  box = tuple(int(extent) for extent in offsets[0].max(axis=0) + 1)
  if math.prod(box) != grid.shape[axis] or (offsets != offsets[:1]).any():
    return grid
  place = {tuple(offset): i for i, offset in enumerate(offsets[0].tolist())}
  return np.take(grid, [place[cell] for cell in ring_of_box(box)], axis=axis)


def ring_of_box(box: tuple[int, ...]) -> list[tuple[int, ...]]:
  """Orders the cells of a box so that each is next to the one before, if possible in a ring."""
  rows = next((i for i, side in enumerate(box) if side % 2 == 0), None)
  others = [side for i, side in enumerate(box) if i != rows]
  if rows is None or math.prod(others) == 1:
    return _snake(box)
  # Along the first row, back and forth over the rest, and home down the first column.
  columns = _snake(tuple(others))
  cells = [(0, column) for column in columns]
  for row in range(1, box[rows]):
    turn = columns[1:] if row % 2 == 0 else columns[:0:-1]
    cells += [(row, column) for column in turn]
  cells += [(row, columns[0]) for row in range(box[rows] - 1, 0, -1)]
  return [(*column[:rows], row, *column[rows:]) for row, column in cells]


def _snake(box: tuple[int, ...]) -> list[tuple[int, ...]]:
  """Orders all cells of a box so that each is next to the one before."""
  if not box:
    return [()]
  rest = _snake(box[1:])
  return [
    (first, *cell) for first in range(box[0]) for cell in (rest if first % 2 == 0 else rest[::-1])
  ]


def mesh_axes(
  axes: Sequence[str | None], among: Sequence[str] = MESH_AXES
) -> list[tuple[str, ...]]:
  """Returns the mesh axes, from those in `among`, that split each logical axis.

  A mesh axis splits only one axis of an array: the first that asks for it.
  """
  used: set[str] = set()
  split = []
  for axis in axes:
    free = tuple(name for name in RULES[axis] if name not in used)
    used.update(free)
    split.append(tuple(name for name in free if name in among))
  return split


def partition_spec(axes: Sequence[str | None], among: Sequence[str] = MESH_AXES) -> P:
  return P(*(names or None for names in mesh_axes(axes, among)))


def parameter_axes(axes: Sequence[str]) -> list[tuple[str, ...]]:
  """Returns `mesh_axes` of a parameter, but keeps vectors whole over `fsdp`: splitting one saves
  next to nothing, and gathering it costs a latency at each use."""
  is_vector = sum(axis != "layers" for axis in axes) == 1
  return mesh_axes(axes, _NOT_FSDP if is_vector else MESH_AXES)


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
    split = parameter_axes(info.axes)
    for axis, size, names in zip(info.axes, info.shape, split, strict=True):
      parts = math.prod(mesh.shape[name] for name in names)
      if size % parts:
        raise UserError(
          f"sharding: axis {axis!r} of parameter {name!r} has size {size}, which the mesh's "
          f"{' x '.join(names)} = {parts} does not divide."
        )
    shardings[name] = NamedSharding(mesh, P(*(names or None for names in split)))
  return shardings


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins an activation to its logical axes. Outside `jax.set_mesh` it does nothing.

  An array axis that the mesh does not divide, one new token for instance, stays whole.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  split = [
    names if size % math.prod(mesh.shape[name] for name in names) == 0 else None
    for size, names in zip(x.shape, mesh_axes(axes), strict=True)
  ]
  return jax.lax.with_sharding_constraint(x, P(*(names or None for names in split)))


def per_shard(
  function: Callable[..., Any],
  in_axes: Sequence[Sequence[str | None]],
  out_axes: Any,
  *constants: tuple[Any, Any],
) -> Callable[..., Any]:
  """Makes every device apply the function to its own parts, for what the compiler cannot split.

  Args:
    function: takes the constants, then the arrays.
    in_axes: logical axes of each array.
    out_axes: logical axes of the result, or a list with those of each result.
    *constants: (tree, function from the mesh to its partition specs), passed before the arrays.

  Outside `jax.set_mesh` the function is applied to whole arrays.
  """
  mesh = jax.sharding.get_abstract_mesh()
  trees = [tree for tree, _ in constants]
  if mesh.empty:
    return functools.partial(function, *trees)
  several = isinstance(out_axes, list)
  sharded = jax.shard_map(
    function,
    in_specs=(*(make_spec(mesh) for _, make_spec in constants), *map(partition_spec, in_axes)),
    out_specs=tuple(map(partition_spec, out_axes)) if several else partition_spec(out_axes),
    check_vma=False,
  )
  return functools.partial(sharded, *trees)


def gather(parameter: jax.Array, axes: Sequence[str | None]) -> jax.Array:
  """Gathers a parameter that is split over `fsdp`; splits over `tensor` stay."""
  if jax.sharding.get_abstract_mesh().empty:
    return parameter
  return jax.lax.with_sharding_constraint(parameter, partition_spec(axes, _NOT_FSDP))


def sum_over_rows(
  function: Callable[..., jax.Array], out_axes: Sequence[str | None], *arrays: jax.Array
) -> jax.Array:
  """Computes function(*arrays), a sum over rows and positions; each device keeps its part of it.

  The arrays begin with the axes 'batch' and 'time'; the result has the logical axes of a parameter.
  Each device sums over its own rows; a reduce-scatter adds up the sums. The compiler alone would
  reduce the whole sum on every device, twice the bytes, and discard most of it.
  """
  summed = split_names("batch", "time")
  sizes = zip(("batch", "time"), arrays[0].shape, strict=False)
  # A single row, such as a tuned prompt's, stays whole: see `constrain`.
  if not summed or any(size % axis_parts(axis) for axis, size in sizes):
    return function(*arrays)

  return jax.shard_map(
    lambda *arrays: sum_scatter(function(*arrays), out_axes, summed),
    in_specs=partition_spec(("batch", "time"), summed),
    out_specs=partition_spec(out_axes, summed),
    axis_names=set(summed),
    check_vma=False,
  )(*arrays)


@contextlib.contextmanager
def reducing_in(dtype: str) -> Iterator[None]:
  """Makes code traced within add up gradients over devices in one of `REDUCE_DTYPES`.

  The sum of n devices in bfloat16 rounds n times to 8 bits, so that a small part beside a large one
  is lost; in float32 it sends twice the bytes.
  """
  token = _reduce_dtype.set(dtype)
  try:
    yield
  finally:
    _reduce_dtype.reset(token)


def reduce_dtype() -> str:
  return _reduce_dtype.get()


def sum_scatter(x: jax.Array, axes: Sequence[str | None], summed: Sequence[str]) -> jax.Array:
  """Within a shard: sums x over the mesh axes `summed`, and keeps the device's part by `axes`.

  The sum is made in `reduce_dtype`, and has the dtype of x.
  """
  if not summed:
    return x
  dtype, x, rest = x.dtype, x.astype(reduce_dtype()), list(summed)
  for dimension, names in enumerate(mesh_axes(axes)):
    for name in names:
      if name in rest:
        if platform() == "tpu" and jax.lax.axis_size(name) <= MAX_RING:
          x = _ring_scatter(x, name, dimension)
        else:
          x = jax.lax.psum_scatter(x, name, scatter_dimension=dimension, tiled=True)
        rest.remove(name)
  return (jax.lax.psum(x, tuple(rest)) if rest else x).astype(dtype)


def _ring_scatter(x: jax.Array, name: str, dimension: int) -> jax.Array:
  """`psum_scatter` as two rings of permutations, which overlap with computation.

  XLA:TPU turns a reduce-scatter over more than one dimension of the torus into an all-reduce, with
  twice the bytes, and waits for it.
  """
  size = jax.lax.axis_size(name)
  here = jax.lax.axis_index(name)
  length = x.shape[dimension] // size
  half = length // 2

  def ring(direction: int, start: int, width: int) -> jax.Array:
    neighbours = [(i, (i + direction) % size) for i in range(size)]
    total = None
    for hop in range(1, size + 1):
      owner = (here - direction * hop) % size
      mine = jax.lax.dynamic_slice_in_dim(x, owner * length + start, width, dimension)
      total = mine if total is None else jax.lax.ppermute(total, name, neighbours) + mine
    return total

  if half == 0:
    return ring(1, 0, length)
  return jnp.concatenate([ring(1, 0, half), ring(-1, half, length - half)], axis=dimension)


def split_names(*axes: str) -> tuple[str, ...]:
  """The axes of the current mesh, longer than 1, that split these logical axes."""
  mesh = jax.sharding.get_abstract_mesh()
  names = (name for axis in axes for name in RULES[axis])
  return tuple(name for name in names if not mesh.empty and mesh.shape[name] > 1)


def axis_parts(axis: str | None) -> int:
  """Into how many parts the current mesh splits a logical axis."""
  return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in split_names(axis))


def platform() -> str:
  """Platform of the current mesh, whose devices need not exist here: 'cpu', 'gpu' or 'tpu'."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return platform_of(jax.default_backend() if device is None else device.platform)


def platform_of(backend: str) -> str:
  """Platform of a JAX backend, by its name: 'cpu', 'gpu' or 'tpu'."""
  return "gpu" if backend in ("cuda", "rocm") else backend


def time_order(length: int) -> np.ndarray | None:
  """The order in which the positions of a row are laid over the mesh; None for unchanged.

  Under a causal mask the last queries see most keys. Each device of the `context` axis has one of
  the first and one of the last chunks of the row, so that all have equal work (the order of Brandon
  et al. 2023, arXiv:2311.09431, in chunks: Llama 3, Grattafiori et al. 2024, section 3.3.2).
  """
  parts = axis_parts("time")
  if parts == 1:
    return None
  chunks = np.arange(length).reshape(2 * parts, -1)
  pairs = [(i, 2 * parts - 1 - i) for i in range(parts)]
  return np.concatenate([chunks[i] for pair in pairs for i in pair])


def balance_time(batch: Any) -> Any:
  """Puts the positions of every [B, T] field into `time_order`."""
  order = time_order(jax.tree.leaves(batch)[0].shape[1])
  if order is None:
    return batch
  return jax.tree.map(lambda x: constrain(x[:, order], "batch", "time"), batch)


def gather_time(x: jax.Array) -> jax.Array:
  """Within a shard: all positions of [B, T, ...] in the order of the text."""
  names = split_names("time")
  if not names:
    return x
  whole = jax.lax.all_gather(x, names, axis=1, tiled=True)
  chunks = jnp.split(whole, 2 * axis_parts("time"), axis=1)
  return jnp.concatenate([*chunks[0::2], *chunks[1::2][::-1]], axis=1)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of every [B, T] field of a batch."""
  return NamedSharding(mesh, partition_spec(("batch", "time")))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def rows_multiple(grad_accumulation: int, mesh: Mesh) -> int:
  """The number of which the rows of a batch must be a multiple, to split evenly over micro-batches
  and mesh; UserError for no micro-batch."""
  if grad_accumulation < 1:
    raise UserError(f"grad_accumulation={grad_accumulation} must be 1 or more.")
  return grad_accumulation * math.prod(mesh.shape[axis] for axis in RULES["batch"])


def check_batch(
  batch_size: int | None, sequence_length: int, grad_accumulation: int, mesh: Mesh
) -> None:
  """Raises UserError unless every micro-batch splits evenly over the mesh; None rows always do."""
  multiple = rows_multiple(grad_accumulation, mesh)
  if batch_size is not None and batch_size % multiple:
    rows = multiple // grad_accumulation
    raise UserError(
      f"batch_size={batch_size} does not divide into grad_accumulation={grad_accumulation} "
      f"micro-batches over {rows} device{'s' if rows > 1 else ''}: use a multiple of {multiple}."
    )
  spans = math.prod(mesh.shape[axis] for axis in RULES["time"])
  if spans > 1 and sequence_length % (2 * spans):
    raise UserError(
      f"sequence_length={sequence_length} does not split into the {2 * spans} chunks that "
      f"mesh.context={spans} needs, two a device."
    )


def to_global(batch: Any, mesh: Mesh) -> Any:
  """Assembles global arrays from the rows of each host (NumPy [B / hosts, T] a field)."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch
  )
