"""The real TPU compiler's program of a small training step: what it sends, holds and calls."""

import importlib.util
import math

import jax
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.compile import compile_training
from gptjax.compiler.hlo import Program, shape_bytes
from gptjax.compiler.topology import find_slice
from gptjax.devices import sharding
from gptjax.objectives import head
from gptjax.training.resolve import resolve
from gptjax.training.setup import make_setup

pytestmark = [
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed (it exists for Linux on x86-64 only)",
  ),
  pytest.mark.slow,
]

LAYERS, WIDTH, MLP, VOCAB, LENGTH, ROWS = 4, 512, 2048, 4096, 512, 32
SMALL = {
  "model.num_layers": LAYERS,
  "model.embed_dim": WIDTH,
  "model.num_heads": 4,
  "model.mlp_dim": MLP,
  "model.vocab_size": VOCAB,
  "model.position.max_positions": LENGTH,
  "model.dtype": "bfloat16",
  "model.execution.remat": "full",
  "sequence_length": LENGTH,
  "batch_size": ROWS,
}


def compile_small(topology, **mesh):
  overrides = SMALL | {f"mesh.{axis}": size for axis, size in mesh.items()}
  config = config_lib.load(
    "configs/pretrain.py:model=tiny-gpt2", {key: str(value) for key, value in overrides.items()}
  )
  target = find_slice(topology)
  setup = make_setup(resolve(config), target.devices)
  return setup, compile_training(setup, target)


@pytest.fixture(scope="module")
def chunked():
  """A loss in two chunks, as it would be at a real vocabulary."""
  original, head.MAX_LOGIT_BYTES = head.MAX_LOGIT_BYTES, ROWS // 16 * LENGTH * VOCAB * 2
  yield
  head.MAX_LOGIT_BYTES = original


@pytest.fixture(scope="module")
def fsdp_v5e(chunked):
  return compile_small("v5e-16", fsdp=16)


@pytest.fixture(scope="module")
def tensor_v5p(chunked):
  return compile_small("v5p-16", fsdp=4, tensor=2)


@pytest.fixture(params=["fsdp_v5e", "tensor_v5p"])
def compiled(request):
  """The setup and the report of each of the two."""
  return request.getfixturevalue(request.param)


def test_it_fits_and_every_loop_was_understood(compiled):
  _, report = compiled
  assert report.fits
  assert 0 < report.total < report.capacity
  assert report.unknown_loops == 0
  assert 0 < report.mfu < 1
  assert report.seconds > max(report.roofline["compute"], report.roofline["hbm"])


def test_fsdp_sends_parameters_and_gradients_only(fsdp_v5e):
  setup, report = fsdp_v5e
  matrices = sum(
    math.prod(info.shape) for info in setup.parameters.values() if info.fan_in_axes is not None
  )
  share = 15 / 16
  gathered = report.collectives["all-gather"].bytes
  # Twice, since the backward pass gathers again; and the table of the embedding, in bfloat16.
  expected = share * 2 * (2 * matrices + VOCAB * WIDTH)
  assert expected <= gathered <= 1.1 * expected
  scattered = report.collectives["collective-permute"].bytes
  # Gradients are summed in float32 (mesh.reduce_dtype).
  expected = share * 4 * (matrices + VOCAB * WIDTH)
  assert 0.95 * expected <= scattered <= 1.05 * expected
  # What is left is vectors, the table of positions, and scalars.
  positions = 4 * LENGTH * WIDTH
  assert report.collectives["all-reduce"].bytes <= 2 * share * positions * 1.2
  assert set(report.collectives) <= {"all-gather", "all-reduce", "all-to-all", "collective-permute"}
  # Two rings of 15 hops for each of 6 matrices a layer and the table.
  assert report.collectives["collective-permute"].count == 2 * 15 * (6 * LAYERS + 1)
  assert report.collectives["collective-permute"].asynchronous == 2 * 15 * (6 * LAYERS + 1)


