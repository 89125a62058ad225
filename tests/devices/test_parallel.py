"""Results do not depend on how many devices compute them, or how they share the work.

Eight simulated devices are in a process of their own: those of this process are four.
"""

import dataclasses
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import tree
from gptjax.data.batch import Batch
from gptjax.devices import sharding
from gptjax.model.gpt import describe_parameters, model_graph
from gptjax.objectives.text import NextToken
from gptjax.optim import optimizer as optim
from gptjax.presets.parts import optim as presets
from gptjax.training import step as step_lib

ROOT = Path(__file__).parents[2]
ONE = dict.fromkeys(sharding.MESH_AXES, 1)
B, T, STEPS = 16, 24, 3
# Sums run over the 384 tokens of the batch. In another order, 384 roundings of 2^-24 are 2.3e-5 of
# the largest element if all of them err to one side.
TOLERANCE = 2.5e-5

MESHES = [
  {"fsdp": 8},
  {"data": 8},
  {"data": 2, "fsdp": 2, "tensor": 2},
  {"data": 2, "tensor": 2, "context": 2},
  {"fsdp": 2, "context": 4},
]
MODELS = {
  # With dropout, whose mask is to be the same for every position, whichever device has it.
  "learned": {
    "position.max_positions": T,
    "mlp.activation": "gelu_tanh",
    "dropout.embed": 0.2,
    "dropout.attention": 0.2,
    "dropout.residual": 0.2,
  },
  "rope": {
    "position.kind": "rope",
    "norm.kind": "rmsnorm",
    "mlp.activation": "swiglu",
    "num_kv_heads": 2,
    "head.tied": False,
    "layer_pattern": ("full", "local"),
    "window": 9,
    "residual.values": True,
    "residual.embedding": True,
  },
}
# On many devices one model accumulates two micro-batches; on one device neither does. Micro-batches
# have their own dropout.
ACCUMULATION = {"learned": 1, "rope": 2}
RING_SIZES, RING_LENGTHS = (2, 3, 4, 8), (1, 2, 5)


@dataclasses.dataclass(frozen=True)
class Job:
  """A run of some steps. mesh: axes longer than 1, in order; None is no mesh at all."""

  model: str
  mesh: tuple[tuple[str, int], ...] | None
  grad_accumulation: int
  ring: bool = False


def make_job(model, mesh, **changes):
  return Job(model, tuple(mesh.items()), ACCUMULATION[model], **changes)


# --- In the process of eight devices -----------------------------------------------------------


def make_batch():
  """Rows of several documents of different length; padding, of which one row has nothing else."""
  rng = np.random.default_rng(0)
  segments, positions = np.zeros((2, B, T), np.int32)
  for row in range(1, B):
    ends = np.sort(rng.choice(np.arange(1, T + 1), 3, replace=False))
    for i, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
      segments[row, start:end], positions[row, start:end] = i + 1, np.arange(end - start)
  inputs, targets = rng.integers(0, 32, (2, B, T)).astype(np.int32)
  return Batch(inputs, targets, (segments > 0).astype(np.float32), segments, positions)


def run_job(job, config, params):
  """The reports of the steps, the gradient of the first, and the last parameters."""
  described = describe_parameters(config)
  # Plain SGD, whose updates are the gradient; its momentum after a step is that gradient.
  preset = {"name": "sgd", "weight_decay": 0.0, "clip_norm": 0.0, "momentum": 0.9}
  values = types.SimpleNamespace(**(presets.DEFAULTS | preset | {"rules": ((".*", {}),)}))
  optimizer = optim.make_optimizer(values, described, optax.constant_schedule(0.1))
  options = step_lib.StepOptions(
    seed=0, grad_accumulation=job.grad_accumulation, dropout=bool(config.dropout)
  )
  step = step_lib.make_train_step(model_graph(config), NextToken(z_loss=0.01), optimizer, options)
  params = jax.tree.map(jnp.asarray, params)
  state = step_lib.TrainState(jnp.int32(0), jnp.int32(0), params, optimizer.init(params), None)
  batch = make_batch()
  if job.mesh is None:
    return run_steps(step, state, batch)
  mesh = sharding.make_mesh(ONE | dict(job.mesh))
  abstract = step_lib.abstract_state(config, optimizer, described, mesh, ema=False)
  with jax.set_mesh(mesh):
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    return run_steps(step, state, sharding.to_global(batch, mesh))


def run_steps(step, state, batch):
  compiled = step.lower(state, batch).compile()
  metrics, gradient = [], None
  for _ in range(STEPS):
    state, reported = compiled(state, batch)
    metrics.append(jax.device_get(reported))
    gradient = gradient or tree.named_leaves(jax.device_get(state.opt_state))
  return {
    "metrics": metrics,
    "gradient": gradient,
    "params": tree.named_leaves(jax.device_get(state.params)),
    "permutations": compiled.as_text().count("collective-permute("),
  }


def scatter(function, x, size, dimension):
  """Sums the [size, ...] parts of x over as many devices, which keep a part each."""
  mesh = sharding.make_mesh(ONE | {"fsdp": size}, jax.devices()[:size])
  spec = jax.sharding.PartitionSpec
  scattered = jax.shard_map(
    lambda x: function(x[0], "fsdp", dimension),
    mesh=mesh,
    in_specs=spec("fsdp"),
    out_specs=spec(*[None] * dimension, "fsdp"),
  )
  return np.asarray(jax.jit(scattered)(x))


