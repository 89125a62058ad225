"""A mixture of experts: many feed-forward networks, a few of which process each token.

Axes: B batch, T positions, N tokens of a device, C choices of a token, R rows sorted by expert,
D width, F feed-forward width, E experts.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gptjax.devices import sharding
from gptjax.devices.sharding import constrain
from gptjax.model.config import ModelConfig
from gptjax.model.feedforward import GATED, FeedForward, activate
from gptjax.model.grouped import grouped_product
from gptjax.model.layers import Linear
from gptjax.model.stats import RouterStats

_AXES = {
  "gate": ("experts", "embed", "mlp"),
  "up": ("experts", "embed", "mlp"),
  "down": ("experts", "mlp", "embed"),
}


class ExpertLinear(nnx.Module):
  """The same projection of every expert: kernel [E, in, out] and bias [E, out], float32."""

  def __init__(self, sizes, *, axes: tuple[str, str, str], bias: bool, std: float, rngs: nnx.Rngs):
    kernel = std * jax.random.normal(rngs.params(), sizes)
    self.kernel = nnx.Param(kernel, axes=axes, fan_in_axes=1, role="hidden")
    zeros, out_axes = jnp.zeros((sizes[0], sizes[2])), (axes[0], axes[2])
    self.bias = nnx.Param(zeros, axes=out_axes, role="bias") if bias else None


class MixtureOfExperts(nnx.Module):
  """Sends each token to the experts with the largest router logits, and adds up their outputs,
  weighted (Shazeer et al. 2017, arXiv:1701.06538, section 2). No token is dropped, however many
  choose the same expert.

  Shapes: [B, T, D] -> [B, T, D], in the compute dtype. The router is float32.
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    E, D, F = config.experts.count, config.embed_dim, config.mlp_dim
    self.config = config
    self.router = Linear(
      (D,),
      (E,),
      axes=("embed", None),
      bias=config.experts.router_bias,
      std=config.hidden_std,
      dtype="float32",
      rngs=rngs,
      role="router",
    )

    def make(name: str, widths: tuple[int, int], std: float) -> ExpertLinear:
      return ExpertLinear((E, *widths), axes=_AXES[name], bias=config.mlp.bias, std=std, rngs=rngs)

    gated = config.mlp.activation in GATED
    self.gate = make("gate", (D, F), config.hidden_std) if gated else None
    self.up = make("up", (D, F), config.hidden_std)
    self.down = make("down", (F, D), config.residual_std)
    self.shared = (
      FeedForward(dataclasses.replace(config, mlp_dim=config.experts.shared_dim), rngs)
      if config.experts.shared_dim
      else None
    )

  def __call__(
    self,
    x_BTD: jax.Array,
    *,
    valid_BT: jax.Array | None = None,
    router_stats: RouterStats | None = None,
  ) -> jax.Array:
    """Applies the experts.

    Args:
      x_BTD: float.
      valid_BT: bool, false for padding, which goes to no expert and counts in no statistic; None is
        no padding.
      router_stats: receives the statistics of all tokens of the global batch.
    """
    config = self.config
    dtype = config.dtype
    x_BTD = constrain(x_BTD.astype(dtype), "batch", "time", None)
    logits_BTE = constrain(self.router(x_BTD), "batch", "time", None)
    _, choices_BTC = jax.lax.top_k(jax.lax.stop_gradient(logits_BTE), config.experts.per_token)
    is_choice_BTCE = jax.nn.one_hot(choices_BTC, config.experts.count)
    if config.experts.router_normalize:
      weights_BTC = jax.nn.softmax((is_choice_BTCE * logits_BTE[:, :, None]).sum(-1))
    else:
      weights_BTC = (is_choice_BTCE * jax.nn.softmax(logits_BTE)[:, :, None]).sum(-1)
    if router_stats is not None:
      router_stats.update(measure(logits_BTE, is_choice_BTCE, valid_BT))
    if valid_BT is not None:
      choices_BTC = jnp.where(valid_BT[..., None], choices_BTC, config.experts.count)

    # What `_apply_local` casts, so that devices that share an expert add up its gradient before.
    wide = jnp.promote_types(dtype, sharding.reduce_dtype())
    projections = {
      name: {part: x[...].astype(wide) for part, x in _parameters(getattr(self, name))}
      for name in _AXES
      if getattr(self, name) is not None
    }
    # Outside `_split_experts`, so that it is added once however the experts are split.
    down_bias_ED = projections["down"].pop("bias", None)
    y_BTD = _split_experts(config, projections, x_BTD, choices_BTC, weights_BTC)
    if down_bias_ED is not None:
      weights_BTE = (is_choice_BTCE * weights_BTC[..., None]).sum(2).astype(wide)
      y_BTD = (y_BTD + weights_BTE @ constrain(down_bias_ED, None, None)).astype(dtype)
    if self.shared is not None:
      y_BTD += self.shared(x_BTD)
    return y_BTD


def measure(
  logits_BTE: jax.Array, is_choice_BTCE: jax.Array, valid_BT: jax.Array | None
) -> dict[str, jax.Array]:
  """Computes `RouterStats` from the router's logits and the choices (0 or 1), float32.

  balance_loss: E sum_e f_e P_e (Fedus et al. 2022, arXiv:2101.03961, equations 4 to 6) with f_e the
  share of the choices and P_e the mean probability; 1 in perfect balance. z_loss: the mean squared
  log of the normaliser (Zoph et al. 2022, arXiv:2202.08906, equation 5).
  """
  weights_BT = jnp.ones(logits_BTE.shape[:2]) if valid_BT is None else valid_BT.astype(jnp.float32)
  tokens = jnp.maximum(weights_BT.sum(), 1)
  weights_BT1 = weights_BT[..., None]
  load_E = (is_choice_BTCE.mean(2) * weights_BT1).sum((0, 1)) / tokens
  probability_E = (jax.nn.softmax(logits_BTE) * weights_BT1).sum((0, 1)) / tokens
  squares_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
  return {
    "balance_loss": load_E.size * (load_E * probability_E).sum(),
    "z_loss": (squares_BT * weights_BT).sum() / tokens,
    "load": jax.lax.stop_gradient(load_E),
  }


