import shutil
import statistics

import jax
import numpy as np
import pytest
from flax import nnx

from gptjax import tree
from gptjax.devices import sharding
from gptjax.diagnosis.dry_run import dry_run
from gptjax.errors import UserError
from gptjax.model.gpt import GPT, describe_parameters
from gptjax.peft.config import PeftConfig
from gptjax.peft.layers import Adapter
from gptjax.peft.quantized import QuantizedKernel, quantize, quantize_params
from gptjax.peft.surgery import abstract_model, adapt, merge, unmerge
from gptjax.presets.parts.peft import DEFAULTS, PEFT
from gptjax.quantization.formats import NF4
from gptjax.training.checkpoints import checksum, restore_params
from gptjax.training.loop import train
from gptjax.training.pretrained import load_checkpoint, load_model, load_params_into
from gptjax.training.resolve import resolve
from gptjax.training.setup import make_setup
from tests.peft.conftest import TOKENS
from tests.peft.test_runs import logged, make_config  # noqa: F401

TABLE = np.array(NF4, np.float32)
# Two blocks of 64 along the feed-forward network's axis, and all of any other.
WIDE = {"mlp_dim": 128}
NF4_RUN = {"peft.base": "nf4", "model.execution.remat": "full"}
EXPERTS = {"experts.count": 4, "experts.per_token": 2, "experts.router_bias": True}


def preset(name, base, **changes):
  return PeftConfig.from_config(DEFAULTS | PEFT[name] | {"rank": 4, "base": base} | changes)


def dequantized(kernel, base, contracted):
  stack = contracted[0]
  axes = tuple(f"axis{i}" for i in range(kernel.ndim - stack))
  param = nnx.Param(kernel, axes=axes, fan_in_axes=len(contracted))
  return np.asarray(QuantizedKernel(param, base)[...])


# --- Values: rounded to the nearest, and no further than that ----------------------------------

KERNELS = {"one": ((2, 128, 3, 4), (1,)), "heads": ((2, 3, 64, 5), (1, 2)), "odd": ((72, 7), (0,))}


@pytest.fixture(params=KERNELS)
def kernel(request):
  shape, contracted = KERNELS[request.param]
  kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  kernel[..., -1] = 0
  return kernel, contracted


def test_int8_is_off_by_half_a_step_at_most(kernel):
  kernel, contracted = kernel
  step = np.abs(kernel).max(contracted, keepdims=True) / 127
  error = np.abs(dequantized(kernel, "int8", contracted) - kernel)
  assert (error <= step / 2 * 1.0001).all()
  assert error.max() > 0.45 * step.max()
  assert quantize(kernel, "int8", contracted)["values"].dtype == np.int8


