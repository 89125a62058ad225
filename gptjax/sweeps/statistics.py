"""Whether arms differ beyond the noise between seeds: tests, intervals, power.

Two arms are compared by Welch's t-test (Welch 1947) or, where a seed gives both the same data in
the same order, by a t-test of their differences, seed by seed. Several arms against one baseline
are corrected by Holm (1979), which bounds the chance of even one false difference.

Welch's p is only nearly a chance when seeds are few: between equal arms, p < 0.05 has a chance of
up to 6.4 % with 2 seeds each, 5.9 % with 3, 11.8 % with 2 against 10. So Holm is given
`worst_case_p`, the largest chance that any ratio of the two variances makes of it. All of it is for
normal noise: a skewed one whose scale differs between arms makes false winners more frequent.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import optimize, special

ALPHA = 0.05
# Deviations below this fraction of the values are rounding, not noise.
_ROUNDING = 1e-12
# With more seeds in both arms Welch's p is a chance, to a hundredth of it.
_FEW = 20

Values = Mapping[str, Mapping[int, float]]


@dataclasses.dataclass(frozen=True)
class Difference:
  """Arm minus reference. A p of None: the noise cannot be measured from these seeds.

  low, high: the confidence interval, of this pair alone. p: two-sided, of Welch's or the paired
  test. p_worst: `worst_case_p` of Welch's; it goes with the interval. noise: the standard deviation
  that `power` takes: of one seed's difference if paired, else the root mean square of both arms'.
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
  """An arm: its n seeds, their mean and standard deviation (ddof 1; None of one seed).

  versus: against the baseline; None for the baseline itself. p_holm: corrected over the arms.
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
  """winner: an arm, the baseline, or None. tied: the arms that cannot be told from the winner.

  words: {arm: one word or two}. sentence: the verdict for people.
  """

  winner: str | None
  tied: tuple[str, ...]
  words: Mapping[str, str]
  sentence: str


def difference(
  arm: Mapping[int, float],
  reference: Mapping[int, float],
  *,
  paired: bool,
  confidence: float = 0.95,
) -> Difference:
  """Compares {seed: value} of two arms.

  Paired only where they share two seeds or more, and then over these. Without any deviation
  between seeds, equal values have p = 1, and unequal ones none: copies of a run are no replicates.

  Raises:
    ValueError: an arm is empty, or a value is not finite.
  """
  x, y = _array(arm), _array(reference)
  scale = _ROUNDING * max(np.abs(x).max(), np.abs(y).max())
  common = sorted({*arm} & {*reference})
  if paired and len(common) >= 2:
    x = np.array([arm[seed] - reference[seed] for seed in common])
    delta, noise = float(x.mean()), float(x.std(ddof=1))
    error, df = noise / math.sqrt(len(x)), len(x) - 1
  else:
    paired, delta = False, float(x.mean() - y.mean())
    if min(len(x), len(y)) < 2:
      return Difference(delta)
    sizes = len(x), len(y)
    a, b = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    error, noise = math.sqrt(a + b), math.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2)
    df = (a + b) ** 2 / (a**2 / (len(x) - 1) + b**2 / (len(y) - 1)) if error > scale else math.nan
  if error <= scale:
    p = 1.0 if abs(delta) <= scale else None
    return Difference(delta, p=p, p_worst=p, noise=0.0, paired=paired)
  p = 2 * float(special.stdtr(df, -abs(delta) / error))
  p_worst = p if paired else worst_case_p(p, *sizes)
  level = 1 - confidence if paired else _welch_level(1 - confidence, *sizes)
  half = -error * float(special.stdtrit(df, level / 2))
  return Difference(delta, delta - half, delta + half, p, p_worst, noise, paired)


def worst_case_p(p: float, n: int, m: int) -> float:
  """The chance that Welch's test of two equal arms of n and m seeds gives such a p or less.

  Of normal values, and the largest over all ratios of their variances. Never below p.
  """
  if min(n, m) > _FEW:
    return p
  of_welch, worst = _worst_cases(n, m)
  return max(p, float(np.exp(np.interp(math.log(max(p, 1e-300)), of_welch, worst))))


def _welch_level(level: float, n: int, m: int) -> float:
  """The p of Welch's test whose worst case is `level`."""
  if min(n, m) > _FEW:
    return level
  of_welch, worst = _worst_cases(n, m)
  return min(level, float(np.exp(np.interp(math.log(level), worst, of_welch))))


