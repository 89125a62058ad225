"""Peak performance of accelerators, and the share of it that a training run uses (MFU)."""

import dataclasses
import re
from collections.abc import Sequence

# How MFU is computed; printed beside it.
FLOP_RULE = "6 N + 12 L H Q K per token, K = keys a causal query sees on average"


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak performance of one JAX device: of half a chip, if a chip shows up as two devices.

  Attributes:
    name: the maker's name of the chip.
    peak_flops: dense bfloat16 matrix FLOP/s without sparsity (float16 on V100 and T4, which have
      no bfloat16 units).
    hbm_bytes: bytes of device memory.
    hbm_bytes_per_second: bandwidth of that memory.
  """

  name: str
  peak_flops: float
  hbm_bytes: int
  hbm_bytes_per_second: float


# Pattern of `device_kind`, name, and per chip: bfloat16 TFLOP/s, GiB, GB/s; JAX devices to a chip.
# TPU: the system architecture pages of cloud.google.com/tpu/docs (v2 ... v6e, tpu7x).
# NVIDIA: the data sheets of V100, T4, A100, L4, H100, H200, HGX B200 and GB200 NVL72; where they
# give numbers with sparsity, half of them.
_CHIPS = [
  (r"TPU v2", "TPU v2", 45, 16, 600, 2),
  (r"TPU v3", "TPU v3", 123, 32, 900, 2),
  (r"TPU v4", "TPU v4", 275, 32, 1200, 1),
  (r"TPU v5 lite|TPU v5e", "TPU v5e", 197, 16, 819, 1),
  (r"TPU v5p?", "TPU v5p", 459, 95, 2765, 1),
  (r"TPU v6 lite|TPU v6e", "TPU v6e", 918, 32, 1638, 1),
  (r"TPU7x|TPU v7x?", "TPU v7x", 2307, 192, 7380, 2),
  (r".*V100-SXM.*-16GB.*", "V100 SXM 16GB", 125, 16, 900, 1),
  (r".*V100-SXM.*-32GB.*", "V100 SXM 32GB", 125, 32, 900, 1),
  (r".*V100-PCIE-16GB.*", "V100 PCIe 16GB", 112, 16, 900, 1),
  (r".*V100-PCIE-32GB.*", "V100 PCIe 32GB", 112, 32, 900, 1),
  (r".*\bT4", "T4", 65, 16, 320, 1),
  (r".*A100-(SXM.*|PCIE-)40GB.*", "A100 40GB", 312, 40, 1555, 1),
  (r".*A100-SXM.*80GB.*", "A100 SXM 80GB", 312, 80, 2039, 1),
  (r".*A100.80GB.PCIe", "A100 PCIe 80GB", 312, 80, 1935, 1),
  (r".*\bL4", "L4", 121, 24, 300, 1),
  (r".*H100 PCIe", "H100 PCIe", 756, 80, 2000, 1),
  (r".*H100 NVL", "H100 NVL", 835, 94, 3900, 1),
  (r".*H100 80GB HBM3", "H100 SXM", 989, 80, 3350, 1),
  (r".*H200 NVL", "H200 NVL", 835, 141, 4800, 1),
  (r".*H200", "H200 SXM", 989, 141, 4800, 1),
  (r".*\bB200", "B200", 2250, 180, 7700, 1),
  (r".*\bGB200", "GB200", 2500, 186, 8000, 1),
]


def find_chip(device_kind: str) -> Chip | None:
  """Returns the published numbers of a `jax.Device.device_kind`; None if unknown, as for CPUs."""
  for pattern, name, tflops, gib, gb_per_second, devices in _CHIPS:
    if re.fullmatch(pattern, device_kind):
      return Chip(
        name=name,
        peak_flops=tflops * 1e12 / devices,
        hbm_bytes=gib * 2**30 // devices,
        hbm_bytes_per_second=gb_per_second * 1e9 / devices,
      )
  return None


def flops_per_token(
  *,
  matmul_params: int,
  heads: int,
  head_dim: int,
  sequence_length: int,
  windows: Sequence[int | None],
  causal: bool = True,
) -> float:
  """Returns the FLOPs that training on one token takes, forward and backward, without remat.

  6 N + 12 L H Q T of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), but with the keys
  that a query really sees in place of T: (T + 1) / 2 on average under a causal mask, fewer under a
  sliding window. Document boundaries in a packed row are not subtracted.

  Args:
    matmul_params: N, the parameters that a token is multiplied with: without the embedding's lookup
      table (but with the output head, tied or not) and without inactive experts.
    heads: H, query heads.
    head_dim: Q, their width.
    sequence_length: T.
    windows: one entry a layer, the number of keys a query sees at most, itself included; None
      where there is no limit.
    causal: whether a query sees its past alone; otherwise it sees all T keys.
  """
  keys = 0.0 if causal else float(sequence_length * len(windows))
  for window in windows if causal else ():
    window = sequence_length if window is None else min(window, sequence_length)
    # The first `window` queries see 1, 2, ... keys, the rest see `window`.
    keys += window * (window + 1) / 2 / sequence_length
    keys += window * (sequence_length - window) / sequence_length
  return 6.0 * matmul_params + 12.0 * heads * head_dim * keys


def mfu(
  tokens_per_second: float, flops_per_token: float, *, device_kind: str, devices: int
) -> float | None:
  """Returns the model FLOPs utilisation, a fraction of the peak; None on an unknown chip.

  Args:
    tokens_per_second: rate of all devices together.
    flops_per_token: result of `flops_per_token`.
    device_kind: the `device_kind` of the devices.
    devices: number of JAX devices.
  """
  chip = find_chip(device_kind)
  if chip is None:
    return None
  return tokens_per_second * flops_per_token / (chip.peak_flops * devices)
