"""The memory and traffic of a decoding step, by hand, and the step from the TPU's compiler."""

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import config as config_lib
from gptjax.compiler import decoding
from gptjax.compiler.decoding import Decoding, append, compile_decoding, make_decoding_plan
from gptjax.compiler.hlo import Program
from gptjax.compiler.report import to_text
from gptjax.compiler.topology import find_slice
from gptjax.devices import sharding
from gptjax.errors import UserError
from gptjax.inference import tpu
from gptjax.inference.form import Form, make_form
from gptjax.inference.forward import forward
from gptjax.inference.pages import PAGE
from gptjax.model.attention import Mask, attend, visible
from gptjax.model.gpt import GPT, describe

SHAPE = {
  "vocab_size": 512,
  "num_layers": 2,
  "embed_dim": 256,
  "num_heads": 4,
  "num_kv_heads": 2,
  "mlp_dim": 512,
  "position.max_positions": 256,
  "dtype": "bfloat16",
}
BATCH, CONTEXT = 8, 128
# Queries and output of 4 heads of 64, keys and values of 2, three of the feed-forward network; the
# table, which is also the head: two bytes each. Norms are float32 in any form. In int8, each output
# has a scale, of four bytes.
MATRICES = 2 * (256 * 64 * (2 * 4 + 2 * 2) + 3 * 256 * 512) + 512 * 256
NORMS = (2 * 2 + 1) * 256 + 2 * 2 * 64
SCALES = 2 * (64 * (4 + 2 * 2) + 256 + 2 * 512 + 256) + 512
CACHE = 2 * 2 * BATCH * CONTEXT * 2 * 64 * 2
# So many times the context is a cache that is too large for on-chip memory.
LONG = 256


def load(**overrides):
  shape = {f"model.{key}": value for key, value in SHAPE.items()}
  return config_lib.load("configs/pretrain.py:model=tiny", shape | overrides)


