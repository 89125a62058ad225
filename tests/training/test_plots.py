import json

import pytest

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


@pytest.mark.parametrize("baselines", [None, {}, {"gzip -9": 2.5, "byte 5-gram": 2.0}])
def test_the_curve_is_a_picture_beside_the_metrics(tmp_path, baselines):
  write(tmp_path, LINES)
  path = plot.loss_curve(tmp_path, baselines)
  assert path == tmp_path / "loss.png"
  assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("lines", [[], [{"step": 1, "loss": None}], LINES[:1]])
def test_a_run_with_little_to_show_is_drawn_too(tmp_path, lines):
  write(tmp_path, lines)
  assert plot.loss_curve(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_baselines_are_in_the_picture(tmp_path):
  write(tmp_path, LINES)
  without = plot.loss_curve(tmp_path).read_bytes()
  assert plot.loss_curve(tmp_path, {"gzip -9": 2.5}).read_bytes() != without
