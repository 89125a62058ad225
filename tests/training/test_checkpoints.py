import dataclasses
import gc
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.training.checkpoints import Checkpoints, restore_params

# Orbax gives up the other reads of a damaged checkpoint, which is reported when they are collected.
pytestmark = [
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
  pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
]

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def collect_abandoned_reads():
  yield
  gc.collect()


class Moments(NamedTuple):
  count: jax.Array
  mu: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
  params: dict
  opt_state: tuple
  ema: dict | None
  step: jax.Array


def make_state(seed=0, vocab=40, ema=False):
  """A state as the loop has it: nested dict, optimizer tuple, EMA that may be absent, dtypes."""
  rng = np.random.default_rng(seed)
  params = {
    "embed": {"embedding": jnp.asarray(rng.normal(size=(vocab, 64)), jnp.float32)},
    "blocks": {"mlp": {"kernel": jnp.asarray(rng.normal(size=(2, 64, 128)), jnp.bfloat16)}},
  }
  return State(
    params=params,
    opt_state=(Moments(jnp.int32(seed), jax.tree.map(jnp.zeros_like, params)), None, ()),
    ema=jax.tree.map(lambda x: x + 1, params) if ema else None,
    step=jnp.int32(seed),
  )


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same_bits(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def run(code, *arguments, **environment):
  return subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_a_restored_state_has_the_same_bits(tmp_path):
  state = {
    "float32": jnp.array([0.1, -0.0, jnp.nan, jnp.inf, 1e-45], jnp.float32),
    "bfloat16": jnp.arange(300, dtype=jnp.bfloat16).reshape(3, 100) / 7,
    "int32": jnp.array([-(2**31), 2**31 - 1], jnp.int32),
    "uint32": jnp.array([0, 2**32 - 1], jnp.uint32),
    "int8": jnp.arange(-128, 128, dtype=jnp.int8),
    "bool": jnp.array([True, False]),
    "scalar": jnp.float32(3),
    "nested": [make_state(1), make_state(2, ema=True)],
  }
  with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
    checkpoints.save(7, state)
  with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
    restored, step = checkpoints.restore_latest(abstract(state))
  assert step == 7
  assert_same_bits(restored, state)


def test_random_keys_come_back(tmp_path):
  state = {"key": jax.random.key(3), "raw": jax.random.PRNGKey(4)}
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, state)
    restored, _ = checkpoints.restore_latest(abstract(state))
  assert jax.random.bits(restored["key"]) == jax.random.bits(state["key"])
  assert_same_bits(restored["raw"], state["raw"])


def test_a_new_run_has_nothing_to_restore(tmp_path):
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    assert checkpoints.restore_latest(abstract(make_state())) is None
    assert checkpoints.latest_step() is None


def test_buffers_donated_right_after_save_do_not_reach_the_disk(tmp_path):
  update = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 2 + 1, x), donate_argnums=0)
  state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4096, 512)), jnp.float32)}
  expected = jax.tree.map(np.array, state)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    target = abstract(state)
    checkpoints.save(1, state)
    for _ in range(5):
      state = update(state)
    jax.block_until_ready(state)
    restored, _ = checkpoints.restore_latest(target)
  assert_same_bits(restored, expected)