@functools.cache
def _worst_cases(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
  """log p of Welch's test and the log of its worst case, both rising.

  Let a, b be the degrees of freedom of the sample variances, u the share of the first in their sum
  of squares (each over its sigma^2), which is Beta(a / 2, b / 2). The pooled t of a + b degrees of
  freedom is independent of u (Basu's theorem), and Welch's t is that t times a function of u.
  """
  a, b = n - 1, m - 1
  u = _shares(a, b)
  share = special.expit(np.linspace(-8, 8, 33))[:, None]  # of the first in the true variance
  x, y = share * u / a, (1 - share) * (1 - u) / b
  df, stretch = (x + y) ** 2 / (x**2 / a + y**2 / b), np.sqrt((a + b) * (x + y))
  of_welch = np.geomspace(1e-9, 1, 55)
  worst = [
    (2 * special.stdtr(a + b, stretch * special.stdtrit(df, p / 2))).mean(axis=1).max()
    for p in of_welch
  ]
  return np.log(of_welch), np.log(worst)


def _shares(a: int, b: int) -> np.ndarray:
  """128 equally likely values of Beta(a / 2, b / 2)."""
  return special.betaincinv(a / 2, b / 2, (np.arange(128) + 0.5) / 128)


def holm(p: Sequence[float]) -> list[float]:
  """Adjusts p-values by Holm's step-down rule; they keep their places."""
  order = np.argsort(p)
  stepped = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
  adjusted = np.empty(len(p))
  adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1)
  return adjusted.tolist()


def compare_arms(
  values: Values, baseline: str, *, paired: Mapping[str, bool], confidence: float = 0.95
) -> list[Comparison]:
  """Compares every arm with the baseline.

  Args:
    values: {arm: {seed: value}}.
    paired: {arm: whether equal seeds give it and the baseline the same data}.
    confidence: of the intervals, each for itself.

  Raises:
    ValueError: an arm is empty, or a value is not finite.
  """
  versus = {
    arm: difference(values[arm], values[baseline], paired=paired[arm], confidence=confidence)
    for arm in values
    if arm != baseline
  }
  corrected = _holm_of(versus)
  found = []
  for arm, of_seeds in values.items():
    x = _array(of_seeds)
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
  corrected = _holm_of(rivals)
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
  """The chance that the two-sided test of n seeds an arm finds a true difference.

  By the noncentral t distribution, for one comparison. Unpaired: two arms of equal sigma, whose t
  has a limit that depends on the shares of the sample variances, as in `_worst_cases`.

  Args:
    n: 2 or more.
    sigma: between seeds; of one seed's difference if paired.
  """
  if sigma == 0:
    return float(difference != 0)
  if paired:
    df, scale, limits = n - 1, 1 / n, special.stdtrit(n - 1, alpha / 2)
  else:
    df, scale, u = 2 * (n - 1), 2 / n, _shares(n - 1, n - 1)
    level = _welch_level(alpha, n, n)
    limits = special.stdtrit((n - 1) / (u**2 + (1 - u) ** 2), level / 2)
  shift = abs(difference) / (sigma * math.sqrt(scale))
  # Its definition, |z + shift| > limit * sqrt(chi^2 / df), averaged over 256 equally likely chi^2:
  # scipy.stats.nct is NaN beyond a shift of some 40, which two seeds do need.
  chi = np.sqrt(2 * special.gammaincinv(df / 2, (np.arange(256) + 0.5) / 256) / df)
  beyond = np.multiply.outer(limits, chi)
  return float(np.mean(special.ndtr(beyond + shift) + special.ndtr(beyond - shift)))


def seeds_needed(
  sigma: float, difference: float, *, power: float = 0.8, alpha: float = ALPHA, paired: bool
) -> float:
  """The fewest seeds an arm, 2 or more, that find a difference with that power; inf if it is 0."""
  if difference == 0:
    return math.inf

  def enough(n: int) -> bool:
    return _power(n, sigma, difference, alpha=alpha, paired=paired) >= power

  high = 2
  while not enough(high):
    high *= 2
    if high > 2**40:
      return math.inf
  low = high // 2
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if enough(middle) else (middle, high)
  return max(high, 2)


def minimum_detectable_difference(
  n: int, sigma: float, *, power: float = 0.8, alpha: float = ALPHA, paired: bool
) -> float:
  """The smallest true difference that n seeds an arm find with that power."""
  if sigma == 0:
    return 0.0

  def lacking(in_sigmas: float) -> float:
    return _power(n, 1.0, in_sigmas, alpha=alpha, paired=paired) - power

  return sigma * optimize.brentq(lacking, 0, 1e4)


_power = power


def pooled_sigma(compared: Sequence[Comparison]) -> float | None:
  """The standard deviation between seeds, one for all arms; None if each has one seed."""
  measured = [arm for arm in compared if arm.sigma is not None]
  if not measured:
    return None
  squares = sum((arm.n - 1) * arm.sigma**2 for arm in measured)
  return math.sqrt(squares / sum(arm.n - 1 for arm in measured))


def _array(of_seeds: Mapping[int, float]) -> np.ndarray:
  array = np.array(list(of_seeds.values()), float)
  if not len(array) or not np.isfinite(array).all():
    raise ValueError(f"an arm needs values, all finite: {dict(of_seeds)}")
  return array


def _holm_of(differences: Mapping[str, Difference]) -> dict[str, float]:
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
