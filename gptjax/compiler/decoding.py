"""Estimates the cost of a decoding step, which adds a token to each row of a batch."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from gptjax.compiler.report import Report, Work, compile_report
from gptjax.compiler.topology import Target
from gptjax.devices import sharding
from gptjax.errors import UserError
from gptjax.model.attention import KeysAndValues
from gptjax.model.gpt import GPT, ParameterInfo
from gptjax.model.stack import Cache
from gptjax.training.dry_run import tree_bytes
from gptjax.training.resolve import resolve
from gptjax.training.setup import Setup, make_setup

FLOP_RULE = "2 N + 4 L H Q K per token, K = keys that the last position of the context sees"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
  """State between two steps: the newest token of each row, int32 [B], how many are before it, int32
  [B], and the cache."""

  tokens: jax.Array
  lengths: jax.Array
  cache: Cache


def make_decoding_plan(
  config: ConfigDict, devices: Sequence[jax.Device], batch: int, context: int
) -> Setup:
  """The setup of a config whose model decodes `batch` rows with room for `context` positions each.

  Raises:
    UserError: as `make_setup`, or the model cannot be decoded.
  """
  mesh = sharding.make_mesh(config.mesh, devices)
  rows = math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
  model = config.model
  if batch < 1 or context < 1:
    raise UserError(f"--batch={batch} and --context={context} must both be at least 1.")
  if batch % rows:
    raise UserError(
      f"--batch={batch} does not divide over the {rows} devices of the mesh's data, fsdp "
      f"and expert axes: use a multiple of {rows}."
    )
  if model.position.kind == "learned" and context > model.position.max_positions:
    raise UserError(
      f"--context={context} exceeds the {model.position.max_positions} learned positions of the "
      "model: shorten it, or choose a model with rotary positions."
    )
  if mesh.shape["context"] > 1:
    raise UserError(
      f"mesh.context={mesh.shape['context']} has nothing to split where one token is decoded at a "
      "time: use mesh.tensor or mesh.data."
    )
  config = ConfigDict(config.to_dict())
  config.update({"batch_size": batch, "sequence_length": context, "grad_accumulation": 1})
  return make_setup(resolve(config), devices)


def compile_decoding(setup: Setup, target: Target) -> Report:
  """Compiles a step of greedy decoding with the setup's batch and context, and reports on it.

  Parameters and cache are in `model.dtype`. The layers are separate, as after `GPT.unstack`, since
  slicing them out of the stack would copy every parameter for every token.
  """
  graph, params = abstract_parameters(setup)
  decoding = abstract_decoding(setup)

  @functools.partial(
    jax.jit,
    donate_argnames=("decoding",),
    out_shardings=jax.tree.map(lambda leaf: leaf.sharding, decoding),
    compiler_options=setup.compiler_options,
  )
  def step(params: Any, decoding: Decoding) -> Decoding:
    return append(nnx.merge(graph, params), decoding)

  return compile_report(setup, target, step, (params, decoding), _work(setup, params, decoding))


def append(model: GPT, state: Decoding) -> Decoding:
  """Reads the newest token of each row, and takes the likeliest to follow it."""
  x_B1D, cache = model.hidden(
    state.tokens[:, None], positions_BT=state.lengths[:, None], cache=state.cache
  )
  tokens_B = model.logits(x_B1D)[:, 0].argmax(-1).astype(jnp.int32)
  return Decoding(tokens_B, state.lengths + 1, cache)


def abstract_parameters(setup: Setup) -> tuple[nnx.GraphDef, Any]:
  """The model with separate layers: its static part, and its parameters as `jax.ShapeDtypeStruct`s
  in the compute dtype with the shardings of `sharding.RULES`."""

  def build() -> GPT:
    model = GPT(setup.model, nnx.Rngs(0))
    model.unstack()
    return model

  graph, state = nnx.split(nnx.eval_shape(build))
  flat = traverse_util.flatten_dict(nnx.to_pure_dict(state))
  described = {path: _unstacked(setup, path) for path in flat}
  shardings = sharding.parameter_shardings(
    {"/".join(map(str, path)): info for path, info in described.items()}, setup.mesh
  )
  placed = {
    path: jax.ShapeDtypeStruct(
      info.shape, setup.model.dtype, sharding=shardings["/".join(map(str, path))]
    )
    for path, info in described.items()
  }
  return graph, traverse_util.unflatten_dict(placed)


def _unstacked(setup: Setup, path: tuple[Any, ...]) -> ParameterInfo:
  """The description in `setup.parameters` of a parameter in a single layer or outside layers."""
  info = setup.parameters["/".join(str(part) for part in path if not isinstance(part, int))]
  if info.axes[0] != "layers":
    return info
  inputs = info.fan_in_axes and tuple(i - 1 for i in info.fan_in_axes)
  return ParameterInfo(info.shape[1:], info.axes[1:], inputs, info.role)


def abstract_decoding(setup: Setup) -> Decoding:
  """The state between two steps, as `jax.ShapeDtypeStruct`s with shardings: rows are split like a
  batch, the cache also by heads."""
  B, S = setup.config.batch_size, setup.config.sequence_length

  def build() -> Decoding:
    zeros = jnp.zeros(B, jnp.int32)
    return Decoding(zeros, zeros, GPT(setup.model, nnx.Rngs(0)).empty_cache(B, S))

  pair = KeysAndValues(*(("batch", None, "kv_heads", None),) * 2)
  axes = Decoding(("batch",), ("batch",), [pair] * setup.model.num_layers)

  def place(leaf: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
    where = NamedSharding(setup.mesh, sharding.partition_spec(axes))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

  return jax.tree.map(place, jax.eval_shape(build), axes)


def _work(setup: Setup, params: Any, decoding: Decoding) -> Work:
  """The work of a step, whatever the program.

  A device reads the parameters that tokens are multiplied with or scaled by, but not lookup tables:
  all that `tensor` does not split, since it gathers those that `fsdp` splits; and the experts that
  some row is expected to choose if all are equally likely. It reads the part of the cache that the
  layers see: all of it, or a window.
  """
  model, mesh = setup.model, setup.mesh
  batch, context = setup.config.batch_size, setup.config.sequence_length
  windows = model.windows * (model.num_layers // len(model.windows))
  keys = sum(context if window is None else min(window, context) for window in windows)
  _, cache = tree_bytes(decoding.cache)
  weights = read = 0
  for info in setup.parameters.values():
    is_scores = model.head.tied and info.axes == ("vocab", "embed")
    is_matrix = info.fan_in_axes is not None or is_scores
    active = model.experts.active if "experts" in info.axes else 1.0
    weights += math.prod(info.shape) * active if is_matrix else 0
    if is_matrix or not {"vocab", "positions"} & set(info.axes):
      split = [axis for axes in sharding.parameter_axes(info.axes) for axis in axes]
      parts = math.prod(mesh.shape[axis] for axis in split if axis != "fsdp")
      size = math.prod(info.shape) * jnp.dtype(model.dtype).itemsize // parts
      read += round(size * (1 - (1 - active) ** batch))
  held = {"parameters": tree_bytes(params)[1], "kv_cache": cache}
  advice = {
    "parameters": "parameters: a longer mesh.tensor or mesh.fsdp",
    "kv_cache": "the cache: a smaller --batch or --context, or a longer mesh.tensor or mesh.data",
  }
  return Work(
    tokens=batch,
    model_flops=batch * (2.0 * weights + 4.0 * model.num_heads * model.head_dim * keys),
    flop_rule=FLOP_RULE,
    held=held,
    read={"parameters": read, "kv_cache": cache * keys // (context * model.num_layers)},
    advice=tuple(advice[name] for name in sorted(held, key=held.get, reverse=True)),
  )
