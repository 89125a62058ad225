"""Metrics of a run: exact means, tokens per second, and writers to files and services."""

import contextlib
import importlib
import json
import math
import os
import pathlib
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import jax
from absl import logging
from etils import epath
from tqdm import tqdm

from gptjax.devices import chips
from gptjax.errors import UserError
from gptjax.small_files import parse_json, read_bytes, write_atomically

_UPLOAD_SECONDS = 60.0
PLAIN_LINE_SECONDS = 15.0


class Sums:
  """Sums of (value, weight) pairs over many batches, finished into means.

  The sums stay on the device until `finish`, so that adding never waits for a step, and are then
  added in float64: float32 could not count beyond 2**24 tokens.
  """

  def __init__(self):
    self._pairs: list[Mapping[str, tuple[Any, Any]]] = []

  def add(self, pairs: Mapping[str, tuple[Any, Any]]) -> None:
    """Adds a batch: the name of each metric -> (sum over the tokens, sum of their weights)."""
    self._pairs.append(dict(pairs))

  def finish(self, *, text_bytes: float | None = None) -> dict[str, float]:
    """Returns each metric's mean, NaN if the weights are all zero.

    If `loss` is among them (nats, summed over tokens) also `perplexity`, and `bits_per_byte` given
    `text_bytes`, the UTF-8 bytes of those tokens.
    """
    batches = jax.device_get(self._pairs)
    sums, means = {}, {}
    for name in {name: None for batch in batches for name in batch}:
      pairs = [batch[name] for batch in batches if name in batch]
      sums[name] = math.fsum(float(value) for value, _ in pairs)
      weight = math.fsum(float(weight) for _, weight in pairs)
      means[name] = sums[name] / weight if weight else math.nan
    if "loss" in means:
      means["perplexity"] = math.exp(means["loss"]) if not means["loss"] > 700 else math.inf
      if text_bytes is not None:
        means["bits_per_byte"] = sums["loss"] / math.log(2) / text_bytes
    return means


class Throughput:
  """Measures tokens per second of training alone.

  The clock runs from one `tick` to the next, each after the results of a step have arrived. The
  first tick only starts it, so compilation is left out; so does the first after a `restart`, which
  the loop calls whenever it does something else (evaluates, saves).
  """

  def __init__(self):
    self._since: float | None = None
    self._tokens = 0
    self._seconds = 0.0
    self._all_ticks = 0
    self._all_seconds = 0.0

  def tick(self, tokens: int) -> None:
    """Counts a step of `tokens` tokens whose results have just arrived on the host."""
    now = time.perf_counter()
    if self._since is not None:
      self._tokens += tokens
      self._seconds += now - self._since
      self._all_ticks += 1
      self._all_seconds += now - self._since
    self._since = now

  def restart(self) -> None:
    """Excludes the time until the next tick."""
    self._since = None

  def rate(self) -> float | None:
    """Returns the tokens per second since the last call; None if no step was timed."""
    rate = self._tokens / self._seconds if self._seconds else None
    self._tokens, self._seconds = 0, 0.0
    return rate

  def seconds_per_tick(self) -> float | None:
    """Returns the mean over all timed steps so far; None if there is none."""
    return self._all_seconds / self._all_ticks if self._all_ticks else None


