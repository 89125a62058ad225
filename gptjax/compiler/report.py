"""Reports memory, FLOPs and time of a compiled step, as one table and one JSON object."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from gptjax.compiler.estimate import KERNEL_EFFICIENCY, Estimate, estimate
from gptjax.compiler.flops import count_flops
from gptjax.compiler.hlo import Collective, Program
from gptjax.compiler.topology import Slice, Target
from gptjax.devices import chips
from gptjax.errors import UserError
from gptjax.training.setup import Setup

# Sizes in the compiler's messages about programs that do not fit.
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Traffic:
  """The collectives of one kind in a step: their number, bytes that a device sends, and how many
  overlap with computation."""

  count: int
  bytes: int
  asynchronous: int


@dataclasses.dataclass(frozen=True)
class Work:
  """The work of a step.

  Attributes:
    tokens: tokens that it processes on all devices.
    model_flops: FLOPs for all of them, by `flop_rule`.
    held: {name: bytes} of the arguments on one device, if their parts matter.
    read: {name: bytes} that a device must read from its memory in a step; if empty, arguments and
      output count.
    advice: how to make it smaller; if empty, the advice depends on the largest arrays.
  """

  tokens: int
  model_flops: float
  flop_rule: str = chips.FLOP_RULE
  held: Mapping[str, int] = dataclasses.field(default_factory=dict)
  read: Mapping[str, int] = dataclasses.field(default_factory=dict)
  advice: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Costs:
  """Costs that are read from a program in its target's own dialect.

  Attributes:
    network: {name: seconds} that the collectives take at the peak of the links.
    kernel_flops: FLOPs of hand-written kernels on one device.
    kernels: {kind: how many run in a step}, if the compiler chooses among several kinds.
    estimate: estimated time; None if the compiler gives no cycles.
    remark: a caveat about these numbers, one sentence.
  """

  network: Mapping[str, float]
  kernel_flops: float
  kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)
  estimate: Estimate | None = None
  remark: str = ""


@functools.singledispatch
def read_costs(
  target: Target, program: Program, setup: Setup, collectives: list[Collective]
) -> Costs:
  """Reads the costs of a program compiled for the target. Each kind of target registers its own."""
  raise NotImplementedError(type(target).__name__)


@read_costs.register
def _(target: Slice, program: Program, setup: Setup, collectives: list[Collective]) -> Costs:
  devices = list(setup.mesh.devices.flat)
  model, experts = setup.model, setup.model.experts.count
  # The share of the rows in `model.moe` that are in use under an even load.
  rows = max(model.experts.per_token, experts // setup.mesh.shape["expert"]) / (experts or 1)
  times = estimate(program, target, devices, model.windows, collectives, rows)
  return Costs({"ici": times.collectives}, times.kernel_flops, estimate=times)


@dataclasses.dataclass(frozen=True)
class Report:
  """A step compiled for a target. Bytes and FLOPs are per device and step.

  Attributes:
    work: the work of the step.
    hbm: bytes of arguments, temporaries, output (unless written over the arguments) and code; for
      a program that does not fit, the bytes that it would need.
    capacity: bytes a program may use.
    buffers: (bytes, shape, origin) of the largest arrays.
    hardware_flops: FLOPs computed, recomputation included.
    collectives: traffic by kind.
    roofline: seconds that computing, memory and network would take at their peaks.
    costs: other costs read from the program; None if it does not fit.
    program: the optimised program's text; empty if it does not fit.
  """

  topology: str
  chip: str
  chips: int
  devices: int
  mesh: Mapping[str, int]
  work: Work
  hbm: Mapping[str, int]
  capacity: int
  buffers: list[tuple[int, str, str]]
  hardware_flops: float
  collectives: Mapping[str, Traffic]
  roofline: Mapping[str, float]
  peak_flops: float
  hbm_bytes_per_second: float
  compile_seconds: float
  costs: Costs | None = None
  unknown_loops: int = 0
  program: str = dataclasses.field(default="", repr=False)

  @property
  def total(self) -> int:
    return sum(self.hbm.values())

  @property
  def fits(self) -> bool:
    return self.total <= self.capacity

  @property
  def seconds(self) -> float | None:
    estimate = self.costs and self.costs.estimate
    return estimate.seconds if estimate and self.fits else None

  @property
  def mfu(self) -> float | None:
    return self.seconds and self.mfu_at(self.seconds)

  @property
  def tokens_per_second(self) -> float | None:
    return self.seconds and self.work.tokens / self.seconds

  def mfu_at(self, seconds: float) -> float:
    return self.work.model_flops / (seconds * self.peak_flops * self.devices)

  def to_json(self) -> dict[str, Any]:
    return {
      "topology": self.topology,
      "chips": self.chips,
      "mesh": dict(self.mesh),
      "hbm_bytes_per_chip": {
        "arguments": self.hbm["arguments"],
        "temporaries": self.hbm["temporaries"],
        "output": self.hbm["output"],
        **self.work.held,
        "total": self.total,
        "capacity": self.capacity,
      },
      "fits": self.fits,
      "model_flops_per_step": self.work.model_flops,
      "hardware_flops_per_chip": self.hardware_flops * self.devices / self.chips,
      "collectives": {
        kind: {"count": t.count, "bytes": t.bytes, "async": t.asynchronous}
        for kind, t in self.collectives.items()
      },
      "kernels": dict(self.costs.kernels) if self.costs else {},
      "estimated_step_seconds": self.seconds,
      "estimated_mfu": self.mfu,
      "estimated_tokens_per_second": self.tokens_per_second,
      "bound_seconds": dict(self.roofline),
      "compile_seconds": self.compile_seconds,
    }


def compile_report(
  setup: Setup, target: Target, step: Callable, arguments: tuple[Any, ...], work: Work
) -> Report:
  """Compiles step(*arguments) for the target and reads the program.

  Args:
    setup: setup with a mesh of the target's devices.
    step: from `jax.jit`. arguments: abstract, with shardings.
    work: the work of the step.
  """
  devices = len(target.devices)
  with jax.set_mesh(setup.mesh):
    traced = step.trace(*arguments)
    lowered = traced.lower()
  flops = count_flops(traced.jaxpr.jaxpr) / devices
  started = time.perf_counter()
  try:
    compiled = lowered.compile(dict(target.compiler_options))
    problem = ""
  except jax.errors.JaxRuntimeError as error:
    problem = str(error)
    if option := re.search(r"(?:While setting option|No such compile option:)[^\n]*", problem):
      raise UserError(f"compile.options: the compiler refuses one: {option[0]}") from error
    if "RESOURCE_EXHAUSTED" not in problem:
      raise
  seconds = time.perf_counter() - started
  common = {
    "topology": target.name,
    "chip": target.chip.name,
    "chips": target.chips,
    "devices": devices,
    "mesh": {axis: size for axis, size in setup.mesh.shape.items() if size > 1},
    "work": work,
    "capacity": target.hbm_bytes,
    "peak_flops": target.chip.peak_flops,
    "hbm_bytes_per_second": target.chip.hbm_bytes_per_second,
    "compile_seconds": seconds,
  }
  if problem:
    return Report(
      **common,
      hbm=_needed(problem, arguments),
      buffers=_refused_buffers(problem),
      hardware_flops=flops,
      collectives={},
      roofline={"compute": flops / target.chip.peak_flops},
    )
  text = compiled.as_text()
  program = Program(text)
  memory = compiled.memory_analysis()
  collectives = program.collectives(devices)
  costs = read_costs(target, program, setup, collectives)
  flops += costs.kernel_flops
  traffic: dict[str, Traffic] = {}
  for one in collectives:
    old = traffic.get(one.kind, Traffic(0, 0, 0))
    traffic[one.kind] = Traffic(
      old.count + one.count,
      old.bytes + round(one.bytes),
      old.asynchronous + one.count * one.asynchronous,
    )
  touched = sum(work.read.values()) or (memory.argument_size_in_bytes + memory.output_size_in_bytes)
  return Report(
    **common,
    hbm={
      "arguments": memory.argument_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes,
      "output": memory.output_size_in_bytes - memory.alias_size_in_bytes,
      "code": memory.generated_code_size_in_bytes,
    },
    buffers=program.largest_buffers(5),
    hardware_flops=flops,
    collectives=traffic,
    costs=costs,
    roofline={
      "compute": flops / target.chip.peak_flops,
      "hbm": touched / target.chip.hbm_bytes_per_second,
      **costs.network,
    },
    unknown_loops=len(program.unknown_loops),
    program=text,
  )


def _needed(problem: str, arguments: Any) -> dict[str, int]:
  """Bytes that a refused program would use, from the compiler's message."""
  leaves = jax.tree.leaves(arguments)
  held = sum(
    leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves
  )
  used = re.search(r"Used ([\d.]+)([KMGT])", problem) or re.search(
    r"\(([\d.]+)([KMGT])\) exceeds", problem
  )
  total = round(float(used[1]) * _UNITS[used[2]]) if used else 0
  return {"arguments": held, "temporaries": max(total - held, 0), "output": 0, "code": 0}


