"""Compares two runs, bit for bit or by the noise of their training losses."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gptjax.config import CONFIG_FILE, flatten
from gptjax.errors import UserError
from gptjax.sweeps import statistics
from gptjax.sweeps.results import read_json
from gptjax.training.metrics import read_metrics

_LEAST_BLOCKS = 4


def compare(a: str, b: str, *, exact: bool) -> bool:
  """Compares two runs' metrics at the steps that both logged, and prints the finding.

  exact: every training loss and validation number is the same float; the first that is not is
  printed. Otherwise: the mean difference of the training losses, by a t-test over means of blocks,
  each five times as long as the autocorrelation time of the difference.

  Returns:
    Whether they are equal (exact), or not told apart (p >= 0.05).

  Raises:
    UserError: a directory is no run, or they have too few steps in common.
  """
  runs = [Path(a), Path(b)]
  one, other = (
    flatten(read_json(run / CONFIG_FILE, "not the work directory of a run")) for run in runs
  )
  for key in sorted({*one} | {*other}):
    if one.get(key) != other.get(key):
      print(f"config.{key}: {one.get(key, 'not there')!r} -> {other.get(key, 'not there')!r}")
  first, second = map(_numbers, runs)
  common = [at for at in first if at in second]
  if not common:
    raise UserError(f"{a} and {b} have no step in common at which both logged a metric.")
  if not exact:
    return _compare_blocks(a, b, {at: (first[at], second[at]) for at in common})
  differing = [at for at in common if first[at] != second[at]]
  if not differing:
    print(f"Equal in all {len(common)} numbers, to step {common[-1][0]}.")
    return True
  (step, name), x, y = differing[0], first[differing[0]], second[differing[0]]
  by = f", by {y - x:+.3g}" if isinstance(x, float) and isinstance(y, float) else ""
  print(
    f"Step {step} is the first that differs: {name} is {x!r} and {y!r}{by}. "
    f"{len(differing)} of {len(common)} numbers differ."
  )
  return False


def _numbers(workdir: Path) -> dict[tuple[int, str], float | str | None]:
  """{(step, name): value} of training and validation by step; "nan" and "inf" as text."""
  lines = sorted(read_metrics(workdir), key=lambda line: line["step"])
  return {
    (line["step"], name): line.get("nonfinite", {}).get(name, value)
    for line in lines
    for name, value in line.items()
    if name == "loss" or name.startswith("val/")
  }


def autocorrelation_time(x: np.ndarray) -> float:
  """1 + 2 sum of autocorrelations, up to the first lag of 5 times that sum (Sokal 1997)."""
  x = x - x.mean()
  covariance = np.fft.irfft(np.abs(np.fft.rfft(x, 2 * len(x))) ** 2)[: len(x)]
  if covariance[0] <= 0:
    return 1.0
  times = 2 * np.cumsum(covariance / covariance[0]) - 1
  return float(max(times[np.argmax(np.arange(len(x)) >= 5 * times)], 1))


def _compare_blocks(a: str, b: str, pairs: Mapping[tuple[int, str], tuple]) -> bool:
  for (step, name), values in pairs.items():
    if any(isinstance(value, str) for value in values):
      print(f"Not comparable: {name} at step {step} is {values[0]} and {values[1]}.")
      return False
  delta = np.array([y - x for (_, name), (x, y) in pairs.items() if name == "loss"])
  if len(delta) < 4 * _LEAST_BLOCKS:
    raise UserError(
      f"{a} and {b} logged {len(delta)} training losses at the same steps; a test needs "
      f"{4 * _LEAST_BLOCKS}."
    )
  tau = autocorrelation_time(delta)
  blocks = int(np.clip(len(delta) / (5 * tau), _LEAST_BLOCKS, len(delta) // 4))
  means = {i: float(block.mean()) for i, block in enumerate(np.array_split(delta, blocks))}
  found = statistics.difference(means, dict.fromkeys(means, 0.0), paired=True)
  # Without any noise a difference is real, however small.
  p = 0.0 if found.p is None else found.p
  interval = "" if found.low is None else f" [{found.low:+.4g}, {found.high:+.4g}]"
  too_short = len(delta) < _LEAST_BLOCKS * 5 * tau
  last = [(step, y - x) for (step, name), (x, y) in pairs.items() if name == "val/loss"][-1:]
  print(
    f"{'They differ' if p < statistics.ALPHA else 'Not told apart'}: the training loss of {b} less "
    f"that of {a} is {found.difference:+.4g}{interval} over {len(delta)} common steps, p = {p:.2g} "
    f"(t-test of {blocks} blocks of 5 autocorrelation times, each {tau:.1f} lines)."
    + " The runs are too short for such blocks, so p is too small." * too_short
    + "".join(f" Validation loss at step {step}: {by:+.4g}." for step, by in last)
    + " One run of each: only a sweep over seeds can tell their recipes apart."
  )
  return p >= statistics.ALPHA
