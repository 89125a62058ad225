"""Gradients of bfloat16 computations are added up over devices in float32, or as the config says.

Each of four devices has one row. The gradients of the rows are 256, 1, 1 and 1: in bfloat16, which
has 8 bits of mantissa, 256 + 1 is 256.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import config as config_lib
from gptjax.devices import sharding
from gptjax.errors import UserError
from gptjax.model.layers import Linear, Mix, contract
from gptjax.model.moe import MixtureOfExperts
from gptjax.objectives.cross_entropy import cross_entropy
from gptjax.training.setup import make_setup

ROOT = Path(__file__).parents[2]
ONE = dict.fromkeys(sharding.MESH_AXES, 1)
MESHES = [{"fsdp": 4}, {"data": 4}, {"data": 2, "fsdp": 2}]
ROWS = np.array([256, 1, 1, 1], np.float32).reshape(4, 1, 1)
SUM = 259.0
SIZES = {"model.vocab_size": 256, "batch_size": 4, "tokenizer": "bytes"}
COLLECTIVE = (
  r'"?stablehlo\.(?:all_reduce|reduce_scatter|collective_permute)"?.*?-> tensor<[\dx]*x?(\w+)>'
)


@pytest.fixture(params=MESHES, ids=str)
def mesh(request):
  mesh = sharding.make_mesh(ONE | request.param)
  with jax.set_mesh(mesh):
    yield mesh


def product_gradient(mesh):
  def gradient(x, kernel):
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    return jax.grad(lambda kernel: contract(x, kernel, 1, ("embed", "mlp")).sum())(kernel)

  rows = jax.device_put(np.broadcast_to(ROWS, (4, 1, 8)), sharding.batch_sharding(mesh))
  return jax.jit(gradient), (rows, jnp.ones((8, 8)))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # a reduce-scatter, and rings
def test_a_product_rounds_the_sum_alone(mesh, monkeypatch, platform):
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  gradient, arguments = product_gradient(mesh)
  assert set(dtypes_of_collectives(gradient, *arguments)) == {"f32"}
  expected = np.full((8, 8), SUM, jnp.bfloat16)
  np.testing.assert_array_equal(gradient(*arguments), expected)


def dtypes_of_collectives(function, *arguments) -> list[str]:
  text = function.lower(*arguments).as_text()
  return [match[1] for match in re.finditer(COLLECTIVE, text, re.DOTALL)]


def test_a_bias_is_summed_in_float32(mesh):
  dtypes = {"dtype": "bfloat16", "rngs": nnx.Rngs(0)}
  layer = Linear((8,), (8,), axes=("embed", "mlp"), bias=True, std=0.0, **dtypes)
  graph, params = nnx.split(layer)

  def gradient(params, x, scale):
    def loss(params):
      return (nnx.merge(graph, params)(x) * scale.astype(jnp.bfloat16)).sum()

    return jax.grad(loss)(params)["bias"][...]

  rows, scale = jax.device_put((np.zeros((4, 1, 8)), ROWS), sharding.batch_sharding(mesh))
  np.testing.assert_array_equal(jax.jit(gradient)(params, rows, scale), np.full(8, SUM))


def test_a_learnt_mix_is_summed_in_float32(mesh):
  graph, params = nnx.split(Mix(1.0, 1.0))

  def gradient(params, x):
    x = x.astype(jnp.bfloat16)
    return jax.grad(lambda params: nnx.merge(graph, params)(x, x).sum())(params)["weights"][...]

  rows = jax.device_put(ROWS, sharding.batch_sharding(mesh))
  np.testing.assert_array_equal(jax.jit(gradient)(params, rows), np.full(2, SUM))


def test_an_expert_that_devices_share_is_summed_in_float32(mesh, tiny_config):
  config = tiny_config(
    dtype="bfloat16", **{"experts.count": 2, "experts.per_token": 2, "mlp.bias": True}
  )
  graph, params = nnx.split(MixtureOfExperts(config, nnx.Rngs(0)))

  def gradient(params, x, scale):
    def loss(params):
      y = nnx.merge(graph, params)(x.astype(jnp.bfloat16))
      return (y.astype(jnp.float32) * scale).sum()

    return jax.grad(loss)(params)

  # The same token in each row, so that the gradients of the rows are as their scales.
  token = np.random.default_rng(0).normal(size=(1, 1, 16)).astype(np.float32)
  x, scale = np.broadcast_to(token, (4, 1, 16)), ROWS
  of_rows = [jax.jit(gradient)(params, x[:1], s[None]) for s in scale]
  expected = jax.tree.map(lambda *leaves: sum(leaves), *of_rows)
  x, scale = jax.device_put((x, scale), sharding.batch_sharding(mesh))
  assert set(dtypes_of_collectives(jax.jit(gradient), params, x, scale)) == {"f32"}
  actual = jax.jit(gradient)(params, x, scale)
  for name in ("up", "down"):
    for part in ("kernel", "bias"):
      wanted = np.asarray(expected[name][part][...])
      # The 3 of 259 are 1.2 %. What a device makes of a row is bfloat16, and so is what is left of
      # the sum under fsdp: two roundings of 2^-9, each of which may fall to the other side.
      close = {"rtol": 2.0**-7, "atol": 1e-3 * np.abs(wanted).max()}
      np.testing.assert_allclose(actual[name][part][...], wanted, **close)


def cross_entropy_gradient(x, kernel, targets):
  def loss(kernel):
    weights = jnp.ones(targets.shape)
    return cross_entropy(x, kernel, targets, weights, axes=("embed", "vocab")).total

  return jax.grad(loss)(kernel)


def test_the_head_of_the_loss_is_that_of_one_device(mesh):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4, 16, 8)).astype(jnp.bfloat16)
  kernel = rng.normal(size=(8, 32)).astype(np.float32)
  targets = rng.integers(0, 32, (4, 16)).astype(np.int32)
  actual = jax.jit(cross_entropy_gradient)(x, kernel, targets)
  one = sharding.make_mesh(ONE, jax.devices()[:1])
  with jax.set_mesh(one):
    expected = jax.jit(cross_entropy_gradient)(x, kernel, targets)
  # 64 tokens: 64 roundings of 2^-24.
  np.testing.assert_allclose(actual, expected, rtol=0, atol=4e-6 * np.abs(expected).max())


def test_the_config_says_in_what(mesh):
  gradient, arguments = product_gradient(mesh)
  with sharding.reducing_in("bfloat16"):
    assert set(dtypes_of_collectives(gradient, *arguments)) == {"bf16"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_reduces_as_its_config_says(dtype):
  config = config_lib.load(
    f"{ROOT}/configs/pretrain.py:model=debug,mesh=fsdp",
    SIZES | {"model.dtype": "bfloat16", "mesh.reduce_dtype": dtype},
  )
  setup = make_setup(config)
  optimizer = setup.make_optimizer(setup.run_length)
  with jax.set_mesh(setup.mesh):
    step = setup.make_train_step(optimizer)
    found = dtypes_of_collectives(step, setup.abstract_state(optimizer), setup.abstract_batch())
  # The sums of losses and norms are float32 always.
  assert ("bf16" in found) == (dtype == "bfloat16")
  assert "f32" in found


def test_another_dtype_is_refused():
  spec = f"{ROOT}/configs/pretrain.py:model=debug"
  config = config_lib.load(spec, SIZES | {"mesh.reduce_dtype": "float16"})
  with pytest.raises(UserError, match=r"^mesh\.reduce_dtype: no choice 'float16'\. Did you mean"):
    make_setup(config)
