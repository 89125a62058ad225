"""Products and attention on a CPU, faster than XLA's where a few rows meet many weights.

The bits of a row of a result depend on what it is computed from alone: not on the other rows, nor
on how many there are, how they are cut in parts, or how many threads work.

Axes: M rows, D contracted, F produced; B batch, T query positions, S pages of a row, N query heads,
K key-value heads, H head width, P pages, Z positions of a page, X distances.
"""

import importlib.util
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np

# Rows of x that a product is compiled for, at most; beyond, for any number.
ROWS = (1, 4, 8)

_handlers: dict[str, object] = {}
_compiling = threading.Lock()


def available() -> bool:
  """Whether numba is there and compiles, and JAX computes on a CPU unless told otherwise."""
  if os.name != "posix" or importlib.util.find_spec("numba") is None:
    return False
  is_off = os.environ.get("NUMBA_DISABLE_JIT", "0") != "0"
  return not is_off and jax.default_backend() == "cpu"


def product(x_MD: jax.Array, weights_FD: jax.Array, scales_F: jax.Array | None = None) -> jax.Array:
  """x @ weights.T, times a scale for each row of the weights if given: float32 [M, F].

  Args:
    x_MD: float32.
    weights_FD: float32, bfloat16 or int8.
    scales_F: float32.
  """
  scales_F = jnp.zeros(0, jnp.float32) if scales_F is None else scales_F
  sizes = {"M": x_MD.shape[0] if x_MD.ndim == 2 else 0, "F": weights_FD.shape[0]}
  _check("x_MD", x_MD, "MD", ("float32",), sizes)
  _check("weights_FD", weights_FD, "FD", ("float32", "bfloat16", "int8"), sizes)
  if scales_F.size:
    _check("scales_F", scales_F, "F", ("float32",), sizes)
  rows = next((R for R in ROWS if sizes["M"] <= R), 0)
  name = _compile("product", weights_FD.dtype.name, rows)
  y_MF = jax.ShapeDtypeStruct((sizes["M"], sizes["F"]), jnp.float32)
  return jax.ffi.ffi_call(name, y_MF)(x_MD, weights_FD, scales_F)


def grouped_product(
  x_MD: jax.Array, values_FP: jax.Array, scales_FG: jax.Array, zeros_FG: jax.Array | None = None
) -> jax.Array:
  """x @ weights.T for weights of few bits, (number - zero) * scale: float32 [M, F].

  Args:
    x_MD: float32.
    values_FP: int8, P = D; or uint8, two numbers of 4 bits in each, P = D / 2, as
      `gptjax.quantization.formats` packs them.
    scales_FG: float32, one for D / G inputs each.
    zeros_FG: int8; None is no zero points.
  """
  sizes = {}
  _check("x_MD", x_MD, "MD", ("float32",), sizes)
  _check("values_FP", values_FP, "FP", ("int8", "uint8"), sizes)
  _check("scales_FG", scales_FG, "FG", ("float32",), sizes)
  if zeros_FG is not None:
    _check("zeros_FG", zeros_FG, "FG", ("int8",), sizes)
  kind = "int4" if values_FP.dtype == jnp.uint8 else "int8"
  inputs, groups = sizes["D"], sizes["G"]
  if sizes["P"] * (2 if kind == "int4" else 1) != inputs or not multiplies(kind, inputs, groups):
    raise ValueError(f"values_FP {values_FP.shape} and {groups} groups do not fit {inputs} inputs")
  rows = next((R for R in ROWS if sizes["M"] <= R), 0)
  group = inputs // groups if groups > 1 else 0
  name = _compile("grouped_product", kind, rows, group, zeros_FG is not None)
  y_MF = jax.ShapeDtypeStruct((sizes["M"], sizes["F"]), jnp.float32)
  zeros_FG = jnp.zeros((0, 0), jnp.int8) if zeros_FG is None else zeros_FG
  return jax.ffi.ffi_call(name, y_MF)(x_MD, values_FP, scales_FG, zeros_FG)


def multiplies(kind: str, inputs: int, groups: int) -> bool:
  """Whether `grouped_product` takes weights of a kind with so many inputs in so many groups."""
  read = {"int8": 16, "int4": 32}.get(kind)
  return read is not None and inputs % groups == 0 and inputs // groups % read == 0


