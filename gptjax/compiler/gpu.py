"""NVIDIA GPUs that are not here: their names and data, and how to read their programs.

XLA can compile for a GPU from a description, with the CUDA plugin of JAX and the assembler of a
CUDA toolkit. It then neither tries kernels out nor says how long one takes.
"""

import ctypes.util
import dataclasses
import importlib.util
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from gptjax.compiler.hlo import Collective, Instruction, Program, parse_shapes
from gptjax.compiler.report import Costs, read_costs
from gptjax.compiler.topology import Target
from gptjax.devices.chips import Chip, find_chip
from gptjax.errors import UserError
from gptjax.training.setup import Setup

GPUS_PER_NODE = 8
PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


@dataclasses.dataclass(frozen=True)
class Model:
  """One kind of GPU, in the node of eight that its maker sells.

  Attributes:
    device_kind: the driver's name for it.
    capability: its compute capability.
    accelerated: whether it has instructions for this capability alone, like sm_90a.
    cores: number of streaming multiprocessors.
    fp32_units: float32 units of one multiprocessor.
    shared_kib: shared memory of one multiprocessor; a block can have 1 KiB less.
    l2_mib: second-level cache.
    clock_ghz: the highest clock.
    memory_bytes: memory that the driver reports, a little less than published.
    nvlink_bytes_per_second: to the GPUs of its node, in one direction: half of the published rate.
    nic_bytes_per_second: to other nodes, by the one network card per GPU.
  """

  device_kind: str
  capability: tuple[int, int]
  accelerated: bool
  cores: int
  fp32_units: int
  shared_kib: int
  l2_mib: float
  clock_ghz: float
  memory_bytes: int
  nvlink_bytes_per_second: float
  nic_bytes_per_second: float


# Architecture white papers of NVIDIA A100 and H100, data sheets of H200 and HGX B200, and the table
# of compute capabilities in the CUDA C++ Programming Guide; network cards of DGX A100, H100, H200
# and B200. Memory, clock and cache as in the device descriptions that XLA has in
# xla/backends/gpu/target_config/specs.
MODELS = {
  "a100": Model(
    "NVIDIA A100-SXM4-80GB", (8, 0), False, 108, 64, 164, 40, 1.41, 85_100_068_864, 300e9, 25e9
  ),
  "h100": Model(
    "NVIDIA H100 80GB HBM3", (9, 0), True, 132, 128, 228, 50, 1.98, 84_942_979_072, 450e9, 50e9
  ),
  "h200": Model("NVIDIA H200", (9, 0), True, 132, 128, 228, 50, 1.98, 151_397_597_184, 450e9, 50e9),
  "b200": Model(
    "NVIDIA B200", (10, 0), True, 148, 128, 228, 126.5, 1.965, 191_514_411_008, 900e9, 50e9
  ),
}

# Kind of a call or a fusion, by the first of these that is found in its target or configuration.
_KINDS = (
  ("__cudnn$fmha", "cuDNN attention"),
  ("__cudnn", "cuDNN"),
  ("__cublas$lt", "cuBLASLt"),
  ("__cublas", "cuBLAS"),
  ("gemm_fusion", "Triton matrix product"),
  ("__triton_gemm", "Triton matrix product"),
  ("__triton", "Triton fusion"),
  ("__custom_fusion", "XLA fusion"),
)
# Matrix products over queries and keys in cuDNN's attention: QK and AV; backward the scores again
# and the gradients of Q, K, V and A.
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 5


@dataclasses.dataclass(frozen=True)
class Gpus(Target):
  """GPUs to compile for, in one node or several.

  Attributes:
    name: the name that was given.
    devices: JAX devices, node by node.
    chip: peak performance of one of them.
    model: its row of the table.
    cuda: root of a CUDA toolkit.
  """

  name: str
  devices: list[jax.Device]
  chip: Chip
  model: Model
  cuda: Path

  @property
  def chips(self) -> int:
    return len(self.devices)

  @property
  def hbm_bytes(self) -> int:
    """The memory that JAX takes, a share set by the same environment variable."""
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
    return int(self.model.memory_bytes * share)

  @property
  def compiler_options(self) -> Mapping[str, str]:
    # Autotuning runs kernels, which needs the GPU.
    return {"xla_gpu_cuda_data_dir": str(self.cuda), "xla_gpu_autotune_level": "0"}

  def link_bandwidth(self, group: int) -> float:
    """Most bytes a second that a device sends in a collective of `group` devices.

    A group that fits in a node is assumed to be in one. In a larger group, each network card
    carries an eighth of the node's bytes.
    """
    inside = self.model.nvlink_bytes_per_second
    if group <= GPUS_PER_NODE:
      return inside
    return min(inside, self.model.nic_bytes_per_second * GPUS_PER_NODE)


def is_name(name: str) -> bool:
  """Whether a topology's name is that of GPUs, by its beginning."""
  return re.split(r"[-:]", name)[0] in MODELS


