"""TPU slices that are not here: their names, shapes, and what is known of their chips."""

import dataclasses
import importlib.util
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import jax
from jax.experimental import topologies

from gptjax.devices.chips import Chip, find_chip
from gptjax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Generation:
  """One kind of TPU.

  Attributes:
    names: as Cloud writes it before the number of an accelerator type.
    dimensions: of the torus, 2 or 3.
    counts_cores: whether that number counts cores, two a chip, or chips.
    clock_hz: of the matrix units: the published peak over their operations a cycle.
    usable_hbm_gib: of one JAX device, what the compiler allows a program.
    link_bytes_per_second: of one link of the torus, in one direction (Austin et al. 2025, How to
      Scale Your Model, section 2, which has them as measured, a tenth below the published).
    wraps_at: a dimension this long, or a multiple of it, is a ring.
    share_of_chip: of what `chips` says of a device, what a device of the compiler has.
  """

  names: tuple[str, ...]
  dimensions: int
  counts_cores: bool
  clock_hz: float
  usable_hbm_gib: float
  link_bytes_per_second: float
  wraps_at: int
  share_of_chip: float = 1.0


GENERATIONS = {
  "v4": Generation(("v4",), 3, True, 1.05e9, 15.25, 4.5e10, 4, share_of_chip=0.5),
  "v5e": Generation(("v5e", "v5litepod"), 2, False, 1.5e9, 15.75, 4.5e10, 16),
  "v5p": Generation(("v5p",), 3, True, 1.75e9, 95.74, 9e10, 4),
  "v6e": Generation(("v6e",), 2, False, 1.75e9, 31.25, 9e10, 16),
  "tpu7x": Generation(("tpu7x",), 3, True, 2.2e9, 94.75, 9e10, 4),
}


class Target(Protocol):
  """What a report needs to know of the devices that a program is compiled for.

  name: as it was asked for. devices: what JAX sees. chip: what one device has at most. chips: how
  many there are. hbm_bytes: what a program may use of one device. compiler_options: what every
  compilation for them is told, beside the options of the config.
  """

  name: str
  devices: list[jax.Device]
  chip: Chip

  @property
  def chips(self) -> int: ...

  @property
  def hbm_bytes(self) -> int: ...

  @property
  def compiler_options(self) -> Mapping[str, str]: ...


@dataclasses.dataclass(frozen=True)
class Slice(Target):
  """TPU chips to compile for.

  Attributes:
    name: as it was asked for.
    shape: of the torus, chips; one slice of several.
    num_slices: joined by the data centre's network.
    devices: what JAX sees, all slices, in the order of the topology.
    chip: what one device has at most.
    generation: its row of the table.
  """

  name: str
  shape: tuple[int, ...]
  num_slices: int
  devices: list[jax.Device]
  chip: Chip
  generation: Generation

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.num_slices

  @property
  def hbm_bytes(self) -> int:
    """What a program may use of one device."""
    return int(self.generation.usable_hbm_gib * 2**30)

  @property
  def compiler_options(self) -> Mapping[str, str]:
    return {}

  def link_bandwidth(self, group: int) -> float:
    """Bytes a second that a device sends at most in a collective of `group` devices.

    Such a group is taken to lie along as few dimensions as hold it; a dimension that is a ring has
    two links for it, one that is not has one.
    """
    links, size = 0, 1
    for length in sorted(self.shape, reverse=True):
      if length > 1 and size < group:
        size *= length
        links += 2 if length % self.generation.wraps_at == 0 else 1
    return max(links, 1) * self.generation.link_bytes_per_second

  def busiest_link(self, messages: Iterable[tuple[Sequence[int], Sequence[int]]]) -> int:
    """How many messages share the link with the most, if all are sent at once.

    Each goes from one chip's coordinates to another's, one dimension after the other, the shorter
    way round where a dimension is a ring.
    """
    load: Counter[tuple[tuple[int, ...], int, int]] = Counter()
    for source, target in messages:
      here = list(source)
      for axis, length in enumerate(self.shape):
        ring = length % self.generation.wraps_at == 0
        way = (target[axis] - here[axis]) % length if ring else target[axis] - here[axis]
        if ring and way > length - way:
          way -= length
        for _ in range(abs(way)):
          load[tuple(here), axis, way > 0] += 1
          here[axis] = (here[axis] + (1 if way > 0 else -1)) % length
    return max(load.values(), default=1)


