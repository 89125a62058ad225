import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gptjax.devices import sharding
from gptjax.errors import UserError
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import ParameterInfo, describe_parameters

ONE = dict.fromkeys(sharding.MESH_AXES, 1)


def make_mesh(**sizes):
  return sharding.make_mesh(ONE | sizes)


# --- Mesh --------------------------------------------------------------------------------------


def test_a_mesh_has_the_wanted_sizes():
  assert dict(make_mesh(data=2, tensor=2).shape) == ONE | {"data": 2, "tensor": 2}


@pytest.mark.parametrize("axis", sharding.MESH_AXES)
def test_minus_one_fills(axis):
  assert make_mesh(**{axis: -1}).shape[axis] == 4


def test_minus_one_takes_what_the_others_leave():
  assert make_mesh(data=-1, fsdp=2).shape["data"] == 2
  assert make_mesh(data=4, fsdp=-1).shape["fsdp"] == 1


@pytest.mark.parametrize(
  ("sizes", "sentence"),
  [
    ({"data": 4, "fsdp": 4}, "mesh data=4 x fsdp=4 needs 16 devices, this run sees 4. Set"),
    ({}, "mesh of size 1 needs 1 devices, this run sees 4. Set --config.mesh.data=-1"),
    ({"data": -1, "fsdp": 3}, "mesh data=-1 x fsdp=3 needs a multiple of 3 devices"),
    ({"data": -1, "fsdp": -1}, "only one axis can be -1, not data and fsdp"),
    ({"tensor": 0}, "mesh.tensor must be positive, or -1"),
    ({"data": -2}, "mesh.data must be positive, or -1"),
  ],
)
def test_an_impossible_mesh_is_one_sentence(sizes, sentence):
  with pytest.raises(UserError) as error:
    make_mesh(**sizes)
  assert sentence in str(error.value)
  assert "\n" not in str(error.value)


# --- Parameters --------------------------------------------------------------------------------


def test_every_parameter_of_every_architecture_is_sharded(tiny_config):
  mesh = make_mesh(fsdp=2, tensor=2)
  choices = [
    {name: choice}
    for name in ("norm.kind", "norm.placement", "mlp.activation", "position.kind")
    for choice in typing.get_args(ModelConfig.kinds()[name])
  ]
  for choice in [*choices, {"head.tied": False}, {"attention.qk_norm": True}, {"bias": False}]:
    parameters = describe_parameters(tiny_config(**choice))
    shardings = sharding.parameter_shardings(parameters, mesh)
    assert set(shardings) == set(parameters)
    kernels = [name for name in shardings if name.endswith("kernel")]
    assert kernels
    assert not [name for name in kernels if shardings[name].is_fully_replicated]


def test_parameters_are_split_by_width_and_by_head(tiny_config):
  config = tiny_config(num_kv_heads=2, **{"head.tied": False})
  shardings = sharding.parameter_shardings(describe_parameters(config), make_mesh(fsdp=2, tensor=2))
  specs = {name: sharding.spec for name, sharding in shardings.items()}
  assert specs["blocks/attention/query/kernel"] == P(None, "fsdp", "tensor", None)
  assert specs["blocks/attention/out/kernel"] == P(None, "tensor", None, "fsdp")
  assert specs["blocks/mlp/up/kernel"] == P(None, "fsdp", "tensor")
  assert specs["embed/embedding"] == P("tensor", "fsdp")
  assert specs["head/kernel"] == P("fsdp", "tensor")
  split = shardings["blocks/attention/query/kernel"].shard_shape((2, 16, 4, 4))
  assert split == (2, 8, 2, 4)


def test_vectors_are_whole_over_fsdp(tiny_config):
  parameters = describe_parameters(tiny_config(**{"attention.qk_norm": True}))
  shardings = sharding.parameter_shardings(parameters, make_mesh(fsdp=2, tensor=2))
  specs = {name: sharding.spec for name, sharding in shardings.items()}
  assert specs["final_norm/scale"] == P(None)
  assert specs["blocks/attention_norm/scale"] == P(None, None)
  assert specs["blocks/mlp/down/bias"] == P(None, None)
  assert specs["blocks/mlp/up/bias"] == P(None, "tensor")


def test_one_mesh_axis_splits_one_axis_of_an_array():
  assert sharding.mesh_axes(("embed", "embed")) == [("fsdp",), ()]
  assert sharding.partition_spec(("batch", "embed")) == P(("data", "fsdp", "expert"), None)


def test_a_size_that_does_not_divide_is_refused_by_name(tiny_config):
  parameters = describe_parameters(tiny_config(num_kv_heads=1))
  message = (
    r"axis 'kv_heads' of parameter 'blocks/attention/key/bias' has size 1, which .*tensor = 2"
  )
  with pytest.raises(UserError, match=message):
    sharding.parameter_shardings(parameters, make_mesh(data=2, tensor=2))