class Writer:
  """Writes metrics to `WORKDIR/metrics.jsonl`, TensorBoard, Weights & Biases and the terminal.

  metrics.jsonl holds one JSON object a line, `step` first, floats with all their digits. JSON has
  no NaN or infinity: they are null there, and named in `nonfinite`, {"loss": "nan"}. An unknown
  value (None) is null alone.

  A run that resumes at step S writes S + 1 and later steps again, so they are dropped first.

  On a local disk every line is flushed at once. Object stores cannot append: with a `workdir` on
  gs:// the files grow in a temporary folder and are copied there once a minute and at the end.

  Args:
    workdir: the run's folder. Created if necessary.
    total_steps: for the progress bar.
    resume_step: the step that the run goes on from; 0 at its beginning.
    tensorboard: write event files to `WORKDIR/tensorboard`.
    wandb: report to Weights & Biases, under one run for all resumptions.
    run_config: the config as plain data, for TensorBoard and Weights & Biases.
    process_index: every process but 0 writes nothing.

  Raises:
    UserError: `workdir` cannot be written, or wandb is not installed.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    *,
    total_steps: int,
    resume_step: int,
    tensorboard: bool,
    wandb: bool,
    run_config: Mapping[str, Any],
    process_index: int = 0,
  ):
    self._active = process_index == 0
    if not self._active:
      return
    self._workdir = epath.Path(workdir)
    with contextlib.ExitStack() as stack:
      try:
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._folder = pathlib.Path(os.fspath(workdir))
        self._remote = _is_remote(workdir)
        if self._remote:
          self._folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
          if (self._workdir / "metrics.jsonl").exists():
            (self._workdir / "metrics.jsonl").copy(self._folder / "metrics.jsonl")
        _drop_after(self._folder / "metrics.jsonl", resume_step)
        self._lines = stack.enter_context((self._folder / "metrics.jsonl").open("a"))
      except OSError as error:
        raise UserError(f"{workdir}: cannot write metrics here: {error.strerror}") from error
      self._tensorboard = None
      if tensorboard:
        self._tensorboard = _import_tensorboard().SummaryWriter(
          str(self._folder / "tensorboard"),
          purge_step=resume_step + 1,
          flush_secs=30,
          filename_suffix=f".{resume_step}",
        )
        stack.callback(self._tensorboard.close)
        config_text = json.dumps(run_config, indent=2, default=str)
        self._tensorboard.add_text("config", f"```\n{config_text}\n```", resume_step)
      self._wandb = _start_wandb(self._workdir, run_config) if wandb else None
      if self._wandb is not None:
        stack.callback(self._wandb.finish)
      self._progress = _Progress(total_steps, resume_step)
      stack.callback(self._progress.close)
      self._resources = stack.pop_all()
    self._uploaded = time.monotonic()

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes the metrics of a step: numbers, scalar arrays (already on the host), or None."""
    if not self._active:
      return
    values = {name: _plain(value) for name, value in metrics.items()}
    try:
      self._lines.write(_json_line(step, values))
      self._lines.flush()
    except OSError as error:
      raise UserError(f"{self._workdir}: cannot write metrics here: {error.strerror}") from error
    known = {name: value for name, value in values.items() if value is not None}
    if self._tensorboard is not None:
      for name, value in known.items():
        self._tensorboard.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(known, step=step)
    self._progress.update(step, known)
    if self._remote and time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
      self.upload()

  def write_text(self, step: int, name: str, text: str) -> None:
    """Writes a text, such as a sample, to TensorBoard and the terminal."""
    if not self._active:
      return
    if self._tensorboard is not None:
      self._tensorboard.add_text(name, f"```\n{text}\n```", step)
    self.message(f"{name} at step {step}: {text}")

  def message(self, text: str) -> None:
    """Prints a text above the progress bar."""
    if self._active:
      tqdm.write(text)
      sys.stdout.flush()

  def close(self) -> None:
    """Finishes all files. The writer cannot be used afterwards."""
    if not self._active:
      return
    self._active = False
    with self._resources:
      if self._tensorboard is not None:
        self._tensorboard.close()  # Only this writes everything that is queued.
      self.upload()

  def upload(self) -> None:
    """Copies the files to the object store, if the work directory is on one."""
    if not self._remote:
      return
    for path in self._folder.rglob("*"):
      if path.is_file():
        target = self._workdir / path.relative_to(self._folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, path.read_bytes())
    self._uploaded = time.monotonic()


