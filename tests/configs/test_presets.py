import itertools
import re
from pathlib import Path

import pytest

from gptjax import config as config_lib
from gptjax.devices import sharding
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import count_parameters, describe_parameters
from gptjax.presets.parts import data, mesh, models, optim
from gptjax.training.resolve import resolve
from gptjax.training.setup import make_setup

# What the model cards and reference implementations count.
PUBLISHED = {
  "gpt1": 116_534_784,
  "gpt2-124m": 124_439_808,
  "gpt2-355m": 354_823_168,
  "gpt2-774m": 774_030_080,
  "gpt2-1558m": 1_557_611_200,
  "smollm2-135m": 134_515_008,
  "smollm2-360m": 361_821_120,
  "smollm2-1.7b": 1_711_376_384,
  "llama2-7b": 6_738_415_616,
  "llama2-70b": 68_976_648_192,
  "llama3-8b": 8_030_261_248,
  "llama3.1-8b": 8_030_261_248,
  "llama3.1-70b": 70_553_706_496,
  "llama3.2-1b": 1_235_814_400,
  "mixtral-8x7b": 46_702_792_704,
  "gpt-neo-125m": 125_198_592,
  "gpt-neo-1.3b": 1_315_575_808,
  "gpt-j-6b": 6_050_882_784,
  "gpt-neox-20b": 20_554_567_680,
  "pythia-70m": 70_426_624,
  "pythia-160m": 162_322_944,
  "pythia-1.4b": 1_414_647_808,
  "mistral-7b": 7_241_732_096,
  "qwen2.5-0.5b": 494_032_768,
  "qwen3-0.6b": 596_049_920,
  "gemma2-2b": 2_614_341_888,
  "gemma3-270m": 268_098_176,
  "gpt-oss-20b": 20_914_757_184,
  "bert-base": 109_514_298,
  "bert-large": 335_174_458,
  "bert-base-chinese": 102_290_312,
  "roberta-base": 124_697_433,
  "t5-small": 60_506_624,
  "t5-base": 222_903_552,
  "t5-v1.1-base": 247_577_856,
  "mt5-small": 300_176_768,
}
# What the paper prints (Brown et al. 2020, table 2.1), rounded, and mostly without embeddings'
# last digits.
NOMINAL = {
  "gpt3-125m": 125e6,
  "gpt3-350m": 356e6,
  "gpt3-760m": 760e6,
  "gpt3-1.3b": 1.3e9,
  "gpt3-2.7b": 2.65e9,
  "gpt3-6.7b": 6.66e9,
  "gpt3-13b": 12.85e9,
  "gpt3-175b": 174.6e9,
}
HOMEMADE = {
  "debug",
  "tiny",
  "tiny-gpt2",
  "tiny-moe",
  "char",
  "speedrun",
  "gpt4-style-14b",
  "gpt4-style-1.8t",
}


def build(name):
  preset = ModelConfig.defaults() | models.MODELS[name]
  return ModelConfig.from_config(preset | {"vocab_size": preset["vocab_size"] or 4096})


def test_every_published_preset_has_its_count_here():
  assert set(models.MODELS) == {*PUBLISHED, *NOMINAL, *HOMEMADE}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_parameter_count_is_the_published_one(name):
  assert count_parameters(build(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", NOMINAL)
def test_the_parameter_count_is_near_the_printed_one(name):
  assert count_parameters(build(name)) == pytest.approx(NOMINAL[name], rel=0.03)


@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_preset_builds_and_all_its_parameters_are_sharded(name):
  everywhere = sharding.make_mesh({**mesh.DEFAULTS, "data": -1})
  parameters = describe_parameters(build(name))
  assert set(sharding.parameter_shardings(parameters, everywhere)) == set(parameters)


@pytest.mark.parametrize(
  ("part", "name"),
  [
    *itertools.product(["model"], models.MODELS),
    *itertools.product(["data"], [*data.DATA, "stdlib+tiny_shakespeare"]),
    *itertools.product(["optim"], optim.OPTIMIZERS),
    *itertools.product(["mesh"], mesh.MESHES),
  ],
)
def test_pretrain_composes_every_preset(part, name):
  config = config_lib.load(f"configs/pretrain.py:{part}={name}")
  setup = make_setup(resolve(config))
  # The rules of the optimizer cover every parameter, or this raises.
  optimizer = setup.make_optimizer(setup.run_length)
  assert set(optimizer.groups) == set(setup.parameters)


@pytest.mark.parametrize("name", models.MODELS)
def test_muon_takes_every_projection_of_the_layers_and_nothing_else(name):
  setup = make_setup(resolve(config_lib.load(f"configs/pretrain.py:model={name},optim=muon")))
  groups = setup.make_optimizer(None).groups
  muon = {name for name, group in groups.items() if group.algorithm == "muon"}
  assert muon == {name for name in groups if re.fullmatch(r"(encoder/)?blocks/.*/kernel", name)}


@pytest.mark.parametrize("name", ["tiny", "gpt2-124m"])
def test_decay_is_for_matrices(name):
  setup = make_setup(resolve(config_lib.load(f"configs/pretrain.py:model={name}")))
  for name, group in setup.make_optimizer(None).groups.items():
    assert (group.decay > 0) == name.endswith(("kernel", "embedding"))


def test_quickstart_loads():
  config = config_lib.load("configs/quickstart.py")
  assert config.data.source == "stdlib"
  assert config.optim.name == "muon"


def test_a_config_file_runs_without_an_argument_and_from_any_directory(tmp_path, monkeypatch):
  root = Path.cwd()
  monkeypatch.chdir(tmp_path)
  assert config_lib.load(f"{root}/configs/pretrain.py").model.num_layers == 4


def test_of_experts_only_the_active_count_in_the_flops():
  dense = {"experts.count": 0, "experts.per_token": 0}
  load = {"sequence_length": 256, "model.vocab_size": 4096}

  def flops(**changes):
    overrides = {f"model.{key}": value for key, value in changes.items()}
    return make_setup(
      resolve(config_lib.load("configs/pretrain.py:model=tiny-moe", load | overrides))
    )

  mixture, twice_as_wide = flops(), flops(**dense, mlp_dim=2 * 256)
  routers = 6 * 4 * 192 * 8
  assert mixture.flops_per_token == twice_as_wide.flops_per_token + routers
  assert mixture.num_parameters > 2 * twice_as_wide.num_parameters