def test_an_axis_without_a_rule_is_refused_by_name():
  parameters = {"a/b": ParameterInfo((4,), ("widht",), None, "norm")}
  with pytest.raises(UserError, match=r"axis 'widht' of parameter 'a/b' is not in RULES"):
    sharding.parameter_shardings(parameters, make_mesh(data=-1))


# --- Batches -----------------------------------------------------------------------------------


def test_check_batch_accepts_what_divides():
  mesh = make_mesh(data=2, context=2)
  sharding.check_batch(8, 12, 4, mesh)


@pytest.mark.parametrize(
  ("sizes", "arguments", "sentence"),
  [
    ({"data": 4}, (6, 8, 1), r"batch_size=6 .* over 4 devices: use a multiple of 4"),
    ({"data": 2, "fsdp": 2}, (12, 8, 2), r"batch_size=12 .*grad_accumulation=2.* multiple of 8"),
    ({"data": 4}, (4, 8, 0), r"grad_accumulation=0"),
    ({"context": 4}, (4, 12, 1), r"sequence_length=12 .* 8 chunks that mesh\.context=4 needs"),
  ],
)
def test_check_batch_refuses_what_does_not(sizes, arguments, sentence):
  with pytest.raises(UserError, match=sentence):
    sharding.check_batch(*arguments, make_mesh(**sizes))


@pytest.mark.parametrize("sizes", [{"data": 4}, {"data": 2, "fsdp": 2}, {"data": 2, "context": 2}])
def test_a_batch_goes_to_the_devices_and_back(sizes):
  mesh = make_mesh(**sizes)
  batch = {"x": np.arange(64).reshape(8, 8), "y": np.ones((8, 8), np.float32)}
  there = sharding.to_global(batch, mesh)
  assert there["x"].addressable_shards[0].data.size == 16
  assert there["x"].sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)
  jax.tree.map(np.testing.assert_array_equal, there, batch)


def test_each_device_sees_as_much_of_a_causal_row():
  assert sharding.time_order(16) is None
  with jax.set_mesh(make_mesh(context=4)):
    order = sharding.time_order(16)
  parts = order.reshape(4, 4)
  np.testing.assert_array_equal(np.sort(order), np.arange(16))
  # A query at position p sees p + 1 keys.
  assert len(set((parts + 1).sum(1))) == 1
  # Of two runs of the row each, so that neighbours stay together.
  np.testing.assert_array_equal(parts[:, 1::2] - parts[:, ::2], 1)


def test_balancing_moves_all_fields_of_a_batch_alike():
  batch = {"x": np.arange(64).reshape(4, 16), "y": np.arange(64).reshape(4, 16) / 2}
  assert sharding.balance_time(batch) is batch
  mesh = make_mesh(data=2, context=2)
  with jax.set_mesh(mesh):
    order = sharding.time_order(16)
    balanced = jax.jit(sharding.balance_time)(sharding.to_global(batch, mesh))
  assert balanced["x"].sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)
  np.testing.assert_array_equal(balanced["x"], batch["x"][:, order])
  np.testing.assert_array_equal(balanced["y"] * 2, balanced["x"])


def test_constrain_pins_under_a_mesh_and_does_nothing_without():
  x = jnp.zeros((4, 4, 4))
  assert sharding.constrain(x, "batch", "time", None) is x
  with jax.set_mesh(make_mesh(data=4)):
    pinned = jax.jit(lambda x: sharding.constrain(x, "batch", "time", None))(x)
  assert pinned.addressable_shards[0].data.shape == (1, 4, 4)


@pytest.mark.parametrize("box", [(4, 4), (2, 4, 4), (3, 4), (2, 2, 1), (4, 4, 2), (8, 2)])
def test_a_ring_goes_through_a_box_from_neighbour_to_neighbour(box):
  ring = sharding.ring_of_box(box)
  assert sorted(ring) == sorted(np.ndindex(*box))
  steps = np.abs(np.subtract(ring, np.roll(ring, 1, axis=0))).sum(axis=1)
  assert set(steps.tolist()) == {1}


def test_where_there_is_no_ring_there_is_a_path():
  for box in [(7,), (3, 3), (3, 1, 5)]:
    path = sharding.ring_of_box(box)
    assert sorted(path) == sorted(np.ndindex(*box))
    assert set(np.abs(np.diff(path, axis=0)).sum(axis=1).tolist()) == {1}


class FakeChip:
  def __init__(self, coords):
    self.coords = coords


def test_fsdp_follows_the_wires_and_the_other_axes_stay():
  chips = [[FakeChip((x, y, z)) for z in range(2) for y in range(4)] for x in range(2)]
  grid = np.empty((2, 8, 1), object)
  grid[:, :, 0] = chips
  ordered = sharding._as_rings(grid, 1)
  for x in range(2):
    coords = np.array([chip.coords for chip in ordered[x, :, 0]])
    assert set(coords[:, 0].tolist()) == {x}
    assert set(np.abs(coords - np.roll(coords, 1, axis=0)).sum(axis=1).tolist()) == {1}
