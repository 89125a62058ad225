"""Virtual tokens before the text: trained keys and values, or embeddings from which they follow.

Every segment of a packed row sees them as if they came right before it, within the window of a
layer if it has one; a virtual token sees only those before it. So a row has one copy of them,
however it is packed, and they take none of its positions.

Axes: B batch, T query positions, S key positions, P virtual tokens, D width, N query heads, K
key-value heads, H head width, L layers.
"""

import dataclasses
from operator import attrgetter

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.devices.sharding import constrain
from gptjax.errors import UserError
from gptjax.model.attention import Attention, Mask, visible
from gptjax.model.gpt import GPT
from gptjax.model.layers import adopt
from gptjax.model.positions import rope_frequencies, rotate
from gptjax.peft.layers import Adapter


class PrefixAttention(Attention):
  """Attention that also sees P keys and values, [P, K, H] each, at the positions before the text.

  The keys are stored for position 0 (or for 0 to P - 1, already rotated), and rotated back by P
  positions; moving the text forward by P would be the same, since rotary positions are relative.
  """

  def __init__(self, base: Attention, keys: nnx.Variable, values: nnx.Variable):
    adopt(self, base)
    self.prefix_keys, self.prefix_values = keys, values

  def _attend(self, q_BTNH, k_BSKH, v_BSKH, mask: Mask, bias_BNTS, key) -> jax.Array:
    def in_front(prefix_PKH: jax.Array, x_BSKH: jax.Array) -> jax.Array:
      shape = (x_BSKH.shape[0], *prefix_PKH.shape)
      prefix_BPKH = jnp.broadcast_to(prefix_PKH[None].astype(x_BSKH.dtype), shape)
      prefix_BPKH = constrain(prefix_BPKH, "batch", None, "kv_heads", None)
      return jnp.concatenate([prefix_BPKH, x_BSKH], axis=1)

    keys_PKH = self.prefix_keys[...]
    if self.config.position.kind == "rope" and mask.rotates:
      keys_PKH = self._turned_back(keys_PKH, local=mask.window is not None)
    B, P = q_BTNH.shape[0], keys_PKH.shape[0]
    positions_BP = jnp.broadcast_to(jnp.arange(-P, 0), (B, P))
    seen_BTP = visible(mask.query_positions_BT, positions_BP, mask.window)
    visible_BTS = jnp.concatenate([seen_BTP, mask.visible_BTS], axis=-1)
    return super()._attend(
      q_BTNH,
      in_front(keys_PKH, k_BSKH),
      in_front(self.prefix_values[...], v_BSKH),
      dataclasses.replace(mask, visible_BTS=visible_BTS),
      bias_BNTS,
      key,
    )

  def _turned_back(self, keys_PKH: jax.Array, *, local: bool) -> jax.Array:
    config = self.config
    P = keys_PKH.shape[0]
    turned_PKH = rotate(keys_PKH[None], jnp.full((1, P), -P), config, local=local)[0]
    _, factor = rope_frequencies(config, local=local)  # It does not depend on the position.
    return turned_PKH.at[..., : config.rope.dim].divide(factor)


class PrefixGPT(GPT):
  """A model with additional keys and values in each layer, [L, P, K, H] each."""

  def __init__(self, base: GPT, keys: nnx.Variable, values: nnx.Variable):
    adopt(self, base)
    self.blocks = nnx.merge(*nnx.split(base.blocks))
    if not isinstance(self.blocks, nnx.List):
      self.blocks.attention = PrefixAttention(self.blocks.attention, keys, values)
      return
    for i, block in enumerate(self.blocks):
      layer = (nnx.Variable(keys[...][i]), nnx.Variable(values[...][i]))
      block.attention = PrefixAttention(block.attention, *layer)


class PromptGPT(GPT):
  """A model that reads embeddings [P, D] before the text (Lester et al. 2021, section 2).

  Their keys and values in each layer do not depend on the text, so they are run once for all rows.
  """

  def __init__(self, base: GPT, prompt: nnx.Variable):
    adopt(self, base)
    self.prompt = prompt

  def run(self, x_BTD: jax.Array, positions_BT: jax.Array, **kwargs):
    return self.as_prefix(*self.keys_and_values()).run(x_BTD, positions_BT, **kwargs)

  def embeddings(self) -> jax.Array:
    """The embeddings of the virtual tokens, float32 [P, D]."""
    return self.prompt[...]

  def keys_and_values(self) -> tuple[jax.Array, jax.Array]:
    """The prompt's keys and values in each layer, [L, P, K, H] each."""
    x_1PD = self.embeddings()[None]
    P = x_1PD.shape[1]
    positions_1P = jnp.arange(P)[None]
    if self.position is not None:
      x_1PD += self.position(positions_1P + self.config.position.offset - P)
    x_1PD = x_1PD.astype(self.config.dtype)
    _, pairs = super().run(x_1PD, positions_1P, cache=self.empty_cache(1, P))
    return tuple(jnp.stack([pair[i][0] for pair in pairs]) for i in (0, 1))

  def as_prefix(self, keys: jax.Array, values: jax.Array) -> PrefixGPT:
    """The same model, with the prompt's keys and values instead of its embeddings."""
    prefixed = PrefixGPT(self, nnx.Variable(keys), nnx.Variable(values))
    del prefixed.prompt
    return prefixed


