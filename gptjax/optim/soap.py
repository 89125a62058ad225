"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# Lower precision would spoil the statistics and the bases.
_PRECISION = jax.lax.Precision.HIGHEST


class SoapState(NamedTuple):
  """State of SOAP: `count`, int32, the gradients seen, and float32 trees like the parameters.

  For a parameter [..., m, n], momentum: of the gradient G. second_moment: of the rotated gradient.
  left [..., m, m], right [..., n, n]: moving averages of G G^T and G^T G. left_basis, right_basis:
  their eigenvectors.
  """

  count: jax.Array
  momentum: optax.Updates
  second_moment: optax.Updates
  left: optax.Updates
  right: optax.Updates
  left_basis: optax.Updates
  right_basis: optax.Updates


def scale_by_soap(b1: float, b2: float, eps: float, interval: int) -> optax.GradientTransformation:
  """SOAP (Vyas et al. 2024, arXiv:2409.11321, algorithm 3), with bias correction as in Adam.

  Every leaf is a matrix [..., m, n] or a stack of them. The first gradient only makes the bases,
  the eigenvectors of its statistics: it is diagonal in them, and Adam would blow up the rounding
  errors beside the diagonal. They take a step of power iteration with a QR decomposition every
  `interval` updates (their algorithm 4).
  """

  def init(params: optax.Params) -> SoapState:
    def square(axis: int) -> optax.Updates:
      return jax.tree.map(
        lambda p: jnp.zeros((*p.shape[:-2], p.shape[axis], p.shape[axis]), jnp.float32), params
      )

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    return SoapState(
      jnp.zeros((), jnp.int32), zeros, zeros, square(-2), square(-1), square(-2), square(-1)
    )

  def update(updates: optax.Updates, state: SoapState, params=None):
    del params
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
    first = state.count == 0

    def rotate(x, p, q):
      return _matmul(_matmul(p.mT, x), q)

    momentum = optax.tree.update_moment(grads, state.momentum, b1, 1)
    rotated = jax.tree.map(rotate, grads, state.left_basis, state.right_basis)
    second_moment = optax.tree.update_moment(rotated, state.second_moment, b2, 2)
    momentum = jax.tree.map(lambda m: jnp.where(first, 0, m), momentum)
    steps = jnp.maximum(state.count, 1)

    def direction(m, v, p, q):
      m = rotate(m, p, q) / (1 - b1**steps)
      v = v / (1 - b2**steps)
      return _matmul(_matmul(p, m / (jnp.sqrt(v) + eps)), q.mT)

    bases = state.left_basis, state.right_basis
    directions = jax.tree.map(direction, momentum, second_moment, *bases)

    def average(statistics, product):
      return jax.tree.map(
        lambda s, g: jnp.where(first, product(g), b2 * s + (1 - b2) * product(g)), statistics, grads
      )

    statistics = (
      average(state.left, lambda g: _matmul(g, g.mT)),
      average(state.right, lambda g: _matmul(g.mT, g)),
    )
    bases = jax.lax.switch(
      jnp.where(first, 0, jnp.where(state.count % interval == 0, 1, 2)),
      (
        lambda s, _: jax.tree.map(lambda s: _one_by_one(lambda x: jnp.linalg.eigh(x)[1], s), s),
        lambda s, q: jax.tree.map(
          lambda s, q: _one_by_one(lambda x: jnp.linalg.qr(x)[0], _matmul(s, q)), s, q
        ),
        lambda _, q: q,
      ),
      statistics,
      bases,
    )
    return directions, SoapState(state.count + 1, momentum, second_moment, *statistics, *bases)

  return optax.GradientTransformation(init, update)


def _one_by_one(function, stack: jax.Array) -> jax.Array:
  """Applies function([n, n]) -> [n, n] to each matrix of a stack [..., n, n] in turn.

  XLA:CPU distributes the matrices of a stack over its threads, and with two threads waits for ever
  if that is inside a conditional (jax 0.10.2).
  """
  each = jax.lax.map(function, stack.reshape(-1, *stack.shape[-2:]))
  return each.reshape(stack.shape)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.matmul(x, y, precision=_PRECISION)
