"""The search itself; what it compiles with is in the other tests of this folder."""

import json
import math

import jax
import pytest

from configs.parts import tuned
from gptjax import config as config_lib
from gptjax.compiler import search
from gptjax.compiler.search import Found
from gptjax.errors import UserError

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


@pytest.fixture
def compiled(monkeypatch):
  """What was compiled, by a compiler that likes tensor=2 and hates recomputation."""
  tried = []

  def try_one(spec, overrides, candidate, target, cache):
    tried.append(candidate)
    speed = 100 * candidate["mesh.tensor"] if candidate["mesh.tensor"] <= 2 else 1
    speed *= {"none": 4, "dots": 3, "save_qkv": 2, "full": 1}[candidate["model.remat"]]
    speed *= 2 if "32768" in candidate.get("compile.options.tpu", "") else 1
    return Found(candidate, report(speed, fits=candidate["model.remat"] != "none"))

  monkeypatch.setattr(search, "try_one", try_one)
  return tried


def run(target, tmp_path, **options):
  return search.search(SPEC, SETTINGS, target, processes=2, cache_dir=tmp_path, **options)


@pytest.mark.parametrize(("devices", "heads", "rows"), [(16, 16, 64), (32, 12, 96), (4, 3, 4)])
def test_meshes_divide_devices_heads_and_rows(devices, heads, rows):
  found = search.meshes(devices, heads, rows)
  assert found
  for cut in found:
    assert math.prod(cut.values()) == devices
    assert heads % cut["mesh.tensor"] == 0
    assert rows % (cut["mesh.data"] * cut["mesh.fsdp"]) == 0
  assert len({tuple(cut.values()) for cut in found}) == len(found)


def test_each_round_starts_from_the_best_of_the_one_before(target, tmp_path, compiled):
  found = run(target, tmp_path, tries=8)
  best = found[0]
  assert best.overrides["mesh.tensor"] == 2
  assert best.overrides["model.remat"] == "dots"  # 'none' is faster, but does not fit
  assert "32768" in best.overrides["compile.options.tpu"]
  speeds = [one.tokens_per_second for one in found]
  assert speeds == sorted(speeds, reverse=True)
  # Nothing is compiled twice, and no more than asked for.
  assert len({json.dumps(one, sort_keys=True) for one in compiled}) == len(compiled)
  compiled.clear()
  run(target, tmp_path, tries=2)
  assert len(compiled) <= 6


def test_what_cannot_fit_is_not_compiled(target, tmp_path, compiled):
  with pytest.raises(UserError, match=r"here-4: nothing fits 0\.0. GiB; use more chips"):
    run(Target(target.devices, hbm_bytes=2**20), tmp_path)
  assert compiled == []


def test_state_and_activations_are_what_counts(target):
  config = config_lib.load(SPEC, SETTINGS | {"model.remat": "full"})
  assert search.misfit(config, target) == ""
  small = Target(target.devices, hbm_bytes=2**20)
  assert "for state, gradients and activations alone" in search.misfit(config, small)
  wrong = config_lib.load(SPEC, SETTINGS | {"mesh.tensor": "3"})
  assert "mesh data=-1 x tensor=3 needs a multiple of 3 devices" in search.misfit(wrong, target)


def test_the_winner_is_a_part_of_a_config(tmp_path, monkeypatch):
  monkeypatch.setattr(tuned, "FOLDER", tmp_path)
  overrides = {"mesh.data": 1, "mesh.fsdp": 4, "model.remat": "dots", "compile.options.tpu": "a=1"}
  search.write(Found(overrides, None), tmp_path / "tiny_v5e-4.json")
  assert tuned.names() == ["tiny_v5e-4"]
  config = config_lib.load(f"{SPEC},tuned=tiny_v5e-4")
  assert (config.mesh.data, config.mesh.fsdp, config.model.remat) == (1, 4, "dots")
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
