"""AdaLoRA's allocation of ranks (Zhang et al. 2023, arXiv:2303.10512, section 3).

A triplet is one of the r columns of A, its singular value and its row of B. The importance of each
triplet is tracked; the singular values of the least important, over all matrices and layers, are
set to 0 until the budget is met.

Axes: L layers of a stack, if there is one, n inputs or outputs of a projection, r triplets.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax import tree
from gptjax.config import RunLength
from gptjax.errors import UserError
from gptjax.model.gpt import ParameterInfo
from gptjax.optim.optimizer import Optimizer
from gptjax.peft.config import DURATIONS

# Both betas of section 4.
_SMOOTHING = 0.85
_TRIPLET = ("lora_a", "lora_b", "singular_values")


@dataclasses.dataclass(frozen=True)
class Budget:
  """The number of singular values, in all matrices, that are not 0 after an update (section 3.3).

  start: during the first `first_steps` updates, all. end: from `last_step` on. every: number of
  updates from one pruning to the next; between them, gradients may change pruned values.
  """

  start: int
  end: int
  first_steps: int
  last_step: int
  every: int

  def __call__(self, updates: jax.Array) -> jax.Array:
    """The budget after `updates`, int32, by the cubic schedule of equation 12."""
    left = (self.last_step - updates) / max(self.last_step - self.first_steps, 1)
    left = jnp.clip(left, 0.0, 1.0)
    return jnp.round(self.end + (self.start - self.end) * left**3).astype(jnp.int32)

  def is_due(self, updates: jax.Array) -> jax.Array:
    between = (updates > self.first_steps) & (updates % self.every == 0)
    return between | (updates >= self.last_step)


class AllocationState(NamedTuple):
  """The optimizer's state, `inner`, and smoothed `sensitivity` and `uncertainty` per parameter."""

  inner: optax.OptState
  sensitivity: Any
  uncertainty: Any


@dataclasses.dataclass(frozen=True, eq=False)
class AdaLoRAOptimizer(Optimizer):
  """An optimizer that also pulls A and B towards orthonormal columns and rows, and keeps a budget
  of singular values."""

  parameters: Mapping[str, ParameterInfo]
  orthogonal_penalty: float
  budget: Budget

  def init(self, params: Any) -> AllocationState:
    inner = super().init(params)
    return AllocationState(inner, *(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

  def update(self, grads: Any, state: AllocationState, params: Any, step: jax.Array):
    """Updates like `Optimizer.update`, with the gradient of the penalty added."""
    pull = jax.grad(orthogonality)(params, self.parameters)
    grads = jax.tree.map(lambda g, p: g + self.orthogonal_penalty * p, grads, pull)
    new, inner, norm = super().update(grads, state.inner, params, step)
    updates = step + 1
    sensitivity, uncertainty = self._observe(grads, params, state, updates)
    kept = self._most_important(sensitivity, uncertainty, self.budget(updates))
    due = self.budget.is_due(updates)

    def allocate(name: str, x: jax.Array) -> jax.Array:
      return jnp.where(due & ~kept[name], 0.0, x) if name in kept else x

    return tree.map_named(allocate, new), AllocationState(inner, sensitivity, uncertainty), norm

  def _observe(self, grads, params, state: AllocationState, updates) -> tuple[Any, Any]:
    """Smoothed sensitivity and uncertainty (equations 8 to 10), constant in the final phase."""

    def smooth(old: jax.Array, new: jax.Array) -> jax.Array:
      smoothed = _SMOOTHING * old + (1 - _SMOOTHING) * new
      return jnp.where(updates <= self.budget.last_step, smoothed, old)

    found = jax.tree.map(lambda w, g: jnp.abs(w * g), params, grads)
    sensitivity = jax.tree.map(smooth, state.sensitivity, found)
    apart = jax.tree.map(lambda i, mean: jnp.abs(i - mean), found, sensitivity)
    return sensitivity, jax.tree.map(smooth, state.uncertainty, apart)

  def _most_important(self, sensitivity, uncertainty, count: jax.Array) -> dict[str, jax.Array]:
    """{name of singular values: bool [L, r]}, true for the `count` most important."""
    scores = tree.named_leaves(jax.tree.map(jnp.multiply, sensitivity, uncertainty))  # Equation 11.
    importance = {}
    for path in _paths(self.parameters):
      names = [f"{path}/{leaf}" for leaf in _TRIPLET]
      means = [_columns(scores[name], self.parameters[name]).mean(-2) for name in names]
      importance[names[-1]] = sum(means)  # Equation 7.
    flat = jnp.concatenate([x.ravel() for x in importance.values()])
    place = jnp.argsort(jnp.argsort(flat, descending=True))
    kept, start = {}, 0
    for name, x in importance.items():
      kept[name] = (place[start : start + x.size] < count).reshape(x.shape)
      start += x.size
    return kept


def allocate_ranks(
  optimizer: Optimizer, config: Any, parameters: Mapping[str, ParameterInfo], run: RunLength | None
) -> AdaLoRAOptimizer:
  """Adds the penalty and the budget to an optimizer.

  Args:
    config: `config.peft`.
    parameters: the trained parameters.
    run: length of the run; None for an optimizer that is only traced.

  Raises:
    UserError: the two phases with a constant budget leave no step between them.
  """
  shapes = [parameters[f"{path}/singular_values"].shape for path in _paths(parameters)]
  initial, last_step, every = 0, 1, 0
  if run is not None:
    initial, final, every = (run.steps({"peft": config}, f"peft.{name}") for name in DURATIONS)
    last_step = run.total_steps - final
    if initial >= last_step:
      raise UserError(
        f"peft.budget_initial of {initial} steps and peft.budget_final of {final} leave none of "
        f"the run's {run.total_steps} to go from rank {config.rank} to {config.target_rank}."
      )
  return AdaLoRAOptimizer(
    **vars(optimizer),
    parameters=parameters,
    orthogonal_penalty=config.orthogonal_penalty,
    budget=Budget(
      start=sum(math.prod(shape) for shape in shapes),
      end=sum(math.prod(shape[:-1]) for shape in shapes) * config.target_rank,
      first_steps=initial,
      last_step=last_step,
      every=every or last_step,
    ),
  )


def orthogonality(params: Any, parameters: Mapping[str, ParameterInfo]) -> jax.Array:
  """The penalty of equation 4, summed over all matrices: |A^T A - I|^2 + |B B^T - I|^2."""
  total = jnp.zeros(())
  for name, x in tree.named_leaves(params).items():
    if name.endswith(_TRIPLET[:2]):
      columns = _columns(x, parameters[name])
      gram = columns.swapaxes(-1, -2) @ columns
      total += jnp.square(gram - jnp.broadcast_to(jnp.eye(gram.shape[-1]), gram.shape)).sum()
  return total


def _paths(parameters: Mapping[str, ParameterInfo]) -> list[str]:
  suffix = "/singular_values"
  return [name.removesuffix(suffix) for name in parameters if name.endswith(suffix)]


def _columns(x: jax.Array, info: ParameterInfo) -> jax.Array:
  """Reshapes a parameter of triplets to [L, n, r]."""
  x = jnp.moveaxis(x, info.axes.index("rank"), -1)
  return x.reshape(*x.shape[: info.axes.count("layers")], -1, x.shape[-1])