def find_slice(name: str, num_slices: int = 1) -> Slice:
  """The slice of a name: as Cloud says it ('v5p-128' is 64 chips), or with its shape ('v5p:4x4x4').

  Raises:
    UserError: there is no such slice, or the TPU compiler is not installed.
  """
  generation, shape = parse_name(name)
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      f"--topology={name}: the TPU compiler is not installed. Run: pip install "
      f"'jax[tpu]=={jax.__version__}' (Linux on x86-64; no TPU is needed)."
    )
  prepare_environment()
  row = GENERATIONS[generation]
  padded = (*shape, 1)[:3]
  options = {"num_slices": num_slices} if num_slices > 1 else {}
  if math.prod(shape) < 4:
    options["chips_per_host_bounds"] = padded
  try:
    devices = topologies.get_topology_desc(
      f"{generation}:{'x'.join(map(str, shape))}", "tpu", **options
    ).devices
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f"--topology={name}: the TPU compiler refuses it: {error}") from error
  chip = find_chip(devices[0].device_kind)
  share = row.share_of_chip
  chip = dataclasses.replace(
    chip,
    peak_flops=chip.peak_flops * share,
    hbm_bytes=int(chip.hbm_bytes * share),
    hbm_bytes_per_second=chip.hbm_bytes_per_second * share,
  )
  return Slice(name, shape, num_slices, list(devices), chip, row)


def parse_name(name: str) -> tuple[str, tuple[int, ...]]:
  """'v5p-128' -> ('v5p', (4, 4, 4)); 'v5e:4x8' -> ('v5e', (4, 8))."""
  match = re.fullmatch(r"(\w+?)(?:-(\d+)|:(\d+(?:x\d+)*))", name)
  by_name = {alias: key for key, row in GENERATIONS.items() for alias in row.names}
  if not match or match[1] not in by_name:
    known = [f"{alias}-16" for alias in by_name]
    raise UserError(
      f"--topology={name}: no such slice. {did_you_mean(name, known)} A name is as Cloud says it, "
      "such as v5e-16 or v5p-128, or has a shape, such as v5p:4x4x4; of GPUs, such as h100-8."
    )
  generation = by_name[match[1]]
  row = GENERATIONS[generation]
  if match[3]:
    shape = tuple(map(int, match[3].split("x")))
    if len(shape) != row.dimensions or 0 in shape:
      raise UserError(
        f"--topology={name}: a slice of {generation} has {row.dimensions} dimensions."
      )
    return generation, shape
  count = int(match[2])
  if row.counts_cores:
    if count < 8 or count % 8:
      raise UserError(f"--topology={name}: {generation} counts cores, 8 for 4 chips, 16 for 8 ...")
    return generation, default_shape(count // 2, 3)
  if count < 1 or count & (count - 1) or count > 256:
    raise UserError(f"--topology={name}: {generation} counts chips, a power of 2 up to 256.")
  return generation, default_shape(count, 2)


def default_shape(chips: int, dimensions: int) -> tuple[int, ...]:
  """The shape nearest to a cube or a square: 64 -> (4, 4, 4), 8 -> (2, 4), 4 -> (2, 2, 1)."""
  if chips == 4 and dimensions == 3:
    return (2, 2, 1)
  if dimensions == 1:
    return (chips,)
  first = max(side for side in range(1, round(chips ** (1 / dimensions)) + 1) if chips % side == 0)
  return (first, *default_shape(chips // first, dimensions - 1))


def prepare_environment() -> None:
  """Tells libtpu that there is no TPU to look for. Call before it is loaded."""
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
  # Several processes may compile at once: there is no chip for them to fight for.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
