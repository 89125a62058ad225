import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax.model.layers import Embedding, LayerNorm, Linear, RMSNorm, dropout, soft_cap


def linear(in_shape, out_shape, **changes):
  axes = tuple("abcd"[: len(in_shape) + len(out_shape)])
  options = {"axes": axes, "bias": True, "std": 1.0, "dtype": "float32", "rngs": nnx.Rngs(0)}
  return Linear(in_shape, out_shape, **(options | changes))


@pytest.mark.parametrize(
  ("in_shape", "out_shape", "product"),
  [
    ((3,), (4,), "xyi,io->xyo"),
    ((3,), (2, 4), "xyi,ino->xyno"),
    ((2, 3), (4,), "xyni,nio->xyo"),
  ],
)
def test_linear_contracts_the_trailing_axes(in_shape, out_shape, product):
  layer = linear(in_shape, out_shape)
  layer.bias[...] = jax.random.normal(jax.random.key(1), out_shape)
  x = np.random.default_rng(0).normal(size=(5, 2, *in_shape)).astype(np.float32)
  expected = np.einsum(product, x, layer.kernel[...]) + np.asarray(layer.bias[...])[None, None]
  np.testing.assert_allclose(layer(x), expected, atol=1e-5)
  assert linear(in_shape, out_shape, bias=False).bias is None


@pytest.mark.parametrize(("in_shape", "out_shape"), [((3,), (2, 4)), ((2, 3), (4,))])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradients_of_linear_are_those_of_the_product(in_shape, out_shape, dtype):
  graph, params = nnx.split(linear(in_shape, out_shape, dtype=dtype))
  x = np.random.default_rng(0).normal(size=(5, 2, *in_shape)).astype(np.float32)

  def by_layer(params, x):
    return jnp.square(nnx.merge(graph, params)(x).astype(jnp.float32)).sum()

  def by_formula(params, x):
    y = jnp.tensordot(x, params["kernel"], len(in_shape)) + params["bias"][None, None]
    return jnp.square(y).sum()

  params = nnx.to_pure_dict(params)
  params["bias"] = jax.random.normal(jax.random.key(1), out_shape)
  actual = jax.jit(jax.grad(by_layer, (0, 1)))(params, x)
  expected = jax.jit(jax.grad(by_formula, (0, 1)))(params, x)
  tolerance = 1e-4 if dtype == "float32" else 0.05
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def test_linear_computes_in_its_dtype_and_keeps_float32():
  layer = linear((3,), (4,), dtype="bfloat16")
  assert layer(jnp.ones((1, 3))).dtype == jnp.bfloat16
  assert layer.kernel[...].dtype == layer.bias[...].dtype == jnp.float32


def test_embedding_looks_up_rows():
  layer = Embedding(7, 3, axes=("vocab", "embed"), std=1.0, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(layer(jnp.array([[5, 0]]))[0, 0], layer.embedding[...][5])


def test_layernorm_is_its_formula():
  x = np.random.default_rng(0).normal(3, 2, (2, 4, 8)).astype(np.float32)
  layer = LayerNorm(8, eps=1e-5, bias=True)
  layer.scale[...] = jnp.arange(8.0)
  layer.bias[...] = -jnp.arange(8.0)
  centred = x - x.mean(-1, keepdims=True)
  expected = centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * np.arange(8) - np.arange(8)
  np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)
  assert LayerNorm(8, eps=1e-5, bias=False).bias is None


def test_rmsnorm_is_its_formula():
  x = np.random.default_rng(0).normal(3, 2, (2, 4, 8)).astype(np.float32)
  layer = RMSNorm(8, eps=1e-5)
  layer.scale[...] = jnp.arange(8.0)
  expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * np.arange(8)
  np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [LayerNorm(8, eps=1e-5, bias=True), RMSNorm(8, eps=1e-5)])
def test_norms_are_computed_in_float32(norm):
  # The mean of the squares of 8 and 256 +- 1 is lost in bfloat16.
  x = jnp.array([[256, 255, 257, 256, 256, 256, 256, 258]], jnp.bfloat16)
  y = norm(x)
  assert y.dtype == jnp.bfloat16
  expected = norm(x.astype(jnp.float32))
  np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8)


def test_dropout_without_a_key_or_a_rate_is_the_identity():
  x = jnp.ones((4, 4))
  assert dropout(x, 0.5, None) is x
  assert dropout(x, 0.0, jax.random.key(0)) is x


def test_dropout_keeps_the_mean_and_differs_by_key():
  x = jnp.full((200, 200), 3.0)
  y = dropout(x, 0.25, jax.random.key(0))
  np.testing.assert_allclose(np.unique(y), [0, 4])
  assert float((y == 0).mean()) == pytest.approx(0.25, abs=0.01)
  assert float(y.mean()) == pytest.approx(3, rel=0.01)
  np.testing.assert_array_equal(y, dropout(x, 0.25, jax.random.key(0)))
  assert (y != dropout(x, 0.25, jax.random.key(1))).any()


def test_soft_cap_bounds_and_leaves_small_values():
  x = jnp.array([-1e4, -0.01, 0.0, 0.01, 1e4])
  np.testing.assert_allclose(soft_cap(x, 5.0), [-5, -0.01, 0, 0.01, 5], rtol=1e-4)
  assert soft_cap(x, 0.0) is x
