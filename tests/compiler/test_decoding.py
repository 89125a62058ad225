"""The memory and traffic of a decoding step, by hand, and the step from the TPU's compiler."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from gptjax import config as config_lib
from gptjax.compiler import decoding
from gptjax.compiler.decoding import Decoding, append, compile_decoding, make_decoding_plan
from gptjax.compiler.report import to_text
from gptjax.compiler.topology import find_slice
from gptjax.errors import UserError
from gptjax.model.gpt import GPT

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
# On half of the `tensor` axis: queries and output of 4 heads of 64, keys and values of 2, three of
# the feed-forward network; the norms; the table, which is also the head. Two bytes each.
MATRICES = 2 * (256 * 64 * (2 * 4 + 2 * 2) + 3 * 256 * 512) + 512 * 256
NORMS = (2 * 2 + 1) * 256 + 2 * 2 * 64
CACHE = 2 * 2 * BATCH * CONTEXT * 2 * 64 * 2


def load(**overrides):
  shape = {f"model.{key}": value for key, value in SHAPE.items()}
  return config_lib.load("configs/pretrain.py:model=tiny", shape | overrides)


def make_plan(devices, mesh, batch=BATCH, context=CONTEXT, **overrides):
  sizes = {f"mesh.{axis}": mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor", "context")}
  return make_decoding_plan(load(**sizes, **overrides), devices, batch, context)


def work_of(setup):
  _, params = decoding.abstract_parameters(setup)
  return decoding._work(setup, params, decoding.abstract_decoding(setup))


def test_what_a_device_holds_and_reads():
  work = work_of(make_plan(jax.devices(), {"fsdp": 2, "tensor": 2}))
  # Matrices are split over both axes, vectors over neither but by heads; the cache over both.
  assert work.held == {"parameters": 2 * (MATRICES // 4 + NORMS), "kv_cache": CACHE // 4}
  # What `fsdp` splits is gathered to be used.
  assert work.read == {"parameters": 2 * (MATRICES // 2 + NORMS), "kv_cache": CACHE // 4}
  assert work.tokens == BATCH
  assert [line.partition(":")[0] for line in work.advice] == ["parameters", "the cache"]
  assert work.model_flops == BATCH * (2 * MATRICES + 4 * 4 * 64 * 2 * CONTEXT)


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
  _, params = decoding.abstract_parameters(setup)
  flat = {"/".join(map(str, k)): v for k, v in traverse_util.flatten_dict(params).items()}
  assert {leaf.dtype for leaf in flat.values()} == {jnp.dtype("bfloat16")}
  kernel = flat["blocks/1/attention/key/kernel"]
  assert kernel.shape == (256, 2, 64)
  assert kernel.sharding.shard_shape(kernel.shape) == (128, 1, 64)
  state = decoding.abstract_decoding(setup)
  shards = {leaf.sharding.shard_shape(leaf.shape) for pair in state.cache for leaf in pair}
  assert shards == {(BATCH // 2, CONTEXT, 1, 64)}


def test_a_step_with_the_layers_apart_takes_what_the_model_finds_likeliest():
  setup = make_plan(jax.devices()[:1], {"data": 1}, **{"model.dtype": "float32"})
  model = GPT(setup.model, nnx.Rngs(0))
  tokens, lengths = np.array([[5, 3, 9, 4], [7, 1, 6, 2]]), np.array([3, 2])
  expected = jax.jit(model)(tokens)
  _, cache = jax.jit(lambda model: model.hidden(tokens, cache=model.empty_cache(2, 8)))(model)
  model.unstack()
  apart, abstract = decoding.abstract_parameters(setup)
  own = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, abstract)
  step = jax.jit(lambda params, state: append(nnx.merge(apart, params), state))
  got = step(own, Decoding(tokens[[0, 1], lengths], lengths, cache))
  np.testing.assert_array_equal(got.tokens, expected[[0, 1], lengths].argmax(-1))
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
  setup = make_plan(target.devices, {"fsdp": 2, "tensor": 2})
  return compile_decoding(setup, target), setup


def test_of_experts_only_those_chosen_count():
  changes = {"model.experts.count": 4, "model.experts.per_token": 1}
  dense = work_of(make_plan(jax.devices()[:1], {}))
  mixture = work_of(make_plan(jax.devices()[:1], {}, **changes))
  router, expert = 2 * 256 * 4, 2 * 3 * 256 * 512
  assert mixture.model_flops == dense.model_flops + 2 * BATCH * router
  # All rows choose at random: of 4, the expected share that any of 8 chooses.
  read = mixture.read["parameters"] - dense.read["parameters"]
  assert abs(read - 2 * (router + expert * (4 * (1 - 0.75**BATCH) - 1))) <= 3


def test_the_compiled_step_holds_what_was_counted(compiled):
  report, _ = compiled
  held = report.work.held
  rest = report.hbm["arguments"] - held["parameters"] - held["kv_cache"]
  # Tokens of the rows, and padding of small vectors to whole tiles.
  assert 0 <= rest < 100_000
  # The cache is written in place: only what a device returns beside it is new.
  assert report.hbm["output"] < 10_000
  assert report.fits
  # fsdp gathers every matrix of a layer, but for the table that is scored.
  layers = 2 * (MATRICES - 512 * 256) // 2
  assert report.collectives["all-gather"].bytes >= layers // 2


def test_the_report_names_the_cache_and_the_bound(compiled):
  report, setup = compiled
  reads = sum(report.work.read.values())
  assert report.roofline["hbm"] == pytest.approx(reads / 819e9)
  assert 0 < report.tokens_per_second < BATCH / report.roofline["hbm"]
  text = to_text(report, setup)
  assert "    KV cache" in text
  assert f"memory bandwidth allows {BATCH / report.roofline['hbm']:,.0f} tokens/s" in text
  found = report.to_json()
  assert found["hbm_bytes_per_chip"]["kv_cache"] == CACHE // 4
  assert found["estimated_tokens_per_second"] == report.tokens_per_second
