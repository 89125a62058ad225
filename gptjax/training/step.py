"""The training step: its state, created sharded, and the pure functions that are compiled."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util
from jax.sharding import Mesh

from gptjax import tree
from gptjax.data.batch import Batch
from gptjax.devices import sharding
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import ParameterInfo
from gptjax.model.stats import ActivationStats, RouterStats
from gptjax.objectives.task import Task
from gptjax.optim.optimizer import Optimizer
from gptjax.training.adaptation import WHOLE, WholeModel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """State of training, everything that a checkpoint holds.

  Attributes:
    step: int32, updates done or skipped, and so the index of the next batch.
    skipped: int32, updates that were not finite.
    params: trained parameters, a nested dict of float32.
    ema: moving average of the parameters, or None.
    base_checksum: uint32, `checkpoints.checksum` of the model under adapters; None without them.
    second_checksum: uint32, the same of the task's second model; None without one.
  """

  step: jax.Array
  skipped: jax.Array
  params: Any
  opt_state: optax.OptState
  ema: Any
  base_checksum: jax.Array | None = None
  second_checksum: jax.Array | None = None


def make_state(
  model_config: ModelConfig,
  optimizer: Optimizer,
  seed: int,
  ema: bool,
  adaptation: WholeModel = WHOLE,
  base: Mapping[str, Any] | None = None,
  checksums: Mapping[str, jax.Array] | None = None,
) -> TrainState:
  """The state at step 0. Meant for `jax.eval_shape`, or for `jax.jit` with output shardings.

  Args:
    model_config: the model.
    optimizer: makes its own state.
    seed: decides the initial parameters.
    ema: whether a moving average of the parameters is kept.
    adaptation: decides which parameters are trained.
    base: the parameters of a frozen model under adapters.
    checksums: {field of the state: checksum} of the frozen models that there are.
  """
  params = adaptation.initial_params(model_config, seed, base)
  return TrainState(
    step=jnp.int32(0),
    skipped=jnp.int32(0),
    params=params,
    opt_state=optimizer.init(params),
    # A copy, since two outputs of one buffer could not both be donated to the step.
    ema=jax.tree.map(jnp.copy, params) if ema else None,
    **(checksums or {}),
  )


def abstract_state(
  model_config: ModelConfig,
  optimizer: Optimizer,
  parameters: Mapping[str, ParameterInfo],
  mesh: Mesh,
  *,
  ema: bool,
  adaptation: WholeModel = WHOLE,
  has_second: bool = False,
) -> TrainState:
  """The state as `jax.ShapeDtypeStruct`s with shardings; nothing is allocated.

  Optimizer state in the shape of a parameter is sharded like the parameter.
  """

  def make() -> TrainState:
    frozen = {"base_checksum": not adaptation.is_whole, "second_checksum": has_second}
    checksums = {name: jnp.uint32(0) for name, is_there in frozen.items() if is_there}
    return make_state(model_config, optimizer, 0, ema, adaptation, checksums=checksums)

  shapes = jax.eval_shape(make)
  shardings = sharding.parameter_shardings(parameters, mesh)

  def place(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    parts = name.split("/")
    for start in range(len(parts)):
      parameter = "/".join(parts[start:])
      if parameter in shardings and parameters[parameter].shape == leaf.shape:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[parameter])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh))

  return tree.map_named(place, shapes)


def init_state(
  model_config: ModelConfig,
  optimizer: Optimizer,
  seed: int,
  abstract: TrainState,
  adaptation: WholeModel = WHOLE,
  base: Mapping[str, Any] | None = None,
  checksums: Mapping[str, int] | None = None,
) -> TrainState:
  """Makes the state of step 0 like `make_state`, each array on the devices that will hold it."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  ema = abstract.ema is not None

  def make(base: Mapping[str, Any] | None) -> TrainState:
    found = jax.tree.map(jnp.uint32, checksums)
    return make_state(model_config, optimizer, seed, ema, adaptation, base, found)

  return jax.jit(make, out_shardings=shardings)(base)


def replace_params(state: TrainState, loaded: Mapping[str, Any]) -> TrainState:
  """Puts loaded parameters in the place of the initial ones, and starts their average from them."""
  flat = traverse_util.flatten_dict(state.params) | traverse_util.flatten_dict(loaded)
  params = traverse_util.unflatten_dict(flat)
  ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
  return dataclasses.replace(state, params=params, ema=ema)


