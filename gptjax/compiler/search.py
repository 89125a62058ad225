"""Searches for the layout of a training step that its compiler expects to be the fastest.

There are three rounds, each from the best of the one before: meshes; recomputation and number of
micro-batches; kernels and compiler options. Candidates that cannot fit by arithmetic are not
compiled. Others are compiled in processes of their own, and their reports cached.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from gptjax import config as config_lib
from gptjax.compiler.topology import Slice
from gptjax.devices.hosts import cache_root
from gptjax.devices.sharding import MAX_RING
from gptjax.diagnosis.dry_run import tree_bytes
from gptjax.errors import UserError
from gptjax.training.resolve import resolve
from gptjax.training.setup import make_setup

Overrides = dict[str, Any]


# Memory of a token's saved activations in each layer, in units of the width of the residual stream
# and of the feed-forward network; approximate for 'none'.
_SAVED = {
  "full": (1, 0),
  "save_attention": (2, 0),
  "save_qkv": (6, 0),
  "offload": (6, 0),
  "dots": (6, 1),
  "none": (8, 2),
}
OPTIONS = ("", "xla_tpu_scoped_vmem_limit_kib=32768", "xla_tpu_scoped_vmem_limit_kib=65536")


@dataclasses.dataclass(frozen=True)
class Found:
  """A candidate and the JSON of its report; None if it was not compiled, with the reason."""

  overrides: Overrides
  report: Mapping[str, Any] | None
  reason: str = ""

  @property
  def tokens_per_second(self) -> float:
    return (self.report or {}).get("estimated_tokens_per_second") or 0.0


def search(
  spec: str,
  overrides: Mapping[str, str],
  target: Slice,
  *,
  processes: int,
  tries: int = 6,
  rounds: int = 3,
  cache_dir: Path | None = None,
  keep: int = 1,
) -> list[Found]:
  """Tries layouts of a config on a slice; returns them with the fastest first.

  Args:
    spec, overrides: from --config; the global batch stays the same.
    target: the slice.
    processes: parallel compilations; each takes one or two gigabytes and more than one core.
    tries: most compilations in a round.
    rounds: how many of the three rounds.
    cache_dir: folder for cached reports; by default in the user's cache.
    keep: how many layouts of a round go into the next.

  Raises:
    UserError: no candidate fits.
  """
  run = functools.partial(
    _try_all,
    spec=spec,
    base=dict(overrides),
    target=target,
    processes=processes,
    cache=cache_dir or default_cache(),
    tries=tries,
  )
  config = config_lib.load(spec, overrides)
  devices, heads = len(target.devices), config.model.num_kv_heads or config.model.num_heads
  cuts = meshes(devices, heads, config.batch_size)
  if not cuts:
    raise UserError(
      f"no mesh of {devices} devices divides batch_size={config.batch_size} and {heads} heads."
    )
  start = {
    "grad_accumulation": 1,
    "model.execution.remat": "full",
    "model.attention.kernel": "auto",
    "compile.options.tpu": config.compile.options.tpu,
  }
  found = run("meshes", [cut | start for cut in cuts])
  best = _best(found, keep, by_mesh=True)
  later = [
    ("remat and micro-batches", _remat_and_accumulation),
    ("kernels and options", _kernels_and_options),
  ]
  for name, variations in later[: rounds - 1]:
    candidates = [one.overrides | v for one in best for v in variations(config, one.overrides)]
    found += run(name, [c for c in candidates if c not in [f.overrides for f in found]])
    best = _best(found, keep)
    if not best:
      raise UserError(
        f"{target.name}: nothing fits {target.hbm_bytes / 2**30:.2f} GiB; use more chips or a "
        "smaller batch."
      )
  return sorted(found, key=lambda one: -one.tokens_per_second)


def default_cache() -> Path:
  return cache_root() / "compile"


def meshes(devices: int, heads: int, rows: int) -> list[Overrides]:
  """Possible meshes, the most promising first: `fsdp` short enough for a ring, `tensor` small."""
  ranked = []
  for doublings in range(4):
    tensor = 2**doublings
    cuts = [
      {"mesh.data": devices // (tensor * fsdp), "mesh.fsdp": fsdp, "mesh.tensor": tensor}
      for fsdp in range(1, devices // tensor + 1)
      if devices % (tensor * fsdp) == 0 and rows % (devices // tensor) == 0
    ]
    cuts.sort(key=lambda cut: cut["mesh.fsdp"] * (1 if cut["mesh.fsdp"] > MAX_RING else -1))
    cuts.sort(key=lambda cut: cut["mesh.fsdp"] > MAX_RING)
    if heads % tensor == 0:
      ranked += [(rank + doublings, cut) for rank, cut in enumerate(cuts)]
  return [cut for _, cut in sorted(ranked, key=lambda entry: entry[0])]


def _remat_and_accumulation(config: ConfigDict, chosen: Overrides) -> Iterable[Overrides]:
  rows = config.batch_size // (chosen["mesh.data"] * chosen["mesh.fsdp"])
  accumulations = [times for times in (1, 2, 4, 8, 16) if rows % times == 0]
  # Full recomputation last: the first round has it, and it helps only if nothing else fits.
  for remats in (("none", "dots", "save_qkv"), ("full",)):
    for accumulation in accumulations:
      for remat in remats:
        yield {"model.execution.remat": remat, "grad_accumulation": accumulation}


def _kernels_and_options(config: ConfigDict, chosen: Overrides) -> Iterable[Overrides]:
  del config, chosen
  for options in OPTIONS:
    yield {"compile.options.tpu": options}
  yield {"model.attention.kernel": "xla"}


def _best(found: Sequence[Found], keep: int, by_mesh: bool = False) -> list[Found]:
  """The fastest layouts; while none is known to fit, the meshes that come nearest to fitting."""

  def order(one: Found) -> tuple[float, float]:
    needed = one.report["hbm_bytes_per_chip"]["total"] if one.report else float("inf")
    return -one.tokens_per_second, needed

  return [
    one
    for one in sorted(found, key=order)[:keep]
    if one.tokens_per_second or (by_mesh and one.report)
  ]


def _try_all(
  name: str,
  candidates: Sequence[Overrides],
  *,
  spec: str,
  base: Overrides,
  target: Slice,
  processes: int,
  cache: Path,
  tries: int,
) -> list[Found]:
  """Compiles the first candidates that may fit, several at a time."""
  refused, possible = [], []
  for candidate in candidates:
    if len(possible) == tries:
      break
    reason = misfit(config_lib.load(spec, base | candidate), target)
    if reason:
      refused.append(Found(candidate, None, reason))
    else:
      possible.append(candidate)
  with (
    concurrent.futures.ThreadPoolExecutor(processes) as pool,
    tqdm(total=len(possible), desc=name, unit="layout") as progress,
  ):

    def one(candidate: Overrides) -> Found:
      result = try_one(spec, base | _as_text(candidate), candidate, target, cache)
      progress.set_postfix_str(f"{result.tokens_per_second:,.0f} tokens/s")
      progress.update()
      return result

    return refused + list(pool.map(one, possible))


def misfit(config: ConfigDict, target: Slice) -> str:
  """The reason why a config cannot fit the slice by arithmetic alone; empty if it may.

  A lower bound: state, gradients, and the layers' saved activations.
  """
  try:
    setup = make_setup(resolve(config), target.devices)
    state = setup.abstract_state(setup.make_optimizer(setup.run_length))
  except UserError as error:
    return str(error)
  held = tree_bytes(state)[1] + tree_bytes(state.params)[1]
  mesh, model = setup.mesh.shape, setup.model
  rows = config.batch_size // (mesh["data"] * mesh["fsdp"] * config.grad_accumulation)
  widths, wide = _SAVED[model.execution.remat]
  per_token = widths * model.embed_dim + wide * model.mlp_dim / mesh["tensor"]
  bytes_each = 2 if model.dtype == "bfloat16" else 4
  saved = model.num_layers * rows * config.sequence_length * per_token * bytes_each
  saved /= mesh["context"]
  if held + saved > target.hbm_bytes:
    return f"needs {(held + saved) / 2**30:.1f} GiB for state, gradients and activations alone"
  return ""


def _as_text(overrides: Overrides) -> dict[str, str]:
  return {key: str(value) for key, value in overrides.items()}


def try_one(
  spec: str, overrides: Mapping[str, str], candidate: Overrides, target: Slice, cache: Path
) -> Found:
  """Compiles a candidate (included in `overrides`) in its own process, or reads its report."""
  arguments = [
    f"--config={spec}",
    f"--topology={target.name}",
    f"--num_slices={target.num_slices}",
    *(f"--config.{key}={value}" for key, value in sorted(overrides.items())),
  ]
  remembered = cache / f"{_digest(arguments)}.json"
  if not remembered.exists():
    with tempfile.TemporaryDirectory() as folder:
      output = Path(folder) / "report.json"
      process = subprocess.run(
        [sys.executable, "-m", "gptjax.compile", *arguments, f"--json={output}"],
        capture_output=True,
        text=True,
        check=False,
      )
      if process.returncode != 0 or not output.exists():
        return Found(candidate, None, (process.stderr.strip().splitlines() or ["failed"])[-1])
      cache.mkdir(parents=True, exist_ok=True)
      partial = cache / f"{remembered.name}.{os.getpid()}.{id(candidate)}"
      partial.write_text(output.read_text())
      partial.replace(remembered)
  return Found(candidate, json.loads(remembered.read_text()))


@functools.cache
def _versions() -> str:
  """A text that changes whenever this program or its compiler may have changed."""
  package = Path(__file__).parents[1]
  sources = b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))
  installed = [importlib.metadata.version(name) for name in ("jax", "libtpu", "flax", "optax")]
  return hashlib.sha256(sources).hexdigest() + " ".join(installed)


def _digest(arguments: Sequence[str]) -> str:
  return hashlib.sha256("\n".join([_versions(), *arguments]).encode()).hexdigest()[:32]


def table(found: Sequence[Found], limit: int = 20) -> str:
  """Formats the ranking in Markdown."""
  lines = [
    "| tokens/s | MFU | step | HBM | layout |",
    "|---|---|---|---|---|",
  ]
  for one in found[:limit]:
    if one.report is None:
      lines.append(f"| - | - | - | {one.reason} | {describe(one.overrides)} |")
      continue
    report = one.report
    used = report["hbm_bytes_per_chip"]["total"] / 2**30
    if report["fits"]:
      speed = (
        f"{report['estimated_tokens_per_second']:,.0f} | {report['estimated_mfu']:.3f} | "
        f"{report['estimated_step_seconds']:.3f} s"
      )
    else:
      speed = "does not fit | - | -"
    lines.append(f"| {speed} | {used:.1f} GiB | {describe(one.overrides)} |")
  return "\n".join(lines)


def describe(overrides: Overrides) -> str:
  """Describes overrides that are not 1 or empty, such as 'fsdp=16 remat=dots'."""
  return " ".join(
    f"{key.rpartition('.')[2]}={value}"
    for key, value in overrides.items()
    if value not in (1, "", "auto")
  )


def write(one: Found, path: Path) -> None:
  """Saves a layout as a config part, for `tuned=NAME`."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(one.overrides, indent=2) + "\n")