def test_no_activations_are_gathered_over_fsdp(fsdp_v5e):
  _, report = fsdp_v5e
  activations = f"[{ROWS},{LENGTH},"
  gathers = [
    instruction.shape
    for instructions in Program(report.program).computations.values()
    for instruction in instructions
    if instruction.opcode.startswith("all-gather")
  ]
  assert gathers
  assert not [shape for shape in gathers if activations in shape]


def test_no_large_parameter_is_whole_on_a_device(compiled):
  setup, _ = compiled
  with jax.set_mesh(setup.mesh):
    state = setup.abstract_state(setup.make_optimizer(setup.run_length))
  for leaf in jax.tree.leaves(state):
    whole = leaf.sharding.shard_shape(leaf.shape) == leaf.shape
    assert not whole or leaf.size <= LAYERS * MLP


def test_tensor_parallel_norms_are_split_over_the_sequence(tensor_v5p):
  _, report = tensor_v5p
  # Two reduce-scatters a layer forward, and again backward, where plain tensor parallelism has
  # all-reduces of whole activations.
  activations = ROWS // 4 * LENGTH * WIDTH * 2
  in_layers = [
    one
    for one in Program(report.program).collectives(8)
    if one.count >= LAYERS and "/shard_map/while/" not in one.op_name  # that is the loss
  ]
  scattered = [one for one in in_layers if one.kind == "reduce-scatter"]
  assert sum(one.count for one in scattered) >= 4 * LAYERS
  reduced = [one for one in in_layers if one.kind == "all-reduce"]
  assert not [one for one in reduced if one.bytes / one.count >= activations / 4]


def test_splash_attention_and_the_chunked_loss_are_in_the_program(compiled):
  setup, report = compiled
  program = Program(report.program)
  kernels = {kernel.name: kernel.count for kernel in program.kernels()}
  assert sorted(kernels) == [
    "splash_mha_dkv_segmented_no_residuals",
    "splash_mha_fwd_segmented_residuals",
  ]
  assert kernels["splash_mha_dkv_segmented_no_residuals"] == LAYERS
  with jax.set_mesh(setup.mesh):
    vocab = VOCAB // sharding.axis_parts("vocab")
    tokens = ROWS * LENGTH // math.prod(sharding.axis_parts(axis) for axis in ("batch", "time"))
  largest = max(
    shape_bytes(f"f32[{dims}]")
    for _, instruction, _ in program.steps()
    for dims in _logit_shapes(instruction.shape, vocab)
  )
  assert largest <= np.dtype(np.float32).itemsize * tokens * vocab // 2


def _logit_shapes(shape, vocab):
  """The arrays in the text of a shape with as many columns as the vocabulary, and not the width."""
  found = []
  for dims in (part.partition("]")[0] for part in shape.split("[")[1:]):
    sizes = [int(size) for size in dims.split(",") if size.isdigit()]
    if vocab in sizes and WIDTH not in sizes and len(sizes) > 1:
      found.append(dims)
  return found


def test_context_parallelism_gathers_keys_and_scatters_their_gradients(chunked):
  setup, report = compile_small("v5e-16", fsdp=4, context=4)
  in_layers = [one for one in Program(report.program).collectives(16) if one.count >= LAYERS]
  # One matrix of keys, in bfloat16: all rows of a device, the whole length.
  keys = ROWS // 4 * LENGTH * WIDTH * 2
  gathered = [one for one in in_layers if one.kind == "all-gather" and "shard_map" in one.op_name]
  assert sum(one.bytes for one in gathered) <= 1.01 * 4 * LAYERS * keys * 3 / 4
  scattered = [one for one in in_layers if one.kind == "reduce-scatter"]
  assert sum(one.bytes for one in scattered) <= 1.01 * 2 * LAYERS * keys * 3 / 4
  # What is all-reduced is each device's part of the gradient of the weights, over `context`.
  matrices = sum(math.prod(i.shape) for i in setup.parameters.values() if i.fan_in_axes is not None)
  reduced = sum(one.bytes for one in in_layers if one.kind == "all-reduce")
  assert reduced <= 1.05 * 2 * 3 / 4 * matrices / 4 * 2
