# ruff: noqa: E501 (an instruction of a program is one line)
"""Names and programs of GPUs, which need nothing; and a real compilation where it can be done."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jax._src.cudnn import fused_attention_stablehlo

from gptjax.compile import find_target
from gptjax.compiler import gpu
from gptjax.compiler.gpu import MODELS, Gpus, is_name, parse_name
from gptjax.compiler.hlo import Program
from gptjax.compiler.report import read_costs
from gptjax.devices import chips
from gptjax.errors import UserError

ROOT = Path(__file__).parents[2]

PROGRAM = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[2,256,12,64])) -> (s32[], bf16[2,256,12,64]) {
  %p = (s32[], bf16[2,256,12,64]{3,2,1,0}) parameter(0)
  %q = bf16[2,256,12,64]{3,2,1,0} get-tuple-element(%p), index=1
  %i = s32[] get-tuple-element(%p), index=0
  %mask = bf16[2,1,256,256]{3,2,1,0} fusion(%i), kind=kLoop, calls=%masked
  %fwd = (bf16[2,12,256,64]{3,1,2,0}, f32[2,12,256]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q, %mask), custom_call_target="__cudnn$fmhaScaleBiasSoftmax", operand_layout_constraints={bf16[2,256,12,64]{3,2,1,0}, bf16[2,256,12,64]{3,2,1,0}, bf16[2,256,12,64]{3,2,1,0}, bf16[2,1,256,256]{3,2,1,0}}, api_version=API_VERSION_STATUS_RETURNING
  %bwd = (bf16[2,12,256,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q, %mask), custom_call_target="__cudnn$fmhaScaleBiasSoftmaxBackward", operand_layout_constraints={bf16[2,256,12,64]{3,2,1,0}, bf16[2,256,12,64]{3,2,1,0}, bf16[2,256,12,64]{3,2,1,0}, f32[2,12,256]{2,1,0}}
  %gemm_fusion_dot.1 = bf16[2,256,12,64]{3,2,1,0} fusion(%q), kind=kCustom, calls=%product, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
  %softmax = bf16[2,256,12,64]{3,2,1,0} fusion(%q), kind=kCustom, calls=%soft, backend_config={"fusion_backend_config":{"kind":"__triton"}}
  %in_place = bf16[2,256,12,64]{3,2,1,0} fusion(%q), kind=kCustom, calls=%soft, backend_config={"fusion_backend_config":{"kind":"__custom_fusion","custom_fusion_config":{"name":"dynamic_slice_fusion"}}}
  ROOT %t = (s32[], bf16[2,256,12,64]{3,2,1,0}) tuple(%i, %gemm_fusion_dot.1)
}

%condition (p: (s32[], bf16[2,256,12,64])) -> pred[] {
  %p = (s32[], bf16[2,256,12,64]{3,2,1,0}) parameter(0)
  ROOT %less = pred[] constant(false)
}

ENTRY %main (x: bf16[96,768], s: (s32[], bf16[2,256,12,64])) -> bf16[768,768] {
  %x = bf16[96,768]{1,0} parameter(0)
  %s = (s32[], bf16[2,256,12,64]{3,2,1,0}) parameter(1)
  %all-gather-start = (bf16[96,768]{1,0}, bf16[768,768]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=mesh['data'=1,'fsdp'=8] {'fsdp'}, dimensions={0}, backend_config={"collective_backend_config":{"is_sync":false}}
  %loop = (s32[], bf16[2,256,12,64]{3,2,1,0}) while(%s), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %all-gather-done = bf16[768,768]{1,0} all-gather-done(%all-gather-start)
  %all-reduce-start = ((f32[3072]{0}), f32[3072]{0}) all-reduce-start(%x), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum, backend_config={"collective_backend_config":{"is_sync":true}}
  %all-reduce-done = f32[3072]{0} all-reduce-done(%all-reduce-start)
  %product = (f32[768,768]{1,0}, s8[4]{0}) custom-call(%x, %x), custom_call_target="__cublas$lt$matmul"
  %older = (f32[768,768]{1,0}, s8[4]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm"
  ROOT %sorted = bf16[768,768]{1,0} custom-call(%x), custom_call_target="__cub$DeviceRadixSort"
}
"""


