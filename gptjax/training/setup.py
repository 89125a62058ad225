"""The objects of a resolved config, before any data is read: model, task, mesh, optimizer, step."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util
from jax.sharding import Mesh

from gptjax.config import RunLength
from gptjax.data.batch import Batch
from gptjax.data.options import DataOptions, read_options
from gptjax.devices import chips, sharding
from gptjax.errors import UserError, check_choice, check_number
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import ParameterInfo, abstract_model, count_parameters, describe_parameters
from gptjax.objectives.task import Task, find_task, make_task
from gptjax.optim.optimizer import Optimizer, check_numbers, make_optimizer, make_schedule
from gptjax.training import flops, pretrained, step
from gptjax.training.adaptation import WholeModel, make_adaptation
from gptjax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Setup:
  """A checked config, its model, task and mesh. Made by `make_setup`; nothing is allocated.

  Attributes:
    parameters: {name: shape and axes} of the model.
    adaptation: decides which parameters are trained.
    trained: {name: shape and axes} of the trained parameters, which may be adapters.
    graph: the model is `nnx.merge(graph, params)`; `frozen`, if there is any, comes third.
    second: the task's second model, `model.second`; None without one.
  """

  config: Any
  task: Task
  data: DataOptions
  model: ModelConfig
  parameters: Mapping[str, ParameterInfo]
  graph: nnx.GraphDef
  mesh: Mesh
  adaptation: WholeModel
  trained: Mapping[str, ParameterInfo]
  second: ModelConfig | None

  @property
  def num_parameters(self) -> int:
    """Number of parameters of the model, without adapters."""
    return count_parameters(self.model)

  @property
  def num_trained(self) -> int:
    """Number of trained parameters, without those that `config.optim` freezes."""
    groups = self.make_optimizer(None).groups
    return sum(
      math.prod(info.shape) for name, info in self.trained.items() if not groups[name].frozen
    )

  @property
  def flops_per_token(self) -> float:
    """FLOPs per token of a row, forward and backward; a second model's are forward alone."""
    lengths = (self.config.sequence_length, self.task.target_length(self.data))
    own = flops.flops_per_token(self.model, self.parameters, self.trained, *lengths)
    if self.second is None:
      return own
    described = describe_parameters(self.second)
    return own + flops.flops_per_token(self.second, described, described, *lengths) / 3

  @property
  def flop_rule(self) -> str:
    rule = chips.FLOP_RULE + ("" if self.adaptation.is_whole else " (4 N where frozen)")
    return rule if self.second is None else f"{rule}, a third of it for the second model"

  def make_optimizer(self, length: RunLength | None) -> Optimizer:
    """The optimizer of `config.optim`; without a length its learning rate is 0."""
    unfreeze_steps = 0
    if length is None:
      schedule = optax.constant_schedule(0.0)
    else:
      unfreeze_steps = length.steps(self.config, "optim.unfreeze_every")
      schedule = make_schedule(
        self.config.optim,
        total_steps=length.total_steps,
        warmup_steps=length.steps(self.config, "optim.warmup"),
        decay_steps=length.steps(self.config, "optim.decay"),
      )
    optimizer = make_optimizer(
      self.config.optim, self.trained, schedule, self.model.width_ratio, unfreeze_steps
    )
    return self.adaptation.wrap(optimizer, self.trained, length)

  def abstract_state(self, optimizer: Optimizer) -> TrainState:
    ema = self.config.optim.ema_decay > 0
    frozen = {"adaptation": self.adaptation, "has_second": self.second is not None}
    return step.abstract_state(self.model, optimizer, self.trained, self.mesh, ema=ema, **frozen)

  def abstract_base(self) -> dict[str, Any]:
    """The parameters of the model that adapters are put on, with their shardings."""
    return self._abstract(self.parameters)

  def abstract_second(self) -> dict[str, Any] | None:
    """The same of the task's second model; None without one."""
    return None if self.second is None else self._abstract(describe_parameters(self.second))

  def _abstract(self, parameters: Mapping[str, ParameterInfo]) -> dict[str, Any]:
    shardings = sharding.parameter_shardings(parameters, self.mesh)
    flat = {
      name: jax.ShapeDtypeStruct(info.shape, jnp.float32, sharding=shardings[name])
      for name, info in parameters.items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")

  def frozen(self, base: Any, second: Any = None) -> dict[str, Any] | None:
    """The frozen parameters for the step, from the two models', which must not be used again."""
    frozen = self.adaptation.freeze(base, self.parameters, self.trained)
    return frozen if second is None else (frozen or {}) | {"second": second}

  def require_whole_model(self) -> None:
    """Raises UserError if there is a frozen model beside what is trained."""
    if not self.adaptation.is_whole or self.second is not None:
      raise UserError(
        f"peft.method={self.adaptation.method!r}, task={self.task.name!r}: this looks at the "
        "training of one whole model. Set --config.peft.method=none, and another task if needed."
      )

  def make_train_step(self, optimizer: Optimizer) -> Callable:
    ema_decay = self.config.optim.ema_decay
    return step.make_train_step(
      self.graph, self.task, optimizer, self._step_options, ema_decay=ema_decay
    )

  def make_observe_step(self, optimizer: Optimizer) -> Callable:
    return step.make_observe_step(self.graph, self.task, optimizer, self._step_options)

  @property
  def _step_options(self) -> step.StepOptions:
    return step.StepOptions(
      seed=self.config.seed,
      grad_accumulation=self.config.grad_accumulation,
      dropout=bool(self.model.dropout),
      router_balance_loss=self.config.router_balance_loss,
      router_z_loss=self.config.router_z_loss,
      reduce_dtype=self.config.mesh.reduce_dtype,
      compiler_options=self.compiler_options,
    )

  @property
  def run_length(self) -> RunLength | None:
    """The length of the run; see `length_without_data`."""
    return length_without_data(self.config)

  @property
  def compiler_options(self) -> dict[str, str]:
    """The options in `config.compile.options` for the platform of the mesh."""
    platform = sharding.platform_of(self.mesh.devices.flat[0].platform)
    options = {}
    for item in filter(None, self.config.compile.options[platform].split(",")):
      name, equals, value = item.partition("=")
      if not equals:
        raise UserError(f"compile.options.{platform}: {item!r} is not NAME=VALUE.")
      options[name.strip()] = value.strip()
    return options

  def abstract_batch(self) -> Batch:
    """Shapes and shardings of a batch; if examples are packed anew for each batch, of the largest
    batch, in which each example takes a row."""
    rows, where = self.config.batch_size, sharding.batch_sharding(self.mesh)
    rows = -(-rows // self.row_multiple) * self.row_multiple

    def field(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=where)

    length = (self.task.target_length(self.data),)
    whole = field(length, jnp.int32)
    more = {name: field(*one) for name, one in self.task.batch_fields(self.data).items()}
    return Batch(whole, whole, field(length, jnp.float32), whole, whole, **more)

  @property
  def row_multiple(self) -> int:
    """The number of which a batch's rows are a multiple."""
    return sharding.rows_multiple(self.config.grad_accumulation, self.mesh)


def length_without_data(config: Any) -> RunLength | None:
  """The length of a run by its config alone; None in epochs, whose length depends on the data."""
  if "total_epochs" in config:
    return None
  tokens = config.batch_size * config.sequence_length
  return RunLength.from_config(
    config, None if find_task(config.task.name).packs_batches else tokens, None
  )


def _check_numbers(config: Any) -> None:
  """Raises UserError, by its key, for a number that no run can use."""
  check_number("grad_accumulation", config.grad_accumulation, at_least=1)
  for key in ("max_skipped_steps", "router_balance_loss", "router_z_loss"):
    check_number(key, config[key], at_least=0)
  for key in ("start", "steps"):
    check_number(f"profile.{key}", config.profile[key], at_least=0)
  check_number("sample.max_tokens", config.sample.max_tokens, at_least=1)
  check_number("sample.temperature", config.sample.temperature, at_least=0)
  check_number("sample.top_p", config.sample.top_p, above=0, at_most=1)
  check_numbers(config.optim)


def make_setup(config: Any, devices: Sequence[jax.Device] | None = None) -> Setup:
  """Checks the model, task, mesh and batch of a config; reads a second model's config, no other.

  Args:
    config: as `resolve` returns it.
    devices: devices of the mesh; by default all that JAX sees.

  Raises:
    UserError: a value that cannot be used, by its key.
  """
  model = ModelConfig.from_config(config.model)
  if model.position.kind == "learned" and config.sequence_length > model.position.max_positions:
    raise UserError(
      f"sequence_length={config.sequence_length} exceeds model.position.max_positions="
      f"{model.position.max_positions}; raise the latter or choose model.position.kind=rope."
    )
  task, data = make_task(config.task), read_options(config)
  task.check_model(model)
  _check_numbers(config)
  check_choice("mesh.reduce_dtype", config.mesh.reduce_dtype, sharding.REDUCE_DTYPES)
  mesh = sharding.make_mesh(config.mesh, devices)
  rows = None if task.packs_batches else config.batch_size
  sharding.check_batch(rows, config.sequence_length, config.grad_accumulation, mesh)
  if model.encoder_layers and mesh.shape["context"] > 1:
    raise UserError(
      f"mesh.context={mesh.shape['context']}: rows of an encoder-decoder are not split; use "
      "mesh.data, mesh.fsdp or mesh.tensor."
    )
  if model.experts.count % mesh.shape["expert"]:
    raise UserError(
      f"mesh.expert={mesh.shape['expert']} does not divide "
      f"model.experts.count={model.experts.count}."
    )
  adaptation = make_adaptation(config)
  if not adaptation.is_whole and not config.init_from:
    raise UserError(f"peft.method={adaptation.method!r} needs init_from, the model to adapt.")
  whole, second = adaptation.abstract_model(model), None
  if task.second_model:
    second = pretrained.read_model_config(task.second_model)
    whole.second = abstract_model(second)
  return Setup(
    config,
    task,
    data,
    model,
    describe_parameters(model),
    nnx.graphdef(whole),
    mesh,
    adaptation,
    adaptation.trained(model),
    second,
  )