@dataclasses.dataclass(frozen=True)
class StepOptions:
  """How a step computes gradients, and how it is compiled.

  Attributes:
    seed: with the step's number, the source of all randomness.
    grad_accumulation: micro-batches that a batch is cut into, one after another.
    dropout: whether the model drops anything.
    router_balance_loss: factor of the loss that balances the load of experts.
    router_z_loss: factor of the z-loss of the routers' logits.
    reduce_dtype: dtype in which gradients of matrices are added up over devices.
    compiler_options: of XLA, by name.
  """

  seed: int
  grad_accumulation: int = 1
  dropout: bool = False
  router_balance_loss: float = 0.0
  router_z_loss: float = 0.0
  reduce_dtype: str = "float32"
  compiler_options: Mapping[str, Any] | None = None


def _make_gradients(
  graph: nnx.GraphDef, task: Task, options: StepOptions, *, observe: bool = False
) -> Callable[..., tuple[dict[str, jax.Array], Any, dict[str, jax.Array]]]:
  """Returns (state, batch, frozen) -> (metrics, gradient, stats).

  `frozen` are the parameters of the model that are not in the state, and have no gradient.

  The metrics are the task's loss, the weight of the batch, and the routers' statistics in a mixture
  of experts; the routers' two losses, means over the layers, are minimised with the task's, times
  their factors. The loss is the mean over the valid targets of the whole global batch: each
  micro-batch is divided by that one count, so their gradients add up to the gradient of the whole.
  Randomness is a function of (seed, step). The stats, [L] each, are empty unless `observe`.
  """

  def loss(params, micro: Batch, key, weight, frozen):
    model = nnx.merge(graph, params, frozen or {})
    stats = ActivationStats() if observe else None
    router_stats = RouterStats() if model.config.experts.count else None
    sums = task.loss(model, micro, key, stats=stats, router_stats=router_stats)
    share = micro.weights.sum() / weight
    total = sums.total / weight
    if router_stats is not None:
      balance, z = router_stats["balance_loss"].mean(), router_stats["z_loss"].mean()
      total += share * (options.router_balance_loss * balance + options.router_z_loss * z)
    told = {f"router/{name}": x * share for name, x in (router_stats or {}).items()}
    return total, ({"loss": sums.cross_entropy / weight} | told, dict(stats or {}))

  @sharding.reducing_in(options.reduce_dtype)
  def gradients(state: TrainState, batch: Batch, frozen: Any):
    batch = sharding.balance_time(batch)
    key = None
    if options.dropout:
      key = jax.random.fold_in(jax.random.key(options.seed), state.step)
    tokens = batch.weights.sum()
    weight = jnp.maximum(tokens, 1)
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def add(carry, micro_and_key):
      (_, told), grads = value_and_grad(state.params, *micro_and_key, weight, frozen)
      return jax.tree.map(jnp.add, carry, grads), told

    if options.grad_accumulation == 1:
      (_, (metrics, stats)), grads = value_and_grad(state.params, batch, key, weight, frozen)
    else:
      keys = None if key is None else jax.random.split(key, options.grad_accumulation)
      zero = jax.tree.map(jnp.zeros_like, state.params)
      micro_batches = _micro_batches(batch, options.grad_accumulation)
      grads, (metrics, stats) = jax.lax.scan(add, zero, (micro_batches, keys))
      metrics = {name: x.sum(0) for name, x in metrics.items()}
      # Micro-batches are equally large, so the mean of their mean squares is the batch's.
      stats = {
        name: jnp.sqrt(jnp.square(x).mean(0)) if name.endswith("_rms") else x.max(0)
        for name, x in stats.items()
      }
    return _over_layers(metrics) | {"batch_tokens": tokens}, grads, stats

  return gradients


