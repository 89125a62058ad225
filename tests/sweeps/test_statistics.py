import gc
import math
import weakref

import numpy as np
import pytest
from scipy import stats

from gptjax.sweeps import statistics
from gptjax.sweeps.statistics import compare_arms, difference, holm, verdict

SWEEPS = 1000


def arms(*samples):
  """{"a": {seed: value}, ...}; the first is the baseline."""
  return {"abcdefgh"[i]: dict(enumerate(map(float, x))) for i, x in enumerate(samples)}


def judge(*samples, paired=False, lower_is_better=True):
  values = arms(*samples)
  paired = dict.fromkeys(values, paired)
  return verdict(values, "a", paired=paired, lower_is_better=lower_is_better)


def at_most(rate, sweeps=SWEEPS):
  """The bound that a rate stays below in all but one of 1,000 simulations."""
  return stats.binom.ppf(0.999, sweeps, rate) / sweeps


EQUAL = [
  # seeds of each arm, sigma of each arm: all means are equal
  ([3] * 5, [1, 1, 1, 1, 1]),
  ([3] * 5, [1, 5, 5, 5, 5]),
  ([5] * 4, [1, 1, 1, 1]),
  ([5] * 4, [3, 1, 0.3, 1]),
  ([3, 3], [1, 6]),
  ([2, 2], [1, 16]),
  ([10, 2], [1, 3]),
  ([2, 10], [1, 1]),
]


def rates(draw, seeds, sigmas):
  """The rates of sweeps with a winner and of sweeps with any difference, the arms being equal."""
  wins = differ = 0
  for _ in range(SWEEPS):
    found = judge(*(sigma * draw(n) for sigma, n in zip(sigmas, seeds, strict=True)))
    wins += found.winner is not None
    differ += any(word in ("better", "worse", "winner") for word in found.words.values())
  return wins / SWEEPS, differ / SWEEPS


@pytest.mark.parametrize(("seeds", "sigmas"), EQUAL)
def test_a_winner_among_equals_is_named_at_most_once_in_twenty_sweeps(seeds, sigmas):
  rng = np.random.default_rng(0)
  winner, any_difference = rates(lambda n: rng.normal(size=n), seeds, sigmas)
  assert winner <= at_most(0.05)
  assert any_difference <= at_most(0.05)


@pytest.mark.parametrize("noise", ["heavy tails", "skewed"])
def test_nor_more_often_when_the_noise_is_not_normal(noise):
  rng = np.random.default_rng(0)
  draw = {
    "heavy tails": lambda n: rng.standard_t(2.5, n),
    "skewed": lambda n: rng.lognormal(size=n),
  }
  assert max(rates(draw[noise], [3] * 5, [1] * 5)) <= at_most(0.05)
  assert max(rates(draw[noise], [5] * 4, [1] * 4)) <= at_most(0.05)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95])
def test_pairing_by_seed_holds_its_level(correlation):
  rng = np.random.default_rng(0)
  wins = differ = 0
  for _ in range(SWEEPS):
    shared = math.sqrt(correlation) * rng.normal(size=3)
    own = math.sqrt(1 - correlation) * rng.normal(size=(5, 3))
    found = judge(*(shared + own * [[1], [1], [2], [0.5], [1]]), paired=True)
    wins += found.winner is not None
    differ += any(word in ("better", "worse", "winner") for word in found.words.values())
  assert wins / SWEEPS <= at_most(0.05)
  assert differ / SWEEPS <= at_most(0.05)


def test_a_false_winner_is_rare_beside_a_worse_arm():
  # Holm, unlike a test of all arms at once, also holds when some arms do differ.
  rng = np.random.default_rng(0)
  wins = 0
  for _ in range(SWEEPS):
    x = rng.normal(size=(4, 4))
    x[3] += 50
    wins += judge(*x).winner is not None
  assert wins / SWEEPS <= at_most(0.05)


@pytest.mark.parametrize(("n", "m", "ratio"), [(3, 3, 7), (2, 2, 16), (10, 2, 3), (5, 8, 0.3)])
def test_the_worst_case_bounds_what_welch_exceeds(n, m, ratio):
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(8000, n)), ratio * rng.normal(size=(8000, m))
  p = stats.ttest_ind(x, y, axis=1, equal_var=False).pvalue
  rate = np.mean(p < 0.05)
  assert rate > 0.05
  assert statistics.worst_case_p(0.05, n, m) > rate - 0.008
  p_worst = [statistics.worst_case_p(one, n, m) for one in p]
  assert np.mean(np.array(p_worst) < 0.05) <= at_most(0.05, 8000)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("n", "effect"), [(2, 4.0), (3, 2.5), (5, 1.8), (12, 1.0)])
def test_power_is_what_simulation_finds(n, effect, paired):
  rng = np.random.default_rng(n)
  found = 0
  for _ in range(2000):
    base, arm = rng.normal(size=(2, n))
    if paired:
      base, arm = 100 * base, 100 * base + arm
    values = arms(base, arm - effect)
    found += compare_arms(values, "a", paired={"b": paired})[1].significant
  expected = statistics.power(n, 1.0, effect, paired=paired)
  assert abs(found / 2000 - expected) < 3.3 * math.sqrt(expected * (1 - expected) / 2000)


