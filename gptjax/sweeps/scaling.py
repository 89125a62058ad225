"""Fits the scaling law L(N, D) = E + A / N^alpha + B / D^beta to the runs of a sweep.

Hoffmann et al. 2022 (arXiv:2203.15556). N: the parameters that multiply, so without the tables that
tokens and positions look up, with the head (tied or not): those that cost FLOPs, for which
C = 6 N D holds most nearly, and without which laws of small models bend (Porian et al. 2024,
arXiv:2406.19146). D: training tokens. L: nats a token. C: FLOPs of forward and backward.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import optimize

from gptjax.config import open_saved
from gptjax.data.tokenizer import declared_vocab_size
from gptjax.errors import UserError
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import describe_parameters
from gptjax.sweeps import plots
from gptjax.sweeps.results import Results, load_results

DELTA = 1e-3
# Their starting points: alpha, beta, e, a, b, where E = exp(e), A = exp(a), B = exp(b).
GRID = tuple(
  itertools.product(
    np.arange(0, 2.5, 0.5), np.arange(0, 2.5, 0.5), np.arange(-1, 1.5, 0.5), *[range(0, 30, 5)] * 2
  )
)
_STARTS = 40
_SAME_BUDGET = 1.1


@dataclasses.dataclass(frozen=True)
class Law:
  """The function L(N, D) = E + A / N^alpha + B / D^beta."""

  E: float
  A: float
  B: float
  alpha: float
  beta: float

  def __call__(self, N, D):
    """The loss, in nats a token; numbers or arrays."""
    return self.E + self.A / np.power(N, self.alpha) + self.B / np.power(D, self.beta)

  def compute_optimal(self, flops: float, *, factor: float = 6.0) -> tuple[float, float]:
    """Finds N and D of the least loss at factor N D = flops (eq. 4); NaN if more of one hurts."""
    if not (self.alpha > 0 and self.beta > 0):
      return math.nan, math.nan
    G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
    a = self.beta / (self.alpha + self.beta)
    return G * (flops / factor) ** a, (flops / factor) ** (1 - a) / G


@dataclasses.dataclass(frozen=True)
class Fit:
  """A law, and the laws of bootstrap resamples of its runs."""

  law: Law
  resamples: Sequence[Law]

  def interval(
    self, quantity: Callable[[Law], float], confidence: float = 0.95
  ) -> tuple[float, float]:
    """Percentiles of a law's quantity over the resamples; a NaN counts as beyond both ends."""
    values = np.array([quantity(law) for law in self.resamples])
    ends = np.where(np.isnan(values), [[-math.inf], [math.inf]], values)
    low = np.quantile(ends[0], (1 - confidence) / 2, method="lower")
    high = np.quantile(ends[1], (1 + confidence) / 2, method="higher")
    return float(low), float(high)

  def predict(self, N: float, D: float, confidence: float = 0.95) -> tuple[float, float, float]:
    """Predicts the loss and its interval, the law's: a single run also has noise of its own."""
    return float(self.law(N, D)), *self.interval(lambda law: law(N, D), confidence)


def _objective(x: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_l: np.ndarray):
  """Huber loss of the log loss (eq. 3, summed) and its gradient; x is alpha, beta, e, a, b."""
  alpha, beta, e, a, b = x
  terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
  predicted = np.logaddexp.reduce(terms)
  residual = predicted - log_l
  slope = np.clip(residual, -DELTA, DELTA)
  of_n, of_d, of_e = slope * np.exp(terms - predicted)
  gradient = np.array([-of_n @ log_n, -of_d @ log_d, of_e.sum(), of_n.sum(), of_d.sum()])
  huber = slope * (residual - slope / 2)
  # In units of delta^2, or the optimizer would stop at the start.
  return huber.sum() / DELTA**2, gradient / DELTA**2


def _minimise(starts: Sequence[np.ndarray], data: tuple[np.ndarray, ...]) -> np.ndarray:
  # They use L-BFGS; with five unknowns there is no memory to limit.
  found = [
    optimize.minimize(_objective, x, data, jac=True, method="BFGS", options={"gtol": 1e-5})
    for x in starts
  ]
  return min(found, key=lambda result: result.fun).x


