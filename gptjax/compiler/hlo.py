"""Reads an optimised XLA program: its computation, time and communication.

XLA:TPU writes its own estimate of cycles on every fusion. A loop's body is written once, however
often it runs, so everything here is multiplied by trip counts.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
)
_COPIES = ("copy-done", "slice-done", "dynamic-slice-done", "async-done")
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|called_computations?|(?:true|false)_computation)=%?([\w.\-]+)"
)
_LAYOUTS = re.compile(r"operand_layout_constraints=\{((?:\w+\[[\d,]*\](?:\{[\d,]*\})?,? ?)*)\}")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a program. `shape` is text with the layout, `rest` the text after the operands."""

  name: str
  opcode: str
  shape: str
  operands: tuple[str, ...]
  rest: str
  is_root: bool

  @property
  def op_name(self) -> str:
    """Its origin in the traced Python program."""
    found = re.search(r'op_name="([^"]*)"', self.rest)
    return found[1] if found else ""

  @property
  def bytes(self) -> int:
    return shape_bytes(self.shape)

  @property
  def cycles(self) -> int:
    """The compiler's own estimate of cycles; 0 if it makes none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
    return int(found[1]) if found else 0

  @property
  def operand_layouts(self) -> str:
    """The shapes of a custom call's operands, as text; empty if the program omits them."""
    layouts = _LAYOUTS.search(self.rest)
    return layouts[1] if layouts else ""

  def attribute(self, name: str) -> str | None:
    found = re.search(rf'\b{name}=("?)([^",\s]+)\1', self.rest)
    return found[2] if found else None

  def called(self) -> list[str]:
    names = _CALLED.findall(self.rest)
    if branches := _BRANCHES.search(self.rest):
      names += [name.strip().lstrip("%") for name in branches[1].split(",")]
    return names


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation, in all its runs of one step.

  Attributes:
    kind: one of COLLECTIVES.
    count: how often it runs in a step.
    bytes: bytes that a chip sends in all those runs, by a ring (bandwidth-optimal) algorithm.
    group: how many devices take part.
    asynchronous: whether the program computes something else meanwhile.
    op_name: its origin in the Python program.
    computation: the computation it is in, whose operations may hide it.
    pairs: (sender, receiver) of a permutation, as indices of the mesh's devices.
  """

  kind: str
  count: int
  bytes: float
  group: int
  asynchronous: bool
  op_name: str
  computation: str
  pairs: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A hand-written (Mosaic) kernel, for which the compiler estimates no cycles.

  Attributes:
    name: its author's name for it.
    count: how often it runs in a step.
    computation: the computation it is in.
    operands: shapes of its floating-point operands.
    metadata: its author's metadata.
    bytes: bytes of its operands and its result.
  """

  name: str
  count: int
  computation: str
  operands: tuple[tuple[int, ...], ...]
  metadata: str
  bytes: int = 0


def shape_bytes(shape: str) -> int:
  """Bytes of all arrays in a shape, given as text, without padding."""
  total = 0
  for kind, dims, _ in _ARRAY.findall(shape):
    bits = _BITS.get(kind)
    if bits is None:
      digits = re.search(r"\d+", kind)
      bits = int(digits[0]) if digits else 0
    total += math.prod(int(dim) for dim in dims.split(",") if dim) * bits
  return total // 8


def parse_shapes(text: str) -> list[tuple[int, ...]]:
  """The shapes of the floating-point arrays in the text of several shapes."""
  return [
    tuple(int(dim) for dim in dims.split(",") if dim)
    for kind, dims, _ in _ARRAY.findall(text)
    if kind.startswith(("f", "bf"))
  ]