@pytest.mark.parametrize(("n", "effect"), [(3, 1.5), (6, 1.0), (30, 0.3)])
def test_power_of_pairs_is_of_the_noncentral_t_distribution(n, effect):
  limit, shift = stats.t.isf(0.025, n - 1), effect * math.sqrt(n)
  expected = stats.nct.sf(limit, n - 1, shift) + stats.nct.cdf(-limit, n - 1, shift)
  assert statistics.power(n, 1.0, effect, paired=True) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("paired", [True, False])
def test_power_of_two_seeds_is_that_of_its_definition_where_the_shift_is_large(paired):
  rng, effect = np.random.default_rng(0), 60.0
  x = effect + rng.normal(size=(40_000, 2))
  if paired:
    p = stats.ttest_1samp(x, 0, axis=1).pvalue
  else:
    p = stats.ttest_ind(x, rng.normal(size=x.shape), axis=1, equal_var=False).pvalue
    p = np.array([statistics.worst_case_p(one, 2, 2) for one in p])
  found = statistics.power(2, 1.0, effect, alpha=0.0125, paired=paired)
  assert found == pytest.approx(np.mean(p < 0.0125), abs=0.01)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("alpha", [0.05, 0.0125])
@pytest.mark.parametrize("effect", [0.2, 0.7, 1.5, 4.0])
def test_seeds_needed_are_the_fewest_with_the_power(effect, alpha, paired):
  n = statistics.seeds_needed(2.0, 2 * effect, alpha=alpha, paired=paired)
  assert statistics.power(n, 2.0, 2 * effect, alpha=alpha, paired=paired) >= 0.8
  assert n == 2 or statistics.power(n - 1, 2.0, 2 * effect, alpha=alpha, paired=paired) < 0.8
  smallest = statistics.minimum_detectable_difference(n, 2.0, alpha=alpha, paired=paired)
  assert smallest <= 2 * effect
  assert statistics.power(n, 2.0, smallest, alpha=alpha, paired=paired) == pytest.approx(0.8)


def test_seeds_needed_at_the_edges():
  assert statistics.seeds_needed(1.0, 0.0, paired=False) == math.inf
  assert statistics.seeds_needed(0.0, 1.0, paired=False) == 2
  assert statistics.seeds_needed(1.0, 1e5, paired=True) == 2
  assert statistics.minimum_detectable_difference(3, 0.0, paired=False) == 0
  # n = 17 a group for one sigma is in every table of power (Cohen 1988, table 2.4.1).
  assert statistics.seeds_needed(1.0, 1.0, paired=False) == 17


def test_the_tests_are_those_of_scipy():
  rng = np.random.default_rng(0)
  base, arm = rng.normal(size=5), 0.3 + 2 * rng.normal(size=4)
  found = compare_arms(arms(base, arm), "a", paired={"b": False})[1]
  expected = stats.ttest_ind(arm, base, equal_var=False)
  assert found.versus.p == pytest.approx(expected.pvalue, rel=1e-9)
  assert found.sigma == pytest.approx(np.std(arm, ddof=1))
  low, high = expected.confidence_interval(1 - statistics._welch_level(0.05, 4, 5))
  assert (found.versus.low, found.versus.high) == pytest.approx((low, high))
  assert found.versus.p_worst > found.versus.p

  pair = compare_arms(arms(base[:4], arm), "a", paired={"b": True})[1].versus
  expected = stats.ttest_rel(arm, base[:4])
  interval = expected.confidence_interval(0.95)
  assert pair.paired
  assert pair.p == pair.p_worst == pytest.approx(expected.pvalue, rel=1e-9)
  assert (pair.low, pair.high) == pytest.approx((interval.low, interval.high))


def test_many_seeds_need_no_worst_case():
  assert statistics.worst_case_p(0.03, 21, 40) == 0.03
  assert statistics.worst_case_p(0.03, 20, 20) == pytest.approx(0.03, rel=0.01)


def test_pairs_are_the_seeds_in_common():
  base, arm = {0: 1.0, 1: 2.0, 2: 4.0, 7: 99.0}, {2: 3.0, 0: 0.5, 1: 1.2, 5: -50.0}
  found = difference(arm, base, paired=True)
  assert found.difference == pytest.approx((-0.5 - 0.8 - 1.0) / 3)
  assert found.p == pytest.approx(stats.ttest_rel([0.5, 1.2, 3.0], [1.0, 2.0, 4.0]).pvalue)
  assert not difference(arm, {9: 1.0, 8: 2.0}, paired=True).paired


def test_holm_by_hand():
  # 4 x .01, then 3 x .03 and 2 x .035 raised to it, then 1 x .2.
  assert holm([0.035, 0.01, 0.2, 0.03]) == pytest.approx([0.09, 0.04, 0.2, 0.09])
  assert holm([0.7, 0.6]) == [1, 1]
  assert holm([]) == []