def test_nf4_takes_the_nearest_of_its_table_times_the_largest_of_a_block(kernel):
  kernel, contracted = kernel
  axis = contracted[-1]
  size = kernel.shape[axis]
  block = 64 if size % 64 == 0 else size
  parts = [
    part / np.maximum(np.abs(part).max(axis, keepdims=True), 1e-30)
    for part in np.split(kernel, size // block, axis)
  ]
  largest = [
    np.abs(part).max(axis, keepdims=True) for part in np.split(kernel, size // block, axis)
  ]
  nearest = [TABLE[np.abs(part[..., None] - TABLE).argmin(-1)] for part in parts]
  expected = np.concatenate([n * a for n, a in zip(nearest, largest, strict=True)], axis)
  actual = dequantized(kernel, "nf4", contracted)
  np.testing.assert_allclose(actual, expected, atol=1e-6)
  bound = np.repeat(np.concatenate(largest, axis), block, axis) * np.diff(TABLE).max() / 2
  assert (np.abs(actual - kernel) <= bound * 1.0001).all()


def test_the_table_is_of_quantiles_of_the_normal_distribution():
  # Equal shares of both halves, the outermost of which ends between 1 - 1/32 and 1 - 1/30.
  end = 1 - (1 / 32 + 1 / 30) / 2
  quantile = np.vectorize(statistics.NormalDist().inv_cdf)
  above = quantile(np.linspace(0.5, end, 9))
  below = -quantile(np.linspace(0.5, end, 8))[:0:-1]
  np.testing.assert_allclose(TABLE, np.concatenate([below, above]) / above[-1], atol=1e-6)


# --- Models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "base", "changes"),
  [
    pytest.param(
      "lora",
      "nf4",
      {"execution.scan_layers": True, "execution.remat": "full"},
      marks=pytest.mark.slow,
    ),
    ("dora", "int8", {}),
    ("ia3", "bfloat16", {}),
    pytest.param("lora", "nf4", EXPERTS | {"execution.scan_layers": False}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_logits_are_those_of_the_plain_model_with_the_dequantised_kernels(
  name, base, changes, make_model, make_adapted, logits, tiny_config, model_config
):
  config = model_config.replace(WIDE | changes)
  adapted = make_adapted(preset(name, base), config)
  actual = logits(adapted)
  merged = merge(adapted)
  assert type(merged) is GPT
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(nnx.state(merged)))
  np.testing.assert_allclose(actual, logits(merged), atol=1e-4)
  own, kernel = (x.blocks.mlp.up.kernel[...] for x in (make_model(config), merged))
  assert np.abs(kernel - own).max() > 1e-4


@pytest.mark.slow
def test_what_was_merged_is_taken_out_of_the_dequantised_kernels(make_adapted):
  config = preset("lora", "nf4")
  adapted = make_adapted(config)
  again = unmerge(merge(adapted), config, nnx.to_pure_dict(nnx.state(adapted, Adapter)))
  query = again.blocks.attention.query
  expected = adapted.blocks.attention.query.kernel[...]
  np.testing.assert_allclose(query.kernel[...], expected, atol=1e-5)


def test_a_model_with_virtual_tokens_is_quantised_too(make_adapted, logits):
  adapted = make_adapted(preset("prompt", "int8"), by=0.0)
  # Put on a model whose own kernels are the dequantised ones, they compute the same.
  plain = merge(make_adapted(preset("lora", "int8"), by=0.0))
  expected = logits(adapt(plain, preset("prompt", "float32"), nnx.Rngs(1)))
  np.testing.assert_allclose(logits(adapted), expected, atol=1e-5)


@pytest.mark.slow
def test_gradients_are_those_beside_the_dequantised_kernels_which_are_not_kept(
  make_adapted, model_config
):
  config = model_config.replace(WIDE)
  adapted = make_adapted(preset("lora", "nf4"), config)

  def of(model):
    graph, adapters, frozen = nnx.split(model, Adapter, ...)

    def loss(adapters):
      return (nnx.merge(graph, adapters, frozen)(TOKENS) ** 2).mean()

    residuals = jax.eval_shape(lambda adapters: jax.vjp(loss, adapters)[1], adapters)
    kept = {x.shape for x in jax.tree.leaves(residuals) if x.dtype == np.float32}
    return jax.tree.leaves(jax.jit(jax.grad(loss))(adapters)), kept

  gradients, kept = of(adapted)
  up = (config.num_layers, config.embed_dim, config.mlp_dim)
  assert up not in kept
  plain = nnx.merge(*nnx.split(adapted))
  for _, module in list(nnx.iter_modules(plain)):
    if isinstance(getattr(module, "kernel", None), QuantizedKernel):
      module.kernel = nnx.Param(module.kernel[...])
  expected, kept = of(plain)
  assert up in kept
  for a, b in zip(gradients, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


def test_parameters_are_those_of_the_model_that_is_made_and_as_small_as_they_say(
  make_model, model_config, tiny_config, random_params
):
  config = tiny_config(embed_dim=64, mlp_dim=128, num_heads=1, **EXPERTS)
  parameters = describe_parameters(config)
  size = sum(
    int(np.prod(info.shape))
    for name, info in parameters.items()
    if info.fan_in_axes is not None and "router" not in name
  )
  rest = sum(int(np.prod(info.shape)) for info in parameters.values()) - size
  for base, expected in (("bfloat16", 2 * size), ("nf4", size / 2 + 4 * size / 64)):
    params = jax.tree.map(jax.numpy.asarray, random_params(config))
    quantized = quantize_params(params, parameters, base)
    _, _, made = nnx.split(abstract_model(config, preset("lora", base)), Adapter, ...)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), nnx.to_pure_dict(made))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), quantized) == shapes
    assert sum(x.nbytes for x in jax.tree.leaves(quantized)) == expected + 4 * rest
  # A kernel is gone when the next is quantised.
  assert params["blocks"]["mlp"]["up"]["kernel"].is_deleted()
  assert not params["embed"]["embedding"].is_deleted()
  assert quantized["blocks"]["mlp"]["router"]["kernel"].dtype == np.float32


def test_they_are_split_over_the_mesh_as_the_kernel_was(tiny_config):
  parameters = describe_parameters(tiny_config(embed_dim=128, mlp_dim=128))
  ones = dict.fromkeys(sharding.MESH_AXES, 1)
  mesh = sharding.make_mesh(ones | {"fsdp": 2, "tensor": 2})
  where = sharding.parameter_shardings(parameters, mesh)
  names = ("blocks/mlp/up/kernel", "blocks/mlp/down/kernel", "blocks/attention/out/kernel")
  abstract = {
    name: jax.ShapeDtypeStruct(parameters[name].shape, np.float32, sharding=where[name])
    for name in names
  }
  found = tree.named_leaves(
    quantize_params(abstract, {name: parameters[name] for name in names}, "nf4")
  )
  shapes = {
    name.removeprefix("blocks/"): (x.shape, x.sharding.shard_shape(x.shape))
    for name, x in found.items()
  }
  assert shapes == {
    "mlp/up/kernel/values": ((2, 64, 128), (2, 32, 64)),
    "mlp/up/kernel/scales": ((2, 2, 128), (2, 1, 64)),
    "mlp/down/kernel/values": ((2, 64, 128), (2, 32, 64)),
    "mlp/down/kernel/scales": ((2, 2, 128), (2, 1, 64)),
    "attention/out/kernel/values": ((2, 4, 16, 128), (2, 2, 16, 64)),
    "attention/out/kernel/scales": ((2, 4, 1, 128), (2, 2, 1, 64)),
  }


