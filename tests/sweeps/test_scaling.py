import json
import math

import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.presets import pretrain
from gptjax.sweeps import scaling
from gptjax.sweeps.scaling import Law, fit_law
from gptjax.training.resolve import resolve
from gptjax.training.setup import make_setup

# Hoffmann et al. 2022, appendix D.
PAPER = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)


def isoflop_runs(sizes=6, budgets=4):
  flops = np.repeat(np.geomspace(1e18, 1e21, budgets), sizes)
  best = np.array([PAPER.compute_optimal(C)[0] for C in flops])
  N = best * np.tile(np.geomspace(0.2, 5, sizes), budgets)
  return N, flops / (6 * N), flops


def test_the_law_of_the_paper_is_found_again():
  N, D, _ = isoflop_runs()
  law = fit_law(N, D, PAPER(N, D), resamples=0).law
  for name in ("E", "A", "B", "alpha", "beta"):
    assert getattr(law, name) == pytest.approx(getattr(PAPER, name), rel=1e-3), name


def test_outliers_do_not_bend_it():
  N, D, _ = isoflop_runs()
  rng = np.random.default_rng(0)
  L = PAPER(N, D) * np.exp(0.001 * rng.normal(size=len(N)))
  L[[3, 11]] *= 1.3  # Two runs that went wrong; by least squares they move alpha by a fifth.
  law = fit_law(N, D, L, resamples=0).law
  assert law.alpha == pytest.approx(PAPER.alpha, abs=0.02)
  assert law.beta == pytest.approx(PAPER.beta, abs=0.02)
  assert law.compute_optimal(1e21)[0] == pytest.approx(PAPER.compute_optimal(1e21)[0], rel=0.15)


def test_the_fit_is_no_worse_than_from_the_truth():
  N, D, _ = isoflop_runs()
  L = PAPER(N, D) * np.exp(0.01 * np.random.default_rng(1).normal(size=len(N)))
  data = np.log(N), np.log(D), np.log(L)

  def loss(law):
    x = np.array([law.alpha, law.beta, math.log(law.E), math.log(law.A), math.log(law.B)])
    return scaling._objective(x, *data)[0]

  assert loss(fit_law(N, D, L, resamples=0).law) < loss(PAPER)


def test_the_objective_and_its_gradient():
  N, D, _ = isoflop_runs()
  L = PAPER(N, D) * np.exp(0.002 * np.random.default_rng(1).normal(size=len(N)))
  data = np.log(N), np.log(D), np.log(L)
  x = np.array([0.33, 0.27, 0.5, 6.0, 6.1])
  value, gradient = scaling._objective(x, *data)
  alpha, beta, e, a, b = x
  r = np.log(math.exp(e) + math.exp(a) / N**alpha + math.exp(b) / D**beta) - np.log(L)
  huber = np.where(abs(r) < 1e-3, r**2 / 2, 1e-3 * (abs(r) - 5e-4))
  assert value == pytest.approx(huber.sum() / 1e-6)
  for i, step in enumerate(1e-6 * np.eye(5)):
    rise = scaling._objective(x + step, *data)[0] - scaling._objective(x - step, *data)[0]
    assert gradient[i] == pytest.approx(rise / 2e-6, rel=1e-3)


def test_bootstrap_intervals_cover_the_truth_at_about_their_rate(monkeypatch):
  monkeypatch.setattr(scaling, "_STARTS", 2)
  N, D, _ = isoflop_runs(sizes=8)
  rng = np.random.default_rng(0)
  hits = []
  for _ in range(10):
    L = PAPER(N, D) * np.exp(0.002 * rng.normal(size=len(N)))
    fit = fit_law(N, D, L, resamples=30)
    for of in (
      lambda law: law.alpha,
      lambda law: law.beta,
      lambda law: law(1e9, 1e11),
      lambda law: law.compute_optimal(1e21)[0],
    ):
      low, high = fit.interval(of, 0.9)
      hits.append(low <= of(PAPER) <= high)
  assert 0.72 <= np.mean(hits) <= 1
  predicted, low, high = fit.predict(1e9, 1e11)
  assert predicted == fit.law(1e9, 1e11)
  assert 0 < high - low < 0.05


def test_a_resample_without_an_optimum_makes_the_interval_unbounded():
  laws = [Law(1, 400, 400, 0.3, 0.3)] * 18 + [Law(1, 400, 400, -0.1, 0.3)] * 2
  fit = scaling.Fit(laws[0], laws)
  optimum = laws[0].compute_optimal(1e20)[0]
  of = lambda law: law.compute_optimal(1e20)[0]  # noqa: E731
  assert fit.interval(of, 0.95) == (-math.inf, math.inf)
  assert fit.interval(of, 0.7) == (optimum, optimum)


@pytest.mark.parametrize("factor", [6.0, 7.5])
def test_compute_optimal_is_the_minimum_along_the_budget(factor):
  N, D = PAPER.compute_optimal(3e20, factor=factor)
  assert factor * N * D == pytest.approx(3e20)
  others = N * np.geomspace(0.5, 2, 401)
  losses = PAPER(others, 3e20 / factor / others)
  assert others[np.argmin(losses)] == pytest.approx(N, rel=0.005)


