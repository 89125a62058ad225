"""What a forward pass tells of itself when it is asked to."""

import jax
import jax.numpy as jnp


class Figures(dict[str, jax.Array]):
  """Named figures of a forward pass, filled while it is traced.

  Of an activation `x` they hold `x_rms`, its root mean square as a float32 scalar; or `x` itself,
  where `whole` is asked for. Nothing in them has a gradient.
  """

  def __init__(self, whole: bool = False):
    super().__init__()
    self.whole = whole

  def note(self, name: str, x: jax.Array) -> None:
    x = jax.lax.stop_gradient(x)
    self.update({name: x} if self.whole else {f"{name}_rms": root_mean_square(x)})


class Routing(dict[str, jax.Array]):
  """What the routers of a mixture of experts tell, filled while a forward pass is traced.

  balance_loss, z_loss: float32 scalars with gradients, to be minimised. load: float32 [E], the
  share of the tokens' choices that fell on each expert, without a gradient.
  """


def root_mean_square(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.square(x.astype(jnp.float32)).mean())
