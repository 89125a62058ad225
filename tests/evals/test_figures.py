import numpy as np
import pytest

from gptjax.evals import figures


def test_a_confusion_matrix_has_its_counts_where_rows_are_what_is_right(tmp_path, drawn):
  figures.classification(tmp_path / "a.png", ["pos", "neg"], [[5, 2], [0, 1]])
  (axes,) = drawn[0].axes
  assert axes.images[0].get_array().tolist() == [[5, 2], [0, 1]]
  assert {text.get_position(): text.get_text() for text in axes.texts} == {
    (0, 0): "5",
    (1, 0): "2",
    (0, 1): "0",
    (1, 1): "1",
  }
  assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "right")
  for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
    assert [label.get_text() for label in labels] == ["pos", "neg"]
  assert (tmp_path / "a.png").exists()


def test_a_panel_of_calibration_has_accuracy_by_confidence(tmp_path, drawn):
  confidence = np.array([0.4, 0.91, 0.95, 0.99])
  correct = np.array([True, True, False, True])
  figures.classification(tmp_path / "a.png", ["pos", "neg"], [[1, 0], [1, 2]], confidence, correct)
  _, axes = drawn[0].axes
  dots = axes.collections[0]
  assert dots.get_offsets().tolist() == pytest.approx(np.array([[0.4, 1], [0.95, 2 / 3]]))
  small, large = dots.get_sizes()
  assert large > small  # Three of the four are in the second interval.
  assert axes.lines[0].get_xydata().tolist() == [[0, 0], [1, 1]]
