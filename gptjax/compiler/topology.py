"""TPU slices that are not here: their names, shapes, and the data of their chips."""

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

from gptjax.config import describe_absent_tpu
from gptjax.devices.chips import Chip, find_chip
from gptjax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Generation:
  """One kind of TPU.

  Attributes:
    names: Cloud's names before the number in an accelerator type.
    dimensions: dimensions of the torus, 2 or 3.
    counts_cores: whether that number counts cores, two per chip, or chips.
    clock_hz: clock of the matrix units: the published peak over their operations per cycle.
    usable_hbm_gib: memory of one JAX device that the compiler allows a program.
    link_bytes_per_second: rate of one link of the torus, in one direction (Austin et al. 2025, How
      to Scale Your Model, section 2: measured, a tenth below the published rate).
    wraps_at: a dimension this long, or a multiple of it, is a ring.
    share_of_chip: the compiler's device as a share of the device in `chips`.
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
  """The devices that a program is compiled for, as reports need to know them.

  name: the name that was given. devices: JAX devices. chip: peak performance of one device. chips:
  their number. hbm_bytes: memory that a program may use on one device. compiler_options: options of
  every compilation for them, beside those of the config.
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
    name: the name that was given.
    shape: shape of one slice's torus, in chips.
    num_slices: number of slices, joined by the data centre's network.
    devices: JAX devices of all slices, in the order of the topology.
    chip: peak performance of one device.
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
    """Memory that a program may use on one device."""
    return int(self.generation.usable_hbm_gib * 2**30)

  @property
  def compiler_options(self) -> Mapping[str, str]:
    return {}

  def link_bandwidth(self, group: int) -> float:
    """Most bytes a second that a device sends in a collective of `group` devices.

    The group is assumed to extend along as few dimensions as possible; a dimension that is a ring
    has two links for it, any other has one.
    """
    links, size = 0, 1
    for length in sorted(self.shape, reverse=True):
      if length > 1 and size < group:
        size *= length
        links += 2 if length % self.generation.wraps_at == 0 else 1
    return max(links, 1) * self.generation.link_bytes_per_second

  def busiest_link(self, messages: Iterable[tuple[Sequence[int], Sequence[int]]]) -> int:
    """Number of messages on the busiest link, if all are sent at once.

    Each goes from one chip's coordinates to another's, one dimension after the other, in the
    shorter direction if a dimension is a ring.
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
  """Finds a slice by Cloud's name ('v5p-128' is 64 chips) or by its shape ('v5p:4x4x4').

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
  """Parses a name: 'v5p-128' -> ('v5p', (4, 4, 4)); 'v5e:4x8' -> ('v5e', (4, 8))."""
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
  """Tells libtpu that there is no TPU to look for. Call it before libtpu is loaded."""
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  describe_absent_tpu()
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
  # Several processes may compile at once, since no chip is used.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