def test_a_run_resumes_on_another_mesh(tmp_path):
  code = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from gptjax.training.checkpoints import Checkpoints

    def place(shape, spec):
      mesh = jax.make_mesh(shape, ("data", "model"))
      return NamedSharding(mesh, spec)

    x = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
    with Checkpoints(sys.argv[1], keep=1) as checkpoints:
      checkpoints.save(3, {"x": jax.device_put(x, place((4, 1), P("data")))})
      for shape, spec in [((2, 2), P("data", "model")), ((1, 4), P(None, "model")), ((1, 1), P())]:
        target = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(shape, spec))
        with jax.set_mesh(target.sharding.mesh):
          restored, step = checkpoints.restore_latest({"x": target})
          assert restored["x"].sharding == target.sharding
          assert np.array_equal(restored["x"], x)
          checkpoints.save(step + 1, restored)
  """
  result = run(code, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=4")
  assert result.returncode == 0, result.stderr
  # ... and in this process, with the devices that it has.
  x = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    restored, _ = checkpoints.restore_latest(abstract({"x": jnp.asarray(x)}))
  assert_same_bits(restored, {"x": x})


def test_saving_and_restoring_say_nothing(tmp_path):
  code = """
    import sys, warnings
    warnings.simplefilter("default")
    import jax, jax.numpy as jnp
    from gptjax.training.checkpoints import Checkpoints, restore_params
    state = {"params": {"w": jnp.ones((8, 8))}}
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with Checkpoints(sys.argv[1], keep=1) as checkpoints:
      for step in 1, 2:
        checkpoints.save(step, state)
      checkpoints.restore_latest(target)
    restore_params(sys.argv[1], target["params"])
  """
  result = run(code, tmp_path)
  assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# --- Damage -----------------------------------------------------------------------------------


def flip_a_bit(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x10
  path.write_bytes(content)


DAMAGES = {
  "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
  "emptied": lambda path: os.truncate(path, 0),
  "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
  "deleted": lambda path: path.unlink(),
  "flipped": flip_a_bit,
}


def payload(step_folder):
  """The file that holds the arrays' chunks: the largest by far."""
  files = [path for path in step_folder.rglob("*") if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


@pytest.fixture
def two_checkpoints(tmp_path):
  states = {10: make_state(10), 20: make_state(20)}
  with Checkpoints(tmp_path, keep=3) as checkpoints:
    for step, state in states.items():
      checkpoints.save(step, state)
  return tmp_path, states


@pytest.mark.parametrize(
  "damage",
  [
    pytest.param(damage, marks=[] if damage == "flipped" else [pytest.mark.slow])
    for damage in DAMAGES
  ],
)
def test_damage_to_any_file_never_restores_wrong_values(two_checkpoints, damage, tmp_path):
  directory, states = two_checkpoints
  backup = shutil.copytree(directory / "20", tmp_path / "backup")
  files = [path for path in (directory / "20").rglob("*") if path.is_file()]
  assert len(files) > 8
  steps = set()
  for path in files:
    DAMAGES[damage](path)
    with Checkpoints(directory, keep=3) as checkpoints:
      restored, step = checkpoints.restore_latest(abstract(states[20]))
    # Some files are only for Orbax's information: then step 20 itself comes back, whole.
    assert_same_bits(restored, states[step])
    steps.add(step)
    shutil.rmtree(directory / "20")
    shutil.copytree(backup, directory / "20")
  assert 10 in steps


@pytest.mark.parametrize(
  "damage",
  [
    pytest.param(damage, marks=[] if damage in ("deleted", "zeroed") else [pytest.mark.slow])
    for damage in DAMAGES
  ],
)
def test_a_damaged_payload_is_skipped_with_a_warning(two_checkpoints, damage, caplog):
  directory, states = two_checkpoints
  DAMAGES[damage](payload(directory / "20"))
  with Checkpoints(directory, keep=3) as checkpoints:
    restored, step = checkpoints.restore_latest(abstract(states[20]))
    assert checkpoints.steps() == [10]
  assert step == 10
  assert_same_bits(restored, states[10])
  # Only our own: reads that Orbax abandoned may still complain through asyncio's logger.
  warnings = [record.message for record in caplog.records if record.name == "absl"]
  assert [f"{directory}/20: skipped" in warning for warning in warnings] == [True]


def test_every_flipped_bit_of_the_payload_is_noticed(two_checkpoints):
  directory, states = two_checkpoints
  path = payload(directory / "20")
  whole = path.read_bytes()
  rng = np.random.default_rng(0)
  for position in rng.integers(0, len(whole), 15):
    content = bytearray(whole)
    content[position] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    with Checkpoints(directory, keep=3) as checkpoints:
      restored, step = checkpoints.restore_latest(abstract(states[20]))
      assert_same_bits(restored, states[step])


def test_a_changed_name_in_the_metadata_falls_back_to_the_older_checkpoint(two_checkpoints, caplog):
  directory, states = two_checkpoints
  path = directory / "20" / "state" / "_METADATA"
  content = path.read_text()
  for old, new in (("embedding", "embeddinq"), ("kernel", "kernek"), ('"step"', '"stop"')):
    assert old in content
    path.write_text(content.replace(old, new))
    with Checkpoints(directory, keep=3) as checkpoints:
      restored, step = checkpoints.restore_latest(abstract(states[20]))
    assert step == 10
    assert_same_bits(restored, states[10])
    assert "20: skipped, the checkpoint is damaged" in caplog.text
    caplog.clear()


@pytest.mark.parametrize("next_steps", [(20,), (15, 20)])
def test_training_goes_on_over_a_damaged_checkpoint(two_checkpoints, next_steps):
  directory, states = two_checkpoints
  DAMAGES["truncated"](payload(directory / "20"))
  with Checkpoints(directory, keep=1) as checkpoints:
    checkpoints.restore_latest(abstract(states[10]))
    # The damaged one must not count as the one to keep, nor be in the way of its own step.
    for step in next_steps:
      checkpoints.save(step, make_state(step))
      checkpoints.wait()
      assert checkpoints.steps() == [step]
  with Checkpoints(directory, keep=1) as checkpoints:
    restored, step = checkpoints.restore_latest(abstract(states[20]))
  assert step == 20
  assert_same_bits(restored, states[20])


def test_all_damaged_is_an_error_that_names_the_folder(two_checkpoints):
  directory, states = two_checkpoints
  for step in states:
    DAMAGES["truncated"](payload(directory / str(step)))
  with (
    Checkpoints(directory, keep=3) as checkpoints,
    pytest.raises(UserError, match=f"^{directory}: all checkpoints are damaged .*10, 20"),
  ):
    checkpoints.restore_latest(abstract(states[10]))
  assert (directory / "20").exists()


def test_another_model_is_an_error_that_names_the_parameter(two_checkpoints):
  directory, _ = two_checkpoints
  smaller = abstract(make_state(vocab=39))
  extra = abstract(make_state())
  extra.params["head"] = {"kernel": extra.params["embed"]["embedding"]}
  fewer = abstract(make_state())
  del fewer.params["embed"]
  half = abstract(make_state())
  half.params["embed"]["embedding"] = half.params["embed"]["embedding"].update(dtype=jnp.float16)
  for target, message in (
    (
      smaller,
      "params/embed/embedding was saved as float32[40, 64], but this config has float32[39, 64]",
    ),
    (
      half,
      "params/embed/embedding was saved as float32[40, 64], but this config has float16[40, 64]",
    ),
    (extra, "this config has params/head/kernel, which the checkpoint lacks"),
    (fewer, "the checkpoint has params/embed/embedding, which this config lacks"),
  ):
    with (
      Checkpoints(directory, keep=3) as checkpoints,
      pytest.raises(UserError, match=re.escape(f"{directory}/20: {message}.")),
    ):
      checkpoints.restore_latest(target)


def test_a_save_killed_half_way_is_never_restored(tmp_path):
  code = """
    import os, sys
    import jax, jax.numpy as jnp
    from gptjax.training.checkpoints import Checkpoints
    checkpoints = Checkpoints(sys.argv[1], keep=5)
    checkpoints.save(1, {"w": jnp.ones((1000, 1000))})
    checkpoints.wait()
    state = {"w": jax.random.normal(jax.random.key(0), (8000, 8000))}  # 256 MB: a second to write.
    jax.block_until_ready(state)
    print("saving", flush=True)
    checkpoints.save(2, state)
    checkpoints.wait()
    print("saved", flush=True)
  """
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(code), tmp_path],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "saving\n"
  begun = time.monotonic()
  while not any((tmp_path / f).is_dir() and "2." in f for f in os.listdir(tmp_path)):
    assert time.monotonic() - begun < 60
    time.sleep(0.001)
  time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  assert "saved" not in process.stdout.read()
  process.wait()
  assert not (tmp_path / "2").exists()

  target = {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32, sharding=jnp.zeros(1).sharding)}
  with Checkpoints(tmp_path, keep=5) as checkpoints:
    assert checkpoints.steps() == [1]
    restored, step = checkpoints.restore_latest(target)
    assert step == 1
    assert_same_bits(restored, {"w": jnp.ones((1000, 1000))})
    checkpoints.save(2, restored)
  assert sorted(os.listdir(tmp_path)) == ["1", "2", "metrics.json"]


