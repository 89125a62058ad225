"""Recovery training: a pruned model is trained on, and its zeros stay zero."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gptjax import tree
from gptjax.compression.prune import Sparsity, check_zeros, prunable
from gptjax.config import RunLength
from gptjax.errors import UserError
from gptjax.model.gpt import ParameterInfo
from gptjax.optim.optimizer import Optimizer
from gptjax.training.adaptation import WholeModel


@dataclasses.dataclass(frozen=True, eq=False)
class SparseOptimizer(Optimizer):
  """An optimizer under which the zeros of some parameters stay, and have no gradient.

  Which they are is read from the parameters at each update, so that a checkpoint holds no mask. (A
  weight that an update makes exactly 0 stays 0 as well.)
  """

  sparse: frozenset[str]

  def update(self, grads: Any, state: Any, params: Any, step: jax.Array):
    def masked(name: str, x: jax.Array, parameter: jax.Array) -> jax.Array:
      return jnp.where(parameter == 0, 0.0, x) if name in self.sparse else x

    # Gradients too, so that their norm, and what algorithms mix along a matrix, have none of it.
    grads = tree.map_named(masked, grads, params)
    new, state, norm = super().update(grads, state, params, step)
    return tree.map_named(masked, new, params), state, norm


@dataclasses.dataclass(frozen=True)
class SparseModel(WholeModel):
  """Trains every parameter of the model but its zeros: `config.peft.method='sparse'`.

  Attributes:
    rules: of `config.peft.targets`, a pattern or (pattern, options) each, for the kernels whose
      zeros stay; none is all kernels of the layers. The option `pattern` is the 'N:M' that their
      zeros must be when the training starts.
  """

  rules: Sequence[Any]

  method = "sparse"

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> "SparseModel":
    """Reads `config.peft`; UserError for a value that cannot be used."""
    if config.base != "float32":
      raise UserError(
        f"peft.base={config.base!r} is of a frozen model, and nothing is frozen here."
      )
    rules = [
      (one, {}) if isinstance(one, str) else one for one in config.targets or ["role:hidden"]
    ]
    for rule, options in rules:
      if set(options) - {"pattern"}:
        raise UserError(
          f"peft.targets: the rule {rule!r} of method 'sparse' has options that are "
          f"not 'pattern': {', '.join(options)}."
        )
      if options:
        Sparsity.parse(options["pattern"], "peft.targets: pattern")
    return cls(rules)

  def wrap(
    self, optimizer: Optimizer, trained: Mapping[str, ParameterInfo], length: RunLength | None
  ) -> Optimizer:
    return SparseOptimizer(**vars(optimizer), sparse=frozenset(self._options(trained)))

  def check_start(self, params: Any, parameters: Mapping[str, ParameterInfo]) -> None:
    """Raises UserError for a kernel that has no zeros, or not those of its pattern."""
    leaves = tree.named_leaves(params)
    for name, options in self._options(parameters).items():
      if bool((leaves[name] != 0).all()):
        raise UserError(
          f"peft.method='sparse' keeps zeros, and {name!r} has none: set init_from to a pruned "
          "model, or peft.targets to what is pruned of it."
        )
      if options:
        check_zeros(name, leaves[name], parameters[name], Sparsity.parse(options["pattern"]))

  def _options(self, parameters: Mapping[str, ParameterInfo]) -> dict[str, Mapping[str, Any]]:
    """The options of each kernel whose zeros stay; UserError for a rule that decides on none."""
    roles = {name: info.role for name, info in prunable(parameters).items()}
    named = enumerate(tree.name_roles(self.rules, roles))
    numbered = [(pattern, number) for number, (pattern, _) in named]
    matched = tree.match_rules(roles, [*numbered, ("", None)], "peft.targets")
    if unused := set(range(len(self.rules))) - set(matched.values()):
      raise UserError(
        f"peft.targets: the rule {self.rules[min(unused)][0]!r} is the first for no kernel of the "
        "layers."
      )
    return {name: self.rules[i][1] for name, i in matched.items() if i is not None}
