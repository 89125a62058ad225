"""Previews a sweep: parameters, FLOPs and an estimate of the time for each arm."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp

from gptjax.devices import chips
from gptjax.small_files import read_json
from gptjax.sweeps.definition import Sweep
from gptjax.sweeps.devices import Host
from gptjax.training.checkpoints import lower_is_better
from gptjax.training.metrics import read_metrics

_MFU = 0.4
_MATMUL_SHARE = 0.5


def preview(sweep: Sweep, workdir: Path, host: Host, parallel: int) -> str:
  """Makes a table of the arms with the total of their trials; a search counts by one suggestion.

  Trials that have finished in `workdir` tell how fast this host is, if there are any.
  """
  rate, rule = flops_per_second(workdir, host, parallel)
  trials = {"search": len(sweep.trials)} if sweep.search else dict.fromkeys(sweep.plans, 0)
  for trial in filter(None, sweep.trials.values()):
    trials[trial.arm] += 1
  lines = [f"{'arm':<32} {'trials':>6} {'parameters':>12} {'FLOPs a run':>12} {'seconds':>9}"]
  total = 0.0
  for arm, setup in sweep.plans.items():
    length = setup.run_length
    row = f"{arm:<32} {trials[arm]:>6} {setup.num_parameters:>12,}"
    if length is None:
      lines.append(f"{row} {'unknown: the run is given in epochs':>22}")
      continue
    flops = length.total_steps * length.tokens_per_step * setup.flops_per_token
    total += flops * trials[arm]
    lines.append(f"{row} {flops:>12.3g} {flops / rate:>9.0f}")
  seconds = total / rate / min(parallel, len(sweep.trials))
  left_out = any(setup.run_length is None for setup in sweep.plans.values())
  lines.append(
    f"total: {len(sweep.trials)} trials, {total:.3g} FLOPs, {seconds:.0f} s with {parallel} at once"
    + ", without runs given in epochs" * left_out
  )
  lines.append(
    f"seconds are an estimate: {rate:.3g} FLOP/s a trial, {rule}; no compilation counted"
  )
  better = "lower" if lower_is_better(sweep.metric) else "higher"
  lines.append(f"compared by {sweep.metric}, {better} is better")
  return "\n".join(lines)


def flops_per_second(workdir: Path, host: Host, parallel: int) -> tuple[float, str]:
  """Estimates the FLOPs a second of one trial, and says by which rule."""
  finished = []
  for path in workdir.glob("trials/*/trial.json"):
    if read_json(path)["state"] == "done":
      last = read_metrics(path.parent)[-1]
      if last.get("flops") and last.get("seconds"):
        finished.append((last["flops"], last["seconds"]))
  if finished:
    flops, seconds = map(sum, zip(*finished, strict=True))
    return flops / seconds, f"as measured in {len(finished)} finished trials"
  chip = chips.find_chip(host.device_kind)
  if chip is not None:
    return _MFU * chip.peak_flops * host.devices, f"{_MFU:.0%} of the peak of {chip.name}"
  rate = _MATMUL_SHARE * _matmul_flops_per_second() / parallel
  return rate, f"{_MATMUL_SHARE:.0%} of a matrix product's rate on {host.device_kind}, shared"


def _matmul_flops_per_second(size: int = 1024) -> float:
  """Measures the rate of float32 products of [size, size] matrices, the fastest of five."""
  product = jax.jit(jnp.dot)
  x = jnp.ones((size, size))
  product(x, x).block_until_ready()
  best = float("inf")
  for _ in range(5):
    start = time.perf_counter()
    product(x, x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best
