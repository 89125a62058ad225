"""Optimizers, schedules and parameter groups, on optax.

An update is

    parameter -= learning_rate(step) * lr * (direction + weight_decay * decay * parameter)

where the direction comes from an algorithm, and `lr` and `decay` are multipliers that a list of
rules gives each parameter by its name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax import tree
from gptjax.errors import UserError, check_number, did_you_mean
from gptjax.model.gpt import ParameterInfo
from gptjax.optim import soap, transfer
from gptjax.optim.layerwise import LayerwiseRates

# With these, weight decay is a term of the gradient (L2), not decoupled from it.
L2_ALGORITHMS = ("adam", "sgd")

# These update matrices only.
MATRIX_ALGORITHMS = ("muon", "soap")


@dataclasses.dataclass(frozen=True)
class Group:
  """Settings of the parameters that a rule matches.

  Attributes:
    lr: multiplier of `optim.learning_rate`.
    decay: multiplier of `optim.weight_decay`.
    algorithm: replaces `optim.name`.
    frozen: neither updated nor counted in the gradient norm; no optimizer state is kept.
  """

  lr: float = 1.0
  decay: float = 1.0
  algorithm: str = ""
  frozen: bool = False


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, so jit can take it static
class Optimizer:
  """A gradient transformation, its schedule and its groups.

  Attributes:
    learning_rate: step -> float32 scalar, before the group's multiplier.
    groups: {parameter name: Group}, complete.
    layerwise: further multipliers, by layer and by step.
  """

  transformation: optax.GradientTransformation
  learning_rate: Callable[[jax.Array], jax.Array]
  groups: Mapping[str, Group]
  layerwise: LayerwiseRates

  def init(self, params: Any) -> optax.OptState:
    return self.transformation.init(params)

  def update(self, grads: Any, state: optax.OptState, params: Any, step: jax.Array):
    """Returns new parameters, new state and the norm of the gradient before clipping."""
    factors = {name: self.layerwise.factor(name, step) for name in self.groups}
    learning_rate = self.learning_rate(step)

    def trained_part(name: str, gradient: jax.Array) -> jax.Array:
      if self._frozen(name):
        return jnp.zeros_like(gradient)
      factor = factors[name]
      return gradient if factor is None else jnp.where(factor > 0, gradient, 0.0)

    def updated(name: str, parameter: jax.Array, direction: jax.Array) -> jax.Array:
      if self._frozen(name):
        return parameter
      rate = learning_rate * self.groups[name].lr
      return parameter - (rate if factors[name] is None else rate * factors[name]) * direction

    grads = tree.map_named(trained_part, grads)
    directions, state = self.transformation.update(grads, state, params)
    return tree.map_named(updated, params, directions), state, optax.global_norm(grads)

  def _frozen(self, name: str) -> bool:
    return self.groups[name].frozen


def check_numbers(config: Any) -> None:
  """Raises UserError for a number in `config.optim` that no optimizer can use."""
  for key in ("learning_rate", "final_fraction", "weight_decay", "clip_norm"):
    check_number(f"optim.{key}", config[key], at_least=0)
  check_number("optim.eps", config.eps, above=0)  # A gradient of 0 is divided by it.
  for key in ("b1", "b2", "momentum", "ema_decay"):
    check_number(f"optim.{key}", config[key], at_least=0, below=1)
  check_number("optim.layer_decay", config.layer_decay, above=0)
  check_number("optim.freeze_layers", config.freeze_layers, at_least=0)
  check_number("optim.preconditioner_interval", config.preconditioner_interval, at_least=1)


def make_optimizer(
  config: Any,
  parameters: Mapping[str, ParameterInfo],
  schedule: optax.Schedule,
  width_ratio: float = 1.0,
  unfreeze_steps: int = 0,
) -> Optimizer:
  """Builds the optimizer of `config.optim`.

  Args:
    unfreeze_steps: see `LayerwiseRates`.
    width_ratio: width of the model over the base's; see `gptjax.optim.transfer`.

  Raises:
    UserError: an unknown algorithm or rule key, or a parameter that no rule matches.
  """
  roles = {name: info.role for name, info in parameters.items()}
  rules = tree.name_roles(config.rules, roles)
  matched = tree.match_rules(parameters, rules, "optim.rules")
  groups = {name: _group(values, config.name) for name, values in matched.items()}
  if config.freeze:
    rules = tree.name_roles([(config.freeze, True), ("", False)], roles)
    frozen = tree.match_rules(groups, rules, "optim.freeze")
    if not 0 < sum(frozen.values()) < len(frozen):
      found = "all parameters" if any(frozen.values()) else "none of the parameters"
      raise UserError(
        f"optim.freeze={config.freeze!r} is found in the names of {found}. "
        f"{did_you_mean(config.freeze, groups)}"
      )
    groups = {
      name: dataclasses.replace(group, frozen=group.frozen or frozen[name])
      for name, group in groups.items()
    }
  for name in transfer.hidden_parameters(parameters):
    group = groups[name]
    times = transfer.learning_rate_multiplier(group.algorithm, width_ratio)
    groups[name] = dataclasses.replace(group, lr=group.lr * times, decay=group.decay / times)
  for name, group in groups.items():
    if group.algorithm in MATRIX_ALGORITHMS and not group.frozen:
      _check_matrix(name, parameters[name], group.algorithm)
  algorithms = {
    name: _algorithm(name, config, parameters) for name in {g.algorithm for g in groups.values()}
  }
  l2 = {name: config.weight_decay * g.decay for name, g in groups.items() if _is_l2(g)}
  decoupled = {name: config.weight_decay * g.decay for name, g in groups.items() if not _is_l2(g)}
  return Optimizer(
    optax.chain(
      optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
      _add_decay(l2),
      optax.partition(
        algorithms | {"frozen": optax.set_to_zero()},
        lambda params: tree.map_named(
          lambda name, _: "frozen" if groups[name].frozen else groups[name].algorithm, params
        ),
      ),
      _add_decay(decoupled),
    ),
    schedule,
    groups,
    LayerwiseRates.from_config(config, parameters, unfreeze_steps),
  )


def _group(values: Mapping[str, Any], default_algorithm: str) -> Group:
  known = [field.name for field in dataclasses.fields(Group)]
  for key in values:
    if key not in known:
      raise UserError(f"optim.rules: no key {key!r} in a rule. {did_you_mean(key, known)}")
  group = Group(**values)
  return dataclasses.replace(group, algorithm=group.algorithm or default_algorithm)


def _is_l2(group: Group) -> bool:
  return group.algorithm in L2_ALGORITHMS


def _add_decay(decay: Mapping[str, float]) -> optax.GradientTransformation:
  def add(updates, params):
    return tree.map_named(
      lambda name, u, p: u + decay[name] * p if decay.get(name) else u, updates, params
    )

  return optax.stateless(add)


def _algorithm(
  name: str, config: Any, parameters: Mapping[str, ParameterInfo]
) -> optax.GradientTransformation:
  """The direction of an algorithm's update, before learning rate and decoupled decay.

  adamw: Loshchilov and Hutter 2019. adam: Kingma and Ba 2015. sgd: heavy-ball momentum. adafactor:
  Shazeer and Stern 2018, without relative step sizes; like optax and T5X without bias correction of
  its momentum. lion: Chen et al. 2023. muon: Jordan et al. 2024, Nesterov momentum orthogonalised
  by five Newton-Schulz steps and scaled to the update size of Adam, 0.2 sqrt(max(fan_in, fan_out))
  (Liu et al. 2025, arXiv:2502.16982, equation 4). soap: Vyas et al. 2024.
  """
  match name:
    case "adamw" | "adam":
      return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    case "sgd":
      return optax.trace(decay=config.momentum)
    case "lion":
      return optax.scale_by_lion(b1=config.b1, b2=config.b2)
    case "adafactor":
      return optax.chain(
        _on_matrices(optax.scale_by_factored_rms(), parameters),
        _clip_by_layer(parameters),
        optax.ema(config.b1, debias=False),
      )
    case "muon":
      return optax.chain(
        optax.contrib.scale_by_muon(
          beta=config.momentum,
          weight_dimension_numbers=lambda params: tree.map_named(
            lambda name, _: optax.contrib.MuonDimensionNumbers(
              parameters[name].fan_in_axes, parameters[name].fan_out_axes
            ),
            params,
          ),
        ),
        optax.stateless(
          lambda updates, params: tree.map_named(
            lambda name, u: u * 0.2 * max(parameters[name].fan_in, parameters[name].fan_out) ** 0.5,
            updates,
          )
        ),
      )
    case "soap":
      inner = soap.scale_by_soap(config.b1, config.b2, config.eps, config.preconditioner_interval)
      return _on_matrices(inner, parameters)
  choices = ("adamw", "adam", "sgd", "lion", "adafactor", "muon", "soap")
  raise UserError(f"optim: no algorithm {name!r}. {did_you_mean(name, choices)}")


def _check_matrix(name: str, info: ParameterInfo, algorithm: str) -> None:
  """Refuses a parameter that the algorithm would fail on in the middle of compilation."""
  if info.fan_in_axes is None:
    raise UserError(
      f"optim.rules: {algorithm} works on matrices, and {name!r} is not a projection's kernel; "
      "give it dict(algorithm='adamw')."
    )


def _on_matrices(
  inner: optax.GradientTransformation, parameters: Mapping[str, ParameterInfo]
) -> optax.GradientTransformation:
  """Passes `inner` each kernel as matrices [..., fan_in, fan_out], of layers and experts if there
  are any, and other parameters as they are."""

  def flatten(updates):
    def to_matrix(name, u):
      info = parameters[name]
      if info.fan_in_axes is None:
        return u
      return u.reshape(*u.shape[: info.fan_in_axes[0]], info.fan_in, info.fan_out)

    return tree.map_named(to_matrix, updates)

  def update(updates, state, params):
    directions, state = inner.update(flatten(updates), state, flatten(params))
    return jax.tree.map(lambda d, u: d.reshape(u.shape), directions, updates), state

  return optax.GradientTransformation(lambda params: inner.init(flatten(params)), update)


def _clip_by_layer(parameters: Mapping[str, ParameterInfo]) -> optax.GradientTransformation:
  """Scales the update of each parameter of each layer down to a root mean square of 1 (Shazeer and
  Stern 2018, section 6). Layers of a stack are clipped apart, so that stacking changes nothing."""

  def clip(name: str, u: jax.Array) -> jax.Array:
    own_axes = tuple(range(parameters[name].axes.count("layers"), u.ndim))
    return u / jnp.maximum(1, jnp.sqrt(jnp.square(u).mean(own_axes, keepdims=True)))

  return optax.stateless(lambda updates, params: tree.map_named(clip, updates))


def make_schedule(
  config: Any, *, total_steps: int, warmup_steps: int, decay_steps: int
) -> optax.Schedule:
  """step -> learning rate: a linear warmup from 0, then `config.schedule`.

  cosine, linear: to `final_fraction` of the peak when `total_steps` are done (cosine: Loshchilov
  and Hutter 2017). wsd: constant, then linear over the last `decay_steps` (warmup-stable-decay, Hu
  et al. 2024). rsqrt: peak * sqrt(warmup / step) (Vaswani et al. 2017, eq. 3). constant.
  """
  peak, final = config.learning_rate, config.learning_rate * config.final_fraction
  if warmup_steps > total_steps:
    raise UserError(
      f"optim: a warmup of {warmup_steps} steps is longer than the run of {total_steps}."
    )
  remaining = max(total_steps - warmup_steps, 1)
  match config.schedule:
    case "cosine":
      after = optax.cosine_decay_schedule(peak, remaining, alpha=config.final_fraction)
    case "linear":
      after = optax.linear_schedule(peak, final, remaining)
    case "wsd":
      if decay_steps > remaining:
        raise UserError(
          f"optim: a decay of {decay_steps} steps does not fit after a warmup of {warmup_steps} "
          f"in the run's {total_steps}."
        )
      after = optax.linear_schedule(peak, final, decay_steps, remaining - decay_steps)
    case "rsqrt":
      origin = max(warmup_steps, 1)
      after = lambda step: peak * jnp.sqrt(origin / (step + origin))  # noqa: E731
    case "constant":
      after = optax.constant_schedule(peak)
    case _:
      choices = ("cosine", "linear", "wsd", "rsqrt", "constant")
      raise UserError(
        f"optim.schedule: no schedule {config.schedule!r}. "
        f"{did_you_mean(str(config.schedule), choices)}"
      )
  # Step 0 has the first share of the warmup, as a learning rate of 0 would waste an update.
  warmup = lambda step: peak * (step + 1) / (warmup_steps + 1)  # noqa: E731
  return optax.join_schedules([warmup, after], [warmup_steps])