def _parameters(projection: ExpertLinear) -> list[tuple[str, nnx.Param]]:
  parts = [("kernel", projection.kernel), ("bias", projection.bias)]
  return [(part, parameter) for part, parameter in parts if parameter is not None]


def _split_experts(config: ModelConfig, projections: Any, x_BTD, choices_BTC, weights_BTC):
  """Applies the experts on the devices that hold them, by `sharding.RULES`."""
  # As in `constrain`, an axis that the mesh does not divide is whole: few rows, or one new token.
  tokens = tuple(
    axis if size % sharding.axis_parts(axis) == 0 else None
    for axis, size in zip(("batch", "time"), x_BTD.shape[:2], strict=True)
  )

  def make_specs(mesh):
    return {
      name: {
        part: sharding.partition_spec(_AXES[name] if part == "kernel" else _AXES[name][::2])
        for part in parts
      }
      for name, parts in projections.items()
    }

  apply = functools.partial(_apply_local, config.mlp.activation, tokens[0] is not None)
  of_tokens = (*tokens, None)
  sharded = sharding.per_shard(apply, [of_tokens] * 3, of_tokens, (projections, make_specs))
  return sharded(x_BTD, choices_BTC, weights_BTC)


def _apply_local(activation, has_own_rows, projections, x_BTD, choices_BTC, weights_BTC):
  """On one device: the contribution of its experts to the tokens of all devices that share them;
  each device then receives the sum for its own tokens."""
  names = sharding.split_names("experts")
  projections = jax.tree.map(lambda x: x.astype(x_BTD.dtype), projections)
  E = projections["up"]["kernel"].shape[0]
  tokens = [x.reshape(-1, x.shape[-1]) for x in (x_BTD, choices_BTC, weights_BTC)]
  if names and has_own_rows:
    tokens = [jax.lax.all_gather(x, names, tiled=True) for x in tokens]
  # Choices are the first axis: as rows of an array, 2 of them would be padded to a tile of 8 or 16.
  x_ND, choices_CN, weights_CN = tokens[0], tokens[1].T, tokens[2].T
  C, N = choices_CN.shape
  # A token's choices differ, so at most one of them falls on each of the experts that are here.
  R = N * min(C, E)
  expert = choices_CN.reshape(-1) - (jax.lax.axis_index(names) * E if names else 0)
  expert = jnp.where((expert >= 0) & (expert < E), expert, E)
  order = jnp.argsort(expert, stable=True)
  place_CN = jnp.argsort(order).reshape(C, N)
  sizes_E = (expert[:, None] == jnp.arange(E)[None]).sum(0, dtype=jnp.int32)
  # Rows for experts of other devices come last, where all is 0; beyond R they are dropped.
  order_R = order[:R]
  token_1R = order_R[None] % N
  is_expert_RE = jax.nn.one_hot(expert[order_R], E, dtype=x_BTD.dtype)

  def project(name, x):
    y = grouped_product(x, projections[name]["kernel"], sizes_E, _AXES[name])
    if "bias" in projections[name]:
      y += is_expert_RE @ projections[name]["bias"]
    return y

  x_RD = _take_sum(x_ND, token_1R, place_CN)
  up_RF = checkpoint_name(project("up", x_RD), "mlp")
  gate_RF = checkpoint_name(project("gate", x_RD), "mlp") if "gate" in projections else None
  y_RD = project("down", activate(activation, up_RF, gate_RF))
  weights_R = _take_sum(weights_CN.reshape(-1), order_R[None], place_CN.reshape(1, -1))
  y_ND = _take_sum(y_RD * weights_R[:, None].astype(y_RD.dtype), place_CN, token_1R)
  if names and has_own_rows:
    y_ND = jax.lax.psum_scatter(y_ND, names, tiled=True)
  partial_sums = sharding.split_names("mlp") + (() if has_own_rows else names)
  if partial_sums:
    y_ND = jax.lax.psum(y_ND, partial_sums)
  return y_ND.reshape(x_BTD.shape)


@jax.custom_vjp
def _take_sum(x: jax.Array, indices_KM: jax.Array, transposed: jax.Array) -> jax.Array:
  """The sum over K of x[indices], [M, ...]; indices beyond the end of x give 0.

  The gradient gathers too, by the indices of where each row of x went, instead of scattering.
  """
  del transposed
  # One by one: XLA:TPU expects one gather with a sum over an axis to take seven times the cycles.
  taken = (jnp.take(x, indices_M, axis=0, mode="fill", fill_value=0) for indices_M in indices_KM)
  return functools.reduce(jnp.add, taken)


def _take_sum_forward(x, indices_KM, transposed):
  return _take_sum(x, indices_KM, transposed), (indices_KM, transposed)


def _take_sum_backward(residuals, dy):
  indices_KM, transposed = residuals
  return _take_sum(dy, transposed, indices_KM), None, None


_take_sum.defvjp(_take_sum_forward, _take_sum_backward)
