import json

import numpy as np
import pytest
from matplotlib import image

from gptjax.training import plots as plot

LINES = [
  {"step": 0, "val/bits_per_byte": 8.0},
  {"step": 1, "loss": 5.0, "grad_norm": 1.0},
  {"step": 2, "loss": None},
  {"step": 3, "loss": 3.0, "val/bits_per_byte": None},
  {"step": 4, "val/bits_per_byte": 4.0},
]


def write(workdir, lines):
  (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def points(axes):
  """[step, value] of each line of the panel."""
  return [line.get_xydata().tolist() for line in axes.lines]


def test_the_curve_is_a_picture_beside_the_metrics(tmp_path, drawn):
  write(tmp_path, LINES)
  assert plot.loss_curve(tmp_path) == tmp_path / "loss.png"
  training, validation = drawn[0].axes
  assert points(training) == [[[1, 5], [3, 3]]]
  assert points(validation) == [[[0, 8], [4, 4]]]
  assert training.get_ylabel() == "training loss (nats a token)"
  assert validation.get_ylabel() == "validation bits per byte"
  assert image.imread(tmp_path / "loss.png").std() > 0.05


def test_without_bits_per_byte_the_validation_loss_is_drawn(tmp_path, drawn):
  write(tmp_path, [{"step": 2, "val/loss": 1.5}])
  plot.loss_curve(tmp_path)
  validation = drawn[0].axes[1]
  assert points(validation) == [[[2, 1.5]]]
  assert validation.get_ylabel() == "validation loss (nats a token)"


@pytest.mark.parametrize("lines", [[], [{"step": 1, "loss": None}], LINES[:1]])
def test_a_run_with_little_to_show_is_drawn_too(tmp_path, lines, drawn):
  write(tmp_path, lines)
  plot.loss_curve(tmp_path)
  training, validation = drawn[0].axes
  assert points(training) == []
  assert points(validation) == ([[[0, 8]]] if lines == LINES[:1] else [])


def test_baselines_are_lines_with_their_names(tmp_path, drawn):
  write(tmp_path, LINES)
  plot.loss_curve(tmp_path, {"gzip -9": 2.5, "byte 5-gram": 2.0})
  validation = drawn[0].axes[1]
  assert [np.unique(line.get_ydata()).tolist() for line in validation.lines[1:]] == [[2.5], [2.0]]
  assert [text.get_text() for text in validation.texts] == ["gzip -9 2.500", "byte 5-gram 2.000"]
