"""The notebooks run from the first cell to the last, on a CPU, in the setting they choose there."""

from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
# What each prints when it has done what it promises, in this order.
RESULTS = {
  "ablation": ("total: 6 trials", "adamw seed 2: done", "## Verdict", "p is corrected by Holm"),
  "chat": ("Paris", "the server is ready", "answer in the schema: {'city': ", "ended with 0"),
  "compress": ("bytes of parameters", "int4-gptq", "KL from the original", "8 at once", "import "),
  "pretrain_tpu": ("mesh: ", "killed after step", "resuming at step", "tokens_per_second"),
  "quickstart": ("validation bits per byte:",),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, cpu_devices, monkeypatch, tmp_path):
  for name, value in cpu_devices(1).items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(
    notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
  )
  client.execute()
  printed = "".join(
    output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
  )
  at = [printed.find(result) for result in RESULTS[path.stem]]
  assert -1 not in at, printed
  assert at == sorted(at)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_without_outputs(path):
  for cell in nbformat.read(path, as_version=4).cells:
    assert not cell.get("outputs")
    assert cell.get("execution_count") is None
