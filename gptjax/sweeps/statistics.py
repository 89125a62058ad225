"""Decides whether arms differ by more than the noise between seeds.

Two arms are compared by Welch's t-test or, where a seed gives both the same data in the same
order, by a paired t-test over the seeds. Several arms against one baseline are corrected by Holm
(1979), which bounds the chance of even one false difference. The tests and the correction are those
of statsmodels.

Welch's p-value is only approximate when seeds are few: between equal arms, p < 0.05 has a chance of
up to 6.4 % with 2 seeds each, 5.9 % with 3, 11.8 % with 2 against 10. So Holm is given
`worst_case_p`, the largest chance over all ratios of the two variances. All of this assumes normal
noise: skewed noise whose scale differs between arms makes false winners more frequent.
"""

import contextlib
import dataclasses
import functools
import gc
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import optimize, special, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower, TTestPower
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

ALPHA = 0.05
# Deviations below this fraction of the values are rounding, not noise.
_ROUNDING = 1e-12
# With more seeds than this in both arms, Welch's p-value is right to a hundredth of itself.
_FEW = 20
# Differences below this many standard deviations would need 10^13 seeds.
_NO_EFFECT = 1e-6

Values = Mapping[str, Mapping[int, float]]


@dataclasses.dataclass(frozen=True)
class Difference:
  """Mean of an arm minus the mean of its reference; a p of None: the noise cannot be measured.

  low, high: 95 % confidence interval of this pair alone. p: two-sided, of Welch's or the paired
  test. p_worst: `worst_case_p` of Welch's; it goes with the interval. noise: the standard deviation
  that `power` takes: of the differences by seed if paired, else the arms' root mean square.
  """

  difference: float
  low: float | None = None
  high: float | None = None
  p: float | None = None
  p_worst: float | None = None
  noise: float | None = None
  paired: bool = False


@dataclasses.dataclass(frozen=True)
class Comparison:
  """An arm over its n seeds; sigma, their sample standard deviation, is None with one seed.

  versus: difference to the baseline; None for the baseline itself. p_holm: corrected over the arms.
  """

  arm: str
  n: int
  mean: float
  sigma: float | None
  versus: Difference | None
  p_holm: float | None

  @property
  def significant(self) -> bool:
    return self.p_holm is not None and self.p_holm < ALPHA


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The outcome of a comparison, in one word or two for each arm and in a sentence for people.

  winner: an arm, the baseline, or None. tied: the arms that cannot be told from the winner.
  """

  winner: str | None
  tied: tuple[str, ...]
  words: Mapping[str, str]
  sentence: str


def difference(
  arm: Mapping[int, float], reference: Mapping[int, float], *, paired: bool
) -> Difference:
  """Compares the {seed: value} of two arms.

  The test is paired only where they share two seeds or more, and then runs over these. Without any
  deviation between seeds, equal values have p = 1, and unequal ones none: copies of a run are no
  replicates.

  Raises:
    ValueError: an arm is empty, or a value is not finite.
  """
  x, y = _array(arm), _array(reference)
  scale = max(np.abs(x).max(), np.abs(y).max())
  common = sorted({*arm} & {*reference})
  paired = paired and len(common) >= 2
  if paired:
    x, y = (np.array([values[seed] for seed in common]) for values in (arm, reference))
  delta = float(x.mean() - y.mean())
  if min(len(x), len(y)) < 2:
    return Difference(delta)
  noise = (x - y).std(ddof=1) if paired else math.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2)
  if noise <= _ROUNDING * scale:
    p = 1.0 if abs(delta) <= _ROUNDING * scale else None
    return Difference(delta, p=p, p_worst=p, noise=0.0, paired=paired)
  if paired:
    test = DescrStatsW(x - y)
    p = p_worst = float(test.ttest_mean()[1])
    interval = test.tconfint_mean(ALPHA)
  else:
    test = CompareMeans(DescrStatsW(x), DescrStatsW(y))
    p = float(test.ttest_ind(usevar="unequal")[1])
    p_worst = worst_case_p(p, len(x), len(y))
    interval = test.tconfint_diff(_welch_level(ALPHA, len(x), len(y)), usevar="unequal")
  return Difference(delta, *map(float, interval), p, p_worst, noise, paired)


def worst_case_p(p: float, n: int, m: int) -> float:
  """Largest chance that Welch's test of two equal arms, of n and m seeds, gives such a p or less.

  For normal values, over all ratios of their variances. Never below p.
  """
  if min(n, m) > _FEW:
    return p
  nominal, worst = _worst_cases(n, m)
  return max(p, float(np.exp(np.interp(math.log(max(p, 1e-300)), nominal, worst))))


def _welch_level(level: float, n: int, m: int) -> float:
  """The p-value of Welch's test whose worst case is `level`."""
  if min(n, m) > _FEW:
    return level
  nominal, worst = _worst_cases(n, m)
  return min(level, float(np.exp(np.interp(math.log(level), worst, nominal))))


