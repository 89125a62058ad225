"""Measures gptjax on one NVIDIA GPU: losses, MFU, decoding, kill and resume, within 20 minutes.

    python -m experiments.gpu.run [--output=FILE]
    python -m experiments.gpu.run --smoke --output=FILE

Needs a CUDA device, for itself. Writes results.json beside itself and the table of README.md; with
--output that file alone. --smoke runs all parts with tiny models on any backend.
"""

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from gptjax import config as config_lib
from gptjax.errors import UserError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Seconds that a part may take; together they are the 20 minutes.
LIMITS = {
  "device": 60,
  "losses": 240,
  "gpt2-124m": 180,
  "gpt3-1.3b": 300,
  "decoding": 160,
  "resume": 260,
}
NOT_MEASURED = "not measured"
_TABLE = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- end of table -->)", re.DOTALL)

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_bool("smoke", False, "Run all parts with tiny models, on any backend.")
  flags.DEFINE_string("output", None, "JSON file to write instead of results.json and README.md.")


def main(overrides: Mapping[str, str]) -> int:
  if overrides:
    raise UserError(f"--config.{next(iter(overrides))}: nothing here is configured; see --help.")
  if FLAGS.smoke and not FLAGS.output:
    raise UserError("--smoke measures nothing to keep: give --output=FILE.")
  device = run_part("device", FLAGS.smoke)
  if not device.get("is_cuda") and not FLAGS.smoke:
    found = device.get("card", device.get(NOT_MEASURED))
    raise UserError(f"experiments.gpu needs a CUDA device, and JAX finds only {found!r}.")
  results = {"date": datetime.date.today().isoformat(), "device": device, "parts": {}}
  names = [name for name in LIMITS if name != "device"]
  for number, name in enumerate(names, 1):
    print(f"[{number}/{len(names)}] {name}, at most {LIMITS[name]} s", flush=True)
    results["parts"][name] = run_part(name, FLAGS.smoke)
    write(results)
  print(table(results))
  return 0 if is_good(results) else 1


def run_part(name: str, smoke: bool) -> dict[str, Any]:
  """Runs a part in a process of its own, which has the card and gives it back.

  Returns what it measured, or {'not measured': why}.
  """
  with tempfile.TemporaryDirectory() as folder:
    output = Path(folder) / "part.json"
    command = [sys.executable, "-m", "experiments.gpu.parts", name, str(output)]
    start = time.monotonic()
    process = subprocess.Popen(
      command + ["smoke"] * smoke, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE
    )
    try:
      _, errors = process.communicate(timeout=LIMITS[name])
    except subprocess.TimeoutExpired:
      return {NOT_MEASURED: f"it took more than {LIMITS[name]} s"}
    finally:
      if process.poll() is None:
        # With the training runs that it has started.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
      lines = errors.decode(errors="replace").strip().splitlines()
      return {NOT_MEASURED: lines[-1] if lines else f"exit status {process.returncode}"}
    return json.loads(output.read_text()) | {"seconds": round(time.monotonic() - start, 1)}


def write(results: Mapping[str, Any]) -> None:
  text = json.dumps(results, indent=1) + "\n"
  if FLAGS.output:
    Path(FLAGS.output).write_text(text)
    return
  (HERE / "results.json").write_text(text)
  readme = HERE / "README.md"
  readme.write_text(_TABLE.sub(lambda _: table(results), readme.read_text()))


def is_good(results: Mapping[str, Any]) -> bool:
  """Whether everything was measured, and values that must be equal are."""
  parts = results["parts"]
  if any(
    NOT_MEASURED in parts.get(name, {NOT_MEASURED: ""}) for name in LIMITS if name != "device"
  ):
    return False
  cases = [case for case in parts["losses"].values() if isinstance(case, Mapping)]
  return all(case["equal"] for case in [*cases, parts["resume"]])


def table(results: Mapping[str, Any]) -> str:
  """The results in Markdown, with reasons for missing ones."""
  parts = results.get("parts", {})
  lines = ["| what | result |", "|---|---|"]
  for name, row in _ROWS.items():
    part = parts.get(name, {NOT_MEASURED: ""})
    if NOT_MEASURED in part:
      why = f": {part[NOT_MEASURED]}" if part[NOT_MEASURED] else ""
      lines.append(f"| {row} | {NOT_MEASURED}{why} |")
    else:
      lines.append(f"| {row} | {_describe(name, part)} |")
  device = results.get("device")
  if device is None:
    return f"Date, card and driver: {NOT_MEASURED}.\n\n" + "\n".join(lines) + "\n"
  driver = device["driver"] or "unknown"
  where = f"{results['date']}, {device['card']}, driver {driver}, jax {device['jax']}"
  return f"{where}.\n\n" + "\n".join(lines) + "\n"


_ROWS = {
  "losses": "losses of five steps against the CPU's, largest relative difference",
  "gpt2-124m": "GPT-2 124M, bfloat16",
  "gpt3-1.3b": "GPT-3 1.3B, bfloat16",
  "decoding": "GPT-2 124M writes, bfloat16",
  "resume": "kill -9 and resume",
}


def _describe(name: str, part: Mapping[str, Any]) -> str:
  match name:
    case "losses":
      cases = {case: found for case, found in part.items() if isinstance(found, Mapping)}
      return "; ".join(
        f"{case} ({found['attention']}): {found['largest_difference']:.1e} "
        f"({'within' if found['equal'] else 'beyond'} {found['tolerance']:.0e})"
        for case, found in cases.items()
      )
    case "decoding":
      rates = {rows: part[rows]["tokens_per_second"] for rows in ("1", "8")}
      return "; ".join(f"batch {rows}: {rate:,.0f} tokens/s" for rows, rate in rates.items())
    case "resume":
      bits = "the same bits" if part["equal"] else "other bits"
      return f"{bits} after {part['steps']} steps, killed at step {part['killed_at']}"
  mfu = "unknown peak" if part["mfu"] is None else f"MFU {part['mfu']:.3f}"
  peak = "" if part["peak_bytes"] is None else f", {part['peak_bytes'] / 2**30:.1f} GiB"
  return (
    f"{mfu}, {part['tokens_per_second']:,.0f} tokens/s; {part['rows']} x {part['sequence_length']} "
    f"a step, remat={part['remat']}, {part['attention']} attention{peak}"
  )


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