@pytest.fixture(autouse=True)
def usual_share(monkeypatch):
  monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)


def make_gpus(kind="h100", count=8):
  model = MODELS[kind]
  return Gpus(kind, [None] * count, chips.find_chip(model.device_kind), model, Path("/cuda"))


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("h100-1", ("h100", 1, 1)),
    ("a100-4", ("a100", 1, 4)),
    ("h100-8", ("h100", 1, 8)),
    ("h200-16", ("h200", 2, 8)),
    ("b200-64", ("b200", 8, 8)),
  ],
)
def test_a_name_is_nodes_of_eight(name, expected):
  assert is_name(name)
  assert parse_name(name) == expected


@pytest.mark.parametrize(
  "name", ["h100", "h100-0", "h100-3", "h100-12", "h100:2x8", "h100-8x", "a100-"]
)
def test_a_name_of_nothing_is_refused_in_a_line(name):
  with pytest.raises(UserError, match=rf"^--topology={name}: expected a number of GPUs") as caught:
    find_target(name, 1)
  assert "\n" not in str(caught.value)


def test_names_of_tpus_are_not_of_gpus():
  assert not any(map(is_name, ("v5e-16", "v5p:4x4x4", "h1000-8", "tpu7x-8")))
  with pytest.raises(UserError, match=r"^--num_slices=2 is of TPUs"):
    find_target("h100-8", 2)


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_is_a_chip_that_is_known(kind):
  gpus = make_gpus(kind)
  # The driver reports a little less than the published memory, in GiB or nearly so.
  assert 0.98 < gpus.model.memory_bytes / gpus.chip.hbm_bytes <= 1
  # The matrix units of a core do at most this much in a cycle.
  per_cycle = gpus.chip.peak_flops / (gpus.model.cores * gpus.model.clock_ghz * 1e9)
  assert per_cycle <= {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192}[gpus.model.capability] * 1.01
  assert gpus.hbm_bytes == int(gpus.model.memory_bytes * 0.75)


def test_the_share_of_memory_is_that_of_jax(monkeypatch):
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
  assert make_gpus().hbm_bytes == int(84_942_979_072 * 0.9)


def test_a_description_closes_what_it_opens():
  text = gpu.target_config(MODELS["h100"])
  assert text.count("{") == text.count("}") == 3
  assert re.search(
    r"capability \{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES \}", text
  )
  assert "memory_bandwidth: 3350000000000\n" in text


def test_kernels_are_counted_by_kind():
  assert gpu.count_kernels(Program(PROGRAM)) == {
    "XLA fusion": 8,
    "cuDNN attention": 8,
    "Triton matrix product": 4,
    "Triton fusion": 4,
    "cuBLASLt": 1,
    "cuBLAS": 1,
    "__cub$DeviceRadixSort": 1,
  }


def test_attention_is_two_products_forward_and_five_backward():
  # 4 layers, 2 rows, 12 heads, 256 queries and keys, 64 wide.
  assert gpu.attention_flops(Program(PROGRAM)) == 4 * (2 + 5) * 2 * 2 * 12 * 256 * 256 * 64


def test_under_a_causal_mask_half_the_keys_are_seen():
  causal = PROGRAM.replace(
    "api_version=API_VERSION_STATUS_RETURNING",
    'backend_config={"cudnn_fmha_backend_config":{"mask_type":"PADDING_CAUSAL"}}',
  )
  whole = gpu.attention_flops(Program(PROGRAM))
  # The forward pass alone: two of seven products.
  assert gpu.attention_flops(Program(causal)) == whole * (1 - 2 / 7 / 2)


def test_attention_is_judged_by_the_gpu_that_is_compiled_for(monkeypatch):
  original = fused_attention_stablehlo.check_compute_capability
  monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", original)
  for kind, expected in (("a100", False), ("h100", True), ("b200", True)):
    gpu.judge_attention_by(MODELS[kind])
    assert fused_attention_stablehlo.check_compute_capability("9.0") == expected


