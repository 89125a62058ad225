import struct

import numpy as np
import pytest

from gptjax.evals import figures


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_picture_with_a_panel_for_calibration(tmp_path, calibrated):
  measured = (np.array([0.4, 0.9]), np.array([True, False])) if calibrated else ()
  path = tmp_path / "a.png"
  figures.classification(path, ["pos", "neg"], [[1, 0], [1, 0]], *measured)
  content = path.read_bytes()
  assert content.startswith(b"\x89PNG")
  width, height = struct.unpack(">II", content[16:24])
  assert (width > 2 * height) == calibrated
