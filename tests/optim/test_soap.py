import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.optim.soap import scale_by_soap

B1, B2, EPS = 0.9, 0.95, 1e-8


def gradients(count, shape=(5, 3)):
  rng = np.random.default_rng(0)
  return rng.normal(size=(count, *shape)) * np.geomspace(1, 0.1, shape[-1])


def run(grads, interval):
  soap = scale_by_soap(B1, B2, EPS, interval)
  state = soap.init(jnp.asarray(grads[0], jnp.float32))
  update, directions = jax.jit(soap.update), []
  for grad in grads:
    direction, state = update(jnp.asarray(grad, jnp.float32), state)
    directions.append(np.asarray(direction))
  return np.stack(directions)


def reference(grads, interval):
  """Algorithm 3 of the paper for one matrix, in float64."""
  m, v = np.zeros_like(grads[0]), np.zeros_like(grads[0])
  for t, g in enumerate(grads):
    if t == 0:
      left, right = g @ g.T, g.T @ g
      p, q = np.linalg.eigh(left)[1], np.linalg.eigh(right)[1]
      yield np.zeros_like(g)
      continue
    m = B1 * m + (1 - B1) * g
    v = B2 * v + (1 - B2) * (p.T @ g @ q) ** 2
    hats = (p.T @ m @ q) / (1 - B1**t), v / (1 - B2**t)
    yield p @ (hats[0] / (np.sqrt(hats[1]) + EPS)) @ q.T
    left, right = B2 * left + (1 - B2) * g @ g.T, B2 * right + (1 - B2) * g.T @ g
    if t % interval == 0:
      p, q = np.linalg.qr(left @ p)[0], np.linalg.qr(right @ q)[0]


@pytest.mark.parametrize("interval", [1, 3])
def test_it_is_the_algorithm_of_the_paper(interval):
  # Square: the eigenvectors of G G^T that belong to no singular value are not determined.
  grads = gradients(8, (4, 4))
  expected = np.stack([*reference(grads, interval)])
  np.testing.assert_allclose(run(grads, interval), expected, atol=2e-3)


def test_turning_the_gradient_turns_the_update():
  # What Adam does not do, and the reason for the basis.
  grads = gradients(6, (4, 4))
  u, v = (np.linalg.qr(m)[0] for m in np.random.default_rng(1).normal(size=(2, 4, 4)))
  np.testing.assert_allclose(run(u @ grads @ v, 2), u @ run(grads, 2) @ v, atol=2e-3)


def test_a_stack_is_its_matrices_one_by_one():
  grads = gradients(4, (2, 4, 3))
  each = np.stack([run(grads[:, i], 2) for i in range(2)], axis=1)
  np.testing.assert_allclose(run(grads, 2), each, atol=1e-4)


def test_two_threads_do_not_wait_for_each_other():
  # In a process of its own, whose XLA has as many threads as users' machines give it.
  program = """
import jax, jax.numpy as jnp
from gptjax.optim.soap import scale_by_soap
soap = scale_by_soap(0.9, 0.95, 1e-8, 2)
grads = {name: jax.random.normal(jax.random.key(0), (4, 128, 128)) for name in "abcdef"}
state, update = soap.init(grads), jax.jit(soap.update)
for _ in range(3):
  _, state = update(grads, state)
print(int(state.count))
"""
  environment = {k: v for k, v in os.environ.items() if k not in ("NPROC", "XLA_FLAGS")}
  done = subprocess.run(
    [sys.executable, "-c", program],
    env=environment | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  assert done.stdout.strip() == "3"
