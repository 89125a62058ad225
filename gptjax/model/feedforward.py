"""The position-wise feed-forward network, plain or gated."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gptjax.devices.sharding import constrain
from gptjax.model.config import ModelConfig
from gptjax.model.layers import Linear

ACTIVATIONS = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
  "relu2": lambda x: jnp.square(jax.nn.relu(x)),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "silu": jax.nn.silu,
  "swiglu": jax.nn.silu,
  "geglu": functools.partial(jax.nn.gelu, approximate=True),
  "swiglu_clamped": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
GATED = ("swiglu", "geglu", "swiglu_clamped")
_CLAMP = 7.0


def activate(activation: str, up: jax.Array, gate: jax.Array | None = None) -> jax.Array:
  """Applies `config.mlp.activation`, with a gate of the same shape if it is one of `GATED`."""
  if activation == "swiglu_clamped":
    gate, up = jnp.minimum(gate, _CLAMP), jnp.clip(up, -_CLAMP, _CLAMP) + 1
  if gate is None:
    return ACTIVATIONS[activation](up)
  return ACTIVATIONS[activation](gate) * up


class FeedForward(nnx.Module):
  """act(x W_up) W_down, or (act(x W_gate) * x W_up) W_down for the gated activations.

  Shapes: [B, T, D] -> [B, T, D].
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    D, F = config.embed_dim, config.mlp_dim
    shared = {"bias": config.mlp.bias, "dtype": config.dtype, "rngs": rngs}

    def widen() -> Linear:
      return Linear((D,), (F,), axes=("embed", "mlp"), std=config.hidden_std, **shared)

    self.gate = widen() if config.mlp.activation in GATED else None
    self.up = widen()
    self.down = Linear((F,), (D,), axes=("mlp", "embed"), std=config.residual_std, **shared)
    self.activation = config.mlp.activation

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    x_BTD = constrain(x_BTD, "batch", "time", None)

    def widen(projection: Linear) -> jax.Array:
      return checkpoint_name(constrain(projection(x_BTD), "batch", "time", "mlp"), "mlp")

    up_BTF = widen(self.up)
    gate_BTF = None if self.gate is None else widen(self.gate)
    return self.down(activate(self.activation, up_BTF, gate_BTF))
