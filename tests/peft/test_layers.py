import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax.model.layers import Linear
from gptjax.peft.layers import (
  AdaLoRALinear,
  Bottleneck,
  DoRALinear,
  HoulsbyLinear,
  IA3Linear,
  LoRALinear,
)

SHAPES = [((3,), (2, 4)), ((2, 4), (3,))]


def linear(in_shape, out_shape, dtype="float32"):
  axes = tuple("abcd"[: len(in_shape) + len(out_shape)])
  layer = Linear(in_shape, out_shape, axes=axes, bias=True, std=1.0, dtype=dtype, rngs=nnx.Rngs(0))
  layer.bias[...] = jax.random.normal(jax.random.key(1), out_shape)
  return layer


def random_like(parameter, seed=2):
  parameter[...] = jax.random.normal(jax.random.key(seed), parameter.shape)


@pytest.fixture(params=SHAPES, ids=str)
def parts(request):
  """(layer, x, and x, W and b as matrices): flat inputs and outputs for the formulas."""
  in_shape, out_shape = request.param
  layer = linear(in_shape, out_shape)
  x = np.random.default_rng(0).normal(size=(5, 2, *in_shape)).astype(np.float32)
  matrix = np.asarray(layer.kernel[...]).reshape(np.prod(in_shape), -1)
  return layer, x, x.reshape(10, -1), matrix, np.asarray(layer.bias[...]).reshape(1, -1)


def assert_is(y, expected):
  np.testing.assert_allclose(np.asarray(y).reshape(10, -1), expected, atol=2e-5)


def test_lora_is_its_formula(parts):
  base, x, flat, matrix, bias = parts
  layer = LoRALinear(base, rank=2, scale=3.0, rngs=nnx.Rngs(3))
  np.testing.assert_array_equal(layer(x), base(x))
  assert float(jnp.abs(layer.lora_a[...]).min()) > 0  # B is 0, A is not: else nothing would train.
  random_like(layer.lora_b)
  a, b = layer.lora_a[...].reshape(-1, 2), layer.lora_b[...].reshape(2, -1)
  assert_is(layer(x), flat @ (matrix + 3 * np.asarray(a @ b)) + bias)


def test_adalora_is_its_formula(parts):
  base, x, flat, matrix, bias = parts
  layer = AdaLoRALinear(base, rank=2, scale=3.0, rngs=nnx.Rngs(3))
  np.testing.assert_array_equal(layer(x), base(x))
  assert float(jnp.abs(layer.lora_b[...]).min()) > 0  # Lambda alone is 0: else it would not train.
  for seed, name in enumerate(("lora_a", "lora_b", "singular_values")):
    random_like(getattr(layer, name), seed)
  a, b = layer.lora_a[...].reshape(-1, 2), layer.lora_b[...].reshape(2, -1)
  change = np.asarray(a @ jnp.diag(layer.singular_values[...]) @ b)
  assert_is(layer(x), flat @ (matrix + 3 * change) + bias)


def test_dora_is_its_formula_and_its_norm_has_no_gradient(parts):
  base, x, flat, matrix, bias = parts
  layer = DoRALinear(base, rank=2, scale=3.0, rngs=nnx.Rngs(3))
  np.testing.assert_allclose(layer(x), base(x), rtol=1e-6, atol=1e-6)
  random_like(layer.lora_b)
  random_like(layer.magnitude)
  a, b = layer.lora_a[...].reshape(-1, 2), layer.lora_b[...].reshape(2, -1)
  graph, params = nnx.split(layer)
  params = nnx.to_pure_dict(params)

  def by_formula(b, norm_b):
    direction = matrix + 3 * a @ b
    norm = jnp.linalg.norm(matrix + 3 * a @ norm_b, axis=0, keepdims=True)
    return flat @ (direction * layer.magnitude[...].reshape(1, -1) / norm) + bias

  def by_layer(b):
    changed = params | {"lora_b": b.reshape(layer.lora_b.shape)}
    return nnx.merge(graph, changed)(x).reshape(10, -1)

  assert_is(layer(x), by_formula(b, b))
  pull = jax.random.normal(jax.random.key(5), (10, matrix.shape[1]))
  actual = jax.grad(lambda b: (pull * by_layer(b)).sum())(b)
  expected = jax.grad(lambda b_: (pull * by_formula(b_, b)).sum())(b)
  np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_ia3_is_its_formula(parts):
  base, x, flat, matrix, bias = parts
  for scale_input in (False, True):
    layer = IA3Linear(base, scale_input=scale_input)
    np.testing.assert_array_equal(layer(x), base(x))
    random_like(layer.ia3_scale)
    scale = np.asarray(layer.ia3_scale[...]).reshape(1, -1)
    expected = flat * scale @ matrix + bias if scale_input else (flat @ matrix + bias) * scale
    assert_is(layer(x), expected)


def test_houlsby_is_its_formula(parts):
  base, x, flat, matrix, bias = parts
  layer = HoulsbyLinear(base, rank=2, rngs=nnx.Rngs(3))
  np.testing.assert_array_equal(layer(x), base(x))
  for name in ("up", "up_bias", "down_bias"):
    random_like(getattr(layer.adapter, name))
  down, up = layer.adapter.down[...].reshape(-1, 2), layer.adapter.up[...].reshape(2, -1)
  y = flat @ matrix + bias
  h = jax.nn.gelu(y @ down + layer.adapter.down_bias[...][None])
  assert_is(layer(x), y + h @ up + layer.adapter.up_bias[...].reshape(1, -1))


def test_adapters_compute_in_the_dtype_of_the_projection_and_are_float32():
  base = linear((3,), (4,), "bfloat16")
  layers = [
    LoRALinear(base, rank=2, scale=1.0, rngs=nnx.Rngs(0)),
    AdaLoRALinear(base, rank=2, scale=1.0, rngs=nnx.Rngs(0)),
    DoRALinear(base, rank=2, scale=1.0, rngs=nnx.Rngs(0)),
    IA3Linear(base, scale_input=True),
    HoulsbyLinear(base, rank=2, rngs=nnx.Rngs(0)),
    Bottleneck(
      (), (3,), ("a",), rank=2, activation=jax.nn.relu, dtype="bfloat16", rngs=nnx.Rngs(0)
    ),
  ]
  for layer in layers:
    assert jax.eval_shape(layer, jnp.ones((1, 2, 3))).dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype("float32")}
