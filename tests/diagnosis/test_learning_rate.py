import csv

import numpy as np
import pytest

from gptjax.diagnosis import learning_rate
from gptjax.errors import UserError
from gptjax.training.datasets import open_dataset
from gptjax.training.resolve import resolve
from gptjax.training.setup import make_setup


def test_it_ends_when_half_of_the_descent_is_lost():
  descent = [*np.linspace(5, 3, 50)]
  assert not learning_rate.has_turned(descent)
  assert not learning_rate.has_turned([*descent, *[3.5] * 60])
  assert learning_rate.has_turned([*descent, *[4.5] * 60])
  noise = np.random.default_rng(0).normal(5, 0.1, 200)
  assert not any(learning_rate.has_turned(noise[: i + 1]) for i in range(200))


def test_smoothing_does_not_lag():
  line = np.arange(30.0)
  np.testing.assert_allclose(learning_rate.smooth(line), line)


@pytest.mark.slow
def test_a_tiny_model_has_its_range(make_config, tmp_path, capsys, drawn):
  config = make_config()
  setup, dataset = make_setup(resolve(config)), open_dataset(config, tmp_path)
  steepest, turned = learning_rate.range_test(
    setup, dataset, tmp_path, low=1e-4, high=100.0, steps=120
  )
  assert 1e-3 < steepest < turned < 1.0
  printed = capsys.readouterr().out
  assert f"steepest descent at learning rate {steepest:.3g}" in printed
  rows = list(csv.DictReader((tmp_path / "learning_rate.csv").open()))
  assert len(rows) < 120  # it did not go on to 100
  assert f"ended after step {len(rows)} of 120" in printed
  losses = [float(row["loss"]) for row in rows]
  assert losses[-1] > min(losses) + learning_rate.RISE
  assert float(rows[1]["learning_rate"]) == pytest.approx(1e-4 * 1e6 ** (1 / 119))
  assert (tmp_path / "learning_rate.png").exists()
  (axes,) = drawn[0].axes
  raw, smoothed, *marks = axes.lines
  rates = [float(row["learning_rate"]) for row in rows]
  np.testing.assert_allclose(raw.get_xydata(), np.column_stack([rates, losses]), rtol=1e-6)
  np.testing.assert_allclose(smoothed.get_ydata(), [float(row["smoothed"]) for row in rows], 1e-6)
  assert [mark.get_xdata()[0] for mark in marks] == pytest.approx([steepest, turned])


@pytest.mark.parametrize(
  ("wrong", "message"),
  [({"low": 0.0}, "--low=0"), ({"high": 1e-6}, "--high=1e-06"), ({"steps": 3}, "--steps=3")],
)
def test_bad_ranges_are_refused(tmp_path, wrong, message):
  arguments = {"low": 1e-5, "high": 1.0, "steps": 100} | wrong
  with pytest.raises(UserError, match=message):
    learning_rate.range_test(None, None, tmp_path, **arguments)
