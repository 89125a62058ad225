import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused_attention
from jax.sharding import PartitionSpec as P

from gptjax.compiler.flops import count_flops
from gptjax.model.attention import attend, make_mask

SIDE = 8
PRODUCT = 2 * SIDE**3
x = jnp.ones((SIDE, SIDE))


def flops(function, *arguments):
  return count_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_a_product_counts_two_for_each_multiply_add():
  assert flops(lambda a: a @ a, x) == PRODUCT
  assert flops(
    lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
  ) == (2 * 3 * 4 * 5 * 6)
  assert flops(jnp.sin, x) == 0


def test_a_loop_counts_as_often_as_it_runs():
  def twice(a):
    return jax.lax.scan(lambda carry, _: (carry @ a, None), a, length=5)[0] @ a

  assert flops(twice, x) == 6 * PRODUCT


def test_the_backward_pass_and_what_it_recomputes_count():
  def loss(a):
    return jnp.sin(jnp.sin(a @ a) @ a).sum()

  # Two products forward; two each for two factors backward.
  assert flops(jax.grad(loss), x) == 6 * PRODUCT
  assert flops(jax.grad(jax.checkpoint(loss)), x) == 8 * PRODUCT


def test_what_every_device_does_on_its_part_counts_for_all():
  mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  with jax.set_mesh(mesh):
    split = jax.shard_map(lambda a, b: a @ b, in_specs=(P("data"), P()), out_specs=P("data"))
    assert flops(split, x, x) == PRODUCT
    each = jax.shard_map(
      lambda a: a @ a, in_specs=P(), out_specs=P(), axis_names={"data"}, check_vma=False
    )
    assert flops(each, x) == 4 * PRODUCT


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_calls_are_looked_into(wrap):
  assert flops(wrap(lambda a: a @ a), x) == PRODUCT


def test_attention_of_cudnn_and_what_stands_in_for_it_count_nothing(monkeypatch):
  monkeypatch.setattr(fused_attention, "check_cudnn_version", lambda: 9_10_00)
  monkeypatch.setattr(fused_attention, "check_compute_capability", lambda capability: True)
  rows = jnp.zeros((1, 256), jnp.int32)

  def loss(heads):
    mask = make_mask("cudnn", rows, rows, None, rows)
    return attend(heads, heads, heads, mask).astype(jnp.float32).sum()

  assert flops(jax.grad(loss), jnp.ones((1, 256, 2, 64), jnp.bfloat16)) == 0
