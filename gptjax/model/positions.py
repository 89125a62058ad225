"""Positions of tokens: rotary angles, ALiBi slopes, T5 buckets.

Axes: B batch, T query positions, S key positions, N query heads, H head width, R its rotated part.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptjax.model.config import ModelConfig
from gptjax.model.layers import Embedding


def rope_frequencies(config: ModelConfig, *, local: bool = False) -> tuple[np.ndarray, float]:
  """Angular frequencies of rotary positions [rope_dim / 2], and a factor for queries and keys.

  Su et al. 2021 (arXiv:2104.09864), section 3.2.2. Scaled by `config.rope_scaling`, but not in
  `local` layers with a base of their own:
    linear: positions divided by the factor (Chen et al. 2023, arXiv:2306.15595).
    dynamic: unscaled here, as for a row within the original length; `rotate` scales longer rows.
    yarn: long wavelengths are interpolated, short ones kept, a ramp between, and attention
      sharpened by 0.1 ln(factor) + 1 (Peng et al. 2023, arXiv:2309.00071, sections 3.2 to 3.4).
    llama3: the same idea with the ramp in 1 / wavelength (Llama 3.1).
  """
  dim, base, scaling = config.rope.dim, config.rope.base, config.rope.scaling
  if local and config.rope.local_base:
    base, scaling = config.rope.local_base, "none"
  half = np.arange(0, dim, 2, dtype=np.float64)
  frequencies = base ** (-half / dim)
  factor, original = config.rope.factor, config.rope.original_positions
  match scaling:
    case "linear":
      return frequencies / factor, 1.0
    case "yarn":
      slow, fast = config.rope.low_freq_factor or 1.0, config.rope.high_freq_factor or 32.0

      def dimension_that_turns(times: float) -> float:
        """The dimension that makes `times` full turns over the original context (eq. 14)."""
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

      low, high = dimension_that_turns(fast), dimension_that_turns(slow)
      if config.rope.truncate:
        low, high = math.floor(low), math.ceil(high)
      low, high = max(low, 0), min(high, dim - 1)
      # Where the original length is too short for a turn, the bounds cross, and all is kept.
      ramp = np.clip((np.arange(half.size) - low) / ((high - low) or 1e-3), 0, 1)
      scaled = frequencies / factor * ramp + frequencies * (1 - ramp)
      sharpened = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
      return scaled, config.rope.attention_factor or sharpened
    case "llama3":
      slow, fast = config.rope.low_freq_factor or 1.0, config.rope.high_freq_factor or 4.0
      turns = original * frequencies / (2 * np.pi)
      keep = np.clip((turns - slow) / (fast - slow), 0, 1)
      return frequencies * keep + frequencies / factor * (1 - keep), 1.0
  return frequencies, 1.0


def _dynamic_stretch(positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
  """Divisors of each row's rotary frequencies [B, 1, 1, R / 2], 1 up to the original length.

  A row longer by s multiplies the base by (factor s - factor + 1)^(R / (R - 2)), so that its
  longest wavelength is interpolated and its shortest one kept (Peng et al. 2023, arXiv:2309.00071,
  section 3.1 and appendix A, as in Llama's code in `transformers`).
  """
  dim, factor, original = config.rope.dim, config.rope.factor, config.rope.original_positions
  longer_B = jnp.maximum((positions_BT.max(-1) + 1) / original, 1)
  growth_B = factor * longer_B - (factor - 1)
  exponents = np.arange(0, dim, 2) / (dim - 2)
  return growth_B.reshape(-1, 1, 1, 1) ** jnp.asarray(exponents, jnp.float32).reshape(1, 1, 1, -1)


def rotate(
  x_BTNH: jax.Array, positions_BT: jax.Array, config: ModelConfig, *, local: bool = False
) -> jax.Array:
  """Rotates the pairs (x_i, x_{i + R/2}) of the first R = rope_dim dimensions of each head by
  position times frequency; the other dimensions stay."""
  frequencies, scale = rope_frequencies(config, local=local)
  frequencies_11R = jnp.asarray(frequencies, jnp.float32).reshape(1, 1, 1, -1)
  if config.rope.scaling == "dynamic" and not (local and config.rope.local_base):
    frequencies_11R = frequencies_11R / _dynamic_stretch(positions_BT, config)
  angles_BT1R = positions_BT[:, :, None, None] * frequencies_11R
  cos, sin = scale * jnp.cos(angles_BT1R), scale * jnp.sin(angles_BT1R)
  half = config.rope.dim // 2
  first, second, rest = jnp.split(x_BTNH.astype(jnp.float32), [half, 2 * half], axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
  return rotated.astype(x_BTNH.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
  """Slopes [N] of the linear biases (Press et al. 2022, arXiv:2108.12409, section 3).

  A geometric sequence from 2^(-8/n); for n not a power of two, the sequence of the power below
  and every other slope of the power above, as in the authors' code.
  """

  def powers(n: int) -> list[float]:
    return [2 ** (-8 * (i + 1) / n) for i in range(n)]

  below = 2 ** math.floor(math.log2(num_heads))
  return np.array(powers(below) + powers(2 * below)[::2][: num_heads - below], np.float32)


def t5_bucket(
  distance: jax.Array, buckets: int, max_distance: int, *, bidirectional: bool = False
) -> jax.Array:
  """Buckets of how far back a key is (Raffel et al. 2020, section 2.1).

  The first half of the buckets are exact distances, the rest logarithmic up to `max_distance`,
  beyond which all keys share the last one. If `bidirectional`, the second half of the buckets is
  for keys after the query; otherwise such keys are in bucket 0.
  """
  side = jnp.int32(0)
  if bidirectional:
    buckets //= 2
    side = jnp.where(distance < 0, buckets, 0)
    distance = jnp.abs(distance)
  exact = buckets // 2
  distance = jnp.maximum(distance, 0)
  ratio = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(max_distance / exact)
  logarithmic = exact + (ratio * (buckets - exact)).astype(jnp.int32)
  return side + jnp.where(distance < exact, distance, jnp.minimum(logarithmic, buckets - 1))


class AttentionBias(nnx.Module):
  """The bias of attention logits for 'alibi' and 't5': float32 [B, N, T, S], None for others."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    self.relative = (
      Embedding(
        config.position.t5_buckets,
        config.num_heads,
        axes=("buckets", "heads"),
        std=config.init.std,
        rngs=rngs,
      )
      if config.position.kind == "t5"
      else None
    )

  def __call__(self, query_positions_BT: jax.Array, key_positions_BS: jax.Array):
    config = self.config
    if config.position.kind not in ("alibi", "t5"):
      return None
    distance_BTS = query_positions_BT[:, :, None] - key_positions_BS[:, None, :]
    if self.relative is not None:
      bucket_BTS = t5_bucket(
        distance_BTS,
        config.position.t5_buckets,
        config.position.t5_max_distance,
        bidirectional=config.visibility != "causal",
      )
      return self.relative(bucket_BTS).transpose(0, 3, 1, 2)
    slopes_N = alibi_slopes(config.num_heads)
    return -slopes_N[None, :, None, None] * jnp.abs(distance_BTS[:, None]).astype(jnp.float32)