def test_holm_does_not_search_the_memory_for_garbage():
  class Cycle:
    pass

  cycle = Cycle()
  cycle.itself, kept = cycle, weakref.ref(cycle)
  gc.disable()
  try:
    del cycle
    holm([0.01, 0.2])
    assert kept() is not None
  finally:
    gc.enable()


def test_one_seed_has_no_p_and_never_wins():
  found = judge([1.0, 1.1, 0.9], [0.1])
  assert found.winner is None
  assert found.words["b"] == "not testable"
  assert "cannot be measured" in found.sentence
  assert judge([1.0], [0.1, 0.1001, 0.0999]).winner is None
  assert compare_arms(arms([1.0], [2.0]), "a", paired={"b": True})[1].sigma is None


@pytest.mark.parametrize("paired", [True, False])
def test_no_noise_at_all(paired):
  same = difference({0: 0.1, 1: 0.1}, {0: 0.1, 1: 0.1}, paired=paired)
  assert (same.p, same.difference) == (1, 0)
  # 0.1 + 0.2 is not 0.3: what rounding leaves of a deviation is none.
  copies = difference({0: 0.3, 1: 0.1 + 0.2}, {0: 2.0, 1: 2.0}, paired=paired)
  assert copies.p is None
  assert judge([2.0] * 5, [1.0] * 5, paired=paired).winner is None
  assert judge([2.0] * 5, [2.0] * 5, paired=paired).winner is None


def test_one_arm_without_noise_is_compared_by_that_of_the_other():
  expected = stats.ttest_1samp([1.0, 1.1, 0.9, 1.05], 2.0).pvalue
  found = difference({0: 1.0, 1: 1.1, 2: 0.9, 3: 1.05}, {0: 2.0, 1: 2.0}, paired=False)
  assert found.p == pytest.approx(expected)


def test_a_clear_winner_and_those_that_tie_with_it():
  spread = np.array([-0.01, 0.0, 0.01, 0.004])
  found = judge(2 + spread, 1 + spread, 1.001 + spread[::-1], 1.5 + spread, 3 + spread)
  assert found.winner == "b"
  assert found.tied == ("c",)
  assert found.words == {
    "a": "baseline",
    "b": "winner",
    "c": "ties with the winner",
    "d": "better",
    "e": "worse",
  }
  assert found.sentence.startswith("Winner: b, 1 below a [")
  assert found.sentence.endswith("Not told from it: c.")


def test_where_higher_is_better_the_verdict_is_that_of_the_negated_values():
  spread = np.array([-0.01, 0.0, 0.01, 0.004])
  samples = 2 + spread, 1 + spread, 1.001 + spread[::-1], 1.5 + spread, 3 + spread
  for chosen in (samples, samples[3:], samples[:1], (samples[1], *samples[3:])):
    low = judge(*chosen)
    high = judge(*(-sample for sample in chosen), lower_is_better=False)
    assert (high.winner, high.tied, high.words) == (low.winner, low.tied, low.words)
    assert high.sentence == low.sentence.replace("below", "above")
  assert judge(*samples, lower_is_better=False).winner == "e"


def test_an_arm_of_one_seed_ties_with_the_winner():
  assert judge([2.0, 2.01, 1.99], [1.0, 1.01, 0.99], [1.2]).tied == ("c",)


def test_a_winner_is_told_from_its_rivals_in_pairs():
  # The arms differ by 0.01 in each seed; the seeds differ by 1.
  seeds, jitter = np.arange(5.0), np.array([0.0, 1e-4, -1e-4, 2e-4, -2e-4])
  samples = seeds, seeds - 0.02 + jitter, seeds - 0.01 - jitter
  assert judge(*samples, paired=True).winner == "b"
  assert judge(*samples, paired=True).tied == ()
  assert judge(*samples, paired=False).winner is None


def test_the_baseline_wins_only_if_all_are_worse():
  spread = np.array([-0.01, 0.0, 0.01, 0.004])
  assert judge(1 + spread, 2 + spread, 3 + spread).winner == "a"
  found = judge(1 + spread, 1.001 + spread, 3 + spread)
  assert found.winner is None
  assert "inside the noise" in found.sentence
  assert judge(1 + spread).winner is None


def test_the_best_mean_does_not_win_by_seeds_that_the_baseline_lacks():
  # In the seeds of both the arm is worse.
  base, arm = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.1, 1: 2.1, 2: 3.1001, 3: -99.0}
  found = verdict({"a": base, "b": arm}, "a", paired={"b": True}, lower_is_better=True)
  assert found.winner is None
  assert found.words["b"] == "worse"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused(value):
  with pytest.raises(ValueError, match="finite"):
    judge([1.0, 2.0], [1.0, value])


def test_the_pooled_sigma_weighs_by_degrees_of_freedom():
  compared = compare_arms(arms([0, 2], [0, 0, 6, 6], [9]), "a", paired={"b": False, "c": False})
  assert statistics.pooled_sigma(compared) == pytest.approx(math.sqrt((2 + 36) / 4))
  assert statistics.pooled_sigma(compared[2:]) is None
