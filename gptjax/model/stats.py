"""Statistics that a forward pass collects on request."""

import jax
import jax.numpy as jnp


class ActivationStats(dict[str, jax.Array]):
  """Statistics of activations by name, filled while a forward pass is traced; without gradients.

  An activation `x` is recorded as `x_rms`, its root mean square as a float32 scalar, or itself as
  `x` if `whole`.
  """

  def __init__(self, whole: bool = False):
    super().__init__()
    self.whole = whole

  def note(self, name: str, x: jax.Array) -> None:
    x = jax.lax.stop_gradient(x)
    self.update({name: x} if self.whole else {f"{name}_rms": root_mean_square(x)})


class RouterStats(dict[str, jax.Array]):
  """Statistics of a mixture of experts' routers, filled while a forward pass is traced.

  balance_loss, z_loss: float32 scalars with gradients, to be minimised. load: float32 [E], the
  share of the tokens' choices that fell on each expert, without a gradient.
  """


def root_mean_square(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.square(x.astype(jnp.float32)).mean())
