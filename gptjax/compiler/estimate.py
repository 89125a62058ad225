"""Estimates a step's time from a compiled TPU program; it is not a measurement.

The compiler gives cycles for every fused operation, but not for copies to on-chip memory ahead of
it, hand-written kernels and collectives, whose times are estimated here:

- The fused operations of a loop body take their cycles or, if that is longer, the time in which the
  memory, at its full bandwidth, carries all that they and the copies read.
- A kernel takes the time of its matrix products or, if that is longer, of reading its operands and
  writing its result once, at KERNEL_EFFICIENCY of the peak.
- A collective takes its bytes over the links that it can use (`Slice.link_bandwidth`); a
  permutation, over the link that most of its messages share. A synchronous one is added to the time
  of its loop body; the asynchronous ones of a loop body overlap with the body's computation, and
  only the excess is added.

Left out: the latency of a collective and of a kernel launch, gathers and scatters without cycles,
waiting for a slower chip, the host, collectives that share a link, and the network between slices.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence

import jax

from gptjax.compiler.hlo import Collective, Kernel, Program
from gptjax.compiler.topology import Slice

# Share of the peak in the attention kernels: assumed, not measured. A score costs 4 H FLOPs forward
# and 10 H backward; with H = 128, 12 and 16 vector operations a score, four vector units of 1,024
# lanes and nothing overlapped, v5e would reach 0.57 forward and 0.71 backward. The share of the
# memory's bandwidth where one reads more than it computes is assumed to be the same.
KERNEL_EFFICIENCY = 0.6


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Estimated seconds of one step and their parts.

  Attributes:
    fused: operations with the compiler's cycles, or what they wait for the memory.
    kernels: hand-written kernels.
    exposed: collectives that no computation hides.
    collectives: all collectives, hidden or not.
    kernel_flops: FLOPs of the kernels on one device.
  """

  fused: float
  kernels: float
  exposed: float
  collectives: float
  kernel_flops: float

  @property
  def seconds(self) -> float:
    return self.fused + self.kernels + self.exposed


def estimate(
  program: Program,
  target: Slice,
  devices: Sequence[jax.Device],
  windows: Sequence[int | None],
  collectives: list[Collective],
  expert_rows: float = 1.0,
) -> Estimate:
  """Adds up the program's times.

  Args:
    devices: devices of the mesh, in its order.
    windows: windows of the layers in one period of the model.
    expert_rows: the share of the rows of an expert kernel that are in use.
  """
  clock = target.generation.clock_hz
  memory = program.memory_cycles(target.chip.hbm_bytes_per_second / clock)
  fused = {name: max(cycles, memory[name]) / clock for name, cycles in program.cycles().items()}
  kernels: dict[str, float] = defaultdict(float)
  found, products = program.kernels(), 0.0
  one_pass = not any("_dq_" in kernel.name for kernel in found)
  for kernel in found:
    flops = kernel_flops(kernel, windows, one_pass, expert_rows)
    seconds = max(flops / target.chip.peak_flops, kernel.bytes / target.chip.hbm_bytes_per_second)
    kernels[kernel.computation] += kernel.count * seconds / KERNEL_EFFICIENCY
    products += kernel.count * flops
  waiting: dict[str, float] = defaultdict(float)
  hidden: dict[str, float] = defaultdict(float)
  sharing: dict[tuple[tuple[int, int], ...], int] = {}
  for collective in collectives:
    seconds = collective.bytes / target.link_bandwidth(collective.group)
    if pairs := collective.pairs:
      if pairs not in sharing:
        sharing[pairs] = target.busiest_link(
          (devices[source].coords, devices[destination].coords) for source, destination in pairs
        )
      seconds = sharing[pairs] * collective.bytes / target.generation.link_bytes_per_second
    (hidden if collective.asynchronous else waiting)[collective.computation] += seconds
  exposed = sum(waiting.values())
  for name, seconds in hidden.items():
    exposed += max(0.0, seconds - fused[name] - kernels[name])
  return Estimate(
    fused=sum(fused.values()),
    kernels=sum(kernels.values()),
    exposed=exposed,
    collectives=sum(waiting.values()) + sum(hidden.values()),
    kernel_flops=products,
  )


def kernel_flops(
  kernel: Kernel, windows: Sequence[int | None], one_pass: bool, expert_rows: float = 1.0
) -> float:
  """FLOPs of one run of an attention or Megablox kernel on one device; 0 for other kernels.

  A kernel over pages counts one query for each row, which sees all pages. Blocks that no query may
  see are not visited. If a model's layers have different windows, each kernel counts as their mean.
  `one_pass`: whether one kernel computes all gradients.
  """
  if "gmm" in kernel.name:
    (rows, columns), (*_, contracted, produced) = kernel.operands[-2:]
    # The second operand of `tgmm`, a sum over rows, is not a kernel but other rows.
    contracted = columns if "tgmm" in kernel.name else contracted
    return expert_rows * 2.0 * rows * contracted * produced
  if "ragged_paged" in kernel.name:
    (_, heads, width), (pages, size, *_) = kernel.operands
    return 4.0 * heads * width * pages * size
  if "splash" not in kernel.name:
    return 0.0
  forward = "fwd" in kernel.name
  sizes = dict(re.findall(r'\\?"(block_\w+)\\?": (\d+)', kernel.metadata))
  if forward:
    products, sides = 2, ("block_q", "block_kv")
  elif "dkv" in kernel.name:
    products, sides = (5 if one_pass else 4), ("block_q_dkv", "block_kv_dkv")
  else:
    products, sides = 3, ("block_q_dq", "block_kv_dq")
  (*_, heads, queries, width), (*_, keys, _) = kernel.operands[:2]
  rows = kernel.operands[0][0] if len(kernel.operands[0]) == 4 else 1
  block_q, block_kv = (int(sizes[side]) for side in sides)
  visited = sum(visited_fraction(keys, block_q, block_kv, w) for w in windows) / len(windows)
  return products * 2.0 * rows * heads * queries * keys * width * visited


def visited_fraction(length: int, block_q: int, block_kv: int, window: int | None) -> float:
  """The share of blocks of a causal score matrix that contain a visible pair."""
  visited = total = 0
  for first_q in range(0, length, block_q):
    for first_kv in range(0, length, block_kv):
      total += 1
      last_q, last_kv = first_q + block_q - 1, first_kv + block_kv - 1
      near = window is None or first_q - last_kv < window
      visited += first_kv <= last_q and near
  return visited / total