@functools.cache
def _worst_cases(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
  """Tabulates log p of Welch's test against the log of its worst case; both rise.

  Let a, b be the degrees of freedom of the sample variances, u the share of the first in their sum
  of squares (each over its sigma^2), which is Beta(a / 2, b / 2). The pooled t of a + b degrees of
  freedom is independent of u (Basu's theorem), and Welch's t is that t times a function of u.
  """
  a, b = n - 1, m - 1
  u = _shares(a, b)
  share = special.expit(np.linspace(-8, 8, 33))[:, None]  # of the first in the true variance
  x, y = share * u / a, (1 - share) * (1 - u) / b
  df, stretch = (x + y) ** 2 / (x**2 / a + y**2 / b), np.sqrt((a + b) * (x + y))
  nominal = np.geomspace(1e-9, 1, 55)
  worst = [
    (2 * special.stdtr(a + b, stretch * special.stdtrit(df, p / 2))).mean(axis=1).max()
    for p in nominal
  ]
  return np.log(nominal), np.log(worst)


def _shares(a: int, b: int) -> np.ndarray:
  """128 equally likely values of Beta(a / 2, b / 2)."""
  return special.betaincinv(a / 2, b / 2, (np.arange(128) + 0.5) / 128)


def holm(p: Sequence[float]) -> list[float]:
  """Adjusts p-values by Holm's step-down rule; they keep their places."""
  with _nothing_to_collect():
    return multipletests(p, method="holm")[1].tolist()


@contextlib.contextmanager
def _nothing_to_collect() -> Iterator[None]:
  """Hides what is in memory from the garbage collector.

  `multipletests` collects garbage each time it corrects by Holm: a quarter of a second in a process
  that has loaded JAX, seconds in one that has traced models.
  """
  gc.freeze()
  try:
    yield
  finally:
    gc.unfreeze()


def compare_arms(values: Values, baseline: str, *, paired: Mapping[str, bool]) -> list[Comparison]:
  """Compares every arm of {arm: {seed: value}} with the baseline.

  paired: {arm: whether equal seeds give it and the baseline the same data}.

  Raises:
    ValueError: an arm is empty, or a value is not finite.
  """
  versus = {
    arm: difference(values[arm], values[baseline], paired=paired[arm])
    for arm in values
    if arm != baseline
  }
  corrected = _correct(versus)
  found = []
  for arm, by_seed in values.items():
    x = _array(by_seed)
    sigma = float(x.std(ddof=1)) if len(x) > 1 else None
    found.append(
      Comparison(arm, len(x), float(x.mean()), sigma, versus.get(arm), corrected.get(arm))
    )
  return found


def verdict(
  values: Values, baseline: str, *, paired: Mapping[str, bool], lower_is_better: bool
) -> Verdict:
  """Names a winner only if one is beyond the noise.

  The arm with the best mean wins if Holm's p of its difference to the baseline is below 0.05;
  the baseline wins if it has the best mean and every arm is worse by the same rule. So all arms
  being equal, the chance of a winner is at most 5 %. Arms that do not differ from the winner (the
  same tests against it, Holm over them) are tied with it.
  """
  compared = compare_arms(values, baseline, paired=paired)
  words = {arm.arm: _word(arm, lower_is_better) for arm in compared}
  others = [arm for arm in compared if arm.versus is not None]
  best = (min if lower_is_better else max)(compared, key=lambda arm: arm.mean)
  if not others:
    return Verdict(None, (), words, "No winner: there is no arm to compare with the baseline.")
  if best.versus is None and all(words[arm.arm] == "worse" for arm in others):
    sentence = f"Winner: the baseline, {baseline}; every other arm is worse."
    return Verdict(baseline, (), words | {baseline: "winner"}, sentence)
  if words[best.arm] != "better":
    tested = [arm for arm in (others if best.versus is None else [best]) if arm.p_holm is not None]
    why = "inside the noise" if tested else "its noise cannot be measured"
    return Verdict(None, (), words, f"No winner: {why}; {best.arm} has the best mean.")
  # Sharing the order of the data is an equivalence: two arms that share the baseline's share it.
  rivals = {
    arm.arm: difference(
      values[arm.arm], values[best.arm], paired=paired[best.arm] and paired[arm.arm]
    )
    for arm in others
    if arm is not best
  }
  corrected = _correct(rivals)
  tied = tuple(arm for arm in rivals if corrected.get(arm, 1) >= ALPHA)
  versus, place = best.versus, "below" if lower_is_better else "above"
  low, high = sorted(map(abs, (versus.low, versus.high)))
  sentence = (
    f"Winner: {best.arm}, {abs(versus.difference):.4g} {place} {baseline} [{low:.4g}, {high:.4g}], "
    f"p = {best.p_holm:.2g}."
  )
  if tied:
    sentence += f" Not told from it: {', '.join(tied)}."
  words |= {best.arm: "winner"} | dict.fromkeys(tied, "ties with the winner")
  return Verdict(best.arm, tied, words, sentence)


def power(n: int, sigma: float, difference: float, *, alpha: float = ALPHA, paired: bool) -> float:
  """Chance that the two-sided test of n seeds an arm finds a true difference between two arms.

  sigma: standard deviation between seeds, equal in both arms; of the differences by seed if paired.
  The square of the statistic of a t-test is noncentral F, which scipy has for any shift; the
  noncentral t that statsmodels makes its power of is NaN at some that 2 seeds need.
  """
  if sigma == 0:
    return float(difference != 0)
  df, variance = (n - 1, 1 / n) if paired else (2 * (n - 1), 2 / n)
  limits = stats.t.isf(alpha / 2, df)
  if not paired and n <= _FEW:  # The limit of Welch's test moves with its degrees of freedom.
    u = _shares(n - 1, n - 1)
    limits = stats.t.isf(_welch_level(alpha, n, n) / 2, (n - 1) / (u**2 + (1 - u) ** 2))
  return float(np.mean(stats.ncf.sf(limits**2, 1, df, (difference / sigma) ** 2 / variance)))


def seeds_needed(
  sigma: float, difference: float, *, power: float = 0.8, alpha: float = ALPHA, paired: bool
) -> float:
  """Fewest seeds an arm, 2 or more, that find a difference with that power; inf if it is 0."""
  if abs(difference) <= _NO_EFFECT * sigma:
    return math.inf
  for n in range(2, _FEW + 1):
    if _power(n, sigma, difference, alpha=alpha, paired=paired) >= power:
      return n
  test = TTestPower() if paired else TTestIndPower()
  return math.ceil(test.solve_power(abs(difference) / sigma, alpha=alpha, power=power))


def minimum_detectable_difference(
  n: int, sigma: float, *, power: float = 0.8, alpha: float = ALPHA, paired: bool
) -> float:
  """Smallest true difference that n seeds an arm find with that power."""
  if sigma == 0:
    return 0.0

  def lacking(in_sigmas: float) -> float:
    return _power(n, 1.0, in_sigmas, alpha=alpha, paired=paired) - power

  return sigma * optimize.brentq(lacking, 0, 1e4)


_power = power


def pooled_sigma(compared: Sequence[Comparison]) -> float | None:
  """Standard deviation between seeds, one for all arms; None if each has one seed."""
  measured = [arm for arm in compared if arm.sigma is not None]
  if not measured:
    return None
  squares = sum((arm.n - 1) * arm.sigma**2 for arm in measured)
  return math.sqrt(squares / sum(arm.n - 1 for arm in measured))


def _array(by_seed: Mapping[int, float]) -> np.ndarray:
  array = np.array(list(by_seed.values()), float)
  if not len(array) or not np.isfinite(array).all():
    raise ValueError(f"an arm needs values, all finite: {dict(by_seed)}")
  return array


def _correct(differences: Mapping[str, Difference]) -> dict[str, float]:
  """{arm: p corrected by Holm}, without those that have no p."""
  tested = {arm: d.p_worst for arm, d in differences.items() if d.p_worst is not None}
  return dict(zip(tested, holm(list(tested.values())), strict=True))


def _word(arm: Comparison, lower_is_better: bool) -> str:
  if arm.versus is None:
    return "baseline"
  if arm.p_holm is None:
    return "not testable"
  if not arm.significant:
    return "inside the noise"
  return "better" if (arm.versus.difference < 0) == lower_is_better else "worse"