def attend(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  keys_PZKH: jax.Array,
  values_PZKH: jax.Array,
  tables_BS: jax.Array,
  positions_BT: jax.Array,
  *,
  scale: float,
  cap: float = 0.0,
  window: int | None = None,
  sinks_N: jax.Array | None = None,
  bias_NX: jax.Array | None = None,
  prefix_B: jax.Array | None = None,
  scales: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, ...]:
  """Writes new keys and values into pages, and attends with each query to those of its row.

  Position p of row b is in page `tables_BS[b, p // Z]`, place p % Z. The pages are written in place
  if the caller gives them away. All numbers are float32, but for pages, which may be bfloat16, or
  int8 with a scale for each head of a position.

  Args:
    positions_BT: int32, in steps of 1; -1 is padding, which is not written and attends to nothing.
    scale, cap, sinks_N: as in `attention.attend`.
    window: how many positions a query sees, its own and those before it; None is all.
    bias_NX: added to a logit, by how far the key is before the query; the last one for any
      further, the first for keys of the prefix behind the query.
    prefix_B: int32, the length of the prefix that all of a row's tokens see.
    scales: of pages of int8: those of keys and of values, float32 [P, Z, K, 1].

  Returns:
    What the queries attended to [B, T, N, H], 0 for padding, and the written pages, with their
    scales behind them.
  """
  sinks_N = jnp.zeros(0, jnp.float32) if sinks_N is None else sinks_N
  bias_NX = jnp.zeros((0, 0), jnp.float32) if bias_NX is None else bias_NX
  prefix_B = jnp.zeros(0, jnp.int32) if prefix_B is None else prefix_B
  sizes, kind = {}, keys_PZKH.dtype.name
  _check("q_BTNH", q_BTNH, "BTNH", ("float32",), sizes)
  _check("k_BTKH", k_BTKH, "BTKH", ("float32",), sizes)
  _check("v_BTKH", v_BTKH, "BTKH", ("float32",), sizes)
  _check("keys_PZKH", keys_PZKH, "PZKH", ("float32", "bfloat16", "int8"), sizes)
  _check("values_PZKH", values_PZKH, "PZKH", (kind,), sizes)
  _check("tables_BS", tables_BS, "BS", ("int32",), sizes)
  _check("positions_BT", positions_BT, "BT", ("int32",), sizes)
  if sinks_N.size:
    _check("sinks_N", sinks_N, "N", ("float32",), sizes)
  if bias_NX.size:
    _check("bias_NX", bias_NX, "NX", ("float32",), sizes)
  if prefix_B.size:
    _check("prefix_B", prefix_B, "B", ("int32",), sizes)
  if (scales is None) == (kind == "int8"):
    raise ValueError(f"pages are {kind}, and scales are {scales}: int8 has some, others have none")
  for scales_PZKG in scales or ():
    _check("scales", scales_PZKG, "PZKG", ("float32",), sizes | {"G": 1})
  if not sizes["P"] * sizes["Z"]:
    raise ValueError(f"keys_PZKH has the shape {keys_PZKH.shape}, which has no room")
  if not sizes["K"] or sizes["N"] % sizes["K"]:
    raise ValueError(f"q_BTNH has {sizes['N']} heads, no multiple of the {sizes['K']} of k_BTKH")
  scales = scales or ()
  like = (q_BTNH, keys_PZKH, values_PZKH, *scales)
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like]
  aliases = {3: 1, 4: 2} | {10 + i: 3 + i for i in range(len(scales))}
  call = jax.ffi.ffi_call(_compile("attention", kind), shapes, input_output_aliases=aliases)
  operands = (keys_PZKH, values_PZKH, tables_BS, positions_BT, sinks_N, bias_NX, prefix_B, *scales)
  options = {"cap": np.float32(cap), "scale": np.float32(scale), "window": np.int64(window or 0)}
  return tuple(call(q_BTNH, k_BTKH, v_BTKH, *operands, **options))


def _check(name: str, x: jax.Array, axes: str, dtypes: tuple[str, ...], sizes: dict[str, int]):
  """Checks an argument's dtype and shape against the sizes that axes have, and adds its own."""
  if x.dtype.name not in dtypes:
    raise ValueError(f"{name} is {x.dtype.name}, not {' or '.join(dtypes)}")
  if x.ndim != len(axes):
    raise ValueError(f"{name} has the shape {x.shape}, not {len(axes)} axes")
  for axis, size in zip(axes, x.shape, strict=True):
    if sizes.setdefault(axis, size) != size:
      raise ValueError(f"{name} has the shape {x.shape}, where {axis} is {sizes[axis]} elsewhere")


def _compile(loop: str, *options) -> str:
  """Compiles a kind of a loop unless it is, and returns the name that XLA knows it by."""
  from gptjax.cpu import loops

  name = "_".join(map(str, ("gptjax", loop, *options)))
  with _compiling:
    if name not in _handlers:
      _handlers[name] = getattr(loops, loop)(name, *options)
  return name
