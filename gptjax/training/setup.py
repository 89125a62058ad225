"""What a config amounts to before any data is read: its model, mesh, optimizer and step."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util
from jax.sharding import Mesh

from gptjax.config import RunLength, to_text
from gptjax.data.batch import Batch
from gptjax.data.denoising import span_corruption_lengths
from gptjax.data.labels import find_labels
from gptjax.data.options import LABEL_OBJECTIVES, check_objective, read_options
from gptjax.data.tokenizer import declared_vocab_size
from gptjax.devices import chips, sharding
from gptjax.errors import UserError
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import ParameterInfo, count_parameters, describe_parameters
from gptjax.objectives.label_losses import LabelLoss
from gptjax.optim import optimizer as optim
from gptjax.optim.optimizer import Optimizer
from gptjax.training import step
from gptjax.training.adaptation import WholeModel, make_adaptation
from gptjax.training.pretrained import labels_of, read_model_config, tokenizer_of
from gptjax.training.step import TrainState

# The tokenizer of the model that a run starts from.
INIT_FROM = "init_from"


@dataclasses.dataclass(frozen=True)
class Plan:
  """A checked config, its model and its mesh. Made by `make_plan`; nothing is allocated.

  parameters: {name: shape and axes} of the model. adaptation: which parameters are trained.
  trained: {name: shape and axes} of those; adapters are not among the model's own. graph:
  `nnx.merge(graph, params)` is the model, and beside adapters `nnx.merge(graph, params, frozen)`.
  """

  config: Any
  model: ModelConfig
  parameters: Mapping[str, ParameterInfo]
  graph: nnx.GraphDef
  mesh: Mesh
  adaptation: WholeModel
  trained: Mapping[str, ParameterInfo]

  @property
  def label_loss(self) -> LabelLoss | None:
    """None under the objectives of language models."""
    if self.config.objective not in LABEL_OBJECTIVES:
      return None
    return LabelLoss(self.config.objective, self.config.label_smoothing, self.config.r_drop)

  @property
  def num_parameters(self) -> int:
    """Of the model itself."""
    return count_parameters(self.model)

  @property
  def num_trained(self) -> int:
    """Of those, or beside them, without what `optim` freezes whole."""
    groups = self.make_optimizer(None).groups
    return sum(
      math.prod(info.shape) for name, info in self.trained.items() if not groups[name].frozen
    )

  @property
  def flops_per_token(self) -> float:
    """Of forward and backward, by the rule of `chips.flops_per_token`; of an encoder-decoder, for
    each token of the encoder. A frozen matrix has no gradient, and two thirds of the products."""
    model, length = self.model, self.config.sequence_length

    def matmul_params(pattern: str) -> float:
      return sum(
        math.prod(info.shape)
        * (model.active_experts if "experts" in info.axes else 1)
        * (1 if name in self.trained else 2 / 3)
        for name, info in (self.parameters | self.trained).items()
        if info.fan_in_axes is not None and re.match(pattern, name)
      )

    attention = {"heads": model.num_heads, "head_dim": model.head_dim}
    # The decoder's own, and what it makes of the encoder's tokens.
    decoder = matmul_params("(?!encoder/|blocks/cross_attention/(key|value)/)")
    if model.tied_head and not model.num_labels:
      decoder += model.vocab_size * model.embed_dim * (1 if self.adaptation.is_whole else 2 / 3)
    flops = chips.flops_per_token(
      matmul_params=decoder,
      sequence_length=self.target_length,
      windows=model.windows * (model.num_layers // len(model.windows)),
      causal=model.visibility != "bidirectional",
      **attention,
    )
    if not model.encoder_layers:
      return flops
    flops += 12.0 * model.num_heads * model.head_dim * length * model.num_layers
    encoder = chips.flops_per_token(
      matmul_params=matmul_params("encoder/|blocks/cross_attention/(key|value)/"),
      sequence_length=length,
      windows=[None] * model.encoder_layers,
      causal=False,
      **attention,
    )
    return encoder + flops * self.target_length / length

  @property
  def flop_rule(self) -> str:
    return chips.FLOP_RULE + ("" if self.adaptation.is_whole else " (4 N where frozen)")

  @property
  def target_length(self) -> int:
    """Positions of a row that have targets: those of the decoder, beside an encoder."""
    config = self.config
    if config.objective != "span_corruption":
      return config.sequence_length
    data = config.data
    _, length = span_corruption_lengths(config.sequence_length, data.mask_rate, data.mean_span)
    return length

  def make_optimizer(self, length: RunLength | None) -> Optimizer:
    """The optimizer of `config.optim`; without a length its learning rate is 0."""
    config, unfreeze_steps = self.config.optim, 0
    if length is None:
      schedule = optax.constant_schedule(0.0)
    else:
      unfreeze_steps = length.steps(config, "unfreeze_every")
      schedule = optim.make_schedule(
        config,
        total_steps=length.total_steps,
        warmup_steps=length.steps(config, "warmup"),
        decay_steps=length.steps(config, "decay"),
      )
    optimizer = optim.make_optimizer(
      config, self.trained, schedule, self.model.width_ratio, unfreeze_steps
    )
    return self.adaptation.wrap(optimizer, self.trained, length)

  def abstract_state(self, optimizer: Optimizer) -> TrainState:
    ema = self.config.optim.ema_decay > 0
    return step.abstract_state(
      self.model, optimizer, self.trained, self.mesh, ema=ema, adaptation=self.adaptation
    )

  def abstract_base(self) -> dict[str, Any]:
    """The parameters of the model that adapters are put on, with their shardings."""
    shardings = sharding.parameter_shardings(self.parameters, self.mesh)
    flat = {
      name: jax.ShapeDtypeStruct(info.shape, jnp.float32, sharding=shardings[name])
      for name, info in self.parameters.items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")

  def frozen(self, base: Mapping[str, Any]) -> dict[str, Any] | None:
    """The model's parameters that are not trained, which the step takes beside the state; `base` is
    not to be used any more."""
    return self.adaptation.freeze(base, self.parameters, self.trained)

  def require_whole_model(self) -> None:
    """Raises UserError if only adapters are trained."""
    if not self.adaptation.is_whole:
      raise UserError(
        f"peft.method={self.adaptation.method!r}: this looks at the training of whole models. "
        "Set --config.peft.method=none."
      )

  def make_train_step(self, optimizer: Optimizer) -> Callable:
    ema_decay = self.config.optim.ema_decay
    return step.make_train_step(self.graph, optimizer, ema_decay=ema_decay, **self._step_options)

  def make_observe_step(self, optimizer: Optimizer) -> Callable:
    return step.make_observe_step(self.graph, optimizer, **self._step_options)

  @property
  def _step_options(self) -> dict[str, Any]:
    return {
      "seed": self.config.seed,
      "grad_accumulation": self.config.grad_accumulation,
      "dropout": self.model.has_dropout,
      "labels": self.label_loss,
      "z_loss": self.config.z_loss,
      "router_balance_loss": self.config.router_balance_loss,
      "router_z_loss": self.config.router_z_loss,
      "compiler_options": self.compiler_options,
    }

  @property
  def run_length(self) -> RunLength | None:
    """None if it is given in epochs, whose length only the data could tell."""
    if "total_epochs" in self.config:
      return None
    return RunLength.from_config(self.config, steps_per_epoch=None)

  @property
  def compiler_options(self) -> dict[str, str]:
    """Those of `config.compile.options` for the platform of the mesh."""
    platform = sharding.platform_of(self.mesh.devices.flat[0].platform)
    options = {}
    for item in filter(None, self.config.compile.options[platform].split(",")):
      name, equals, value = item.partition("=")
      if not equals:
        raise UserError(f"compile.options.{platform}: {item!r} is not NAME=VALUE.")
      options[name.strip()] = value.strip()
    return options

  def abstract_batch(self) -> Batch:
    """The shapes of a batch and where its parts lie."""
    rows, where = self.config.batch_size, sharding.batch_sharding(self.mesh)

    def field(dtype: Any, length: int = self.target_length) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct((rows, length), dtype, sharding=where)

    whole = field(jnp.int32)
    batch = Batch(whole, whole, field(jnp.float32), whole, whole)
    if self.config.objective == "prefix":
      batch = dataclasses.replace(batch, prefix=whole)
    if self.config.data.pair_key:
      batch = dataclasses.replace(batch, token_types=whole)
    if self.config.objective in ("multi_label", "regression", "span"):
      values = jax.ShapeDtypeStruct((*whole.shape, self.model.num_labels), jnp.float32)
      batch = dataclasses.replace(batch, values=values.update(sharding=where))
    if self.model.encoder_layers:
      names = ("encoder_inputs", "encoder_segment_ids", "encoder_positions")
      encoder = field(jnp.int32, self.config.sequence_length)
      batch = dataclasses.replace(batch, **dict.fromkeys(names, encoder))
    return batch


def make_plan(config: Any, devices: Sequence[jax.Device] | None = None) -> Plan:
  """Settles the vocabulary and what `config.init_from` says, and checks the model, mesh and batch.

  Args:
    config: from configs/pretrain.py, or with the same keys.
    devices: to make the mesh of; by default all that JAX sees.

  Raises:
    UserError: a value that cannot be used, by its key.
  """
  with config.unlocked():
    if config.tokenizer == INIT_FROM:
      config.tokenizer = tokenizer_of(config.init_from)
    if not config.model.num_layers:
      config.model.update(_architecture_to_start_from(config))
    if not config.model.vocab_size:
      config.model.vocab_size = declared_vocab_size(config.tokenizer)
    _settle_labels(config)
  model = ModelConfig.from_config(config.model)
  if not config.objective:
    with config.unlocked():
      config.objective = _objective_of(model)
  if model.position == "learned" and config.sequence_length > model.max_positions:
    raise UserError(
      f"sequence_length={config.sequence_length} exceeds model.max_positions="
      f"{model.max_positions}; raise the latter or choose model.position=rope."
    )
  _check_objective(config.objective, model)
  mesh = sharding.make_mesh(config.mesh, devices)
  sharding.check_batch(config.batch_size, config.sequence_length, config.grad_accumulation, mesh)
  if model.encoder_layers and mesh.shape["context"] > 1:
    raise UserError(
      f"mesh.context={mesh.shape['context']}: rows of an encoder-decoder are not split; use "
      "mesh.data, mesh.fsdp or mesh.tensor."
    )
  if model.num_experts % mesh.shape["expert"]:
    raise UserError(
      f"mesh.expert={mesh.shape['expert']} does not divide model.num_experts={model.num_experts}."
    )
  adaptation = make_adaptation(config.get("peft"))
  if not adaptation.is_whole and not config.init_from:
    raise UserError(f"peft.method={adaptation.method!r} needs init_from, the model to adapt.")
  return Plan(
    config,
    model,
    describe_parameters(model),
    nnx.graphdef(adaptation.abstract_model(model)),
    mesh,
    adaptation,
    adaptation.trained(model),
  )


def _architecture_to_start_from(config: Any) -> dict[str, Any]:
  """That of the checkpoint `init_from`; UserError if there is none, or a key was set otherwise."""
  if not config.init_from:
    raise UserError("model=init_from needs init_from: a run, hf:PATH or gguf:PATH.")
  architecture = read_model_config(config.init_from).architecture
  for name, default in ModelConfig.defaults().items():
    if name in architecture and config.model[name] not in (default, architecture[name]):
      raise UserError(
        f"model.{name}={config.model[name]!r}, but init_from={config.init_from} has "
        f"{architecture[name]!r}; leave it out."
      )
  return architecture


def _settle_labels(config: Any) -> None:
  """What they are, from the training records where the config does not say, and their number."""
  if config.objective not in LABEL_OBJECTIVES:
    return
  if config.objective in ("classification", "multi_label", "tagging"):
    if not config.data.labels:
      found = find_labels(read_options(config))
      known = labels_of(config.init_from) if config.init_from else None
      # In the order of a head that is kept.
      config.data.labels = known.names if known and {*known.names} == {*found} else found
    count = len(config.data.labels)
  else:
    count = {"regression": 1, "span": 2}[config.objective]
  if config.model.num_labels not in (0, count):
    raise UserError(
      f"model.num_labels={config.model.num_labels}, but objective={config.objective!r} has {count} "
      "here; leave it out."
    )
  config.model.num_labels = count


# The visibility that the model of an objective has, beside an encoder or without one.
_OBJECTIVES = {
  "next_token": ("causal", False),
  "prefix": ("prefix", False),
  "masked": ("bidirectional", False),
  "span_corruption": ("causal", True),
}


def _objective_of(model: ModelConfig) -> str:
  kind = (model.visibility, model.encoder_layers > 0)
  return next(name for name, needed in _OBJECTIVES.items() if needed == kind)


def _check_objective(objective: str, model: ModelConfig) -> None:
  check_objective(objective)
  if objective in LABEL_OBJECTIVES:
    return
  visibility, has_encoder = _OBJECTIVES[objective]
  if model.visibility != visibility:
    raise UserError(
      f"objective={objective!r} needs model.visibility={visibility!r}, not {model.visibility!r}."
    )
  if has_encoder != (model.encoder_layers > 0):
    needs = "at least 1" if has_encoder else "0"
    raise UserError(
      f"objective={objective!r} needs model.encoder_layers of {needs}, not {model.encoder_layers}."
    )


def dry_run(config: Any) -> None:
  """Traces the training step on abstract values and prints what it would take.

  Raises:
    UserError: as `make_plan`, and for what the optimizer, the schedule or the mesh refuses.
  """
  plan = make_plan(config)
  length = plan.run_length
  optimizer = plan.make_optimizer(length)
  with jax.set_mesh(plan.mesh):
    state = plan.abstract_state(optimizer)
    frozen = plan.frozen(plan.abstract_base())
    plan.make_train_step(optimizer).trace(state, plan.abstract_batch(), frozen)
  print(to_text(config))
  print(f"parameters: {plan.num_parameters}")
  if plan.num_trained != plan.num_parameters:
    print(f"trained: {plan.num_trained}")
  print(f"steps: {f'{config.total_epochs} epochs' if length is None else length.total_steps}")
  print(f"tokens a step: {config.batch_size * config.sequence_length}")
  mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.shape.items())
  print(f"mesh: {mesh} ({jax.devices()[0].device_kind})")
  for name, part in (
    ("parameters", (state.params, frozen)),
    ("optimizer", (state.opt_state, state.ema)),
  ):
    total, shard = tree_bytes(part)
    print(f"memory of {name}: {total / 2**20:.1f} MiB in all, {shard / 2**20:.1f} MiB a device")


def tree_bytes(abstract: Any) -> tuple[int, int]:
  """Bytes of all arrays of an abstract tree, in all and on one device."""
  leaves = jax.tree.leaves(abstract)
  total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  shard = sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
  )
  return total, shard
