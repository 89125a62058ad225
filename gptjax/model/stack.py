"""The stack of layers of a decoder or an encoder: scanned, unrolled, or with a cache.

Axes: B batch, T query positions, S key positions, D width, K key-value heads, H head width,
L layers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.devices import sharding
from gptjax.model.attention import (
  KeysAndValues,
  LayerCache,
  Mask,
  choose_kernel,
  make_mask,
  same_segment,
)
from gptjax.model.block import Block, make_norm
from gptjax.model.config import ModelConfig
from gptjax.model.positions import AttentionBias
from gptjax.model.stats import ActivationStats, RouterStats

# One per layer.
Cache = list[LayerCache]

# Names that a layer gives its activations (`checkpoint_name`), in the order of the forward pass:
# queries, keys and values; the attended values and the normaliser of their softmax; the output
# projection of attention; the wide activations of the feed-forward network.
_ATTENTION = ("qkv", "attention", "attention_out")
REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "save_attention": jax.checkpoint_policies.save_only_these_names("attention"),
  "save_qkv": jax.checkpoint_policies.save_only_these_names(*_ATTENTION),
  "dots": jax.checkpoint_policies.save_only_these_names(*_ATTENTION, "mlp"),
  "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=_ATTENTION,
    names_which_can_be_offloaded=["mlp"],
    offload_src="device",
    offload_dst="pinned_host",
  ),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
  """The output of an encoder, as the decoder reads it.

  Attributes:
    hidden_BSD: hidden states.
    segment_ids_BS: a token of the decoder sees its own segment; None is one segment a row.
    keys_and_values: cross-attention's for each layer of the decoder, computed once for decoding.
  """

  hidden_BSD: jax.Array
  segment_ids_BS: jax.Array | None = None
  keys_and_values: list[KeysAndValues] | None = None


class Stack(nnx.Module):
  """Layers and their final norm. Parameters of all layers are stacked as [L, ...], on disk too,
  whether the layers are then scanned or compiled one by one (`ModelConfig.scan_layers`)."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    self.attention_bias = AttentionBias(config, rngs)
    stack = nnx.vmap(lambda rngs: Block(config, rngs), in_axes=0, out_axes=0)
    self.blocks = stack(rngs.fork(split=config.num_layers))
    self.final_norm = None if config.norm.placement == "post" else make_norm(config)

  def run(
    self,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    prefix_BS: jax.Array | None = None,
    encoded: Encoded | None = None,
    cache: Cache | None = None,
    key: jax.Array | None = None,
    stats: ActivationStats | None = None,
    router_stats: RouterStats | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Embeddings [B, T, D] -> hidden states [B, T, D] and the written cache; see `GPT.hidden`."""
    config = self.config
    B, T, _ = x_BTD.shape
    key_positions_BS = positions_BT
    if cache is not None:
      length = cache[0].length
      key_positions_BS = jnp.broadcast_to(jnp.arange(length), (B, length))
    kernel = choose_kernel(config, T, cached=cache is not None, training=key is not None)
    masks = {
      kind: make_mask(
        kernel,
        positions_BT,
        key_positions_BS,
        config.window if kind == "local" else None,
        segment_ids_BT,
        visibility=config.visibility,
        prefix_BS=prefix_BS,
        rotates=kind != "nope",
      )
      for kind in set(config.layer_pattern)
    }
    shared = {
      "bias_BNTS": self.attention_bias(positions_BT, key_positions_BS),
      "embedded_BTD": x_BTD,
      "first_values_BTKH": self.layers()[0].values(x_BTD) if config.residual.values else None,
      "cross_mask": None if encoded is None else _cross_mask(encoded, T, segment_ids_BT),
      "valid_BT": None if segment_ids_BT is None else segment_ids_BT > 0,
    }

    def run(block: Block, x_BTD, kind, cross=None, **of_layer):
      if encoded is not None and cross is None:
        cross = block.cross_attention.keys_and_values(encoded.hidden_BSD)
      mask = masks[kind]
      return block(x_BTD, positions_BT, mask, cross=cross, **shared, **of_layer)

    if cache is not None:
      kinds = config.layer_pattern * (config.num_layers // len(config.layer_pattern))
      cache = list(cache)
      known = [None] * config.num_layers
      if encoded is not None and encoded.keys_and_values is not None:
        known = encoded.keys_and_values
      for i, (block, kind) in enumerate(zip(self.layers(), kinds, strict=True)):
        x_BTD, cache[i] = run(block, x_BTD, kind, cross=known[i], cache=cache[i])
    else:
      x_BTD = self._run_all(run, x_BTD, key, stats, router_stats)
    return x_BTD if self.final_norm is None else self.final_norm(x_BTD), cache

  def empty_cache(self, batch_size: int, length: int) -> Cache:
    """A cache for `length` positions, in the compute dtype."""
    config = self.config
    shape = (batch_size, length, config.num_kv_heads, config.head_dim)
    zeros = jnp.zeros(shape, config.dtype)
    return [KeysAndValues(zeros, zeros) for _ in range(config.num_layers)]

  def unstack(self) -> None:
    """Splits the stack into layers once, so that a decoding loop need not slice it at each step."""
    self.blocks = nnx.List(self.layers())

  def layers(self) -> list[Block]:
    if isinstance(self.blocks, nnx.List):
      return list(self.blocks)
    graphdef, stack = nnx.split(self.blocks)
    layers = _unstack(nnx.to_pure_dict(stack), self.config.num_layers)
    return [nnx.merge(graphdef, layer) for layer in layers]

  def _run_all(
    self,
    run,
    x_BTD: jax.Array,
    key: jax.Array | None,
    stats: ActivationStats | None,
    router_stats: RouterStats | None,
  ) -> jax.Array:
    """Runs all layers, scanned or one by one, a period of the layer pattern at a time."""
    config = self.config
    period = len(config.layer_pattern)
    periods = config.num_layers // period
    graphdef, stack = nnx.split(self.blocks)
    stack = nnx.to_pure_dict(stack)
    keys = None if key is None else jax.random.split(key, config.num_layers)

    def run_period(x_BTD, layers_and_keys):
      layers, keys = layers_and_keys
      told = []
      for i, layer in enumerate(_unstack(layers, period)):
        block = nnx.merge(graphdef, layer)
        layer_stats = None if stats is None else ActivationStats(stats.whole)
        layer_router_stats = None if router_stats is None else RouterStats()
        layer_key = None if keys is None else keys[i]
        x_BTD, _ = run(
          block,
          x_BTD,
          config.layer_pattern[i],
          key=layer_key,
          stats=layer_stats,
          router_stats=layer_router_stats,
        )
        told.append((dict(layer_stats or {}), dict(layer_router_stats or {})))
      return x_BTD, _stack(told)

    scan = config.execution.scan_layers
    if scan is None:
      scan = sharding.platform() != "cpu"
    if config.execution.remat != "none":
      # Inside a scan XLA cannot merge the recomputation with the forward pass: no barrier needed.
      policy = REMAT_POLICIES[config.execution.remat]
      run_period = jax.checkpoint(run_period, policy=policy, prevent_cse=not scan)
    by_period = jax.tree.map(
      lambda leaf: leaf.reshape(periods, period, *leaf.shape[1:]), (stack, keys)
    )
    if scan:
      x_BTD, told = jax.lax.scan(run_period, x_BTD, by_period)
    else:
      told = []
      for layers_and_keys in _unstack(by_period, periods):
        x_BTD, of_period = run_period(x_BTD, layers_and_keys)
        told.append(of_period)
      told = _stack(told)
    for collector, found in zip((stats, router_stats), told, strict=True):
      for name, leaf in found.items():
        collector[name] = leaf.reshape(config.num_layers, *leaf.shape[2:])
    return x_BTD


def _cross_mask(encoded: Encoded, length: int, segment_ids_BT: jax.Array | None) -> Mask:
  """Cross-attention mask: a token of the decoder sees the encoder's segment of the same id."""
  B, S, _ = encoded.hidden_BSD.shape
  if encoded.segment_ids_BS is None:
    return Mask("xla", visible_BTS=jnp.ones((B, length, S), bool))
  if segment_ids_BT is None:
    segment_ids_BT = jnp.ones((B, length), jnp.int32)
  return Mask("xla", visible_BTS=same_segment(segment_ids_BT, encoded.segment_ids_BS))


def _stack(trees: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _unstack(stack: Any, size: int) -> list[Any]:
  """Splits the leading axis of every leaf. The gradient of a split is one concatenation; with
  `size` slices it would be a sum of `size` padded arrays."""
  leaves, structure = jax.tree.flatten(stack)
  columns = [
    [jnp.squeeze(part, 0) for part in jax.lax.split(leaf, (1,) * size, axis=0)] for leaf in leaves
  ]
  return [structure.unflatten([column[i] for column in columns]) for i in range(size)]