class PTuningGPT(PromptGPT):
  """A model whose prompt a network computes from trained vectors [P, D] (Liu et al. 2021, section
  3.2): two hidden layers with ReLU, the `peft` library's network without an LSTM."""

  def __init__(self, base: GPT, prompt: nnx.Variable, rngs: nnx.Rngs):
    super().__init__(base, prompt)
    self.prompt_encoder = PromptEncoder(prompt.shape[1], rngs)

  def embeddings(self) -> jax.Array:
    return self.prompt_encoder(self.prompt[...])

  def as_prefix(self, keys: jax.Array, values: jax.Array) -> PrefixGPT:
    prefixed = super().as_prefix(keys, values)
    del prefixed.prompt_encoder
    return prefixed


class PromptEncoder(nnx.Module):
  """The network from trained vectors to embeddings, float32 [P, D] -> [P, D]."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    self.first, self.second, self.last = (PromptProjection(width, rngs) for _ in range(3))

  def __call__(self, x_PD: jax.Array) -> jax.Array:
    return self.last(jax.nn.relu(self.second(jax.nn.relu(self.first(x_PD)))))


class PromptProjection(nnx.Module):
  """x W + b, float32 [D, D] and [D], uniform up to 1 / sqrt(D)."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    def uniform(*shape: int) -> jax.Array:
      return jax.random.uniform(rngs.params(), shape, minval=-(width**-0.5), maxval=width**-0.5)

    # Without fan_in_axes: it is not run for every token, so it has no FLOPs per token.
    self.kernel = Adapter(uniform(width, width), axes=("embed", None), role="hidden")
    self.bias = Adapter(uniform(width), axes=(None,), role="bias")

  def __call__(self, x_PD: jax.Array) -> jax.Array:
    return x_PD @ self.kernel[...] + self.bias[...][None]


def add_prefix(model: GPT, tokens: int, rngs: nnx.Rngs) -> PrefixGPT:
  """Adds keys and values, normal, with the standard deviation of the model's initialisation."""
  config = _check(model, tokens)
  shape = (config.num_layers, tokens, config.num_kv_heads, config.head_dim)
  axes = ("positions", "kv_heads", "head_dim")

  def normal() -> Adapter:
    values = config.init.std * jax.random.normal(rngs.params(), shape)
    return Adapter(values, axes=axes, role="embedding")

  return PrefixGPT(model, normal(), normal())


def add_prompt(model: GPT, tokens: int, rngs: nnx.Rngs) -> PromptGPT:
  """Adds a prompt with the embeddings of tokens drawn from the vocabulary (Lester et al. 2021,
  section 3.2)."""
  config = _check(model, tokens)
  ids = jax.random.randint(rngs.params(), (tokens,), 0, config.vocab_size)
  prompt = model.embed(ids) * config.embed.scale
  return PromptGPT(model, Adapter(prompt, axes=("positions", "embed"), role="embedding"))


def add_encoded_prompt(model: GPT, tokens: int, rngs: nnx.Rngs) -> PTuningGPT:
  """Adds a prompt that a network computes from vectors, at first normal with deviation 1."""
  config = _check(model, tokens)
  vectors = jax.random.normal(rngs.params(), (tokens, config.embed_dim))
  return PTuningGPT(model, Adapter(vectors, axes=("positions", "embed"), role="embedding"), rngs)


def _check(model: GPT, tokens: int):
  """Makes room for virtual tokens, and returns the unchanged config.

  Raises:
    UserError: the model cannot see virtual tokens.
  """
  config = model.config
  refused = {
    "visibility": config.visibility != "causal",
    "encoder_layers": config.encoder_layers > 0,
    "position.kind": config.position.kind in ("alibi", "t5"),
    "residual.values": config.residual.values,
    "attention.kernel": config.attention.kernel not in ("auto", "xla"),
  }
  for field, is_refused in refused.items():
    if is_refused:
      raise UserError(
        f"peft: virtual tokens are not known with model.{field}={attrgetter(field)(config)!r}."
      )
  # Only this kernel takes an explicit mask; learned positions begin after the virtual tokens.
  model.config = config.replace(
    {"attention.kernel": "xla", "position.offset": config.position.offset + tokens}
  )
  return config
