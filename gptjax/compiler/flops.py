"""Counts the FLOPs of a traced program, recomputation included."""

import math
from typing import Any

import jax


def count_flops(jaxpr: Any) -> float:
  """FLOPs of all matrix products in a jaxpr, on all devices together; 2 for a multiply-add.

  Loops count as often as they run. Kernels (`pallas_call`, cuDNN's attention) count nothing: see
  `hlo.Kernel` and `gpu.attention_flops`.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      total += _dot_flops(equation)
      continue
    times = 1
    match equation.primitive.name:
      case "scan":
        times = equation.params["length"]
      case "shard_map":
        mesh = equation.params["mesh"]
        times = math.prod(mesh.shape[axis] for axis in equation.params["newly_manual_axes"])
      case "pallas_call":
        continue
      case "cond" if _has_cudnn(_jaxprs(equation)):
        # What runs instead where a row has more documents than cuDNN takes.
        continue
    total += times * sum(count_flops(inner) for inner in _jaxprs(equation))
  return total


def _has_cudnn(jaxprs: list[Any]) -> bool:
  return any(
    equation.primitive.name.startswith("dot_product_attention") or _has_cudnn(_jaxprs(equation))
    for jaxpr in jaxprs
    for equation in jaxpr.eqns
  )


def _dot_flops(equation: Any) -> float:
  left = equation.invars[0].aval.shape
  (contracted, _), _ = equation.params["dimension_numbers"]
  depth = math.prod(left[axis] for axis in contracted)
  return 2.0 * depth * math.prod(equation.outvars[0].aval.shape)


def _jaxprs(equation: Any) -> list[Any]:
  """The jaxprs that an equation calls: all branches of a condition, none of a custom rule's."""
  found = []
  for name, value in equation.params.items():
    if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun"):
      continue
    for leaf in jax.tree.leaves(value, is_leaf=_is_jaxpr):
      if _is_jaxpr(leaf):
        found.append(getattr(leaf, "jaxpr", leaf))
  return found


def _is_jaxpr(value: Any) -> bool:
  return hasattr(value, "eqns") or hasattr(value, "jaxpr")
