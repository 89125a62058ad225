"""Four CPU devices in one process, no silent broadcasting, and the tiny models that tests share."""

import gc
import os
import tempfile
import zlib
from importlib import metadata

# What tests and the libraries they use put among temporary files, and leave there, is in one folder
# that is removed; but for the folders of `tmp_path`, of which pytest keeps the last few.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
_temporary = tempfile.TemporaryDirectory(prefix="gptjax-tests-")
tempfile.tempdir = os.environ["TMPDIR"] = _temporary.name

# What tests and the programs that they start compile runs once, on tiny arrays: the time goes into
# compiling it. So that is done in a hurry, and once for all workers of a session: what takes longer
# to compile than to keep is kept, but not in the cache of whoever runs the tests.
if "PYTEST_XDIST_WORKER" not in os.environ:  # Workers inherit the variables.
  _hurry = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
  _hurry.append("--xla_cpu_parallel_codegen_split_count=1")
  if metadata.version("jaxlib").startswith("0.10."):  # Later ones do not have the flag.
    _hurry.append("--xla_cpu_use_fusion_emitters=false")  # Compiles in a third of the time.
  os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *_hurry])
  os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(_temporary.name, "compiled")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
_flags = os.environ["XLA_FLAGS"]
os.environ["XLA_FLAGS"] = f"{_flags} --xla_force_host_platform_device_count=4"
os.environ["NPROC"] = "16"  # As `gptjax.devices.hosts.prepare_cpu` does.

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from flax import nnx, traverse_util  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from gptjax.model.config import ModelConfig  # noqa: E402
from gptjax.model.gpt import describe_parameters, model_graph  # noqa: E402

assert jax.device_count() >= 1  # Starts the backend, which reads the flags.
# The programs that tests start are to see the devices that users do.
del os.environ["NPROC"]
os.environ["XLA_FLAGS"] = _flags

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure():
  """Called at the end, in workers too, which leave no time for what Python does when it exits."""
  _temporary.cleanup()


@pytest.fixture(scope="module", autouse=True)
def search_no_old_objects():
  """Garbage collection does not search what earlier modules have left, which takes seconds."""
  yield
  gc.collect()
  gc.freeze()


@pytest.fixture(scope="session")
def cpu_devices():
  """Returns a function: the variables by which a program sees so many CPU devices."""

  def variables(count):
    flags = f"{_flags} --xla_force_host_platform_device_count={count}"
    # For the few tokens that such programs write, decoding's own kernels take long to compile.
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NUMBA_DISABLE_JIT": "1"}

  return variables


@pytest.fixture
def drawn(monkeypatch):
  """The matplotlib figures that a test has saved as pictures, in their order."""
  figures, save = [], Figure.savefig

  def remember(figure, *arguments, **options):
    figures.append(figure)
    return save(figure, *arguments, **options)

  monkeypatch.setattr(Figure, "savefig", remember)
  return figures


@pytest.fixture(scope="session")
def tiny_config():
  """Returns a function that makes a tiny ModelConfig, with some fields changed."""

  def make(**changes):
    shape = {
      "vocab_size": 32,
      "num_layers": 2,
      "embed_dim": 16,
      "num_heads": 4,
      "mlp_dim": 32,
      "position.max_positions": 16,
    }
    return ModelConfig.from_config(shape | changes)

  return make


@pytest.fixture(scope="session")
def random_params():
  """Returns a function that makes parameters whose every value matters.

  Unlike those of initialisation, biases are not 0, norm scales not 1 and kernels not small. Two
  models have equal values in parameters of equal name and shape.
  """

  def make(config, seed=0):
    flat = {}
    for name, info in describe_parameters(config).items():
      rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
      noise = rng.normal(size=info.shape).astype(np.float32)
      if name.endswith("scale"):
        flat[name] = 1 + 0.2 * noise
      elif info.fan_in_axes is not None:
        flat[name] = noise / np.float32(np.sqrt(info.fan_in))
      else:
        flat[name] = 0.5 * noise
    return traverse_util.unflatten_dict(flat, sep="/")

  return make


@pytest.fixture(scope="session")
def make_forward():
  """Returns a function that makes jit(params, tokens, **kwargs) -> logits for a ModelConfig."""

  def make(config):
    graph = model_graph(config)
    return jax.jit(lambda params, tokens, **kwargs: nnx.merge(graph, params)(tokens, **kwargs))

  return make


@pytest.fixture(scope="session")
def load_params():
  """Returns a function that loads what an opened model has onto one device."""

  def load(opened):
    device = SingleDeviceSharding(jax.devices()[0])
    return opened.load(dict.fromkeys(opened.parameters, device))

  return load
