"""One layer: self-attention, cross-attention if there is an encoder, and the feed-forward network.

Axes: B batch, T query positions, S key positions, D width, K key-value heads, H head width.
"""

import functools

import jax
from flax import nnx

from gptjax.devices.sharding import constrain
from gptjax.model.attention import Attention, KeysAndValues, LayerCache, Mask
from gptjax.model.config import ModelConfig
from gptjax.model.feedforward import FeedForward
from gptjax.model.layers import LayerNorm, Mix, RMSNorm, dropout
from gptjax.model.moe import MixtureOfExperts
from gptjax.model.stats import ActivationStats, RouterStats

# Placements with a norm of the branch's output.
_OF_BRANCH = ("after", "both")


def make_norm(config: ModelConfig) -> LayerNorm | RMSNorm:
  if config.norm.kind == "rmsnorm":
    return RMSNorm(config.embed_dim, eps=config.norm.eps, offset=config.norm.offset)
  return LayerNorm(config.embed_dim, eps=config.norm.eps, bias=config.bias)


class Block(nnx.Module):
  """Branches, each with its norms, added to the residual stream. [B, T, D] -> [B, T, D]."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    of_stream, of_branch = config.norm.placement != "after", config.norm.placement in _OF_BRANCH
    shared, cross = config.residual.kind == "parallel_one_norm", bool(config.encoder_layers)

    def norm_if(wanted: bool) -> LayerNorm | RMSNorm | None:
      return make_norm(config) if wanted else None

    self.attention_norm = norm_if(of_stream)
    self.attention = Attention(config, rngs)
    self.attention_out_norm = norm_if(of_branch)
    self.cross_norm = norm_if(cross and of_stream)
    self.cross_attention = Attention(config, rngs, cross=True) if cross else None
    self.cross_out_norm = norm_if(cross and of_branch)
    self.mlp_norm = norm_if(of_stream and not shared)
    self.mlp = MixtureOfExperts(config, rngs) if config.experts.count else FeedForward(config, rngs)
    self.mlp_out_norm = norm_if(of_branch)
    self.embed_mix = Mix(1.0, 0.0) if config.residual.embedding else None

  def __call__(
    self,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    mask: Mask,
    bias_BNTS: jax.Array | None = None,
    *,
    embedded_BTD: jax.Array | None = None,
    first_values_BTKH: jax.Array | None = None,
    cross: KeysAndValues | None = None,
    cross_mask: Mask | None = None,
    valid_BT: jax.Array | None = None,
    cache: LayerCache | None = None,
    key: jax.Array | None = None,
    stats: ActivationStats | None = None,
    router_stats: RouterStats | None = None,
  ) -> tuple[jax.Array, LayerCache | None]:
    """Returns the output and the written cache, as `Attention` does.

    `cross` are the keys and values that `Block.cross_attention` makes of the encoder's output.
    `valid_BT` is false for padding. `stats` receives each branch as it is added to the residual
    stream (`attention`, `cross_attention`, `mlp`), the stream after the layer (`residual`), and
    `largest_logit`.
    """
    config = self.config
    cross_attends = self.cross_attention is not None
    keys = (None,) * 5 if key is None else jax.random.split(key, 5 if cross_attends else 3)
    attention = functools.partial(
      self.attention,
      positions_BT=positions_BT,
      mask=mask,
      bias_BNTS=bias_BNTS,
      first_values_BTKH=first_values_BTKH,
      cache=cache,
      key=keys[0],
      stats=stats,
    )
    mlp = self.mlp
    if config.experts.count:
      mlp = functools.partial(mlp, valid_BT=valid_BT, router_stats=router_stats)

    def add(x_BTD, branch_BTD, name, key):
      branch_BTD = dropout(branch_BTD, config.dropout.residual, key)
      scale = config.residual.scale / config.depth_ratio
      branch_BTD = branch_BTD if scale == 1 else branch_BTD * scale
      if stats is not None:
        stats.note(name, branch_BTD)
      return x_BTD + branch_BTD

    def add_branch(x_BTD, name, branch, norms, key):
      before, after = norms
      post = config.norm.placement == "post"
      branch_BTD = branch(x_BTD if post or before is None else before(x_BTD))
      branch_BTD = branch_BTD if after is None else after(branch_BTD)
      x_BTD = add(x_BTD, branch_BTD, name, key)
      return before(x_BTD) if post else x_BTD

    def attend(x_BTD):
      nonlocal cache
      branch_BTD, cache = attention(x_BTD)
      return branch_BTD

    if self.embed_mix is not None:
      x_BTD = self.embed_mix(x_BTD, embedded_BTD)
    if config.residual.kind == "sequential":
      norms = (self.attention_norm, self.attention_out_norm)
      x_BTD = add_branch(x_BTD, "attention", attend, norms, keys[1])
      if cross_attends:
        branch = functools.partial(
          self.cross_attention.cross, keys_and_values=cross, mask=cross_mask, key=keys[3]
        )
        norms = (self.cross_norm, self.cross_out_norm)
        x_BTD = add_branch(x_BTD, "cross_attention", branch, norms, keys[4])
      x_BTD = add_branch(x_BTD, "mlp", mlp, (self.mlp_norm, self.mlp_out_norm), keys[2])
    else:
      normed_BTD = self.attention_norm(x_BTD)
      mlp_BTD = mlp(normed_BTD if self.mlp_norm is None else self.mlp_norm(x_BTD))
      x_BTD = add(x_BTD, attend(normed_BTD), "attention", keys[1])
      x_BTD = add(x_BTD, mlp_BTD, "mlp", keys[2])
    if stats is not None:
      stats.note("residual", x_BTD)
    return constrain(x_BTD, "batch", "residual_time", None), cache

  def values(self, x_BTD: jax.Array) -> jax.Array:
    """Attention values [B, T, K, H] of the layer's input [B, T, D], before `value_residual`."""
    if self.config.norm.placement in ("pre", "both"):
      x_BTD = self.attention_norm(x_BTD)
    return self.attention.value(constrain(x_BTD, "batch", "time", None))