# --- Directories that cannot be written -------------------------------------------------------


def test_a_directory_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=f"^{tmp_path}/file/run: cannot write a checkpoint"):
    Checkpoints(tmp_path / "file" / "run", keep=1)


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
  # A limit on the size of files stands in for a full disk.
  code = """
    import resource, sys
    import jax, jax.numpy as jnp
    from gptjax.training.checkpoints import Checkpoints
    from gptjax.errors import UserError
    state = {"w": jax.random.normal(jax.random.key(0), (500, 500))}
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with Checkpoints(sys.argv[1], keep=1) as checkpoints:
      checkpoints.save(1, state)
      checkpoints.wait()
      unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
      resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
      checkpoints.save(2, state)
      try:
        checkpoints.save(3, state)
      except UserError as error:
        print(error)
      assert checkpoints.steps() == [1]
      assert checkpoints.restore_latest(target)[1] == 1
      resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
      checkpoints.save(4, state)
      checkpoints.wait()
      assert checkpoints.steps() == [4]
  """
  result = run(code, tmp_path)
  assert result.returncode == 0, result.stderr
  assert result.stdout == f"{tmp_path}: cannot write a checkpoint: File too large\n"
  assert result.stderr == ""


def test_an_error_of_the_last_save_surfaces_when_closing(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  with pytest.raises(UserError, match=f"^{tmp_path}: cannot write a checkpoint"):  # noqa: PT012
    try:
      resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
      checkpoints.save(1, make_state())
      checkpoints.close()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(1, make_state(1))
    broken = make_state(2)
    broken.params["embed"]["embedding"] = broken.params["embed"]["embedding"].at[3, 4].set(jnp.nan)
    with pytest.raises(UserError, match=r"step 2: params/embed/embedding is not finite.*step 1,"):
      checkpoints.save(2, broken)
    assert checkpoints.steps() == [1]


# --- Retention --------------------------------------------------------------------------------


def test_retention_keeps_the_newest_and_the_periodic(tmp_path):
  with Checkpoints(tmp_path, keep=2, keep_every_steps=30) as checkpoints:
    for step in range(10, 100, 10):
      checkpoints.save(step, {"x": jnp.int32(step)})
    checkpoints.wait()
    assert checkpoints.steps() == [30, 60, 80, 90]
    assert checkpoints.latest_step() == 90
  assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["30", "60", "80", "90"]


def test_retention_keeps_the_best_known_after_its_save_and_over_a_restart(tmp_path):
  losses = {10: float("nan"), 20: 2.0, 30: float("-inf"), 40: 2.5, 50: 2.4}
  for step, loss in losses.items():
    with Checkpoints(tmp_path, keep=1, best_metric="val/loss") as checkpoints:
      checkpoints.save(step, {"x": jnp.int32(step)})
      checkpoints.record_metrics(step, {"val/loss": loss})
  with Checkpoints(tmp_path, keep=1, best_metric="val/loss") as checkpoints:
    assert checkpoints.steps() == [20, 50]
    checkpoints.record_metrics(50, {"val/loss": 1.0})
    checkpoints.save(60, {"x": jnp.int32(60)})
    checkpoints.wait()
    assert checkpoints.steps() == [50, 60]


@pytest.mark.parametrize(("metric", "best"), [("val/f1_macro", 20), ("val/loss", 30)])
def test_the_best_is_the_first_of_the_highest_or_lowest_and_can_be_asked_for(
  tmp_path, metric, best
):
  with Checkpoints(tmp_path, keep=1, best_metric=metric) as checkpoints:
    for step, value in {10: 0.5, 20: 0.9, 30: 0.1, 40: 0.9, 50: 0.1, 60: 0.2}.items():
      checkpoints.save(step, {"params": {"x": jnp.float32(step)}})
      checkpoints.record_metrics(step, {metric: value})
    checkpoints.wait()
    assert checkpoints.steps() == [best, 60]
  wanted = {"x": jax.ShapeDtypeStruct((), jnp.float32, sharding=jnp.float32(0).sharding)}
  for asked, step in ((True, best), (False, 60)):
    params, _ = restore_params(tmp_path, wanted, best=asked)
    assert float(params["x"]) == step


@pytest.mark.parametrize("left", ["whole", "half"])
def test_a_deletion_cut_short_is_finished_when_the_run_goes_on(tmp_path, left):
  directory, aside = tmp_path / "run", tmp_path / "aside"
  with Checkpoints(directory, keep=2, keep_every_steps=30, best_metric="val/loss") as checkpoints:
    for step, loss in {10: 0.5, 20: 0.9, 30: 1.0, 40: 1.0, 50: 0.1}.items():
      checkpoints.save(step, make_state(step))
      checkpoints.wait()
      checkpoints.record_metrics(step, {"val/loss": loss})
      if step == 20:
        shutil.copytree(directory / "20", aside)
    uninterrupted = checkpoints.steps()
  assert uninterrupted == [10, 30, 40, 50]
  if left == "half":
    shutil.rmtree(aside / "state" / "d")
  shutil.move(aside, directory / "20")  # As if the process had died while it was deleted.
  with Checkpoints(directory, keep=2, keep_every_steps=30, best_metric="val/loss") as checkpoints:
    assert checkpoints.restore_latest(abstract(make_state(50)))[1] == 50
    checkpoints.thin_out()
    assert checkpoints.steps() == uninterrupted
  assert not (directory / "20").exists()


def test_nothing_is_thinned_out_for_a_checkpoint_that_cannot_be_read(two_checkpoints):
  directory, states = two_checkpoints
  DAMAGES["flipped"](payload(directory / "20"))
  with Checkpoints(directory, keep=1) as checkpoints:
    _, step = checkpoints.restore_latest(abstract(states[20]))
    checkpoints.thin_out()
    assert step == 10
    assert (directory / "10").exists()


def test_best_metric_that_is_not_evaluated_is_an_error(tmp_path):
  with (
    Checkpoints(tmp_path, keep=1, best_metric="val/los") as checkpoints,
    pytest.raises(UserError, match=r"best_metric='val/los' .*Did you mean 'val/loss'"),
  ):
    checkpoints.record_metrics(1, {"val/loss": 1.0, "val/perplexity": 2.7})


def test_keeping_no_checkpoint_is_an_error(tmp_path):
  with pytest.raises(UserError, match="keep=0"):
    Checkpoints(tmp_path, keep=0)


def test_saving_a_step_twice_is_harmless(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(1, make_state(1))
    checkpoints.save(1, make_state(1))
    checkpoints.wait()
    assert checkpoints.steps() == [1]


# --- Weights from another run -----------------------------------------------------------------


def test_restore_params_reports_what_did_not_fit(tmp_path):
  state = make_state(1, ema=True)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(5, state)
  before = sorted(tmp_path.rglob("*"))

  target = abstract(state.params)
  target["embed"]["embedding"] = target["embed"]["embedding"].update(shape=(50, 64))
  target["adapter"] = {"kernel": target["embed"]["embedding"]}
  target["blocks"]["mlp"]["kernel"] = target["blocks"]["mlp"]["kernel"].update(dtype=jnp.float32)
  params, report = restore_params(tmp_path, target)
  assert report.matched == ["blocks/mlp/kernel"]
  assert report.missing == ["adapter/kernel"]
  assert report.left_over == []
  assert report.mismatched == {"embed/embedding": ((40, 64), (50, 64))}
  assert str(report).splitlines() == [
    f"{tmp_path}/5: 1 parameters matched",
    "  1 missing in it: adapter/kernel",
    "  1 of another shape: embed/embedding (40, 64) -> (50, 64)",
  ]
  kernel = state.params["blocks"]["mlp"]["kernel"]
  assert_same_bits(params, {"blocks": {"mlp": {"kernel": kernel.astype(jnp.float32)}}})

  del target["embed"], target["adapter"]
  _, report = restore_params(tmp_path, target)
  assert report.left_over == ["embed/embedding"]
  assert sorted(tmp_path.rglob("*")) == before


def test_restore_params_reads_the_moving_average(tmp_path):
  state = make_state(1, ema=True)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(5, state)
  params, _ = restore_params(tmp_path, abstract(state.params), ema=True)
  assert_same_bits(params, state.ema)


def test_restore_params_skips_a_damaged_checkpoint(two_checkpoints):
  directory, states = two_checkpoints
  DAMAGES["flipped"](payload(directory / "20"))
  params, report = restore_params(directory, abstract(states[10].params))
  assert report.source.name == "10"
  assert_same_bits(params, states[10].params)


def test_restore_params_says_what_is_wrong_with_the_directory(two_checkpoints):
  directory, states = two_checkpoints
  target = abstract(states[10].params)
  with pytest.raises(UserError, match=f"{directory}/20: the checkpoint holds no 'ema' weights"):
    restore_params(directory, target, ema=True)
  with pytest.raises(UserError, match=f"{directory}/nowhere: no such directory"):
    restore_params(directory / "nowhere", target)
  (directory / "empty").mkdir()
  with pytest.raises(UserError, match=f"{directory}/empty: holds no checkpoint"):
    restore_params(directory / "empty", target)
