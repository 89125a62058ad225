"""Files that tests make beside the package go with them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = "tests/finetuning/test_records.py"
LEAVES_A_FOLDER = f"{FILE}::test_a_set_of_tfds_opens_by_its_names_of_labels"


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_nothing_is_left_among_temporary_files(tmp_path, workers):
  (tmp_path / "temporary").mkdir()
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-q", "-n", workers, LEAVES_A_FOLDER]
    + [f"--basetemp={tmp_path / 'tests'}"],
    env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout
  assert list((tmp_path / "temporary").iterdir()) == []