def _over_layers(metrics: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Means over the layers of router statistics [L]; for the load [L, E], the `largest_load` of an
  expert in shares of 1 / E, which is 1 in balance."""
  means = {name: x.mean() for name, x in metrics.items() if name != "router/load"}
  if (load_LE := metrics.get("router/load")) is not None:
    means["router/largest_load"] = load_LE.max(-1).mean() * load_LE.shape[-1]
  return means


def make_train_step(
  graph: nnx.GraphDef,
  task: Task,
  optimizer: Optimizer,
  options: StepOptions,
  *,
  ema_decay: float = 0.0,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Returns jit(state, batch, frozen=None) -> (state, metrics), which donates the state alone.

  Metrics and gradient come from `_make_gradients`. An update whose loss or gradient is not finite
  is not applied.
  """
  gradients = _make_gradients(graph, task, options)

  def train_step(state: TrainState, batch: Batch, frozen: Any = None):
    metrics, grads, _ = gradients(state, batch, frozen)
    params, opt_state, grad_norm = optimizer.update(
      grads, state.opt_state, state.params, state.step
    )
    ema = None
    if state.ema is not None:
      ema = optax.incremental_update(params, state.ema, 1 - ema_decay)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    updated, kept = (params, opt_state, ema), (state.params, state.opt_state, state.ema)
    params, opt_state, ema = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), updated, kept
    )
    new_state = dataclasses.replace(
      state,
      step=state.step + 1,
      skipped=state.skipped + (1 - finite),
      params=params,
      opt_state=opt_state,
      ema=ema,
    )
    return new_state, metrics | {
      "grad_norm": grad_norm,
      "learning_rate": optimizer.learning_rate(state.step),
      "skipped": new_state.skipped,
    }

  return jax.jit(train_step, donate_argnums=0, compiler_options=options.compiler_options)


def make_observe_step(
  graph: nnx.GraphDef, task: Task, optimizer: Optimizer, options: StepOptions
) -> Callable[..., dict[str, jax.Array]]:
  """Returns jit(state, batch, frozen=None) -> stats of the update that the step would make.

  `layers/NAME` [L]: the stats of `model.block.Block`. `gradient_norm/PARAMETER` (before clipping),
  `update_norm/PARAMETER` (new - old) and `parameter_norm/PARAMETER`: Euclidean, [L] for a parameter
  of the stack and a scalar for any other, float32. Nothing is applied, and the
  state is not donated. A call costs one more forward and backward pass, and a second copy of
  parameters and optimizer state while it lasts.
  """
  gradients = _make_gradients(graph, task, options, observe=True)

  def norms(kind: str, values: Any) -> dict[str, jax.Array]:
    return {
      f"{kind}/{name}": jnp.sqrt(
        jnp.square(x).sum(range(1, x.ndim) if name.startswith("blocks/") else None)
      )
      for name, x in tree.named_leaves(values).items()
    }

  def observe_step(state: TrainState, batch: Batch, frozen: Any = None):
    _, grads, stats = gradients(state, batch, frozen)
    params, _, _ = optimizer.update(grads, state.opt_state, state.params, state.step)
    stats = {f"layers/{name}": x for name, x in stats.items()}
    stats |= norms("gradient_norm", grads) | norms("parameter_norm", state.params)
    stats |= norms("update_norm", jax.tree.map(jnp.subtract, params, state.params))
    # Replicated, so that every host can read them.
    return {name: sharding.constrain(x, *(None,) * x.ndim) for name, x in stats.items()}

  return jax.jit(observe_step, compiler_options=options.compiler_options)


def name_layers(stats: Mapping[str, Any]) -> dict[str, float]:
  """{NAME: [L] or scalar}, on the host -> floats by name; arrays become NAME/00, NAME/01 ..."""
  named = {}
  for name, x in stats.items():
    layers = {f"{name}/{i:02}": float(one) for i, one in enumerate(x)} if x.ndim else None
    named |= layers or {name: float(x)}
  return named


def _micro_batches(batch: Batch, count: int) -> Batch:
  """[B, T] -> [count, B / count, T], strided over rows so that none leaves its device."""
  return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def make_eval_step(
  graph: nnx.GraphDef, task: Task
) -> Callable[..., tuple[dict[str, tuple[jax.Array, jax.Array]], Any]]:
  """Returns jit(params, batch, frozen=None) -> the results of `Task.evaluate`, sums over targets
  and outputs, replicated on every host."""

  def eval_step(params, batch: Batch, frozen: Any = None):
    batch = sharding.balance_time(batch)
    sums, outputs = task.evaluate(nnx.merge(graph, params, frozen or {}), batch)
    return sums, jax.tree.map(lambda x: sharding.constrain(x, *(None,) * x.ndim), outputs)

  return jax.jit(eval_step)
