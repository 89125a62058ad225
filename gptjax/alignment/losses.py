"""Losses of a pair of answers, by the log probabilities that a model gives them.

Each takes and returns arrays of any one shape, float32: an element is a pair.
"""

import jax
import jax.numpy as jnp


def choice(margin: jax.Array, smoothing: float = 0.0) -> jax.Array:
  """-log sigmoid(margin), the loss of a choice (Bradley and Terry 1952); with `smoothing`, the
  probability that the record has it the wrong way round (Mitchell 2023, "A note on DPO with noisy
  preferences", equation 3)."""
  right, wrong = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
  return (1 - smoothing) * right + smoothing * wrong


def dpo(margin: jax.Array, beta: float, smoothing: float = 0.0) -> jax.Array:
  """Rafailov et al. 2023, arXiv:2305.18290, equation 7. `margin` is how much more the model favours
  the better answer than the reference does: the difference of two log ratios."""
  return choice(beta * margin, smoothing)


def ipo(margin: jax.Array, beta: float) -> jax.Array:
  """Azar et al. 2023, arXiv:2310.12036, equation 17: the margin as in `dpo`, of means over tokens,
  is drawn to 1 / (2 beta)."""
  return jnp.square(margin - 1 / (2 * beta))


def hinge(margin: jax.Array, beta: float) -> jax.Array:
  """Zhao et al. 2023 (SLiC), arXiv:2305.10425, with the reference of `dpo` (Liu et al. 2023,
  arXiv:2309.06657, equation 11)."""
  return jax.nn.relu(1 - beta * margin)


def simpo(chosen: jax.Array, rejected: jax.Array, beta: float, gamma: float) -> jax.Array:
  """Meng et al. 2024, arXiv:2405.14734, equation 6; the arguments are means over tokens."""
  return choice(beta * (chosen - rejected) - gamma)


def orpo(chosen: jax.Array, rejected: jax.Array, beta: float) -> jax.Array:
  """Hong et al. 2024, arXiv:2403.07691, equations 6 and 7 with lambda = beta; the arguments are
  means over tokens."""
  return -chosen + beta * choice(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(log_prob: jax.Array) -> jax.Array:
  """log(p / (1 - p)); finite where p is 1 in float32."""
  log_prob = jnp.minimum(log_prob, -1e-7)
  return log_prob - jnp.log(-jnp.expm1(log_prob))


def cpo(
  chosen: jax.Array, rejected: jax.Array, mean_chosen: jax.Array, beta: float, alpha: float
) -> jax.Array:
  """Xu et al. 2024, arXiv:2401.08417, equations 3 to 5: sums over tokens are compared, and `alpha`
  times the better answer's loss is added, here a mean over its tokens."""
  return choice(beta * (chosen - rejected)) - alpha * mean_chosen