class Program:
  """The text of an optimised program, `jax.stages.Compiled.as_text()`, parsed.

  Attributes:
    computations: {name: its instructions, in scheduled order}.
    entry: name of the computation that runs first.
    unknown_loops: loops whose trip count could not be read; they count once.
  """

  def __init__(self, text: str):
    self.computations: dict[str, list[Instruction]] = {}
    self.entry = ""
    self.unknown_loops: list[str] = []
    current: list[Instruction] = []
    for line in _statements(text):
      if header := _HEADER.match(line):
        current = self.computations[header[2]] = []
        if header[1]:
          self.entry = header[2]
      elif instruction := _parse(line):
        current.append(instruction)

  @functools.cached_property
  def runs(self) -> Mapping[str, int]:
    """Runs of each computation in one execution of the program; fused ones included."""
    runs: dict[str, int] = defaultdict(int)

    def visit(name: str, times: int) -> None:
      runs[name] += times
      for instruction in self.computations[name]:
        inner = times
        if instruction.opcode == "while":
          inner *= self._trip_count(name, instruction)
        for called in instruction.called():
          if called in self.computations:
            visit(called, inner)

    visit(self.entry, 1)
    return dict(runs)

  @functools.cached_property
  def scheduled(self) -> frozenset[str]:
    """Computations that run as a sequence of operations: the entry, loop bodies and branches."""
    found: set[str] = set()

    def visit(name: str) -> None:
      found.add(name)
      for instruction in self.computations[name]:
        if instruction.opcode in ("while", "conditional", "call"):
          for called in instruction.called():
            visit(called)

    visit(self.entry)
    return frozenset(found)

  def steps(self) -> Iterator[tuple[str, Instruction, int]]:
    """Yields each operation that runs by itself, with its computation and how often it runs."""
    for name in self.scheduled:
      for instruction in self.computations[name]:
        yield name, instruction, self.runs[name]

  def cycles(self) -> Mapping[str, int]:
    """Estimated cycles of each scheduled computation, over all its runs, without its callees."""
    totals = dict.fromkeys(self.scheduled, 0)
    for name, instruction, times in self.steps():
      totals[name] += instruction.cycles * times
    return totals

  def memory_cycles(self, bytes_per_cycle: float) -> Mapping[str, float]:
    """Cycles in which each scheduled computation, over all its runs, keeps the memory busy.

    Weights are copied to on-chip memory ahead of the operation that reads them, by copies that have
    no cycles of their own. Beside them count the operands that an operation reads from memory
    itself, for at most as long as it runs, since it may read a part.
    """
    totals = dict.fromkeys(self.scheduled, 0.0)
    for name in self.scheduled:
      shapes = {instruction.name: instruction.shape for instruction in self.computations[name]}
      for instruction in self.computations[name]:
        cycles = 0.0
        if instruction.opcode in _COPIES:
          cycles = instruction.bytes / bytes_per_cycle
        elif instruction.cycles:
          read = [shapes.get(operand, "") for operand in instruction.operands]
          size = sum(shape_bytes(shape) for shape in read if "S(" not in shape)
          cycles = min(size / bytes_per_cycle, instruction.cycles)
        totals[name] += cycles * self.runs[name]
    return totals

  def collectives(self, devices: int) -> list[Collective]:
    """All collectives. One that the compiler split into overlapped pieces counts once.

    Args:
      devices: devices of the program, the default group.
    """
    found: dict[str, Collective] = {}
    callers = self._callers()
    for name, instructions in self.computations.items():
      for instruction in instructions:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES or name not in self.runs:
          continue
        home = name
        while home not in self.scheduled:
          home = callers[home]
        if name.startswith("all-reduce-scatter"):
          kind = "reduce-scatter"
        group = _group_size(instruction.rest, devices)
        # XLA:GPU writes a pair of start and done even if nothing comes between them.
        asynchronous = '"is_sync":true' not in instruction.rest and (
          instruction.opcode.endswith("-start")
          or "async_collective_fusion_config" in instruction.rest
        )
        # The pieces of one are fused into several computations, under one channel.
        fused = home != name and instruction.attribute("channel_id")
        count = self.runs[home]
        found.setdefault(
          fused or instruction.name,
          Collective(
            kind,
            count,
            count * _sent_bytes(kind, instruction, group),
            group,
            asynchronous,
            instruction.op_name,
            home,
            _pairs(instruction.rest),
          ),
        )
    return list(found.values())

  def kernels(self) -> list[Kernel]:
    """The hand-written kernels."""
    found = []
    for name, instruction, times in self.steps():
      if instruction.attribute("custom_call_target") != "tpu_custom_call":
        continue
      operands = tuple(parse_shapes(instruction.operand_layouts))
      label = instruction.op_name.split("/")[-2] if "/" in instruction.op_name else instruction.name
      size = shape_bytes(instruction.operand_layouts) + instruction.bytes
      found.append(Kernel(label, times, name, operands, instruction.rest, size))
    return found

  def largest_buffers(self, count: int) -> list[tuple[int, str, str]]:
    """(bytes, shape, origin) of the largest arrays that operations write to device memory.

    Arrays of one shape and origin are listed once; those kept in on-chip memory are left out.
    """
    sizes: dict[tuple[str, str], int] = {}
    free = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")
    for _, instruction, _ in self.steps():
      if instruction.opcode in free or instruction.opcode.endswith("-done"):
        continue
      for match in _ARRAY.finditer(instruction.shape):
        if "S(" not in (match[3] or ""):
          array = f"{match[1]}[{match[2]}]"
          sizes[array, instruction.op_name] = shape_bytes(array)
    largest = sorted(((size, *key) for key, size in sizes.items()), reverse=True)
    return largest[:count]

  def _callers(self) -> dict[str, str]:
    return {
      called: name
      for name, instructions in self.computations.items()
      for instruction in instructions
      for called in instruction.called()
    }

  def _trip_count(self, computation: str, loop: Instruction) -> int:
    """The trip count of a loop that counts up to a constant, as in `scan` and XLA's own passes."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
      return int(known[1])
    condition = {i.name: i for i in self.computations[loop.attribute("condition").lstrip("%")]}
    body = {i.name: i for i in self.computations[loop.attribute("body").lstrip("%")]}
    outer = {i.name: i for i in self.computations[computation]}
    compare = next(i for i in condition.values() if i.is_root)
    counter, limit = (condition.get(name) for name in (*compare.operands, "", "")[:2])
    if (
      compare.opcode != "compare"
      or compare.attribute("direction") != "LT"
      or counter is None
      or counter.opcode != "get-tuple-element"
      or (bound := _constant(limit)) is None
    ):
      self.unknown_loops.append(loop.name)
      return 1
    index = int(counter.attribute("index"))
    root = next(i for i in body.values() if i.is_root)
    update = body.get(root.operands[index]) if root.opcode == "tuple" else None
    step = 1
    if update is not None and update.opcode == "add":
      addends = [_constant(body.get(name)) for name in update.operands]
      step = next((addend for addend in addends if addend), 1)
    start = outer.get(outer[loop.operands[0]].operands[index])
    return max(math.ceil((bound - (_constant(start) or 0)) / step), 0)


def _statements(text: str) -> Iterator[str]:
  """Yields the statements of a program; a kernel's metadata may span several lines."""
  statement = ""
  for line in text.splitlines():
    if line == "}" or _LINE.match(line) or _HEADER.match(line):
      yield statement
      statement = line
    else:
      statement += line
  yield statement