def ring_input(size, dimension, length):
  """Whole numbers, whose sums are exact in any order."""
  shape = [3, 3]
  shape[dimension] = size * length
  return np.random.default_rng(0).integers(-99, 99, (size, *shape)).astype(np.float32)


def native_scatter(x, name, dimension):
  return jax.lax.psum_scatter(x, name, scatter_dimension=dimension, tiled=True)


def main(job_file, result_file):
  jobs = pickle.loads(Path(job_file).read_bytes())
  results = {}
  platform = sharding.platform
  for job, arguments in jobs.items():
    sharding.platform = (lambda: "tpu") if job.ring else platform
    results[job] = run_job(job, *arguments)
  for size in RING_SIZES:
    for dimension in (0, 1):
      for length in RING_LENGTHS:
        x = ring_input(size, dimension, length)
        results[size, dimension, length] = [
          scatter(function, x, size, dimension)
          for function in (sharding._ring_scatter, native_scatter)
        ]
  Path(result_file).write_bytes(pickle.dumps(results))


# --- In this process ---------------------------------------------------------------------------

MESH_JOBS = [make_job(model, mesh) for mesh in MESHES for model in MODELS]
RING_JOBS = [
  make_job("rope", {"fsdp": 8}, ring=True),
  make_job("learned", {"data": 2, "fsdp": 2, "tensor": 2}, ring=True),
]
# Each axis, with one model, and no more than the ring is compared with.
FAST = [
  make_job("learned", {"data": 2, "fsdp": 2, "tensor": 2}),
  make_job("learned", {"fsdp": 2, "context": 4}),
]


def by_speed(jobs):
  """The jobs as parameters of a test, slow but for those of FAST and their rings."""
  return [
    pytest.param(
      job, marks=[] if dataclasses.replace(job, ring=False) in FAST else pytest.mark.slow
    )
    for job in jobs
  ]


def name_job(job):
  return f"{job.model}-{dict(job.mesh)}"


@pytest.fixture(scope="module")
def results(request, tmp_path_factory, tiny_config, random_params, cpu_devices):
  """The results of `main` by their jobs, those that the tests that run ask for."""
  # All heads, feed-forward columns and vocabulary rows divide by 2, all widths by 8.
  execution = {"attention.kernel": "xla", "execution.scan_layers": False}
  configs = {name: tiny_config(**execution, **changes) for name, changes in MODELS.items()}
  mine = [item for item in request.session.items if item.module is request.module]
  asked = {item.callspec.params["job"] for item in mine if "job" in item.callspec.params}
  jobs = {Job(model, None, 1) for model in MODELS} | asked
  jobs |= {dataclasses.replace(job, ring=False) for job in asked}
  folder = tmp_path_factory.mktemp("parallel")
  arguments = {job: (configs[job.model], random_params(configs[job.model])) for job in jobs}
  (folder / "jobs").write_bytes(pickle.dumps(arguments))
  done = subprocess.run(
    [sys.executable, "-m", "tests.devices.test_parallel", folder / "jobs", folder / "results"],
    env=os.environ | cpu_devices(8) | {"NPROC": "16"},
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return pickle.loads((folder / "results").read_bytes())


def assert_close(actual, expected):
  """Within a part of the largest element of each array."""
  assert actual.keys() == expected.keys()
  for name, b in expected.items():
    # The softmax does not see what is added to all keys: the terms of that gradient, which are as
    # large as those of the query's, cancel, and nothing but their rounding is left.
    like = name.replace("attention/key/bias", "attention/query/bias")
    atol = TOLERANCE * np.abs(expected[like]).max()
    np.testing.assert_allclose(actual[name], b, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("job", by_speed(MESH_JOBS), ids=name_job)
def test_training_does_not_depend_on_the_mesh(results, job):
  actual, expected = results[job], results[Job(job.model, None, 1)]
  assert_close(actual["gradient"], expected["gradient"])
  for after, wanted in zip(actual["metrics"], expected["metrics"], strict=True):
    assert_close(after, wanted)
  assert_close(actual["params"], expected["params"])


@pytest.mark.parametrize("job", by_speed(RING_JOBS), ids=name_job)
def test_training_does_not_depend_on_the_ring(results, job):
  without = results[dataclasses.replace(job, ring=False)]
  actual = results[job]
  assert actual["permutations"] > without["permutations"]
  assert_close(actual["gradient"], without["gradient"])
  assert_close(actual["params"], without["params"])


@pytest.mark.parametrize("length", RING_LENGTHS)
@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize("size", RING_SIZES)
def test_a_ring_sums_and_scatters(results, size, dimension, length):
  for scattered in results[size, dimension, length]:
    np.testing.assert_array_equal(scattered, ring_input(size, dimension, length).sum(0))


if __name__ == "__main__":
  # Under the name by which pickled jobs know their class.
  from tests.devices import test_parallel

  test_parallel.main(*sys.argv[1:])
