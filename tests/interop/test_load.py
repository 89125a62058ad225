"""Parameters onto a mesh: the same values, each device its part, no tensor too many in memory."""

import gc
import tracemalloc
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from gptjax import tree
from gptjax.devices import sharding
from gptjax.errors import UserError
from gptjax.interop import safetensors_files
from gptjax.interop.families.llama import LLAMA as LLAMA_FAMILY
from gptjax.interop.huggingface import HuggingFaceModel
from gptjax.interop.load import Importer, export
from gptjax.model.gpt import describe_parameters
from tests.interop.conftest import LLAMA, save_folder

MESH = {"data": 1, "fsdp": 2, "tensor": 2, "context": 1, "expert": 1}


@pytest.fixture(scope="module")
def llama(tiny_config, random_params, tmp_path_factory):
  """(folder, parameters) of a small Llama."""
  config = tiny_config(**LLAMA)
  params = random_params(config)
  return save_folder(tmp_path_factory.mktemp("llama") / "model", config, params), params


def test_each_device_of_a_mesh_has_its_part_and_no_more(llama):
  folder, params = llama
  opened = HuggingFaceModel(str(folder))
  shardings = sharding.parameter_shardings(opened.parameters, sharding.make_mesh(MESH))
  loaded = tree.named_leaves(opened.load(shardings))
  for name, expected in tree.named_leaves(params).items():
    assert loaded[name].sharding == shardings[name]
    for shard in loaded[name].addressable_shards:
      assert shard.data.shape == shardings[name].shard_shape(expected.shape)
      np.testing.assert_array_equal(shard.data, expected[shard.index])
  split = loaded["blocks/mlp/gate/kernel"].addressable_shards[0].data
  assert split.size * 4 == loaded["blocks/mlp/gate/kernel"].size


class CountedTensors:
  """Tensors in memory, each handed out as a copy; `most` is how many copies were alive at once."""

  def __init__(self, tensors):
    self._tensors = tensors
    self.reads = []
    self.alive = self.most = 0

  @property
  def names(self):
    return frozenset(self._tensors)

  def shape(self, name):
    return self._tensors[name].shape

  def read(self, name):
    self.reads.append(name)
    tensor = self._tensors[name].copy()
    weakref.finalize(tensor, self._forget)
    self.alive += 1
    self.most = max(self.most, self.alive)
    return tensor

  def _forget(self):
    self.alive -= 1


@pytest.fixture
def deep(tiny_config, random_params):
  """(importer, tensors, parameters) of a model of 24 layers and 3 MB."""
  config = tiny_config(**LLAMA | {"num_layers": 24, "embed_dim": 64, "mlp_dim": 128})
  parameters, params = describe_parameters(config), random_params(config)
  entries = LLAMA_FAMILY.entries(config)
  tensors = CountedTensors(dict(export(entries, params, parameters, config, "llama", np.float32)))
  return Importer(entries, tensors, parameters, config, source="deep"), tensors, parameters


def test_opening_reads_no_tensor(deep):
  assert deep[1].reads == []


def test_no_tensor_is_read_twice_nor_kept(deep):
  importer, tensors, parameters = deep
  mesh = sharding.make_mesh(MESH)
  importer.load(sharding.parameter_shardings(parameters, mesh))
  assert sorted(tensors.reads) == sorted(tensors.names)
  assert tensors.most <= 2  # The one that is being read, and the one before it.


def test_a_device_that_has_some_layers_reads_no_others(deep, monkeypatch):
  importer, tensors, parameters = deep
  name = "blocks/mlp/gate/kernel"
  mesh = Mesh(np.array(jax.devices()[:2]), ("layers",))
  half = NamedSharding(mesh, PartitionSpec("layers"))
  # As in a process of two, that has the second device alone.
  index = half.addressable_devices_indices_map(parameters[name].shape)[jax.devices()[1]]
  monkeypatch.setattr(
    NamedSharding, "addressable_devices_indices_map", lambda self, shape: {None: index}
  )
  monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, where, read: read(index))
  part = importer._load_parameter(name, half)
  assert part.shape == (12, *parameters[name].shape[1:])
  assert tensors.reads == [f"model.layers.{i}.mlp.gate_proj.weight" for i in range(12, 24)]


def test_the_host_has_one_parameter_and_one_tensor_at_a_time(deep, monkeypatch):
  # JAX may take an array of the host as it is, which is then the result.
  monkeypatch.setattr(
    jax,
    "make_array_from_callback",
    lambda shape, where, read: read((slice(None),) * len(shape)).sum(),
  )
  importer, _, parameters = deep
  everywhere = dict.fromkeys(parameters, SingleDeviceSharding(jax.devices()[0]))
  gc.collect()
  tracemalloc.start()
  importer.load(everywhere)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  sizes = [4 * np.prod(info.shape) for info in parameters.values()]
  assert max(sizes) < peak < 1.3 * max(sizes) < sum(sizes) / 3


def test_shards_of_several_dtypes_are_imported_exactly(tiny_config, random_params, tmp_path):
  config = tiny_config(**LLAMA)
  parameters, params = describe_parameters(config), random_params(config)
  folder = save_folder(tmp_path / "model", config, params)
  entries = LLAMA_FAMILY.entries(config)
  dtypes = (np.float32, ml_dtypes.bfloat16, np.float16)
  named = list(export(entries, params, parameters, config, "llama", np.float32))
  rounded = {name: tensor.astype(dtypes[i % 3]) for i, (name, tensor) in enumerate(named)}
  (folder / "model.safetensors").unlink()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(safetensors_files, "MAX_SHARD_BYTES", 8000)
    safetensors_files.write(folder, rounded.items())
  assert len(list(folder.glob("model-*.safetensors"))) > 3
  opened = HuggingFaceModel(str(folder))
  loaded = opened.load(dict.fromkeys(parameters, SingleDeviceSharding(jax.devices()[0])))
  again = dict(export(entries, loaded, parameters, config, "llama", np.float32))
  for name, expected in rounded.items():
    np.testing.assert_array_equal(again[name], expected.astype(np.float32), err_msg=name)


def test_a_value_too_large_for_a_dtype_is_refused_by_its_tensor(tiny_config, random_params):
  config = tiny_config(**LLAMA)
  parameters, params = describe_parameters(config), random_params(config)
  params["blocks"]["mlp"]["up"]["kernel"][1, 0, 0] = 1e5
  params["blocks"]["mlp"]["up"]["kernel"][1, 0, 1] = np.inf  # Which float16 can say.
  entries = LLAMA_FAMILY.entries(config)
  with pytest.raises(UserError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' .* float16"):
    list(export(entries, params, parameters, config, "llama", np.float16))