def test_costs_are_those_of_the_links_and_no_estimate():
  program, gpus = Program(PROGRAM), make_gpus()
  gather, reduce = program.collectives(devices=8)
  assert (gather.kind, gather.asynchronous, gather.bytes) == ("all-gather", True, 2 * 768 * 672)
  assert (reduce.kind, reduce.asynchronous, reduce.bytes) == (
    "all-reduce",
    False,
    2 * 3072 * 4 * 7 / 8,
  )
  costs = read_costs(gpus, program, None, [gather, reduce])
  assert costs.estimate is None
  assert "no times for GPUs" in costs.remark
  assert costs.network["network"] == pytest.approx((gather.bytes + reduce.bytes) / 450e9)
  # Beyond a node, its eight cards at 50 GB/s are the narrowest.
  assert gpus.link_bandwidth(16) == 400e9
  assert gpus.link_bandwidth(8) == 450e9


@pytest.mark.parametrize(
  ("missing", "message"),
  [
    ("plugin", r"the CUDA plugin of JAX is not installed\. Run: pip install 'jax\[cuda13\]=="),
    ("cudnn", r"cuDNN is not installed\. Run: pip install 'jax\[cuda13\]=="),
    ("ptxas", r"there is no CUDA toolkit with bin/ptxas .* Run: pip install 'jax\[cuda13\]=="),
  ],
)
def test_what_is_missing_is_said_in_a_line(monkeypatch, missing, message):
  absent = {"plugin": gpu.PLUGINS, "cudnn": ("nvidia.cudnn",), "ptxas": ()}[missing]
  monkeypatch.setattr(gpu, "_installed", lambda module: module not in absent)
  monkeypatch.setattr(gpu.ctypes.util, "find_library", lambda name: None)
  monkeypatch.setattr(gpu, "_cuda_roots", lambda: iter(()))
  with pytest.raises(UserError, match=f"^--topology=h100-8: {message}") as caught:
    gpu.find_gpus("h100-8")
  assert "\n" not in str(caught.value)


def test_a_toolkit_is_found_where_it_is_said_to_be(monkeypatch, tmp_path):
  monkeypatch.setattr(gpu, "_installed", lambda module: False)
  (tmp_path / "bin").mkdir()
  (tmp_path / "bin/ptxas").touch()
  monkeypatch.setenv("CUDA_HOME", str(tmp_path))
  # An assembler without the library of device functions is not enough.
  assert gpu.find_cuda() != tmp_path
  (tmp_path / "nvvm/libdevice").mkdir(parents=True)
  assert gpu.find_cuda() == tmp_path


def test_a_step_compiles_for_a_gpu_that_is_not_here(tmp_path):
  if not any(map(gpu._installed, gpu.PLUGINS)):
    pytest.skip("the CUDA plugin of JAX is not installed: pip install 'jax[cuda13]'")
  if gpu.find_cuda() is None:
    pytest.skip("there is no CUDA toolkit with ptxas: pip install 'jax[cuda13]'")
  output = tmp_path / "report.json"
  # In a process of its own: the plugin reads the environment when it is loaded.
  environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
  process = subprocess.run(
    [
      sys.executable,
      "-m",
      "gptjax.compile",
      "--topology=h100-8",
      "--config=configs/pretrain.py:model=tiny,mesh=fsdp",
      "--config.model.num_layers=2",
      "--config.model.dtype=bfloat16",
      "--config.compile.options.gpu=xla_gpu_enable_latency_hiding_scheduler=True",
      f"--json={output}",
    ],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  if "cuDNN is not installed" in process.stderr:
    pytest.skip("cuDNN is not installed: pip install 'jax[cuda13]'")
  assert process.returncode == 0, process.stderr
  assert "H100 SXM" in process.stdout
  assert "no estimate: XLA gives no times for GPUs" in process.stdout
  report = json.loads(output.read_text())
  assert report["fits"]
  assert report["chips"] == 8
  assert report["estimated_step_seconds"] is None
  assert report["estimated_tokens_per_second"] is None
  # Forward and backward of each of two layers.
  assert report["kernels"]["cuDNN attention"] == 4
  assert report["collectives"]["reduce-scatter"]["bytes"] > 0
  # 5 % of slack for what is computed twice, and more for scores that no query sees.
  ratio = report["hardware_flops_per_chip"] * 8 / report["model_flops_per_step"]
  assert 0.95 < ratio < 1.3