def fit_law(
  N: np.ndarray, D: np.ndarray, L: np.ndarray, *, resamples: int = 200, seed: int = 0
) -> Fit:
  """Fits the law by approach 3, and again to bootstrap resamples of the runs.

  BFGS from the 40 best of the paper's 4,500 starting points; of a resample, from the fit of all.

  Args:
    N, D, L: arrays, a run each.

  Raises:
    UserError: too few sizes or token counts to tell the terms apart, a loss that is not finite, or
      no falling law.
  """
  N, D, L = (np.asarray(x, float) for x in (N, D, L))
  if len({*N}) < 3 or len({*D}) < 3 or len({*zip(N, D, strict=True)}) < 6:
    raise UserError(
      f"a scaling law needs 6 pairs of size and tokens, with 3 sizes and 3 token counts: the runs "
      f"have {len({*zip(N, D, strict=True)})}, {len({*N})} and {len({*D})}."
    )
  if not (np.isfinite(L).all() and (L > 0).all()):
    raise UserError("a scaling law needs losses that are finite and above 0.")
  # About their means the logarithms are nearly independent of the constants a and b.
  centre_n, centre_d = np.log(N).mean(), np.log(D).mean()
  log_n, log_d, log_l = np.log(N) - centre_n, np.log(D) - centre_d, np.log(L)
  grid = np.array(GRID, float)
  grid[:, 3] -= grid[:, 0] * centre_n
  grid[:, 4] -= grid[:, 1] * centre_d
  order = np.argsort([_objective(x, log_n, log_d, log_l)[0] for x in grid])
  best = _minimise(grid[order[:_STARTS]], (log_n, log_d, log_l))

  def law(x: np.ndarray) -> Law:
    alpha, beta, e, a, b = x
    of_exp = np.exp([e, a + alpha * centre_n, b + beta * centre_d])
    return Law(*of_exp.tolist(), float(alpha), float(beta))

  if not (law(best).alpha > 0 and law(best).beta > 0):
    raise UserError(
      f"the runs give no scaling law: alpha = {best[0]:.3g} and beta = {best[1]:.3g} are not both "
      "above 0. Noise hides it; spread sizes and token counts further."
    )
  rng = np.random.default_rng(seed)
  again = []
  while len(again) < resamples:
    rows = rng.integers(len(N), size=len(N))
    if min(len({*N[rows]}), len({*D[rows]})) >= 3:
      again.append(law(_minimise([best], (log_n[rows], log_d[rows], log_l[rows]))))
  return Fit(law(best), again)


def isoflops(flops: np.ndarray) -> list[np.ndarray]:
  """Groups runs of one budget, within 10 %: arrays of their indices, by rising budget."""
  order = np.argsort(flops)
  cuts = np.flatnonzero(np.diff(np.log(np.asarray(flops)[order])) > math.log(_SAME_BUDGET)) + 1
  return np.split(order, cuts)


def isoflop_optimum(N: np.ndarray, L: np.ndarray) -> float | None:
  """Approach 2: the N at the bottom of a parabola in log N; None without one among the sizes."""
  if len({*N}) < 3:
    return None
  square, linear, _ = np.polyfit(np.log(N), L, 2)
  bottom = -linear / (2 * square)
  inside = square > 0 and np.log(min(N)) <= bottom <= np.log(max(N))
  return math.exp(bottom) if inside else None


def matmul_parameters(config: Any) -> int:
  """Counts N for a run's config: parameters that multiply, the head among them."""
  if not config.model.vocab_size:
    with config.unlocked():
      config.model.vocab_size = declared_vocab_size(config.tokenizer)
  model = ModelConfig.from_config(config.model)
  described = describe_parameters(model).values()
  count = sum(math.prod(info.shape) for info in described if info.fan_in_axes is not None)
  return count + model.vocab_size * model.embed_dim * model.head.tied


@dataclasses.dataclass(frozen=True)
class Runs:
  """N, D, L and C of runs, in arrays, and the factor of C = factor N D; 6 if C is not recorded."""

  N: np.ndarray
  D: np.ndarray
  L: np.ndarray
  C: np.ndarray
  factor: float
  recorded: bool