@contextlib.contextmanager
def waiting(what: str, *, quiet: bool = False) -> Iterator[None]:
  """Says on stderr that something is going on which may take minutes, and how long it took."""
  start = time.perf_counter()
  if not quiet:
    tqdm.write(f"{what} ...", file=sys.stderr)
  yield
  if not quiet:
    tqdm.write(f"{what}: {time.perf_counter() - start:.1f} s", file=sys.stderr)


def is_live() -> bool:
  """Whether stderr is a terminal or a notebook, where a bar can be drawn again in its place."""
  return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel")


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """Returns the lines of `WORKDIR/metrics.jsonl`, oldest first, none if there is no such file, and
  without one that is still being written; UserError for a line that is damaged."""
  path = epath.Path(workdir) / "metrics.jsonl"
  if not path.exists():
    return []
  found, text = [], read_bytes(path).decode(errors="replace")
  for number, line in enumerate(text.splitlines(keepends=True), 1):
    if line.endswith("\n"):
      found.append(parse_json(line, f"{path}:{number}"))
      if not isinstance(found[-1], dict) or "step" not in found[-1]:
        raise UserError(f"{path}:{number}: not a line of metrics: {line[:40]!r}.")
  return found


class StepLog:
  """Writes the metrics of each training step one step late, when they have already arrived.

  Args:
    writer: receives them.
    every_steps: how often a line is written; 0 is never.
    tokens_per_step: tokens of the global batch.
    flops_per_token: forward and backward, see `chips.flops_per_token`.
    first_step: steps done before a resumption.
    first_seconds: the seconds that they took, from `spent`; None if not known.
  """

  def __init__(
    self,
    writer: Writer,
    *,
    every_steps: int,
    tokens_per_step: int,
    flops_per_token: float,
    first_step: int = 0,
    first_seconds: float | None = 0.0,
  ):
    self._writer = writer
    self._every_steps = every_steps
    self._tokens_per_step = tokens_per_step
    self._flops_per_token = flops_per_token
    self._first_step, self._first_seconds = first_step, first_seconds
    self._throughput = Throughput()
    self._pending: tuple[int, Mapping[str, jax.Array]] | None = None

  def step(self, step: int, metrics: Mapping[str, jax.Array]) -> Mapping[str, Any]:
    """Takes the metrics of a step that was just dispatched; returns those of the step before."""
    arrived = self.flush()
    self._pending = (step, metrics)
    return arrived

  def flush(self) -> Mapping[str, Any]:
    """Waits for the pending step and writes it if it is due; {} if there is none."""
    return self._write_pending(timed=True)

  def _write_pending(self, *, timed: bool) -> Mapping[str, Any]:
    if self._pending is None:
      return {}
    (step, metrics), self._pending = self._pending, None
    metrics = jax.device_get(dict(metrics))
    if timed:
      self._throughput.tick(self._tokens_per_step)
    if self._every_steps and step % self._every_steps == 0:
      rate = self._throughput.rate()
      self._writer.write(
        step, {**self.spent(step), **metrics, "tokens_per_second": rate, "mfu": self._mfu(rate)}
      )
    return metrics

  def spent(self, step: int) -> dict[str, float | None]:
    """Cost of `step` steps: `tokens`, `flops` and `seconds`.

    The seconds are of training alone: the mean of the timed steps, times the number of all steps.
    So a step that also compiled, or followed an evaluation, counts as much as any other.
    """
    tokens = step * self._tokens_per_step
    mean, since = self._throughput.seconds_per_tick(), step - self._first_step
    seconds = self._first_seconds
    if since:
      seconds = None if mean is None or seconds is None else seconds + since * mean
    return {"tokens": tokens, "flops": tokens * self._flops_per_token, "seconds": seconds}

  def interrupt(self) -> Mapping[str, Any]:
    """Writes pending metrics before the loop does something else, whose time is not counted."""
    # Not timed: if dispatching a step waits for it, as it may on a CPU, the step has arrived with
    # the one before, and would seem to take no time.
    arrived = self._write_pending(timed=False)
    self._throughput.restart()
    return arrived

  def _mfu(self, tokens_per_second: float | None) -> float | None:
    if tokens_per_second is None:
      return None
    return chips.mfu(
      tokens_per_second,
      self._flops_per_token,
      device_kind=jax.devices()[0].device_kind,
      devices=jax.device_count(),
    )