def parse_name(name: str) -> tuple[str, int, int]:
  """Parses a name: 'h100-16' -> ('h100', 2, 8), the kind, nodes, and GPUs per node."""
  match = re.fullmatch(r"(\w+)-(\d+)", name)
  count = int(match[2]) if match else 0
  whole = count > 0 and count % GPUS_PER_NODE == 0
  if not match or not (whole or count in (1, 2, 4)):
    raise UserError(
      f"--topology={name}: expected a number of GPUs, 1, 2, 4 or a multiple of {GPUS_PER_NODE}, "
      f"such as {re.split(r'[-:]', name)[0]}-8."
    )
  nodes = max(count // GPUS_PER_NODE, 1)
  return match[1], nodes, count // nodes


def find_gpus(name: str) -> Gpus:
  """Finds the GPUs with a name: 'h100-8' is one node, 'h100-16' two.

  Raises:
    UserError: there are no such GPUs, or the plugin, cuDNN or the CUDA toolkit is not installed.
  """
  kind, nodes, per_node = parse_name(name)
  install = f"Run: pip install 'jax[cuda13]=={jax.__version__}' (Linux; no GPU is needed)."
  if not any(map(_installed, PLUGINS)):
    raise UserError(f"--topology={name}: the CUDA plugin of JAX is not installed. {install}")
  if not _installed("nvidia.cudnn") and not ctypes.util.find_library("cudnn"):
    raise UserError(f"--topology={name}: cuDNN is not installed. {install}")
  cuda = find_cuda()
  if cuda is None:
    raise UserError(
      f"--topology={name}: there is no CUDA toolkit with bin/ptxas and nvvm/libdevice, neither in "
      f"a package of Python nor in CUDA_HOME, PATH or /usr/local. {install}"
    )
  try:
    devices = topologies.get_topology_desc(
      platform="cuda",
      target_config=target_config(MODELS[kind]),
      topology=f"1x{nodes}x{per_node}",
    ).devices
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f"--topology={name}: the GPU compiler refuses it: {error}") from error
  judge_attention_by(MODELS[kind])
  return Gpus(name, list(devices), find_chip(devices[0].device_kind), MODELS[kind], cuda)


def target_config(model: Model) -> str:
  """XLA's description of a GPU, used instead of the GPU itself, a protocol buffer as text.

  Limits of threads and registers are the same for all compute capabilities from 8.0 to 10.0.
  """
  major, minor = model.capability
  extension = "ACCELERATED_FEATURES" if model.accelerated else "NONE"
  shared = model.shared_kib * 1024
  return f"""
    gpu_device_info {{
      name: "{model.device_kind}"
      cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
      core_count: {model.cores}
      fpus_per_core: {model.fp32_units}
      clock_rate_ghz: {model.clock_ghz}
      device_memory_size: {model.memory_bytes}
      memory_bandwidth: {find_chip(model.device_kind).hbm_bytes_per_second:.0f}
      l2_cache_size: {model.l2_mib * 2**20:.0f}
      shared_memory_per_core: {shared}
      shared_memory_per_block: {48 * 1024}
      shared_memory_per_block_optin: {shared - 1024}
      threads_per_warp: 32
      threads_per_block_limit: 1024
      threads_per_core_limit: 2048
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }}
    device_description_str: "{model.device_kind}"
  """


def find_cuda() -> Path | None:
  """The root of a CUDA toolkit: from Python's packages, CUDA_HOME, PATH, or the system."""
  parts = ("bin/ptxas", "nvvm/libdevice")
  return next((root for root in _cuda_roots() if all((root / p).exists() for p in parts)), None)


def _cuda_roots() -> Iterator[Path]:
  if _installed("nvidia"):
    for folder in importlib.util.find_spec("nvidia").submodule_search_locations:
      yield from (Path(folder) / name for name in ("cu13", "cuda_nvcc"))
  if home := os.environ.get("CUDA_HOME"):
    yield Path(home)
  if ptxas := shutil.which("ptxas"):
    yield Path(ptxas).resolve().parents[1]
  yield from sorted(Path("/usr/local").glob("cuda*"), reverse=True)


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False


def count_kernels(program: Program) -> dict[str, int]:
  """Counts kernels that run, by kind: calls of NVIDIA's libraries, Triton's, and XLA's own."""
  counts: Counter[str] = Counter()
  for _, instruction, times in program.steps():
    if instruction.opcode in ("custom-call", "fusion"):
      counts[_kind(instruction)] += times
  return dict(counts.most_common())


def _kind(instruction: Instruction) -> str:
  if instruction.opcode == "fusion" and "kind=kCustom" not in instruction.rest:
    return "XLA fusion"
  for pattern, kind in _KINDS:
    if pattern in instruction.rest:
      return kind
  return instruction.attribute("custom_call_target") or "other"


def judge_attention_by(model: Model) -> None:
  """Makes JAX check cuDNN attention for this GPU model, not for a GPU of this machine."""

  def is_capable(capability: str) -> bool:
    return model.capability >= tuple(map(int, capability.split(".")))

  fused_attention_stablehlo.check_compute_capability = is_capable


def attention_flops(program: Program) -> float:
  """FLOPs of all calls of cuDNN's attention on one device.

  A causal mask counts half of the keys. Documents of packed rows are not known here, and not
  subtracted.
  """
  total = 0.0
  for _, instruction, times in program.steps():
    target = instruction.attribute("custom_call_target") or ""
    if not target.startswith("__cudnn$fmha"):
      continue
    # [B, T, N, H] and [B, S, K, H].
    (rows, queries, heads, width), (_, keys, *_) = parse_shapes(instruction.operand_layouts)[:2]
    products = _BACKWARD_PRODUCTS if target.endswith("Backward") else _FORWARD_PRODUCTS
    seen = 0.5 if re.search(r'"mask_type":"\w*CAUSAL"', instruction.rest) else 1.0
    total += times * seen * products * 2.0 * rows * heads * queries * keys * width
  return total


@read_costs.register
def _(target: Gpus, program: Program, setup: Setup, collectives: list[Collective]) -> Costs:
  del setup
  seconds = math.fsum(one.bytes / target.link_bandwidth(one.group) for one in collectives)
  return Costs(
    {"network": seconds},
    attention_flops(program),
    count_kernels(program),
    remark="no estimate: XLA gives no times for GPUs, and chose the kernels without trying any out",
  )
