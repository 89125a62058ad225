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
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Writes new keys and values into pages, and attends with each query to those of its row.

  Position p of row b is in page `tables_BS[b, p // Z]`, place p % Z. The pages are written in place
  if the caller gives them away. All numbers are float32, but for pages, which may be bfloat16.

  Args:
    positions_BT: int32, in steps of 1; -1 is padding, which is not written and attends to nothing.
    scale, cap, sinks_N: as in `attention.attend`.
    window: how many positions a query sees, its own and those before it; None is all.
    bias_NX: added to a logit, by how far the key is before the query; the last one for any
      further, the first for keys of the prefix behind the query.
    prefix_B: int32, the length of the prefix that all of a row's tokens see.

  Returns:
    What the queries attended to [B, T, N, H], 0 for padding, and the written pages.
  """
  sinks_N = jnp.zeros(0, jnp.float32) if sinks_N is None else sinks_N
  bias_NX = jnp.zeros((0, 0), jnp.float32) if bias_NX is None else bias_NX
  prefix_B = jnp.zeros(0, jnp.int32) if prefix_B is None else prefix_B
  sizes, kind = {}, keys_PZKH.dtype.name
  _check("q_BTNH", q_BTNH, "BTNH", ("float32",), sizes)
  _check("k_BTKH", k_BTKH, "BTKH", ("float32",), sizes)
  _check("v_BTKH", v_BTKH, "BTKH", ("float32",), sizes)
  _check("keys_PZKH", keys_PZKH, "PZKH", ("float32", "bfloat16"), sizes)
  _check("values_PZKH", values_PZKH, "PZKH", (kind,), sizes)
  _check("tables_BS", tables_BS, "BS", ("int32",), sizes)
  _check("positions_BT", positions_BT, "BT", ("int32",), sizes)
  if sinks_N.size:
    _check("sinks_N", sinks_N, "N", ("float32",), sizes)
  if bias_NX.size:
    _check("bias_NX", bias_NX, "NX", ("float32",), sizes)
  if prefix_B.size:
    _check("prefix_B", prefix_B, "B", ("int32",), sizes)
  if not sizes["P"] * sizes["Z"]:
    raise ValueError(f"keys_PZKH has the shape {keys_PZKH.shape}, which has no room")
  if not sizes["K"] or sizes["N"] % sizes["K"]:
    raise ValueError(f"q_BTNH has {sizes['N']} heads, no multiple of the {sizes['K']} of k_BTKH")
  like = (q_BTNH, keys_PZKH, values_PZKH)
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like]
  call = jax.ffi.ffi_call(_compile("attention", kind), shapes, input_output_aliases={3: 1, 4: 2})
  operands = (keys_PZKH, values_PZKH, tables_BS, positions_BT, sinks_N, bias_NX, prefix_B)
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
