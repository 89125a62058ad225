"""Deals the accelerators or cores of this host out to the trials that run at once."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import jax

from gptjax.errors import UserError

# In a process of its own, which lets go of the devices again when it ends.
_PROBE = """
import json, jax
devices = jax.local_devices()
chips = {str(getattr(device, "coords", device.id)) for device in devices}
print(json.dumps([jax.default_backend(), devices[0].device_kind, len(devices), len(chips)]))
"""
# Chips of one process -> how they lie on the host's board.
_TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}


@dataclasses.dataclass(frozen=True)
class Host:
  """The devices of this machine: how many JAX has, and the chips, GPUs or cores that they are."""

  platform: str
  device_kind: str
  devices: int
  units: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Slot:
  """A place where one trial runs: environment variables, and the cores that it keeps to."""

  environment: dict[str, str]
  cores: tuple[int, ...]


def find_host(parallel: int) -> Host:
  """Asks JAX, in another process, which devices trials see here.

  This process leaves them alone: from now on it computes on the CPU, with as many devices as each
  of `parallel` trials will have, so that plans check their meshes.

  Raises:
    UserError: the devices cannot be asked, or do not divide into `parallel` equal parts.
  """
  probe = subprocess.run(
    [sys.executable, "-c", _PROBE],
    env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    capture_output=True,
    text=True,
    check=False,
  )
  if probe.returncode:
    raise UserError(f"JAX finds no devices: {(probe.stderr.strip() or 'killed').splitlines()[-1]}")
  platform, kind, devices, chips = json.loads(probe.stdout.splitlines()[-1])
  units = {
    "cpu": tuple(map(str, _cores())),
    "gpu": tuple(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))),
    "tpu": tuple(filter(None, os.environ.get("TPU_VISIBLE_CHIPS", "").split(","))),
  }[platform] or tuple(map(str, range(chips)))
  if parallel < 1 or len(units) % parallel:
    raise UserError(
      f"--parallel={parallel} does not divide the {len(units)} {platform.upper()} "
      f"{'cores' if platform == 'cpu' else 'devices'} of this host."
    )
  jax.config.update("jax_platforms", "cpu")
  if platform != "cpu":
    devices //= parallel
    jax.config.update("jax_num_cpu_devices", devices)
  return Host(platform, kind, devices, units)


def split(host: Host, parallel: int) -> list[Slot]:
  """Divides the host into equal parts; one trial at a time takes all that it finds."""
  cores = _cores()
  if parallel == 1:
    return [Slot({}, cores)]
  size = len(host.units) // parallel
  slots = []
  for number in range(parallel):
    mine = host.units[number * size : (number + 1) * size]
    if host.platform == "cpu":
      slots.append(Slot({}, tuple(map(int, mine))))
    elif host.platform == "gpu":
      slots.append(Slot({"CUDA_VISIBLE_DEVICES": ",".join(mine)}, cores))
    else:
      slots.append(Slot(_tpu_environment(mine, number), cores))
  return slots


@contextlib.contextmanager
def on_cores(cores: tuple[int, ...]) -> Iterator[None]:
  """Keeps processes that are started inside to these cores, where the system can."""
  if not hasattr(os, "sched_setaffinity"):
    yield
    return
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, cores)  # A child has those of its parent.
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)


def _cores() -> tuple[int, ...]:
  if hasattr(os, "sched_getaffinity"):
    return tuple(sorted(os.sched_getaffinity(0)))
  return tuple(range(os.cpu_count() or 1))


def _tpu_environment(chips: tuple[str, ...], number: int) -> dict[str, str]:
  """The variables by which libtpu takes these chips for a slice with one process."""
  if len(chips) not in _TPU_BOUNDS:
    raise UserError(f"--parallel: {len(chips)} TPU chips a trial are no rectangle of a host's.")
  port = str(8476 + number)
  return {
    "TPU_VISIBLE_CHIPS": ",".join(chips),
    "TPU_CHIPS_PER_PROCESS_BOUNDS": _TPU_BOUNDS[len(chips)],
    "TPU_PROCESS_BOUNDS": "1,1,1",
    "TPU_PROCESS_ADDRESSES": f"localhost:{port}",
    "TPU_PROCESS_PORT": port,
    "CLOUD_TPU_TASK_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }
