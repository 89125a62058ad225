"""The inference form of a model, made once: separate layers, and weights as decoding reads them.

On one CPU, products and attention go to kernels of this package, whose sums have one order whatever
the batch; on TPUs attention goes to JAX's kernel for pages; elsewhere both stay XLA's.

Axes: N query heads, D width, F outputs of a product, V vocabulary, X distances of positions.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.errors import check_choice
from gptjax.inference.int8 import Int8Embedding, Int8Kernel, quantize
from gptjax.inference.pages import PagedCache
from gptjax.inference.sampling import compilations
from gptjax.inference.tpu import RaggedAttention
from gptjax.model.attention import Attention, KeysAndValues
from gptjax.model.config import ModelConfig
from gptjax.model.feedforward import FeedForward
from gptjax.model.gpt import GPT
from gptjax.model.layers import Embedding, Linear, adopt

try:
  from gptjax.cpu import kernels, memory
except ModuleNotFoundError:  # A wing that can be deleted.
  kernels = None

WEIGHTS = ("float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class Form:
  """A model's inference form without its arrays, for jit, which asks for its hash in each step: so
  it is computed once."""

  graphdef: nnx.GraphDef
  treedef: Any

  def __post_init__(self):
    object.__setattr__(self, "_hash", hash((self.graphdef, self.treedef)))

  def __hash__(self) -> int:
    return self._hash

  def model(self, arrays: list[jax.Array]) -> GPT:
    return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, arrays))


# One for all that are equal, or jit would compare them in each step.
_forms: dict[Form, Form] = {}


def inference_form(
  model: GPT, *, weights: str | None = None, length: int, joined: bool
) -> tuple[Form, list[jax.Array]]:
  """Splits the stack of layers and rounds the weights; the model itself stays as it is.

  Decoding would otherwise copy every weight for every token.

  Args:
    model: its parameters are on one device, or sharded.
    weights: in what the matrices are kept, one of `WEIGHTS`; None is the compute dtype.
    length: positions of a row, at most.
    joined: whether keys and values are joined in their pages: `tpu.joins_pages` of the model.

  Returns:
    The form and its arrays.

  Raises:
    UserError: there is no such format.
  """
  weights = weights or model.config.dtype
  check_choice("weights", weights, WEIGHTS)
  graphdef, params = nnx.split(model)
  arrays = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
  devices = {device for array in arrays for device in array.devices()}
  own = len(devices) <= 1 and kernels is not None and kernels.available()
  options = {"own": own, "weights": weights, "length": length, "joined": joined}
  arrays, treedef = jax.tree.flatten(_make_arrays(graphdef, params, **options))
  if own:
    arrays = memory.in_large_pages(arrays)
  form = nnx.eval_shape(functools.partial(make_form, graphdef, params, **options))
  form = Form(nnx.graphdef(form), treedef)
  return _forms.setdefault(form, form), arrays


@functools.partial(jax.jit, static_argnames=("graphdef", "own", "weights", "length", "joined"))
def _make_arrays(graphdef: nnx.GraphDef, params, **options):
  compilations["form"] += 1
  return nnx.state(make_form(graphdef, params, **options))


def make_form(
  graphdef: nnx.GraphDef, params, *, own: bool, weights: str, length: int, joined: bool
) -> GPT:
  """The form; `own` is whether it uses this package's kernels, the rest as in `inference_form`."""
  model = nnx.merge(graphdef, params)
  model.unstack()
  if own:
    _use_kernels(model, weights, length)
    return model
  if weights == "int8":
    _quantize(model)
  _round(model, model.config.dtype if weights == "int8" else weights)
  if joined:
    for path, module in _decoder_modules(model):
      if type(module) is Attention:
        _replace(model, path, RaggedAttention(module))
  return model


def _quantize(model: GPT) -> None:
  """Keeps projections and a tied head in int8; experts and other tables stay as they are."""
  for _, module in _decoder_modules(model):
    is_plain = isinstance(module, Linear) and isinstance(module.kernel, nnx.Param)
    # A rounding error of the router could change its choice of experts.
    if is_plain and module.kernel.role != "router":
      module.kernel = Int8Kernel(module)
  if model.head is None:
    model.embed = Int8Embedding(model.embed)


def _decoder_modules(model: GPT) -> list[tuple[tuple[str | int, ...], Any]]:
  """Paths and modules, but for those of an encoder, which runs once a text, its layers stacked."""
  return [found for found in nnx.iter_modules(model) if found[0][:1] != ("encoder",)]


def _replace(model: GPT, path: tuple[str | int, ...], module: nnx.Module) -> None:
  setattr(functools.reduce(_child, path[:-1], model), path[-1], module)


def _round(model: GPT, dtype: str) -> None:
  """Keeps the matrices that are not in int8 in a dtype, so that a step need not convert them."""
  for _, module in nnx.iter_modules(model):
    for name in ("kernel", "embedding"):
      parameter = getattr(module, name, None)
      is_kept = not isinstance(parameter, nnx.Param) or parameter.dtype == jnp.int8
      if not is_kept and getattr(parameter, "role", None) != "router":
        told = parameter.get_metadata()
        setattr(module, name, type(parameter)(parameter[...].astype(dtype), **told))