def test_what_cannot_be_quantised_is_refused(make_model, tiny_config):
  model = make_model(tiny_config(mlp_dim=33))
  with pytest.raises(UserError, match=r"'blocks/mlp/down/kernel' whose size is 33, which is odd"):
    adapt(model, preset("lora", "nf4"), nnx.Rngs(0))
  with pytest.raises(UserError, match=r"peft\.base: no format 'fp4'"):
    preset("lora", "fp4")
  with pytest.raises(UserError, match=r"peft\.base='nf4' is of a frozen model: choose a peft\.m"):
    PeftConfig.from_config(DEFAULTS | {"base": "nf4"})


# --- Runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized_run(make_config, tmp_path_factory):  # noqa: F811
  """The work directory of a run of 4 steps."""
  workdir = tmp_path_factory.mktemp("nf4")
  train(make_config("lora", **NF4_RUN), workdir)
  return workdir


@pytest.fixture(scope="module")
def adapted(quantized_run):
  """Its model."""
  return load_checkpoint(quantized_run)[0]


@pytest.mark.slow
def test_a_run_learns_and_goes_on_bit_for_bit(quantized_run, adapted, make_config, tmp_path):  # noqa: F811
  losses = logged(quantized_run, "val/loss")
  assert losses[-1] < losses[0]
  shutil.copytree(quantized_run, tmp_path / "run")
  shutil.rmtree(tmp_path / "run/checkpoints/4")
  train(make_config("lora", **NF4_RUN), tmp_path / "run")
  resumed, step = load_checkpoint(tmp_path / "run")
  assert step == 4
  leaves = [jax.tree.leaves(nnx.state(model)) for model in (resumed, adapted)]
  for actual, expected in zip(*leaves, strict=True):
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.slow
def test_a_run_is_loaded_with_its_adapters_merged_into_the_dequantised_kernels(
  quantized_run, adapted
):
  merged, _ = load_model(quantized_run)
  assert type(merged) is GPT
  assert isinstance(adapted.blocks.mlp.up.kernel, QuantizedKernel)
  up, query = merged.blocks.mlp.up, merged.blocks.attention.query
  np.testing.assert_array_equal(up.kernel[...], adapted.blocks.mlp.up.kernel[...])
  expected, _ = adapted.blocks.attention.query.merged()
  np.testing.assert_array_equal(query.kernel[...], expected)


def test_the_checksum_is_of_the_base_before_it_was_quantised(quantized_run, make_config):  # noqa: F811
  setup = make_setup(resolve(make_config("lora", **NF4_RUN)))
  base, _ = load_params_into(setup.config.init_from, setup.model, setup.abstract_base())
  whole = sharding.replicated(setup.mesh)
  adapters = {
    name: jax.ShapeDtypeStruct(info.shape, np.float32, sharding=whole)
    for name, info in setup.trained.items()
  }
  _, report = restore_params(quantized_run / "checkpoints", adapters)
  assert report.base_checksum == checksum(base)


def test_a_dry_run_tells_the_memory_of_what_is_kept(make_config, capsys):  # noqa: F811
  config = make_config("lora", **NF4_RUN, **{"mesh.data": 1, "mesh.fsdp": 4})
  setup = make_setup(resolve(config))
  frozen = setup.frozen(setup.abstract_base())
  kernel = frozen["blocks"]["mlp"]["up"]["kernel"]
  assert kernel["values"].sharding.shard_shape(kernel["values"].shape) == (2, 2, 32)
  dry_run(config)
  assert "memory of parameters: 0.0 MiB in all" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_a_mesh_learns_the_same(sizes, quantized_run, make_config, tmp_path):  # noqa: F811
  changes = {f"mesh.{axis}": size for axis, size in ({"data": 1} | sizes).items()}
  train(make_config("lora", **NF4_RUN | changes), tmp_path)
  expected = logged(quantized_run, "val/loss")
  assert logged(tmp_path, "val/loss") == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_run_starts_from_one_with_a_quantised_base(quantized_run, make_config, tmp_path):  # noqa: F811
  changes = {"init_from": str(quantized_run), "total_steps": 1, "mesh.data": 1, "mesh.fsdp": 4}
  train(make_config("houlsby", **changes), tmp_path)
  first, last = logged(tmp_path, "val/loss")[0], logged(quantized_run, "val/loss")[-1]
  assert first == pytest.approx(last, abs=1e-4)