def _parse(line: str) -> Instruction | None:
  start = _LINE.match(line)
  if not start:
    return None
  begin = start.end()
  end = _closing(line, begin) + 1 if line[begin] == "(" else line.index(" ", begin)
  opening = line.index("(", end)
  closing = _closing(line, opening)
  operands = re.findall(r"%([\w.\-]+)", line[opening:closing])
  return Instruction(
    name=start[2],
    opcode=line[end:opening].strip(),
    shape=line[begin:end],
    # A constant's value is written in the place of operands.
    operands=tuple(operands) if operands else (line[opening + 1 : closing],),
    rest=line[closing + 1 :],
    is_root=bool(start[1]),
  )


def _closing(line: str, opening: int) -> int:
  depth = 0
  for position in range(opening, len(line)):
    depth += {"(": 1, ")": -1}.get(line[position], 0)
    if depth == 0:
      return position
  raise ValueError(f"unbalanced parentheses: {line[:80]}")


def _constant(instruction: Instruction | None) -> int | None:
  if instruction is None or instruction.opcode != "constant":
    return None
  value = instruction.operands[0]
  return int(value) if re.fullmatch(r"-?\d+", value) else None


def _group_size(rest: str, devices: int) -> int:
  """Number of devices in a group of a collective, in any of XLA's notations."""
  if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
    return int(iota[2])
  if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
    return len(groups[1].split(","))
  return devices


def _pairs(rest: str) -> tuple[tuple[int, int], ...]:
  found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest)
  pairs = re.findall(r"\{(\d+),(\d+)\}", found[1] if found else "")
  return tuple((int(source), int(target)) for source, target in pairs)


def _sent_bytes(kind: str, instruction: Instruction, group: int) -> float:
  share = (group - 1) / group
  arrays = [shape_bytes(found[0]) for found in _ARRAY.finditer(instruction.shape)]
  size = sum(arrays)
  started = instruction.opcode.endswith("-start")
  if started and (kind != "all-reduce" or instruction.shape.startswith("((")):
    # Its shape is (operand, result, ...), or ((operands), results, ...); an all-reduce may have the
    # results alone.
    data = [array for array in arrays if array > 4]
    size = sum(data[len(data) // 2 :])
  match kind:
    case "all-reduce":
      return 2 * size * share
    case "reduce-scatter":
      return size * (1 if instruction.opcode.startswith("all-reduce") else group) * share
    case "collective-permute":
      return float(size)
    case _:
      return size * share