def test_isoflop_parabolas_agree_with_the_law():
  N, D, flops = isoflop_runs(sizes=7)
  L = PAPER(N, D)
  shuffled = np.random.default_rng(0).permutation(len(N))
  groups = scaling.isoflops(flops[shuffled] * np.linspace(0.98, 1.02, len(N)))
  assert [len(rows) for rows in groups] == [7, 7, 7, 7]
  for rows in groups:
    runs = shuffled[rows]
    bottom = scaling.isoflop_optimum(N[runs], L[runs])
    assert bottom == pytest.approx(PAPER.compute_optimal(flops[runs[0]])[0], rel=0.05)
  assert scaling.isoflop_optimum(N[:2], L[:2]) is None
  assert scaling.isoflop_optimum(N[:3], L[:3]) is None  # It falls to the last size.
  assert scaling.isoflop_optimum(N[:7], -L[:7]) is None


def test_runs_that_do_not_tell_the_terms_apart_are_refused():
  N, D, _ = isoflop_runs()
  with pytest.raises(UserError, match="the runs have 5, 5 and 5"):
    fit_law(N[:5], D[:5], N[:5])
  with pytest.raises(UserError, match="the runs have 8, 2 and 4"):
    fit_law(np.repeat([1e6, 1e7], 4), np.tile([1e8, 2e8, 3e8, 4e8], 2), np.ones(8))
  with pytest.raises(UserError, match=r"no scaling law: alpha = -0\.\d+"):
    fit_law(N, D, 5 + 1e-3 * N**0.3 + 100 / D**0.28, resamples=0)
  with pytest.raises(UserError, match="finite"):
    fit_law(N, D, np.append(np.nan, np.ones(len(N) - 1)))


def tiny(width, layers, tokens, **changes):
  config = pretrain.get_config("model=tiny")
  settings = {"tokenizer": "bytes", "model.vocab_size": 0, "total_tokens": tokens}
  settings |= {"model.embed_dim": width, "model.num_heads": 4, "model.num_layers": layers}
  for key, value in (settings | changes).items():
    config_lib.override(config, key, value)
  return config


@pytest.mark.parametrize("tied", [True, False])
def test_the_parameters_are_those_whose_flops_are_counted(tied):
  config = tiny(32, 2, 1000, **{"model.head.tied": tied, "sequence_length": 8})
  counted = scaling.matmul_parameters(config)
  setup = make_setup(resolve(config))
  attention = (
    12 * setup.model.num_layers * setup.model.num_heads * setup.model.head_dim * (8 + 1) / 2
  )
  assert setup.flops_per_token == pytest.approx(6 * counted + attention)


def write_sweep(root, *, flops=True, sizes=((32, 2), (64, 2), (96, 3), (128, 4))):
  about = {"name": "law", "question": "", "baseline": "x", "metric": "val/loss", "search": None}
  (root / "sweep.json").write_text(json.dumps(about))
  for i, (width, layers) in enumerate(sizes):
    for tokens in (10**6, 4 * 10**6, 16 * 10**6):
      folder = root / "trials" / f"{i}-{tokens}"
      folder.mkdir(parents=True)
      config = tiny(width, layers, tokens)
      (folder / "config.json").write_text(config_lib.to_json(config))
      N = scaling.matmul_parameters(config)
      trial = {"arm": folder.name, "seed": 0, "overrides": {}, "config": {}, "error": None}
      (folder / "trial.json").write_text(json.dumps(trial | {"state": "done"}))
      line = {"step": 9, "tokens": tokens, "val/loss": float(PAPER(N, tokens))}
      cost = {"flops": 6.6 * N * tokens, "seconds": 1.0} if flops else {}
      (folder / "metrics.jsonl").write_text(json.dumps(line | cost) + "\n")


@pytest.mark.parametrize("flops", [True, False])
def test_a_sweep_is_fitted_drawn_and_extrapolated_with_a_warning(
  tmp_path, capsys, flops, monkeypatch, drawn
):
  monkeypatch.setattr(scaling, "_STARTS", 8)
  monkeypatch.setattr(fit_law, "__kwdefaults__", {"resamples": 10, "seed": 0})
  write_sweep(tmp_path, flops=flops)
  scaling.scaling(str(tmp_path))
  out = capsys.readouterr().out
  assert "12 of 12 runs have finished" in out
  assert "alpha = 0.34 [0.34, 0.34]" in out
  assert ("C = 6.6 N D, the median of the runs' recorded FLOPs" in out) == flops
  assert ("C = 6 N D, as not every run recorded its FLOPs" in out) != flops
  budgets = [line for line in out.splitlines() if " FLOPs: N = " in line and "[" in line]
  assert ["a guess" in line for line in budgets] == [False, False, True, True]
  assert (tmp_path / "scaling.png").exists()
  check = drawn[0].axes[1]
  predicted, measured = check.collections[0].get_offsets().T
  assert len(measured) == 12
  np.testing.assert_allclose(predicted, measured, rtol=1e-3)


def test_a_sweep_that_is_none_or_too_small_is_refused_by_name(tmp_path):
  with pytest.raises(UserError, match=f"{tmp_path}: not the work directory of a sweep"):
    scaling.scaling(str(tmp_path))
  write_sweep(tmp_path, sizes=((32, 2),))
  with pytest.raises(UserError, match=f"{tmp_path}: a scaling law needs .* have 3, 1 and 3"):
    scaling.scaling(str(tmp_path))