def make_plan(devices, mesh, batch=BATCH, context=CONTEXT, **overrides):
  sizes = {f"mesh.{axis}": mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor", "context")}
  return make_decoding_plan(load(**sizes, **overrides), devices, batch, context)


def work_of(setup, weights="bfloat16"):
  form = decoding.abstract_form(setup, weights)
  params, state = decoding.abstract_parameters(setup, form), decoding.abstract_decoding(setup)
  return decoding._work(setup, describe(form), params, state)


def test_what_a_device_holds_and_reads():
  work = work_of(make_plan(jax.devices(), {"fsdp": 2, "tensor": 2}))
  # Matrices are split over both axes, vectors over neither but by heads; the cache over both.
  assert work.held == {"parameters": 2 * MATRICES // 4 + 4 * NORMS, "kv_cache": CACHE // 4}
  # What `fsdp` splits is gathered to be used.
  assert work.read == {"parameters": 2 * MATRICES // 2 + 4 * NORMS, "kv_cache": CACHE // 4}
  assert work.tokens == BATCH
  assert [line.partition(":")[0] for line in work.advice] == ["parameters", "the cache"]
  assert work.model_flops == BATCH * (2 * MATRICES + 4 * 4 * 64 * 2 * CONTEXT)


def test_int8_halves_the_matrices_and_adds_their_scales():
  work = work_of(make_plan(jax.devices(), {"data": 4}), "int8")
  assert work.held["parameters"] == work.read["parameters"] == MATRICES + 4 * (SCALES + NORMS)
  # Scales are split as the outputs are, those of `embed` as vectors: not at all.
  split = work_of(make_plan(jax.devices(), {"fsdp": 2, "tensor": 2}), "int8")
  whole = 2 * (256 + 256)
  scales = 4 * (whole + (SCALES - whole) // 2)
  assert split.held["parameters"] == MATRICES // 4 + scales + 4 * NORMS
  float32 = work_of(make_plan(jax.devices(), {"data": 4}), "float32")
  assert float32.held["parameters"] == 4 * (MATRICES + NORMS)


def test_a_window_and_tables_are_not_read_as_a_whole():
  local = {"model.layer_pattern": ("full", "local"), "model.window": 32}
  work = work_of(make_plan(jax.devices(), {"data": 4}, **local))
  assert work.read["kv_cache"] == CACHE // 4 * (128 + 32) // (128 + 128)
  assert work.held["kv_cache"] == CACHE // 4
  learned = {"model.position.kind": "learned", "model.head.tied": False}
  work = work_of(make_plan(jax.devices(), {"data": 4}, **learned))
  looked_up = 256 * 256 + 512 * 256
  assert work.held["parameters"] - work.read["parameters"] == 2 * looked_up


def test_arrays_lie_as_the_rules_say():
  setup = make_plan(jax.devices(), {"fsdp": 2, "tensor": 2})
  params = decoding.abstract_parameters(setup, decoding.abstract_form(setup, "bfloat16"))
  flat = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(params)}
  assert {leaf.dtype for leaf in flat.values() if len(leaf.shape) > 1} == {jnp.dtype("bfloat16")}
  kernel = flat["blocks/1/attention/key/kernel"].get_value()
  assert kernel.shape == (256, 2, 64)
  assert kernel.sharding.shard_shape(kernel.shape) == (128, 1, 64)
  state = decoding.abstract_decoding(setup)
  shards = {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(state.pools)}
  assert shards == {(BATCH // 2 * CONTEXT // PAGE, PAGE, 1, 64)}


def attend_to_pages(
  q_RNH, pages_PZJH, lengths_B, tables_BI, starts, count, *, sm_scale, sliding_window, **_
):
  """What the TPU's kernel computes, for rows of equal length."""
  B, (R, N, H) = len(tables_BI), q_RNH.shape
  rows_BSKPH = pages_PZJH[tables_BI].reshape(B, -1, pages_PZJH.shape[2] // 2, 2, H)
  positions_BT = lengths_B[:, None] - R // B + jnp.arange(R // B)[None]
  keys_BS = jnp.broadcast_to(jnp.arange(rows_BSKPH.shape[1]), rows_BSKPH.shape[:2])
  seen_BTS = visible(positions_BT, keys_BS, sliding_window)
  keys_and_values = rows_BSKPH[:, :, :, 0], rows_BSKPH[:, :, :, 1]
  queries = q_RNH.reshape(B, -1, N, H)
  mask = Mask("xla", visible_BTS=seen_BTS)
  return attend(queries, *keys_and_values, mask, scale=sm_scale).reshape(R, N, H)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_step_takes_what_the_model_finds_likeliest(platform, monkeypatch):
  # Two groups of rows, each with its own pages, and two of heads.
  # Large weights, so that what comes next depends on what a row sees.
  changes = {"model.dtype": "float32", "model.head.tied": False, "model.init.std": 0.3}
  setup = make_plan(jax.devices(), {"fsdp": 2, "tensor": 2}, 4, 20, **changes)
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  monkeypatch.setattr(tpu, "ragged_paged_attention", attend_to_pages)
  model = GPT(setup.model, nnx.Rngs(0))
  tokens = np.random.default_rng(0).integers(0, 512, (4, 19)).astype(np.int32)
  lengths = np.array([18, 2, 17, 9], np.int32)
  expected = jax.jit(model)(tokens)
  form = decoding.abstract_form(setup, "float32")
  placed = jax.tree.map(lambda leaf: leaf.sharding, decoding.abstract_parameters(setup, form))
  joined = platform == "tpu"
  options = {"own": False, "weights": "float32", "length": 20, "joined": joined}
  params = jax.device_put(nnx.state(make_form(*nnx.split(model), **options)), placed)
  weights, treedef = jax.tree.flatten(params)
  form = Form(nnx.graphdef(form), treedef)
  empty = decoding.abstract_decoding(setup)
  pools = jax.tree.map(
    lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), empty.pools
  )
  assert isinstance(pools[0], jax.Array) == joined
  assert pools[0].ndim == 4 if joined else pools[0].keys_BSKH.ndim == 4
  tables = np.array([[1, 3], [2, 0], [0, 1], [3, 2]], np.int32)
  before = np.where(np.arange(19) < lengths[:, None], np.arange(19), -1).astype(np.int32)
  step = jax.jit(append, static_argnums=(0, 3))
  with jax.set_mesh(setup.mesh):
    last = np.zeros((4, 1), np.int32)
    arrays = (tokens, before, tables, last)
    _, pools = forward(form, weights, pools, *arrays, length=20, rows_axis="batch")
    state = Decoding(tokens[np.arange(4), lengths], lengths, tables, pools)
    got = step(form, weights, state, 20)
  np.testing.assert_array_equal(got.tokens, expected[np.arange(4), lengths].argmax(-1))
  np.testing.assert_array_equal(got.lengths, lengths + 1)


@pytest.mark.parametrize(
  ("mesh", "sizes", "overrides", "message"),
  [
    (
      {"data": 4},
      (6, 128),
      {},
      r"^--batch=6 does not divide .* a multiple of 4\.$",
    ),
    ({"data": 2, "fsdp": 2}, (6, 128), {}, "^--batch=6 does not divide over the 4 devices"),
    ({"data": 4}, (0, 128), {}, r"^--batch=0 and --context=128 must both be at least 1\.$"),
    ({"data": 4}, (4, -1), {}, r"^--batch=4 and --context=-1 must both be at least 1\.$"),
    (
      {"data": 4},
      (4, 512),
      {"model.position.kind": "learned"},
      "^--context=512 exceeds the 256",
    ),
    ({"context": 4}, (4, 128), {}, r"^mesh\.context=4 has nothing to split"),
  ],
)
def test_bad_values_are_refused_in_a_line(mesh, sizes, overrides, message):
  with pytest.raises(UserError, match=message) as caught:
    make_plan(jax.devices(), mesh, *sizes, **overrides)
  assert "\n" not in str(caught.value)


def test_the_batch_and_length_of_training_do_not_matter():
  training = {"batch_size": 3, "sequence_length": 999, "grad_accumulation": 7}
  setup = make_plan(jax.devices(), {"data": 4}, **training)
  assert (setup.config.batch_size, setup.config.sequence_length) == (BATCH, CONTEXT)


@pytest.fixture(scope="module")
def compiled():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("the TPU compiler is not installed: pip install 'jax[tpu]'")
  target = find_slice("v5e-4")
  setup = make_plan(target.devices, {"fsdp": 2, "tensor": 2}, BATCH, LONG * CONTEXT)
  return compile_decoding(setup, target, "bfloat16"), setup


VIEWS = ("parameter", "bitcast", "tuple", "get-tuple-element")


def large_arrays(program, size):
  """What makes the arrays of at least so many bytes in memory, but for arguments."""
  return {
    instruction.op_name.rpartition("/")[2] or instruction.opcode
    for _, instruction, _ in program.steps()
    if instruction.opcode not in VIEWS
    and "S(" not in instruction.shape
    and instruction.bytes >= size
  }


def test_of_experts_only_those_chosen_count():
  changes = {"model.experts.count": 4, "model.experts.per_token": 1}
  dense = work_of(make_plan(jax.devices()[:1], {}))
  mixture = work_of(make_plan(jax.devices()[:1], {}, **changes))
  router, expert = 2 * 256 * 4, 2 * 3 * 256 * 512
  assert mixture.model_flops == dense.model_flops + 2 * BATCH * router
  # All rows choose at random: of 4, the expected share that any of 8 chooses.
  read = mixture.read["parameters"] - dense.read["parameters"]
  # The router stays in float32.
  assert abs(read - 4 * router - 2 * expert * (4 * (1 - 0.75**BATCH) - 1)) <= 3


def test_the_compiled_step_holds_what_was_counted(compiled):
  report, _ = compiled
  held = report.work.held
  rest = report.hbm["arguments"] - held["parameters"] - held["kv_cache"]
  # Tokens of the rows, and padding of small vectors to whole tiles.
  assert 0 <= rest < 100_000
  # Heads of 64 are as wide as a register, of 128, in the pages. They are written in place: only
  # what a device returns beside them is new.
  assert held["kv_cache"] == 2 * LONG * CACHE // 4
  assert report.hbm["output"] < 10_000
  program = Program(report.program)
  kernels = program.kernels()
  assert [kernel.name for kernel in kernels] == ["ragged_paged_attention_kernel"] * 2
  # A kernel reads the pages of its layer, beside tables, queries and little else.
  assert 0 <= kernels[0].bytes - held["kv_cache"] // 2 < 100_000
  assert large_arrays(program, held["kv_cache"] // 2) == {"scatter"}
  assert report.fits
  # fsdp gathers every matrix of a layer, but for the table that is scored.
  layers = 2 * (MATRICES - 512 * 256) // 2
  assert report.collectives["all-gather"].bytes >= layers // 2


def test_the_report_names_the_cache_and_the_bound(compiled):
  report, setup = compiled
  # What the head's padding adds need not be read.
  assert report.work.read["kv_cache"] == LONG * CACHE // 4
  reads = sum(report.work.read.values())
  assert report.roofline["hbm"] == pytest.approx(reads / 819e9)
  assert 0 < report.tokens_per_second < BATCH / report.roofline["hbm"]
  text = to_text(report, setup)
  assert "    KV cache" in text
  assert f"memory bandwidth allows {BATCH / report.roofline['hbm']:,.0f} tokens/s" in text
  found = report.to_json()
  assert found["hbm_bytes_per_chip"]["kv_cache"] == 2 * LONG * CACHE // 4
  assert found["estimated_tokens_per_second"] == report.tokens_per_second


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "kind"), [("bfloat16", "bf16"), ("int8", "s8")])
def test_no_weight_is_written_in_another_type(weights, kind):
  """The real compiler converts int8 within the product; all copies are to on-chip memory."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("the TPU compiler is not installed: pip install 'jax[tpu]'")
  target = find_slice("v5e-4")
  sizes = {"embed_dim": 2048, "num_heads": 16, "num_kv_heads": 16, "mlp_dim": 8192}
  wide = {f"model.{key}": size for key, size in sizes.items()}
  report = compile_decoding(make_plan(target.devices, {"tensor": 4}, **wide), target, weights)
  made = [
    kind
    for _, instruction, _ in Program(report.program).steps()
    for kind, dims in re.findall(r"(\w+)\[([\d,]+)\]", instruction.shape)
    if instruction.opcode not in VIEWS
    and "/scatter" not in instruction.op_name
    and math.prod(map(int, dims.split(","))) >= 2048 * 2048 // 4
  ]
  assert set(made) == {kind}