class _Progress:
  """A bar in terminals and notebooks; elsewhere (a log file) now and then a line."""

  def __init__(self, total_steps: int, first_step: int):
    self._total = total_steps
    self._shown: dict[str, float] = {}
    self._started: tuple[float, int] | None = None
    self._last_line = -math.inf
    self._bar = tqdm(total=total_steps, initial=first_step, unit="step") if is_live() else None

  def update(self, step: int, metrics: Mapping[str, float]) -> None:
    shown = ("loss", "val/loss", "tokens_per_second", "mfu")
    self._shown.update({name: metrics[name] for name in shown if name in metrics})
    if self._bar is not None:
      self._bar.set_postfix_str(self._figures(), refresh=False)
      self._bar.update(step - self._bar.n)
      return
    now = time.monotonic()
    # The first step compiles, so the remaining time is estimated from its end on.
    self._started = self._started or (now, step)
    if step < self._total and now - self._last_line < PLAIN_LINE_SECONDS:
      return
    self._last_line = now
    seconds, steps = now - self._started[0], step - self._started[1]
    left = tqdm.format_interval(seconds / steps * (self._total - step)) if steps else "?"
    parts = [f"step {step}/{self._total}", self._figures(), f"{left} left"]
    print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()

  def _figures(self) -> str:
    formats = {
      "loss": "loss {:.4f}",
      "val/loss": "val/loss {:.4f}",
      "tokens_per_second": "{:,.0f} tokens/s",
      "mfu": "mfu {:.1%}",
    }
    return ", ".join(formats[name].format(value) for name, value in self._shown.items())


def _plain(value: Any) -> int | float | None:
  if value is None or isinstance(value, int):
    return value
  return float(value)


def _json_line(step: int, values: Mapping[str, int | float | None]) -> str:
  nonfinite = {
    name: str(value)
    for name, value in values.items()
    if isinstance(value, float) and not math.isfinite(value)
  }
  line = {"step": step} | {
    name: None if name in nonfinite else value for name, value in values.items()
  }
  if nonfinite:
    line["nonfinite"] = nonfinite
  return json.dumps(line, allow_nan=False) + "\n"


def _drop_after(path: pathlib.Path, step: int) -> None:
  """Drops the lines of later steps, and a line that a killed run left half-written at the end."""
  if not path.exists():
    return
  kept = []
  for number, line in enumerate(path.read_text(errors="replace").splitlines(keepends=True), 1):
    try:
      if json.loads(line)["step"] <= step and line.endswith("\n"):
        kept.append(line)
    except (ValueError, TypeError, KeyError, RecursionError):
      logging.warning("%s:%d: dropped, not a line of metrics: %.40r", path, number, line)
  write_atomically(path, "".join(kept))


def _import_tensorboard() -> ModuleType:
  """tensorboardX without torch, which it would import where there is one: for seconds, and for
  tensors that no run here has."""
  hidden = {} if "torch" in sys.modules else {"torch": None}
  sys.modules.update(hidden)
  try:
    return importlib.import_module("tensorboardX")
  finally:
    for name in hidden:
      del sys.modules[name]


def _start_wandb(workdir: epath.Path, run_config: Mapping[str, Any]) -> Any:
  try:
    import wandb
  except ImportError as error:
    raise UserError("wandb is not installed: pip install wandb") from error
  id_file = workdir / "wandb_id.txt"
  if not id_file.exists():
    write_atomically(id_file, uuid.uuid4().hex)
  return wandb.init(
    name=workdir.name,
    id=id_file.read_text(),
    resume="allow",
    config=dict(run_config),
    dir=None if _is_remote(workdir) else os.fspath(workdir),
  )


def _is_remote(path: epath.PathLike) -> bool:
  return "://" in os.fspath(path)
