import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.inference.sampling import Sampling, choose, filter_logits, penalise_repetition

PROBABILITIES = np.array([0.05, 0.4, 0.15, 0.3, 0.1], np.float32)  # falling: 1, 3, 2, 4, 0
LOGITS = jnp.log(PROBABILITIES)[None] + 3


def kept(**sampling):
  return set(np.where(np.isfinite(filter_logits(LOGITS, Sampling(**sampling))[0]))[0].tolist())


@pytest.mark.parametrize(
  ("sampling", "tokens"),
  [
    ({}, {0, 1, 2, 3, 4}),
    ({"top_k": 1}, {1}),
    ({"top_k": 3}, {1, 3, 2}),
    ({"top_k": 99}, {0, 1, 2, 3, 4}),
    ({"top_p": 1e-6}, {1}),
    ({"top_p": 0.39}, {1}),
    ({"top_p": 0.41}, {1, 3}),
    ({"top_p": 0.69}, {1, 3}),
    ({"top_p": 0.71}, {1, 3, 2}),
    ({"top_p": 0.96}, {0, 1, 2, 3, 4}),
    ({"min_p": 0.5}, {1, 3}),
    ({"min_p": 0.8}, {1}),
    ({"min_p": 1.0}, {1}),
    # In this order: of the first two, renormalised to 4/7 and 3/7, one reaches 0.5.
    ({"top_k": 2, "top_p": 0.5}, {1}),
    ({"top_k": 2, "top_p": 0.6}, {1, 3}),
    # Hot enough, all are nearly equally likely.
    ({"temperature": 100.0, "top_p": 0.75}, {1, 3, 2, 4}),
    ({"temperature": 0.1, "top_p": 0.9}, {1}),
  ],
)
def test_what_the_filters_keep(sampling, tokens):
  assert kept(**sampling) == tokens


def test_what_is_kept_keeps_its_proportions():
  filtered = filter_logits(LOGITS, Sampling(top_k=2, temperature=0.5))
  expected = np.where(np.isin(np.arange(5), [1, 3]), PROBABILITIES**2, 0)
  np.testing.assert_allclose(jax.nn.softmax(filtered)[0], expected / expected.sum(), rtol=1e-4)


def test_rows_are_filtered_each_for_itself():
  both = jnp.concatenate([LOGITS, -LOGITS])
  filtered = filter_logits(both, Sampling(top_k=1))
  np.testing.assert_array_equal(np.isfinite(filtered).argmax(-1), [1, 0])


def test_temperature_0_takes_the_likeliest():
  keys = jax.random.split(jax.random.key(0), 20)
  tokens = choose(jnp.tile(LOGITS, (20, 1)), keys, Sampling(temperature=0))
  assert (tokens == 1).all()
  assert tokens.dtype == jnp.int32


def test_tokens_come_as_often_as_they_are_likely():
  n = 20_000
  keys = jax.random.split(jax.random.key(0), n)
  tokens = choose(jnp.tile(LOGITS, (n, 1)), keys, Sampling())
  frequencies = np.bincount(tokens, minlength=5) / n
  # Five standard deviations.
  np.testing.assert_allclose(frequencies, PROBABILITIES, atol=5 * np.sqrt(0.25 / n))


def test_a_row_is_decided_by_its_own_key():
  keys = jax.random.split(jax.random.key(0), 8)
  together = choose(jnp.tile(LOGITS, (8, 1)), keys, Sampling())
  alone = [choose(LOGITS, keys[i : i + 1], Sampling())[0] for i in range(8)]
  np.testing.assert_array_equal(together, alone)
  assert len(set(np.asarray(together).tolist())) > 1


def test_repetition_is_penalised_by_the_formula_of_ctrl():
  logits = jnp.array([[2.0, -2.0, 2.0, -2.0, 0.0]])
  tokens = jnp.array([[0, 1, 0, 2]])
  valid = jnp.array([[True, True, True, False]])  # 2 is padding
  penalised = penalise_repetition(logits, tokens, valid, 1.25)
  np.testing.assert_allclose(penalised, [[2 / 1.25, -2 * 1.25, 2, -2, 0]])


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("repetition_penalty", 0.0),
  ],
)
def test_a_bad_value_is_refused_by_its_name(name, value):
  with pytest.raises(UserError, match=rf"^{name} is {value}; it must be"):
    Sampling(**{name: value})
