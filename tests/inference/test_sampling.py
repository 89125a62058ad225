import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gptjax.errors import UserError
from gptjax.inference.sampling import (
  Adjustment,
  Sampling,
  Settings,
  choose,
  filter_logits,
  score_tokens,
)

PROBABILITIES = np.array([0.05, 0.4, 0.15, 0.3, 0.1], np.float32)  # falling: 1, 3, 2, 4, 0
LOGITS = jnp.log(PROBABILITIES) + 3


def filtered(logits=LOGITS, **sampling):
  settings = jax.tree.map(lambda column: column[0], Settings.of([Sampling(**sampling)], [0], [0]))
  return filter_logits(logits, settings)


def kept(**sampling):
  return set(np.where(np.isfinite(filtered(**sampling)))[0].tolist())


def draw(rows, sampling=Sampling(), seeds=None, adjustment=None, candidates=0):  # noqa: B008
  seeds = range(len(rows)) if seeds is None else seeds
  settings = Settings.of([sampling] * len(rows), seeds, [7] * len(rows))
  return choose(rows, settings, adjustment, vocab_size=5, candidates=candidates)


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
  probabilities = jax.nn.softmax(filtered(top_k=2, temperature=0.5))
  expected = np.where(np.isin(np.arange(5), [1, 3]), PROBABILITIES**2, 0)
  np.testing.assert_allclose(probabilities, expected / expected.sum(), rtol=1e-4)


def test_of_equally_likely_tokens_all_are_kept():
  logits = jnp.array([1.0, 0.0, 1.0, -1.0, 0.0])
  np.testing.assert_array_equal(np.isfinite(filtered(logits, top_k=3)), [1, 1, 1, 0, 1])


@pytest.mark.parametrize("sampling", [{"top_k": 50}, {"top_p": 0.7}], ids=str)
def test_the_bisection_keeps_what_sorting_would(sampling):
  logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, 1000), jnp.float32)
  falling = np.sort(np.asarray(jax.nn.softmax(logits)))[::-1]
  count = sampling.get("top_k") or int((np.cumsum(falling) - falling < sampling["top_p"]).sum())
  assert 1 < count < 1000
  expected = np.asarray(logits) >= np.sort(logits)[-count]
  np.testing.assert_array_equal(np.isfinite(filtered(logits, **sampling)), expected)


def test_rows_have_settings_of_their_own():
  rows = jnp.stack([LOGITS, -LOGITS, LOGITS])
  samplings = [Sampling(top_k=1), Sampling(temperature=0), Sampling(min_p=0.8)]
  settings = Settings.of(samplings, [1, 2, 3], [0, 0, 0])
  np.testing.assert_array_equal(choose(rows, settings, vocab_size=5).tokens, [1, 0, 1])


def test_temperature_0_takes_the_likeliest():
  tokens = draw(jnp.tile(LOGITS, (20, 1)), Sampling(temperature=0)).tokens
  assert (tokens == 1).all()
  assert tokens.dtype == jnp.int32


def test_tokens_come_as_often_as_they_are_likely():
  n = 20_000
  tokens = draw(jnp.tile(LOGITS, (n, 1))).tokens
  frequencies = np.bincount(tokens, minlength=5) / n
  # Five standard deviations.
  np.testing.assert_allclose(frequencies, PROBABILITIES, atol=5 * np.sqrt(0.25 / n))


def test_tokens_of_a_seed_do_not_hang_together():
  n = 20_000
  options = {"samplings": [Sampling()] * n, "seeds": range(n)}
  rows = jnp.tile(LOGITS, (n, 1))
  first, second = (
    np.asarray(choose(rows, Settings.of(lengths=[length] * n, **options), vocab_size=5).tokens)
    for length in (7, 8)
  )
  pairs = np.bincount(5 * first + second, minlength=25)
  wanted = n * np.outer(PROBABILITIES, PROBABILITIES).ravel().astype(np.float64)
  assert scipy.stats.chisquare(pairs, wanted * n / wanted.sum()).pvalue > 1e-3


def test_nearly_the_same_logits_draw_mostly_the_same_token():
  n, other = 20_000, np.array([0.1, 0.3, 0.2, 0.35, 0.05], np.float32)
  ours = np.asarray(draw(jnp.tile(LOGITS, (n, 1))).tokens)
  theirs = np.asarray(draw(jnp.tile(jnp.log(other), (n, 1))).tokens)
  # How often the same of several exponential times, at two rates each, is the first of both.
  ratios = [np.maximum(PROBABILITIES / PROBABILITIES[i], other / other[i]) for i in range(5)]
  wanted = sum(1 / ratio.sum() for ratio in ratios)
  np.testing.assert_allclose((ours == theirs).mean(), wanted, atol=5 * np.sqrt(0.25 / n))


def test_a_row_is_decided_by_its_own_seed():
  together = draw(jnp.tile(LOGITS, (8, 1))).tokens
  alone = [draw(LOGITS[None], seeds=[i]).tokens[0] for i in range(8)]
  np.testing.assert_array_equal(together, alone)
  assert len(set(np.asarray(together).tolist())) > 1


def test_log_probabilities_are_the_models_whatever_the_settings():
  adjustment = Adjustment(np.full((1, 5), -1.0, np.float32), np.ones((1, 5), bool))
  choice = draw(LOGITS[None], Sampling(0.1, 2), adjustment=adjustment, candidates=3)
  token = int(choice.tokens[0])
  np.testing.assert_allclose(choice.log_probs[0], np.log(PROBABILITIES[token]), rtol=1e-5)
  np.testing.assert_array_equal(choice.candidates[0], [1, 3, 2])
  np.testing.assert_allclose(choice.candidate_log_probs[0], np.log([0.4, 0.3, 0.15]), rtol=1e-5)
  scored = score_tokens(LOGITS[None], np.array([4]), vocab_size=5, candidates=1)
  np.testing.assert_allclose(scored.log_probs, np.log([0.1]), rtol=1e-5)
  np.testing.assert_array_equal(scored.candidates, [[1]])


def test_repetition_is_penalised_by_the_formula_of_ctrl():
  # 3 / 1.25 is less than 2.5; -1 * 1.25 is less than -1.1.
  seen = np.array([[True, False, False, False, False]])
  adjustment = Adjustment(np.zeros((1, 5), np.float32), seen)
  for logits, expected in (([3.0, 2.5, 0, 0, 0], 1), ([-1.0, -1.1, -9, -9, -9], 1)):
    rows = jnp.array([logits])
    penalised = draw(rows, Sampling(temperature=0, repetition_penalty=1.25), adjustment=adjustment)
    assert int(penalised.tokens[0]) == expected
    lighter = draw(rows, Sampling(temperature=0, repetition_penalty=1.05), adjustment=adjustment)
    assert int(lighter.tokens[0]) == 0


def test_what_is_added_to_logits_can_exclude_a_token():
  added = np.zeros((1, 5), np.float32)
  added[0, 1] = -np.inf
  adjustment = Adjustment(added, np.zeros((1, 5), bool))
  assert int(draw(LOGITS[None], Sampling(temperature=0), adjustment=adjustment).tokens[0]) == 3
  tokens = [int(draw(LOGITS[None], seeds=[i], adjustment=adjustment).tokens[0]) for i in range(30)]
  assert 1 not in tokens


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
    ("presence_penalty", float("inf")),
    ("frequency_penalty", float("nan")),
  ],
)
def test_a_bad_value_is_refused_by_its_name(name, value):
  with pytest.raises(UserError, match=rf"^{name} is {value}; it must be"):
    Sampling(**{name: value})
