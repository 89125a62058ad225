"""Estimates the cost of a decoding step, which adds a token to each row of a batch."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from gptjax.compiler.report import Report, Work, compile_report
from gptjax.compiler.topology import Target
from gptjax.devices import sharding
from gptjax.diagnosis.dry_run import tree_bytes
from gptjax.errors import UserError
from gptjax.inference.form import Form, make_form
from gptjax.inference.forward import forward
from gptjax.inference.pages import PAGE, Pools, empty_pools
from gptjax.inference.tpu import joins_pages
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT, ParameterInfo, abstract_model, describe
from gptjax.training.resolve import resolve
from gptjax.training.setup import Setup, make_setup

FLOP_RULE = "2 N + 4 L H Q K per token, K = keys that the last position of the context sees"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
  """State between two steps: the newest token of each row, int32 [B], how many are before it, int32
  [B], the pages of each row, int32 [B, I], and all pages.

  Rows are split over the mesh like a batch, and each part has pages of its own, which `tables`
  counts from 0.
  """

  tokens: jax.Array
  lengths: jax.Array
  tables: jax.Array
  pools: Pools


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


def compile_decoding(setup: Setup, target: Target, weights: str) -> Report:
  """Compiles a step of greedy decoding with the setup's batch and context, and reports on it.

  It is the engine's own step, with the model in its inference form.

  Args:
    weights: in what the matrices are kept, one of `form.WEIGHTS`.
  """
  model = abstract_form(setup, weights)
  params = abstract_parameters(setup, model)
  arrays, treedef = jax.tree.flatten(params)
  form = Form(nnx.graphdef(model), treedef)
  decoding = abstract_decoding(setup)
  length = setup.config.sequence_length

  @functools.partial(
    jax.jit,
    donate_argnames=("decoding",),
    out_shardings=jax.tree.map(lambda leaf: leaf.sharding, decoding),
    compiler_options=setup.compiler_options,
  )
  def step(arrays: list[jax.Array], decoding: Decoding) -> Decoding:
    return append(form, arrays, decoding, length)

  work = _work(setup, describe(model), params, decoding)
  return compile_report(setup, target, step, (arrays, decoding), work)


def append(form: Form, arrays: list[jax.Array], state: Decoding, length: int) -> Decoding:
  """Reads the newest token of each row, and takes the likeliest to follow it."""
  tokens_B1, lengths_B1 = state.tokens[:, None], state.lengths[:, None]
  columns_B1 = jnp.zeros_like(tokens_B1)
  step = (tokens_B1, lengths_B1, state.tables, columns_B1)
  options = {"length": length, "rows_axis": "batch"}
  logits_B1V, pools = forward(form, arrays, state.pools, *step, **options)
  tokens_B = logits_B1V[:, 0].argmax(-1).astype(jnp.int32)
  return Decoding(tokens_B, state.lengths + 1, state.tables, pools)


def abstract_form(setup: Setup, weights: str) -> GPT:
  """The model in its inference form for the setup's mesh; nothing is allocated."""
  length, joined = setup.config.sequence_length, _joined(setup)

  def build() -> GPT:
    parts = nnx.split(GPT(setup.model, nnx.Rngs(0)))
    return make_form(*parts, own=False, weights=weights, length=length, joined=joined)

  return nnx.eval_shape(build)


def _joined(setup: Setup) -> bool:
  with jax.set_mesh(setup.mesh):
    return joins_pages(abstract_model(setup.model))


def abstract_parameters(setup: Setup, form: GPT) -> nnx.State:
  """The parameters of a form as `jax.ShapeDtypeStruct`s with the shardings of `sharding.RULES`."""
  shardings = sharding.parameter_shardings(describe(form), setup.mesh)

  def place(path: tuple[str | int, ...], variable: nnx.Variable) -> nnx.Variable:
    where = shardings["/".join(map(str, path))]
    return variable.replace(jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=where))

  return nnx.map_state(place, nnx.state(form))


def abstract_decoding(setup: Setup) -> Decoding:
  """The state between two steps, as `jax.ShapeDtypeStruct`s with shardings: rows and pages are
  split like a batch, pages also by heads."""
  B, S, joined = setup.config.batch_size, setup.config.sequence_length, _joined(setup)
  I = -(-S // PAGE)

  def build() -> Decoding:
    zeros_B, zeros_BI = jnp.zeros(B, jnp.int32), jnp.zeros((B, I), jnp.int32)
    return Decoding(zeros_B, zeros_B, zeros_BI, empty_pools(setup.model, B * I, joined=joined))

  def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    axes = ("batch", None, "kv_heads", None)[: leaf.ndim]
    where = NamedSharding(setup.mesh, sharding.partition_spec(axes))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

  return jax.tree.map(place, jax.eval_shape(build))


def _work(
  setup: Setup, described: Mapping[str, ParameterInfo], params: nnx.State, decoding: Decoding
) -> Work:
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
  read = 0
  for path, leaf in nnx.to_flat_state(params):
    info = described[name := "/".join(map(str, path))]
    is_scored = model.head.tied and name.startswith("embed/")
    if info.role != "embedding" or is_scored:
      split = [axis for axes in sharding.parameter_axes(info.axes) for axis in axes]
      parts = math.prod(mesh.shape[axis] for axis in split if axis != "fsdp")
      size = math.prod(info.shape) * leaf.dtype.itemsize // parts
      read += round(size * (1 - (1 - _active(model, info)) ** batch))
  matrices = sum(
    math.prod(info.shape) * _active(model, info)
    for info in setup.parameters.values()
    if info.fan_in_axes is not None or (model.head.tied and info.axes == ("vocab", "embed"))
  )
  split = (*sharding.RULES["batch"], *sharding.RULES["kv_heads"])
  values = batch * keys * 2 * model.num_kv_heads * model.head_dim
  cache = values * jnp.dtype(model.dtype).itemsize // math.prod(mesh.shape[axis] for axis in split)
  held = {"parameters": tree_bytes(params)[1], "kv_cache": tree_bytes(decoding.pools)[1]}
  advice = {
    "parameters": "parameters: --weights=int8, a longer mesh.tensor or mesh.fsdp",
    "kv_cache": "the cache: a smaller --batch or --context, or a longer mesh.tensor or mesh.data",
  }
  return Work(
    tokens=batch,
    model_flops=batch * (2.0 * matrices + 4.0 * model.num_heads * model.head_dim * keys),
    flop_rule=FLOP_RULE,
    held=held,
    read={"parameters": read, "kv_cache": cache},
    advice=tuple(advice[name] for name in sorted(held, key=held.get, reverse=True)),
  )


def _active(model: ModelConfig, info: ParameterInfo) -> float:
  """The share of a parameter that one token uses."""
  return model.experts.active if "experts" in info.axes else 1.0
