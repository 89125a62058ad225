import numpy as np
import pytest
from matplotlib import image
from optuna.distributions import CategoricalDistribution, FloatDistribution

from gptjax.sweeps import plots


def curve(*values):
  x = np.arange(len(values), dtype=float)
  return {"tokens": 100 * x, "seconds": x}, np.array(values, float)


def test_the_band_is_the_range_of_two_seeds_and_one_sigma_of_three():
  x = np.arange(3.0)
  two = plots.band([(x, x), (x, x + 2)])
  assert [part.tolist() for part in two] == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
  three = plots.band([(x, x), (x, x + 2), (x, x + 4)])
  assert [part.tolist() for part in three] == [[0, 1, 2], [0, 1, 2], [2, 3, 4], [4, 5, 6]]
  # Between the points of one run the other is interpolated; where one has ended, there is no band.
  points, _, mean, _ = plots.band([(x, x), (np.array([0.0, 1.5]), np.array([0.0, 3.0]))])
  assert points.tolist() == [0, 1, 1.5]
  assert mean.tolist() == [0, 1.5, 2.25]


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_learning_curves_name_axes_and_list_the_best_first(lower_is_better):
  arms = {
    "last": [curve(9, 3, 3)],
    "top": [curve(9, 2, 1), curve(9, 2, 1.2)],
    "mid": [curve(9, 2, 2)],
  }
  label = "validation loss (nats a token)"
  figure = plots.learning_curves(
    arms, ["tokens", "seconds"], label, lower_is_better=lower_is_better
  )
  tokens, seconds = figure.axes
  order = ["top", "mid", "last"] if lower_is_better else ["last", "mid", "top"]
  assert [text.get_text() for text in seconds.get_legend().get_texts()] == order
  assert tokens.get_xlabel() == "training tokens"
  assert seconds.get_xlabel().endswith("(s)")
  assert tokens.get_ylabel() == "validation loss (nats a token)"
  colors = {line.get_label(): line.get_color() for line in tokens.lines}
  assert colors["last"] == plots.COLORS[0]
  assert len({*colors.values()}) == 3
  # The mean over two seeds, against what each panel is about.
  drawn = {line.get_label(): line for line in tokens.lines}
  assert drawn["top"].get_xydata().tolist() == [[0, 9], [100, 2], [200, 1.1]]
  assert seconds.lines[0].get_xdata().tolist() == [0, 1, 2]


def test_more_arms_than_colors_differ_by_style():
  arms = {f"arm {i}": [curve(2, 1 + i)] for i in range(20)}
  axes = plots.learning_curves(arms, ["tokens"], "loss", lower_is_better=True).axes[0]
  looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
  assert len(looks) == 20


def test_differences_are_drawn_about_zero():
  rows = [
    {"arm": "a", "difference": -0.3, "low": -0.4, "high": -0.2, "verdict": "winner"},
    {"arm": "b", "difference": 0.1, "low": -0.1, "high": 0.3, "verdict": "inside the noise"},
  ]
  axes = plots.differences(rows, "difference").axes[0]
  assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
  assert [line.get_xdata().tolist() for line in axes.lines[:4:2]] == [[-0.4, -0.2], [-0.1, 0.3]]
  assert [np.ravel(line.get_xdata()).tolist() for line in axes.lines[1:4:2]] == [[-0.3], [0.1]]
  assert axes.lines[-1].get_xdata() == [0, 0]
  assert [text.get_text() for text in axes.texts] == [
    "-0.3000  winner",
    "+0.1000  inside the noise",
  ]


@pytest.mark.parametrize(
  ("settings", "expected"),
  [
    ([1, 2, 3.5], FloatDistribution(1, 3.5)),
    ([1e-4, 1e-1], FloatDistribution(1e-4, 1e-1, log=True)),
    ([1e-3, 1e-1], FloatDistribution(1e-3, 1e-1)),
    ([0, 1e5], FloatDistribution(0, 1e5)),
    (["b", "a", "b"], CategoricalDistribution(["a", "b"])),
    ([True, False], CategoricalDistribution(["False", "True"])),
    ([1, "x", (2, 3)], CategoricalDistribution(["(2, 3)", "1", "x"])),
  ],
)
def test_an_axis_is_log_over_two_decades_and_has_places_for_words(settings, expected):
  assert plots.scale(settings) == expected


TRIALS = [
  {"lr": 1e-4, "name": "adamw", "tied": True},
  {"lr": 1e-2, "name": "muon"},
  {"lr": 1e-1, "name": "lion", "tied": True},
]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_search_is_drawn_with_a_panel_a_key_and_a_line_a_trial(sign):
  values = [sign * 3.0, sign * 1.0, sign * 2.0]
  drawn = plots.search(TRIALS, values, "loss", lower_is_better=sign > 0)
  panels = {axes.get_xlabel(): axes for axes in drawn["slices"].axes if axes.get_xlabel()}
  assert [*panels] == ["lr", "name", "tied"]
  assert [axes.get_xscale() for axes in panels.values()] == ["log", "linear", "linear"]
  dots = panels["lr"].collections[0].get_offsets()
  assert sorted(dots.tolist()) == [[1e-4, sign * 3], [1e-2, sign * 1], [1e-1, sign * 2]]
  # A key is drawn of the trials that have it.
  assert len(panels["tied"].collections[0].get_offsets()) == 2
  axes = drawn["parallel"].axes[0]
  lines = axes.collections[0]
  assert [label.get_text() for label in axes.get_xticklabels()] == ["loss", "lr", "name", "tied"]
  heights = {line[0][1]: line[1][1] for line in lines.get_segments()}
  span = abs(values[0] - values[1])
  low = min(values)
  found = {value: (height - low) / span for value, height in heights.items()}
  assert found == pytest.approx({sign * 3.0: 0, sign * 1.0: 2 / 3, sign * 2.0: 1})  # log of lr


def test_the_law_is_drawn_through_the_runs_that_follow_it():
  N = np.geomspace(1e6, 1e8, 4)
  law = lambda N, D: 2 + 400 / N**0.34 + 400 / D**0.28  # noqa: E731
  L = law(N, 20 * N)
  figure = plots.scaling(N, 20 * N, L, 120 * N**2, law, 6.0, [120 * N[1] ** 2])
  sizes, check = figure.axes[:2]
  np.testing.assert_allclose(sizes.collections[0].get_offsets(), np.column_stack([N, L]))
  (line,) = sizes.lines
  assert np.interp(N[1], *line.get_xydata().T) == pytest.approx(L[1], rel=1e-3)
  np.testing.assert_allclose(check.collections[0].get_offsets(), np.column_stack([L, L]))


def test_a_picture_is_1200_pixels_wide(tmp_path):
  row = {"arm": "a", "difference": 0.1, "low": 0.0, "high": 0.2, "verdict": "worse"}
  (tmp_path / "a.png").write_bytes(plots.png(plots.differences([row], "difference")))
  found = image.imread(tmp_path / "a.png")
  assert found.shape[1] == 1200
  assert found.std() > 0.05
