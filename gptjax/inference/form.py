"""The inference form of a model, made once: separate layers, and weights as decoding reads them.

On one CPU, products and attention go to kernels of this package, whose sums have one order whatever
the batch; on TPUs attention goes to JAX's kernel for pages; elsewhere both stay XLA's.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.errors import UserError, check_choice
from gptjax.inference.sampling import compilations
from gptjax.inference.tpu import RaggedAttention
from gptjax.model.attention import Attention
from gptjax.model.gpt import GPT
from gptjax.model.layers import Linear, find
from gptjax.quantization.int8 import Int8Embedding, Int8Kernel
from gptjax.quantization.kernel import prepare_for_xla
from gptjax.quantization.stored import is_stored

try:
  from gptjax.cpu import kernels, memory
  from gptjax.cpu.model import use_kernels
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
    UserError: there is no such format, or the model's weights are stored in few bits already.
  """
  if weights and is_stored(model):
    raise UserError(f"weights={weights!r}: the checkpoint stores its weights in few bits already.")
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
  whole = nnx.merge(graphdef, params)
  # One, or the members of an ensemble.
  for model in [module for _, module in nnx.iter_modules(whole) if isinstance(module, GPT)]:
    model.unstack()
    if own:
      use_kernels(model, _decoder_modules(model), weights, length)
      continue
    prepare_for_xla(model, model.config.dtype)
    if weights == "int8":
      _quantize(model)
    _round(model, model.config.dtype if weights == "int8" else weights)
    for path, module in _decoder_modules(model) if joined else ():
      if type(module) is Attention:
        setattr(find(model, path[:-1]), path[-1], RaggedAttention(module))
  return whole


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


def _round(model: GPT, dtype: str) -> None:
  """Keeps the matrices that are not in int8 in a dtype, so that a step need not convert them."""
  for _, module in nnx.iter_modules(model):
    for name in ("kernel", "embedding"):
      parameter = getattr(module, name, None)
      is_kept = not isinstance(parameter, nnx.Param) or parameter.dtype == jnp.int8
      if not is_kept and getattr(parameter, "role", None) != "router":
        told = parameter.get_metadata()
        setattr(module, name, type(parameter)(parameter[...].astype(dtype), **told))
