"""The search; what it compiles with is in the other tests of this folder."""

import importlib.util
import json
import math

import jax
import pytest

from gptjax import config as config_lib
from gptjax.compile import compile_training
from gptjax.compiler import search
from gptjax.compiler.search import Found
from gptjax.compiler.topology import find_slice
from gptjax.errors import UserError
from gptjax.presets.parts import tuned
from gptjax.training.resolve import resolve
from gptjax.training.setup import make_setup

SPEC = "configs/pretrain.py:model=tiny-gpt2"
SETTINGS = {
  "batch_size": "16",
  "sequence_length": "128",
  "model.vocab_size": "512",
  "model.embed_dim": "128",
  "model.num_heads": "4",
}


class Target:
  """Four devices with as much memory as a test wants."""

  name, num_slices = "here-4", 1

  def __init__(self, devices, hbm_bytes=2**40):
    self.devices, self.hbm_bytes = devices, hbm_bytes


@pytest.fixture
def target():
  return Target(jax.devices()[:4])


def report(speed, fits=True):
  return {
    "fits": fits,
    "estimated_tokens_per_second": speed if fits else None,
    "estimated_mfu": 0.5,
    "estimated_step_seconds": 1.0,
    "hbm_bytes_per_chip": {"total": 2**30},
  }


@pytest.mark.parametrize(("devices", "heads", "rows"), [(16, 16, 64), (32, 12, 96), (4, 3, 4)])
def test_meshes_divide_devices_heads_and_rows(devices, heads, rows):
  found = search.meshes(devices, heads, rows)
  assert found
  for cut in found:
    assert math.prod(cut.values()) == devices
    assert heads % cut["mesh.tensor"] == 0
    assert rows % (cut["mesh.data"] * cut["mesh.fsdp"]) == 0
  assert len({tuple(cut.values()) for cut in found}) == len(found)


@pytest.mark.slow  # Six compilations, four of them each in a process of its own.
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu, the TPU compiler, is not installed (it exists for Linux on x86-64 only)",
)
def test_layouts_are_ranked_by_what_the_compiler_says_of_them(tmp_path):
  target = find_slice("v5e-4")
  options = {"processes": 1, "cache_dir": tmp_path, "tries": 2, "rounds": 2}
  found = search.search(SPEC, SETTINGS, target, **options)
  compiled = [one for one in found if one.report]
  assert len(compiled) == len([*tmp_path.iterdir()]) == 4
  assert len({json.dumps(one.overrides, sort_keys=True) for one in found}) == len(found)
  # The compiler is asked again, without the search.
  for one in (compiled[0], compiled[-1]):
    texts = {key: str(value) for key, value in one.overrides.items()}
    setup = make_setup(resolve(config_lib.load(SPEC, SETTINGS | texts)), target.devices)
    speed = compile_training(setup, target).tokens_per_second
    assert one.tokens_per_second == pytest.approx(speed, rel=1e-6)
  speeds = [one.tokens_per_second for one in compiled]
  assert speeds == sorted(speeds, reverse=True)
  assert speeds[0] > speeds[-1]
  # The first round recomputes everything; the second goes on from the fastest of its meshes.
  fastest = next(
    one for one in compiled if one.overrides["model.execution.remat"] == "full"
  ).overrides
  later = [one for one in compiled if one.overrides["model.execution.remat"] != "full"]
  assert len(later) == 2
  for axis in ("mesh.data", "mesh.fsdp", "mesh.tensor"):
    assert {one.overrides[axis] for one in later} == {fastest[axis]}
  # Nothing is compiled twice.
  before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
  again = search.search(SPEC, SETTINGS, target, **options)
  assert [one.overrides for one in again] == [one.overrides for one in found]
  assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_what_cannot_fit_is_not_compiled(target, tmp_path, monkeypatch):
  monkeypatch.setattr(search, "try_one", lambda *_: pytest.fail("compiled"))
  small = Target(target.devices, hbm_bytes=2**20)
  with pytest.raises(UserError, match=r"here-4: nothing fits 0\.0. GiB; use more chips"):
    search.search(SPEC, SETTINGS, small, processes=2, cache_dir=tmp_path)


def test_state_and_activations_are_what_counts(target):
  config = config_lib.load(SPEC, SETTINGS | {"model.execution.remat": "full"})
  assert search.misfit(config, target) == ""
  small = Target(target.devices, hbm_bytes=2**20)
  assert "for state, gradients and activations alone" in search.misfit(config, small)
  wrong = config_lib.load(SPEC, SETTINGS | {"mesh.tensor": "3"})
  assert "mesh data=-1 x tensor=3 needs a multiple of 3 devices" in search.misfit(wrong, target)


def test_the_winner_is_a_part_of_a_config(tmp_path, monkeypatch):
  monkeypatch.setattr(tuned, "FOLDER", tmp_path)
  overrides = {
    "mesh.data": 1,
    "mesh.fsdp": 4,
    "model.execution.remat": "dots",
    "compile.options.tpu": "a=1",
  }
  search.write(Found(overrides, None), tmp_path / "tiny_v5e-4.json")
  assert tuned.names() == ["tiny_v5e-4"]
  config = config_lib.load(f"{SPEC},tuned=tiny_v5e-4")
  assert (config.mesh.data, config.mesh.fsdp, config.model.execution.remat) == (1, 4, "dots")
  assert config.compile.options.tpu == "a=1"
  with pytest.raises(UserError, match="no tuned preset 'tiny_v5e-8'"):
    config_lib.load(f"{SPEC},tuned=tiny_v5e-8")


@pytest.mark.parametrize("name", tuned.names())
def test_every_layout_that_is_kept_is_a_config(name):
  model = name.partition("_")[0]
  config = config_lib.load(f"configs/pretrain.py:model={model},tuned={name}")
  assert config.mesh.fsdp > 1


def test_the_ranking_says_what_did_not_fit(target):
  text = search.table(
    [
      Found({"mesh.fsdp": 4, "mesh.data": 1}, report(1000)),
      Found({"mesh.fsdp": 2}, report(0, fits=False)),
      Found({"mesh.fsdp": 1}, None, "needs 3.0 GiB"),
    ]
  )
  rows = text.splitlines()[2:]
  assert rows[0] == "| 1,000 | 0.500 | 1.000 s | 1.0 GiB | fsdp=4 |"
  assert "does not fit" in rows[1]
  assert "needs 3.0 GiB" in rows[2]
