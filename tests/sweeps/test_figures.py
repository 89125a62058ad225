import io

import numpy as np
import pytest
from matplotlib import image

from gptjax.sweeps import figures


def pixels(png):
  return image.imread(io.BytesIO(png))


def curve(*values):
  x = np.arange(len(values), dtype=float)
  return {"tokens": 100 * x, "seconds": x}, np.array(values, float)


def capture(monkeypatch):
  """The figures that are drawn, before they become pixels."""
  drawn = []
  monkeypatch.setattr(figures, "png", lambda figure: drawn.append(figure) or b"")
  return drawn


def test_the_band_is_the_range_of_two_seeds_and_one_sigma_of_three():
  x = np.arange(3.0)
  two = figures.band([(x, x), (x, x + 2)])
  assert [part.tolist() for part in two] == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
  three = figures.band([(x, x), (x, x + 2), (x, x + 4)])
  assert [part.tolist() for part in three] == [[0, 1, 2], [0, 1, 2], [2, 3, 4], [4, 5, 6]]
  # Between the points of one run the other is interpolated; where one has ended, there is no band.
  points, _, mean, _ = figures.band([(x, x), (np.array([0.0, 1.5]), np.array([0.0, 3.0]))])
  assert points.tolist() == [0, 1, 1.5]
  assert mean.tolist() == [0, 1.5, 2.25]


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_learning_curves_name_axes_and_list_the_best_first(lower_is_better, monkeypatch):
  drawn = capture(monkeypatch)
  arms = {
    "last": [curve(9, 3, 3)],
    "top": [curve(9, 2, 1), curve(9, 2, 1.2)],
    "mid": [curve(9, 2, 2)],
  }
  label = "validation loss (nats a token)"
  figures.learning_curves(arms, ["tokens", "seconds"], label, lower_is_better=lower_is_better)
  tokens, seconds = drawn[0].axes
  order = ["top", "mid", "last"] if lower_is_better else ["last", "mid", "top"]
  assert [text.get_text() for text in seconds.get_legend().get_texts()] == order
  assert tokens.get_xlabel() == "training tokens"
  assert seconds.get_xlabel().endswith("(s)")
  assert tokens.get_ylabel() == "validation loss (nats a token)"
  colors = {line.get_label(): line.get_color() for line in tokens.lines}
  assert colors["last"] == figures.COLORS[0]
  assert len({*colors.values()}) == 3


def test_more_arms_than_colors_differ_by_style(monkeypatch):
  drawn = capture(monkeypatch)
  arms = {f"arm {i}": [curve(2, 1 + i)] for i in range(20)}
  figures.learning_curves(arms, ["tokens"], "loss", lower_is_better=True)
  looks = {(line.get_color(), line.get_linestyle()) for line in drawn[0].axes[0].lines}
  assert len(looks) == 20


def test_differences_are_drawn_about_zero(monkeypatch):
  drawn = capture(monkeypatch)
  rows = [("a", -0.3, -0.4, -0.2, "winner"), ("b", 0.1, -0.1, 0.3, "inside the noise")]
  figures.differences(rows, "difference")
  axes = drawn[0].axes[0]
  assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
  assert axes.lines[0].get_xdata().tolist() == [-0.4, -0.2]
  assert axes.lines[-1].get_xdata() == [0, 0]


@pytest.mark.parametrize(
  ("settings", "positions", "texts", "log"),
  [
    ([1, 2, 3.5], [1, 2, 3.5], [], False),
    ([1e-4, 1e-1], [1e-4, 1e-1], [], True),
    ([1e-3, 1e-1], [1e-3, 1e-1], [], False),
    ([0, 1e5], [0, 1e5], [], False),
    (["b", "a", "b"], [1, 0, 1], [(0, "a"), (1, "b")], False),
    ([True, False], [1, 0], [(0, "False"), (1, "True")], False),
    ([1, "x"], [0, 1], [(0, "1"), (1, "x")], False),
  ],
)
def test_an_axis_is_log_over_two_decades_and_has_places_for_words(settings, positions, texts, log):
  x, marks, is_log = figures.scale(settings)
  assert (x.tolist(), marks, is_log) == (positions, texts, log)


TRIALS = [
  {"lr": 1e-4, "name": "adamw", "tied": True},
  {"lr": 1e-2, "name": "muon"},
  {"lr": 1e-1, "name": "lion", "tied": True},
]


@pytest.mark.parametrize("sign", [1, -1])
def test_slices_have_a_panel_a_key_and_ring_the_best(sign, monkeypatch):
  drawn = capture(monkeypatch)
  values = [sign * 3.0, sign * 1.0, sign * 2.0]
  figures.slices(TRIALS, values, "loss", lower_is_better=sign > 0)
  panels = drawn[0].axes[:3]
  assert [axes.get_xlabel() for axes in panels] == ["lr", "name", "tied"]
  assert [axes.get_xscale() for axes in panels] == ["log", "linear", "linear"]
  assert [label.get_text() for label in panels[1].get_xticklabels()] == ["adamw", "lion", "muon"]
  assert panels[0].lines[0].get_xydata().tolist() == [[1e-2, sign * 1.0]]
  assert panels[2].lines[0].get_xydata().tolist() == [
    [0, sign * 2.0]
  ]  # Of those that have the key.


@pytest.mark.parametrize("sign", [1, -1])
def test_parallel_coordinates_draw_the_best_last(sign, monkeypatch):
  drawn = capture(monkeypatch)
  values = [sign * 3.0, sign * 1.0, sign * 2.0]
  figures.parallel(TRIALS, values, "loss", lower_is_better=sign > 0)
  lines = drawn[0].axes[0].collections[0]
  assert lines.get_array().tolist() == [sign * 3.0, sign * 2.0, sign * 1.0]
  assert lines.get_linewidths()[-1] == max(lines.get_linewidths())
  heights = lines.get_segments()[-1]
  assert heights[0].tolist() == pytest.approx([0, 2 / 3])  # 1e-2 on a log axis from 1e-4 to 1e-1.


def test_pictures_are_1200_pixels_wide_and_not_blank():
  N = np.geomspace(1e6, 1e8, 4)
  law = lambda N, D: 2 + 400 / N**0.34 + 400 / D**0.28  # noqa: E731
  for png in (
    figures.learning_curves({"a": [curve(3, 2, 1)]}, ["tokens"], "loss", lower_is_better=True),
    figures.slices(TRIALS, [3.0, 1.0, 2.0], "loss", lower_is_better=True),
    figures.parallel(TRIALS[:1], [3.0], "loss", lower_is_better=True),
    figures.differences([("a", 0.1, 0.0, 0.2, "worse")], "difference"),
    figures.scaling(N, 20 * N, law(N, 20 * N), 120 * N**2, law, 6.0, []),
  ):
    found = pixels(png)
    assert found.shape[1] == 1200
    assert found.std() > 0.05