def _refused_buffers(problem: str) -> list[tuple[int, str, str]]:
  """The largest allocations that the compiler lists when it refuses a program."""
  found = []
  for entry in re.split(r"\n\s*\d+\. ", problem)[1:6]:
    size = re.search(r"Size: ([\d.]+)([KMGT])", entry)
    shape = re.search(r"Shape: (\w+\[[\d,]*\])", entry)
    origin = re.search(r'op_name="([^"]*)"', entry)
    if size and shape:
      found.append((round(float(size[1]) * _UNITS[size[2]]), shape[1], origin[1] if origin else ""))
  return found


def advice(report: Report, setup: Setup) -> list[str]:
  """Advice on how to make the largest arrays smaller."""
  if report.work.advice:
    return list(report.work.advice)
  model = setup.model
  found = []
  for _, shape, _ in report.buffers:
    dims = [int(dim) for dim in re.findall(r"\d+", shape.partition("[")[2])]
    if dims and dims[0] == model.num_layers // len(model.windows) and shape.startswith("bf16"):
      found.append(
        "saved by every layer: --config.model.execution.remat=full, or more grad_accumulation"
      )
    elif shape.startswith("f32") and dims and dims[0] == model.num_layers:
      found.append("parameters and optimizer: a longer mesh.fsdp or mesh.tensor")
    elif model.vocab_size in dims:
      found.append("the vocabulary: mesh.tensor splits it")
    elif len(dims) > 2:
      found.append("activations of a layer: more grad_accumulation, mesh.tensor or mesh.context")
  return list(dict.fromkeys(found))


