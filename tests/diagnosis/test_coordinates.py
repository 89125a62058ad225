import csv

import numpy as np
import pytest

from gptjax.diagnosis import coordinates
from gptjax.errors import UserError
from gptjax.training.datasets import open_dataset

WIDTHS = (32, 256)
STEPS = 3
# The slope of a broken rule is 0.5 or more; two seeds of these widths scatter by 0.1.
FLAT = 0.25


@pytest.fixture(scope="module")
def slopes(make_config, tmp_path_factory):
  """Returns a function: parametrization -> (slopes, work directory)."""

  def measure(parametrization, **changes):
    workdir = tmp_path_factory.mktemp(parametrization)
    config = make_config(
      **{"model.transfer.parametrization": parametrization, "model.transfer.base_embed_dim": 32},
      **changes,
    )
    dataset = open_dataset(config, workdir)
    found = coordinates.check(config, dataset, workdir, widths=WIDTHS, steps=STEPS, seeds=2)
    return found, workdir

  return measure


@pytest.mark.slow
def test_activations_move_as_far_at_any_width_under_mup(slopes, capsys, drawn):
  found, workdir = slopes("mup")
  # The logits start as a sum of random terms over the width, which shrinks with its root.
  del found["logits"]
  assert {name: value for name, value in found.items() if abs(value) > FLAT} == {}
  printed = capsys.readouterr().out
  assert "flat within 0.15" in printed
  rows = list(csv.DictReader((workdir / "coordinates.csv").open()))
  assert len(rows) == len(WIDTHS) * 2 * (STEPS + 1) * len(coordinates.QUANTITIES)
  assert {float(row["change"]) for row in rows if row["step"] == "0"} == {0.0}
  # The slopes are of what the table holds.
  last = [row for row in rows if row["quantity"] == "logits" and row["step"] == str(STEPS)]
  logs = [
    np.mean([np.log(float(row["change"])) for row in last if row["width"] == str(width)])
    for width in WIDTHS
  ]
  assert (workdir / "coordinates.png").exists()
  (panel,) = [axes for axes in drawn[0].axes if axes.get_title() == "change of logits"]
  lines = {line.get_label(): line for line in panel.lines}
  assert [*lines] == [f"step {step}" for step in range(1, STEPS + 1)]  # Step 0 changes nothing.
  assert lines[f"step {STEPS}"].get_xdata().tolist() == [*WIDTHS]
  np.testing.assert_allclose(lines[f"step {STEPS}"].get_ydata(), np.exp(logs), rtol=1e-4)
  expected = np.polyfit(np.log(WIDTHS), logs, 1)[0]
  assert found["change of logits"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_they_move_further_the_wider_the_standard_model(slopes):
  found, _ = slopes("standard")
  for quantity in ("attention", "mlp", "residual", "logits"):
    assert found[f"change of {quantity}"] > 0.5, found


@pytest.mark.parametrize(
  ("value", "said"), [(0.1, "flat"), (-0.1, "flat"), (0.5, "grows"), (-0.5, "shrinks")]
)
def test_the_verdict_of_a_slope(value, said):
  assert coordinates.verdict(coordinates.slope(WIDTHS, 3 * np.array(WIDTHS) ** value)) == said


def test_heads_are_added_and_not_widened(make_config):
  config = make_config(**{"model.num_heads": 2, "model.num_kv_heads": 1})
  wide = coordinates.widen(config, 96).model
  assert (wide.embed_dim, wide.num_heads, wide.num_kv_heads, wide.mlp_dim) == (96, 6, 3, 192)
  assert config.model.embed_dim == 32
  with pytest.raises(UserError, match=r"--widths: 48 is 1.5 times .* model.num_kv_heads=1"):
    coordinates.widen(config, 48)


@pytest.mark.parametrize("wrong", [{"widths": (32, 32)}, {"steps": 0}, {"widths": (0, 32)}])
def test_what_cannot_be_fitted_is_refused(make_config, tmp_path, wrong):
  arguments = {"widths": WIDTHS, "steps": 1, "seeds": 1} | wrong
  with pytest.raises(UserError, match="--widths"):
    coordinates.check(make_config(), None, tmp_path, **arguments)