def _use_kernels(model: GPT, weights: str, length: int) -> None:
  """Replaces what decoding spends its time on. Activations are then float32, whatever the dtype of
  the weights: a CPU is no faster with others."""
  bias_NX = _bias_by_distance(model, length)
  modules = _decoder_modules(model)
  for _, module in modules:
    if isinstance(getattr(module, "config", None), ModelConfig):
      module.config = module.config.replace({"dtype": "float32"})
    if isinstance(module, Attention):
      _pack_kernels([module.query, module.key, module.value], weights)
    elif isinstance(module, FeedForward) and module.gate is not None:
      _pack_kernels([module.gate, module.up], weights)
  for path, module in modules:
    if isinstance(module, Linear):
      module.dtype = "float32"
      _pack_kernels([module], weights)
    elif type(module) is Attention:
      _replace(model, path, PagedAttention(module, bias_NX))
  if model.head is None:
    model.embed = PackedEmbedding(model.embed, weights)


def _child(module: Any, name: str | int) -> Any:
  return module[name] if isinstance(name, int) else getattr(module, name)


def _bias_by_distance(model: GPT, length: int) -> jax.Array | None:
  """The bias of attention logits by how far back a key is, float32 [N, X]; None without one."""
  positions = jnp.arange(length)[None]
  bias_1N1X = model.attention_bias(positions[:, -1:], positions[:, ::-1])
  return None if bias_1N1X is None else bias_1N1X[0, :, 0]


def _pack_kernels(projections: list[Linear], weights: str) -> None:
  """Replaces the kernels of projections of the same input, unless they are replaced already."""
  if not all(isinstance(one.kernel, nnx.Param) for one in projections):
    return
  # A rounding error of the router could change its choice of experts.
  weights = "float32" if projections[0].kernel.role == "router" else weights
  matrices_FD, shapes = [], []
  for one in projections:
    inputs = math.prod(one.kernel.shape[: one.contracted_axes])
    matrices_FD.append(one.kernel[...].reshape(inputs, -1).T)
    shapes.append(one.kernel.shape[one.contracted_axes :])
  packed = _pack(jnp.concatenate(matrices_FD), weights)
  first = 0
  for one, shape in zip(projections, shapes, strict=True):
    one.kernel = PackedKernel(*packed, first, shape)
    first += math.prod(shape)


class PackedKernel(nnx.Module):
  """A projection's kernel, one row of memory for each output, beside those of other projections.

  Each projection asks for the product with all of them, and takes its part. As the input is the
  same, XLA multiplies once.

  Attributes:
    matrix_FD: [F, D] in the format of the weights.
    scales_F: float32, for int8; else None.
    first: the projection's first output.
    out_shape: the axes that it produces.
  """

  def __init__(
    self,
    matrix_FD: nnx.Variable,
    scales_F: nnx.Variable | None,
    first: int,
    out_shape: tuple[int, ...],
  ):
    self.matrix_FD, self.scales_F = matrix_FD, scales_F
    self.first, self.out_shape = first, tuple(out_shape)

  def product(self, x: jax.Array, count: int, axes: tuple[str, ...]) -> jax.Array:
    """Multiplies as `layers.contract` does."""
    del axes  # One device holds all.
    leading = x.shape[: x.ndim - count]
    y_MF = _multiply(x.reshape(math.prod(leading), -1), self.matrix_FD, self.scales_F)
    y_MF = y_MF[:, self.first : self.first + math.prod(self.out_shape)]
    return y_MF.reshape(*leading, *self.out_shape)


class PackedEmbedding(Embedding):
  """A table that is both looked up and multiplied with: the embedding of a tied head.

  matrix_VD: [V, D] in the format of the weights. scales_V: float32, for int8; else None.
  """

  def __init__(self, base: Embedding, weights: str):
    self.matrix_VD, self.scales_V = _pack(base.embedding[...], weights)

  def __call__(self, indices: jax.Array) -> jax.Array:
    rows = jnp.take(self.matrix_VD[...], indices, axis=0, mode="clip").astype(jnp.float32)
    if self.scales_V is None:
      return rows
    return rows * jnp.take(self.scales_V[...], indices, mode="clip")[..., None]

  def scores(self, x: jax.Array) -> jax.Array:
    y_MV = _multiply(x.reshape(-1, x.shape[-1]), self.matrix_VD, self.scales_V)
    return y_MV.reshape(*x.shape[:-1], -1)


class PagedAttention(Attention):
  """Attention that reads a paged cache where it lies."""

  def __init__(self, base: Attention, bias_NX: jax.Array | None):
    adopt(self, base)
    self.bias_NX = None if bias_NX is None else nnx.Variable(bias_NX)

  def _attend_cached(
    self, q_BTNH, k_BTKH, v_BTKH, positions_BT, mask, bias_BNTS, cache: PagedCache
  ) -> tuple[jax.Array, PagedCache]:
    attended_BTNH, *pool = kernels.attend(
      q_BTNH,
      k_BTKH,
      v_BTKH,
      *cache.pool,
      cache.tables_BI,
      positions_BT,
      scale=self._scale,
      cap=self.config.attention.soft_cap,
      window=mask.window,
      sinks_N=None if self.sinks is None else self.sinks[...],
      bias_NX=None if self.bias_NX is None else self.bias_NX[...],
      prefix_B=cache.prefix_B,
    )
    return attended_BTNH, cache.with_pool(KeysAndValues(*pool))


def _pack(matrix: jax.Array, weights: str) -> tuple[nnx.Variable, nnx.Variable | None]:
  """A matrix in the format of the weights, and for int8 the scale of each row."""
  if weights != "int8":
    return nnx.Variable(matrix.astype(weights)), None
  values, scales = quantize(matrix, (1,))
  return nnx.Variable(values), nnx.Variable(scales)


def _multiply(x_MD: jax.Array, matrix: nnx.Variable, scales: nnx.Variable | None) -> jax.Array:
  return kernels.product(x_MD, matrix[...], None if scales is None else scales[...])
