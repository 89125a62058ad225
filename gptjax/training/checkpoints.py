"""Checkpoints: Orbax writes them, checksums verify them, old ones are deleted.

    <directory>/<step>/state/      the arrays, each under its path in the state: params/blocks/...
    <directory>/<step>/manifest/   shape, dtype and checksum of every array
    <directory>/metrics.json       the metric that decides which checkpoint is the best

Orbax commits a checkpoint by renaming a temporary folder (on object stores: by a marker file), so
a checkpoint that was being written when the process died is never seen. It does not notice bytes
that changed later: a bit flipped inside a chunk restores as another number, without an error. Hence
the checksums, of the arrays on their devices before the save, compared after the restore.
"""

import contextlib
import dataclasses
import gc
import json
import logging as python_logging
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util

from gptjax import tree
from gptjax.errors import UserError, did_you_mean
from gptjax.small_files import read_json, write_atomically

T = TypeVar("T")

# Checksum of the model that adapters were put on, in the checkpoint of a run that trains adapters.
BASE_CHECKSUM = "base_checksum"

_SCORES = "metrics.json"
_LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "kl", "ece", "mean_absolute_error")

# Orbax logs each fault with several tracebacks before it raises; here the error becomes a sentence.
python_logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)


class Checkpoints:
  """The checkpoints of one run. Every process of the run makes the same calls in the same order.

  Args:
    directory: their folder, on a local disk or gs://. Created if necessary.
    keep: how many of the newest stay.
    keep_every_steps: checkpoints at multiples of this stay for ever; 0 is none.
    best_metric: the checkpoint with the best value of this metric (`is_better`) stays too, or ''.

  Raises:
    UserError: `keep` is below 1, or the directory cannot be written.
  """

  def __init__(
    self, directory: epath.PathLike, *, keep: int, keep_every_steps: int = 0, best_metric: str = ""
  ):
    if keep < 1:
      raise UserError(f"a run keeps at least its newest checkpoint: keep={keep} is below 1.")
    self.directory = _absolute(directory)
    self._best_metric = best_metric
    self._retention = _Retention(keep, keep_every_steps, best_metric)
    with _write_errors(self.directory):
      self._manager = ocp.CheckpointManager(
        self.directory,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=self._retention,
          cleanup_tmp_directories=True,
          lightweight_initialize=True,
        ),
      )
      self._retention.scores.update(self._read_scores())
      # Written now, so that a directory nobody can write fails before the training starts.
      self._write_scores()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  def save(self, step: int, state: Any) -> None:
    """Copies `state` off the devices and returns; the rest is written behind the training.

    The arrays may be donated as soon as this returns. A step that is on disk is not written again.

    Args:
      step: names the checkpoint.
      state: a pytree of jax.Arrays.

    Raises:
      UserError: this save or the one before it could not be written, or a weight is not finite.
    """
    self.wait()
    if step in self.steps():
      return
    arrays = tree.named_leaves(state)
    if broken := _not_finite(arrays):
      raise UserError(
        f"step {step}: {broken} is not finite, so this step is not saved; the newest checkpoint is "
        f"that of step {self.latest_step()}, whose weights are."
      )
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(_nested(arrays)), manifest=ocp.args.JsonSave(_make_manifest(arrays))
    )
    with _write_errors(self.directory):
      if step in self._manager.all_steps():  # It is damaged, and must make room.
        self._manager.delete(step)
      self._retention.damaged.discard(step)
      self._manager.save(
        step,
        args=items,
        force=True,  # The loop decides when to save.
      )

  def wait(self) -> None:
    """Returns when the last save is on disk; UserError, raised once, if it could not be written."""
    with _write_errors(self.directory):
      try:
        self._manager.wait_until_finished()
      except BaseException:
        # Orbax forgets the checkpoints that this save was to replace; they still exist.
        self._manager.reload()
        raise

  def close(self) -> None:
    """Waits for the last save and ends Orbax's threads. Raises what `wait` raises."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def steps(self) -> list[int]:
    """Returns the steps that have a checkpoint (or are being written), oldest first."""
    return sorted(set(self._manager.all_steps()) - self._retention.damaged)

  def latest_step(self) -> int | None:
    """Returns the newest step that has a checkpoint, None if there is none."""
    return max(self.steps(), default=None)

  def thin_out(self) -> None:
    """Deletes checkpoints that a process died before deleting. Call after `restore_latest`."""
    kept = self._retention.kept(self.steps())
    for step in self.steps():
      if step not in kept:
        with _write_errors(self.directory):
          self._manager.delete(step)

  def record_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
    """Records the metrics of the checkpoint of `step`, for the deletions after the next save.

    A value that is not finite never makes a checkpoint the best.

    Raises:
      UserError: `metrics` lack the `best_metric`.
    """
    if not self._best_metric:
      return
    if self._best_metric not in metrics:
      hint = did_you_mean(self._best_metric, metrics)
      raise UserError(f"best_metric={self._best_metric!r} is not evaluated. {hint}")
    score = float(metrics[self._best_metric])
    if math.isfinite(score):
      self._retention.scores[step] = score
    with _write_errors(self.directory):
      self._write_scores()

  def restore_latest(self, abstract_state: Any) -> tuple[Any, int] | None:
    """Restores the newest whole checkpoint, bit for bit, onto the shardings of `abstract_state`.

    A damaged checkpoint is skipped with a warning, and deleted after the next save.

    Args:
      abstract_state: the state's pytree of jax.ShapeDtypeStruct, each with its sharding. The mesh
        may be another than the one that saved.

    Returns:
      The state and its step; None if there is no checkpoint yet.

    Raises:
      UserError: the state has other arrays, shapes or dtypes than the checkpoint, or all the
        checkpoints are damaged.
    """
    self.wait()
    if not self.steps():
      return None
    wanted = tree.named_leaves(abstract_state)

    def read(step: int) -> dict[str, jax.Array]:
      manifest = _read_manifest(self._manager, step)
      _require_equal(manifest, wanted, self.directory / str(step))
      return _read_arrays(self._manager, step, manifest, wanted)

    arrays, step = _newest_whole(self.directory, self.steps(), read)
    self._retention.damaged.update(other for other in self.steps() if other > step)
    return jax.tree.unflatten(jax.tree.structure(abstract_state), arrays.values()), step

  @property
  def _scores_path(self) -> epath.Path:
    return self.directory / _SCORES

  def _read_scores(self) -> dict[int, float]:
    if not self._scores_path.exists():
      return {}
    metric, scores = _read_scores(self._scores_path)
    return scores if metric == self._best_metric else {}

  def _write_scores(self) -> None:
    if jax.process_index() != 0:
      return
    scores = {step: s for step, s in self._retention.scores.items() if step in self.steps()}
    content = json.dumps({"metric": self._best_metric, "scores": scores})
    write_atomically(self._scores_path, content)


@dataclasses.dataclass
class ParamsReport:
  """Report of `restore_params`, by parameter name. Only `matched` parameters were loaded.

  Attributes:
    source: the checkpoint's folder.
    matched: in both, with equal shapes.
    missing: wanted, but not in the checkpoint.
    left_over: in the checkpoint, but not wanted.
    mismatched: in both with other shapes: (saved, wanted).
    base_checksum: checksum of the model that adapters were put on; None without adapters.
  """

  source: epath.Path
  matched: list[str]
  missing: list[str]
  left_over: list[str]
  mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
  base_checksum: int | None = None

  def __str__(self) -> str:
    shapes = [f"{name} {saved} -> {wanted}" for name, (saved, wanted) in self.mismatched.items()]
    lines = [f"{self.source}: {len(self.matched)} parameters matched"]
    for label, names in (
      ("missing in it", self.missing),
      ("left over", self.left_over),
      ("of another shape", shapes),
    ):
      if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        lines.append(f"  {len(names)} {label}: {', '.join(names[:5])}{more}")
    return "\n".join(lines)


def restore_params(
  directory: epath.PathLike,
  abstract_params: Any,
  *,
  ema: bool = False,
  near: int | None = None,
  best: bool = False,
) -> tuple[dict[str, Any], ParamsReport]:
  """Reads the weights alone of another run's newest whole checkpoint, matched by name.

  Nothing in `directory` is changed, so that the other run may still be going on.

  Args:
    directory: the other run's checkpoints.
    abstract_params: nested dict of jax.ShapeDtypeStruct, each with its sharding. Weights that were
      saved in another dtype are cast.
    ema: read the moving average of the weights, saved as `ema`, instead of `params`.
    near: read the whole checkpoint whose step is nearest to this one, instead of the newest.
    best: read the best one by the metric of its run, if one has been told, instead of the newest.

  Returns:
    A nested dict of the parameters that matched, and the report on all of them.

  Raises:
    UserError: there is no checkpoint, none is whole, or it holds no such weights.
  """
  directory = _absolute(directory)
  root = "ema" if ema else "params"
  wanted = tree.named_leaves(abstract_params)
  options = ocp.CheckpointManagerOptions(
    read_only=True, create=False, save_interval_steps=0, lightweight_initialize=True
  )

  def read(step: int) -> tuple[dict[str, jax.Array], ParamsReport]:
    manifest = _read_manifest(manager, step)
    saved = {
      name.removeprefix(f"{root}/"): tuple(entry["shape"])
      for name, entry in manifest.items()
      if name.startswith(f"{root}/")
    }
    if not saved:
      raise UserError(f"{directory / str(step)}: the checkpoint holds no {root!r} weights.")
    both = [name for name in wanted if name in saved]
    report = ParamsReport(
      source=directory / str(step),
      matched=[name for name in both if saved[name] == wanted[name].shape],
      missing=[name for name in wanted if name not in saved],
      left_over=[name for name in saved if name not in wanted],
      mismatched={
        name: (saved[name], wanted[name].shape)
        for name in both
        if saved[name] != wanted[name].shape
      },
    )
    if BASE_CHECKSUM in manifest:
      where = next(iter(wanted.values())).sharding
      scalar = {BASE_CHECKSUM: jax.ShapeDtypeStruct((), jnp.uint32, sharding=where)}
      report.base_checksum = int(_read_arrays(manager, step, manifest, scalar)[BASE_CHECKSUM])
    # Read as it was saved, for the checksums, and cast afterwards.
    targets = {
      f"{root}/{name}": jax.ShapeDtypeStruct(
        saved[name], manifest[f"{root}/{name}"]["dtype"], sharding=wanted[name].sharding
      )
      for name in report.matched
    }
    return _read_arrays(manager, step, manifest, targets), report

  if not directory.is_dir():
    raise UserError(f"{directory}: no such directory to read checkpoints from.")
  with ocp.CheckpointManager(directory, options=options) as manager:
    steps = sorted(manager.all_steps())
    if not steps:
      raise UserError(f"{directory}: holds no checkpoint.")
    if near is not None:
      steps.sort(key=lambda step: -abs(step - near))  # the last is tried first
    elif best and (directory / _SCORES).exists():
      metric, scores = _read_scores(directory / _SCORES)
      steps += [_best_step(metric, {step: scores[step] for step in steps if step in scores})]
      steps = [step for step in steps if step is not None]
    (arrays, report), _ = _newest_whole(directory, steps, read)
  if broken := _not_finite(arrays):
    raise UserError(f"{report.source}: {broken} is not finite.")
  params = {name: arrays[f"{root}/{name}"].astype(wanted[name].dtype) for name in report.matched}
  return _nested(params), report


@dataclasses.dataclass
class _Retention:
  """Decides which checkpoints stay. Orbax asks at each save, and deletes after its commit."""

  keep: int
  keep_every_steps: int
  metric: str
  scores: dict[int, float] = dataclasses.field(default_factory=dict)
  damaged: set[int] = dataclasses.field(default_factory=set)

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    kept = self.kept(sorted(c.step for c in checkpoints if c.step not in self.damaged))
    return [checkpoint.step in kept for checkpoint in checkpoints]

  def kept(self, steps: Sequence[int]) -> set[int | None]:
    """Returns the steps that stay, as decided when the newest of them was saved."""
    kept = {*steps[-self.keep :]}
    if self.keep_every_steps:
      kept.update(step for step in steps if step % self.keep_every_steps == 0)
    # The newest had no metrics yet when it was saved.
    kept.add(_best_step(self.metric, {s: self.scores[s] for s in steps[:-1] if s in self.scores}))
    return kept


def is_better(metric: str, value: float, other: float) -> bool:
  """Whether a value of a metric ('val/NAME') beats another."""
  return value < other if lower_is_better(metric) else value > other


def lower_is_better(metric: str) -> bool:
  """Whether a lower value of a metric ('val/NAME') is the better one."""
  return metric.removeprefix("val/") in _LOWER_IS_BETTER


def _best_step(metric: str, scores: Mapping[int, float]) -> int | None:
  """The first step with the best score; None if there is none."""
  best = None
  for step in sorted(scores):
    if best is None or is_better(metric, scores[step], scores[best]):
      best = step
  return best


def _read_scores(path: epath.Path) -> tuple[str, dict[int, float]]:
  """Reads the metric's name, and its value at each step."""
  try:
    saved = read_json(path)
    return saved["metric"], {int(step): score for step, score in saved["scores"].items()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f"{path}: not readable as JSON; delete it to forget which checkpoint is best."
    ) from error