def read_runs(results: Results) -> Runs:
  """Reads how the finished runs of a sweep ended.

  Raises:
    UserError: one did not record its tokens or its loss.
  """
  last = [run.lines[-1] for run in results.finished]
  unknown = [line for line in last if line.get("tokens") is None or line.get("val/loss") is None]
  if unknown:
    raise UserError(
      f"{results.workdir}: {len(unknown)} finished runs have no tokens or no val/loss."
    )
  N = np.array([matmul_parameters(open_saved(run.folder)) for run in results.finished], float)
  D = np.array([line["tokens"] for line in last], float)
  L = np.array([line["val/loss"] for line in last], float)
  if any(line.get("flops") is None for line in last):
    return Runs(N, D, L, 6 * N * D, 6.0, recorded=False)
  C = np.array([line["flops"] for line in last], float)
  return Runs(N, D, L, C, float(np.median(C / (N * D))), recorded=True)


def scaling(workdir: str) -> None:
  """Fits the finished runs of a sweep, prints the law and what it advises, draws scaling.png.

  Raises:
    UserError: WORKDIR is no sweep, or its runs do not determine a law.
  """
  results = load_results(workdir)
  runs = read_runs(results)
  N, D, L, flops, factor = runs.N, runs.D, runs.L, runs.C, runs.factor
  print(f"{len(N)} of {len(results.runs)} runs have finished; the others are left out.")
  try:
    fit = fit_law(N, D, L)
  except UserError as error:
    raise UserError(f"{workdir}: {error}") from None
  rule = "C = 6 N D, as not every run recorded its FLOPs"
  if runs.recorded:
    factors = flops / (N * D)
    rule = (
      f"C = {factor:.3g} N D, the median of the runs' recorded FLOPs (from {factors.min():.3g} to "
      f"{factors.max():.3g}: attention's do not grow with N)"
    )
  print("L(N, D) = E + A / N^alpha + B / D^beta in nats a token; 95 % intervals by bootstrap:")
  for field in dataclasses.fields(Law):
    low, high = fit.interval(lambda law, name=field.name: getattr(law, name))
    print(f"  {field.name:<5} = {getattr(fit.law, field.name):.4g} [{low:.4g}, {high:.4g}]")
  error = fit.law(N, D) / L - 1
  print(f"  relative error: median {np.median(abs(error)):.2%}, largest {abs(error).max():.2%}")
  print(f"N: parameters without lookup tables, with the head. {rule}.")
  groups = [rows for rows in isoflops(flops) if len({*N[rows]}) >= 3]
  for rows in groups:
    bottom = isoflop_optimum(N[rows], L[rows])
    budget = float(np.median(flops[rows]))
    found = "no minimum among its sizes" if bottom is None else f"N = {bottom:.3g}"
    ours = fit.law.compute_optimal(budget, factor=factor)[0]
    print(f"IsoFLOP parabola at {budget:.3g} FLOPs: {found}; the law says N = {ours:.3g}")
  print("Compute-optimal, with 95 % intervals:")
  for budget in flops.max() * 10.0 ** np.arange(4):
    best_n, best_d = fit.law.compute_optimal(budget, factor=factor)
    low, high = fit.interval(lambda law, C=budget: law.compute_optimal(C, factor=factor)[0])
    loss, *limits = fit.predict(best_n, best_d)
    guess = "  beyond 10 times the largest run: a guess" if budget > 10.5 * flops.max() else ""
    print(
      f"  {budget:.3g} FLOPs: N = {best_n:.3g} [{low:.3g}, {high:.3g}], D = {best_d:.3g}, "
      f"loss {loss:.3f} [{limits[0]:.3f}, {limits[1]:.3f}]{guess}"
    )
  path = results.workdir / "scaling.png"
  shown = [float(np.median(flops[rows])) for rows in groups[:6]]
  path.write_bytes(plots.png(plots.scaling(N, D, L, flops, fit.law, factor, shown)))
  print(f"Drawn: {path}")