def to_text(report: Report, setup: Setup) -> str:
  """Formats the report for people."""
  gib = 2**30
  mesh = " x ".join(f"{axis}={size}" for axis, size in report.mesh.items()) or "one device"
  lines = [f"{report.topology}: {report.chips} {report.chip} chips, mesh {mesh}"]
  lines.append(f"HBM a chip's device, of {report.capacity / gib:.2f} GiB:")
  for name, size in report.hbm.items():
    lines.append(f"  {name:12} {size / gib:8.2f} GiB")
    if name == "arguments":
      lines += [
        f"    {_spoken(part):10} {held / gib:8.2f} GiB" for part, held in report.work.held.items()
      ]
  spare = (report.capacity - report.total) / gib
  verdict = (
    f"fits, {spare:.2f} GiB to spare" if report.fits else f"does not fit by {-spare:.2f} GiB"
  )
  lines.append(f"  {'total':12} {report.total / gib:8.2f} GiB: {verdict}")
  if report.buffers:
    lines.append("largest arrays:")
  for size, shape, origin in report.buffers:
    lines.append(f"  {size / gib:8.3f} GiB {shape} {_shorten(origin)}")
  if not report.fits:
    lines += [f"  to shrink {what}" for what in advice(report, setup)]
  lines.append(f"model FLOPs a step: {report.work.model_flops:.4g} ({report.work.flop_rule})")
  extra = report.hardware_flops * report.devices / report.work.model_flops
  lines.append(f"hardware FLOPs a device: {report.hardware_flops:.4g} ({extra:.2f} of the model's)")
  if report.collectives:
    lines.append("collectives:            count   asynchronous   bytes a device")
  for kind, traffic in sorted(report.collectives.items()):
    share = f"{traffic.asynchronous:8,}"
    lines.append(f"  {kind:20} {traffic.count:8,}   {share:>12}   {traffic.bytes:14,}")
  if report.unknown_loops:
    lines.append(f"{report.unknown_loops} loops of unknown length count once")
  if report.costs:
    lines += [f"kernels, {kind}: {count:,}" for kind, count in report.costs.kernels.items()]
    lines += filter(None, [report.costs.remark])
  if report.seconds is not None:
    lines += _estimate_lines(report)
  if report.costs and report.fits:
    lines += _bound_lines(report)
  lines.append(f"compiled in {report.compile_seconds:.1f} s")
  return "\n".join(lines)


def _estimate_lines(report: Report) -> list[str]:
  part, digits = report.costs.estimate, _digits(report)
  return [
    "compiler estimate, not a measurement:",
    f"  step {report.seconds:.{digits}f} s = {part.fused:.{digits}f} fused +"
    f" {part.kernels:.{digits}f} kernels (assumed at {KERNEL_EFFICIENCY:.0%} of peak) +"
    f" {part.exposed:.{digits}f} exposed communication",
    f"  {report.tokens_per_second:,.0f} tokens/s, MFU {report.mfu:.3f} of"
    f" {report.peak_flops / 1e12:.0f} TFLOP/s a device",
  ]


def _bound_lines(report: Report) -> list[str]:
  bound = max(report.roofline, key=report.roofline.get)
  digits = _digits(report)
  lines = [
    "  bound: "
    + ", ".join(f"{name} {seconds:.{digits}f} s" for name, seconds in report.roofline.items())
    + f" (MFU {report.mfu_at(report.roofline[bound]):.3f} if {bound} were all)",
  ]
  if report.work.read:
    parts = " and ".join(
      f"{size / 2**30:.3f} GiB of {_spoken(name)}" for name, size in report.work.read.items()
    )
    lines.append(
      f"  memory bandwidth allows {report.work.tokens / report.roofline['hbm']:,.0f} tokens/s:"
      f" a device reads {parts} a step, at {report.hbm_bytes_per_second / 1e9:,.0f} GB/s"
    )
  return lines


def _digits(report: Report) -> int:
  """Digits of seconds to print; a step that reads its memory only once takes milliseconds."""
  return 6 if report.work.read else 4


def _spoken(name: str) -> str:
  return name.replace("kv_cache", "KV cache")


def _shorten(origin: str) -> str:
  return re.sub(r"(jit\(\w*\)|while|body|closed_call|checkpoint)/", "", origin)[-70:]