class _DamagedError(Exception):
  """The checkpoint cannot be read back as it was written."""


def _newest_whole(
  directory: epath.Path, steps: Sequence[int], read: Callable[[int], T]
) -> tuple[T, int]:
  for step in reversed(steps):
    try:
      return read(step), step
    except _DamagedError as error:
      logging.warning("%s: skipped, the checkpoint is damaged: %s", directory / str(step), error)
  raise UserError(f"{directory}: all checkpoints are damaged (steps {', '.join(map(str, steps))}).")


def checksum(params: Any) -> int:
  """Checksum of a tree's arrays, their names and shapes: uint32, the same for every sharding."""
  return _make_manifest(tree.named_leaves(params))["checksum"]


def _make_manifest(arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
  checksums = jax.device_get({name: _checksum(array) for name, array in arrays.items()})
  entries = {
    name: {"shape": list(array.shape), "dtype": str(array.dtype), "checksum": int(checksums[name])}
    for name, array in arrays.items()
  }
  return {"arrays": entries, "checksum": _text_checksum(entries)}


def _read_manifest(manager: ocp.CheckpointManager, step: int) -> dict[str, dict[str, Any]]:
  manifest = _restore(manager, step, manifest=ocp.args.JsonRestore())
  entries = manifest.get("arrays", {})
  if manifest.get("checksum") != _text_checksum(entries):
    raise _DamagedError("its manifest has changed since it was written")
  return entries


def _require_equal(
  manifest: Mapping[str, Mapping[str, Any]],
  wanted: Mapping[str, jax.ShapeDtypeStruct],
  path: epath.Path,
) -> None:
  """Raises UserError unless the checkpoint has exactly the wanted arrays, shapes and dtypes."""
  for name in wanted:
    if name in manifest:
      saved = f"{manifest[name]['dtype']}{manifest[name]['shape']}"
      expected = f"{wanted[name].dtype}{list(wanted[name].shape)}"
      if saved != expected:
        raise UserError(f"{path}: {name} was saved as {saved}, but this config has {expected}.")
  for names, others, sentence in (
    (wanted, manifest, "this config has {}, which the checkpoint lacks"),
    (manifest, wanted, "the checkpoint has {}, which this config lacks"),
  ):
    extra = [name for name in names if name not in others]
    if extra:
      more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
      raise UserError(f"{path}: {sentence.format(extra[0] + more)}.")


def _read_arrays(
  manager: ocp.CheckpointManager,
  step: int,
  manifest: Mapping[str, Mapping[str, Any]],
  targets: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
  """Reads the arrays that `targets` name, in its order, and compares their checksums."""
  if not targets:
    return {}
  item = _nested(targets)
  restore_args = ocp.checkpoint_utils.construct_restore_args(item)
  restored = tree.named_leaves(
    _restore(
      manager,
      step,
      state=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True),
    )
  )
  arrays = {name: restored.get(name) for name in targets}
  for name, array in arrays.items():
    # Orbax returns the abstract value of an array that it does not find by name.
    if not isinstance(array, jax.Array):
      raise _DamagedError(f"{name} has no values in it")
  checksums = jax.device_get({name: _checksum(array) for name, array in arrays.items()})
  for name, checksum in checksums.items():
    if int(checksum) != manifest[name]["checksum"]:
      raise _DamagedError(f"{name} has other values than were saved")
  return arrays


def _restore(manager: ocp.CheckpointManager, step: int, **item: ocp.args.CheckpointArgs) -> Any:
  """Restores one item of a checkpoint. Raises _DamagedError if Orbax cannot read it."""
  (name,) = item
  # After one unreadable chunk Orbax abandons its other reads, and each would print a traceback of
  # its own when it is collected.
  hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  try:
    try:
      return manager.restore(step, args=ocp.args.Composite(**item))[name]
    except jax.errors.JaxRuntimeError:
      raise  # Out of device memory, most often: not the checkpoint's fault.
    except Exception as error:  # noqa: BLE001 - what Orbax raises for an unreadable chunk.
      reason = str(error.__cause__ or error).split("\n")[0]
    gc.collect()
  finally:
    sys.unraisablehook = hook
  raise _DamagedError(reason)


def _not_finite(arrays: Mapping[str, jax.Array]) -> str | None:
  """Returns the name of the first weight, moving averages included, that is not finite."""
  weights = {name: x for name, x in arrays.items() if name.startswith(("params/", "ema/"))}
  finite = jax.device_get(_are_finite(weights))
  return next((name for name in weights if not finite[name]), None)


@jax.jit
def _are_finite(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  return {name: jnp.isfinite(x).all() for name, x in arrays.items()}


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
  """Returns a uint32 that any one changed element is certain to change.

  It is a sum modulo 2**32 over elements, each mixed with its position (the finalizer of
  MurmurHash3), so it is exact and the same for every sharding.
  """
  if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
    array = jax.random.key_data(array)
  if array.dtype == jnp.bool_:
    array = array.astype(jnp.uint8)
  word = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
  bits = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
  position = jnp.uint32(0)
  for axis, size in enumerate(bits.shape):
    iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    position = position * jnp.uint32(size) + iota
  mixed = bits ^ (position * jnp.uint32(0x9E3779B9))
  mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _text_checksum(entries: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(entries, sort_keys=True).encode())


def _nested(named: Mapping[str, Any]) -> dict[str, Any]:
  return traverse_util.unflatten_dict(dict(named), sep="/")


def _absolute(directory: epath.PathLike) -> epath.Path:
  directory = os.fspath(directory)
  if "://" not in directory:
    directory = os.path.abspath(os.path.expanduser(directory))
  return epath.Path(directory)


@contextlib.contextmanager
def _write_errors(directory: epath.Path) -> Iterator[None]:
  """Turns a failure to write (TensorStore reports a full disk as ValueError) into UserError."""
  try:
    yield
  except UserError:
    raise
  except (OSError, ValueError) as error:
    code = re.search(r"os_error_code='(\d+)'", str(error))
    reason = os.strerror(int(code[1])) if code else str(error)
    raise UserError(f"{directory}: cannot write a checkpoint: {reason}") from error
