"""The loss curve of a run as a picture."""

import io

from etils import epath

from gptjax.small_files import write_atomically
from gptjax.training.metrics import read_metrics


def loss_curve(workdir: epath.PathLike, baselines: dict[str, float] | None = None) -> epath.Path:
  """Draws training loss and validation bits per byte of `metrics.jsonl` into `loss.png`.

  Args:
    workdir: folder of the run.
    baselines: bits per byte of other methods, drawn as lines with their names.

  Returns:
    The path of the picture.
  """
  # Imported here: it takes a second, and only the end of a run needs it.
  from matplotlib.figure import Figure

  workdir = epath.Path(workdir)
  lines = read_metrics(workdir)
  figure = Figure(figsize=(9, 3.6), layout="constrained")
  training, validation = figure.subplots(1, 2)

  def draw(axes, key: str, label: str, **style):
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    axes.plot(*zip(*points, strict=True), **style) if points else None
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)

  draw(training, "loss", "training loss (nats a token)", linewidth=1)
  key, label = "val/bits_per_byte", "validation bits per byte"
  if not any(key in line for line in lines):  # Not all of the text is predicted.
    key, label = "val/loss", "validation loss (nats a token)"
  draw(validation, key, label, marker="o", markersize=3)
  for color, (name, value) in zip(("C1", "C2", "C3"), (baselines or {}).items(), strict=False):
    validation.axhline(value, color=color, linestyle="--", linewidth=1)
    validation.annotate(
      f"{name} {value:.3f}", (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom"
    )
  buffer = io.BytesIO()
  figure.savefig(buffer, dpi=120)
  path = workdir / "loss.png"
  write_atomically(path, buffer.getvalue())
  return path
