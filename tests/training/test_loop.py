"""The loop: resuming bit for bit, stopping well, and what it says of bad input."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.training import loop
from gptjax.training.loop import train
from gptjax.training.pretrained import load_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = {
  "total_steps": 40,
  "batch_size": 8,
  "sequence_length": 32,
  "tokenizer": "bpe:300",
  "model.num_layers": 2,
  "model.embed_dim": 16,
  "model.num_heads": 2,
  "model.mlp_dim": 32,
  "log.every_steps": 1,
  "log.tensorboard": False,
  "eval.every_steps": 0,
  "sample.every_steps": 0,
  "checkpoint.every_steps": 10,
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
  """A folder of text files with a learnable pattern."""
  folder = tmp_path_factory.mktemp("corpus")
  rng = np.random.default_rng(0)
  words = np.array(
    ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "rat", "in", "its", "hat"]
  )
  for number in range(12):
    lines = [" ".join(rng.choice(words, 9)) for _ in range(60)]
    (folder / f"{number}.txt").write_text("\n".join(lines))
  return folder


@pytest.fixture(scope="session")
def environment(cpu_devices) -> dict[str, str]:
  """The variables of subprocesses, which see one CPU device."""
  return os.environ | cpu_devices(1)


def small_config(corpus: Path, argument: str = "model=debug,data=text", **overrides):
  source = {} if "+" in argument else {"data.path": str(corpus)}
  values = SMALL | source | {"data.cache_dir": str(corpus.parent / "cache")} | overrides
  return config_lib.load(f"{ROOT}/configs/pretrain.py:{argument}", values)


def losses(workdir: Path) -> dict[int, float]:
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line["loss"] for line in lines if "loss" in line}


# Trains in a process of its own; with kill_at, the process is killed for good while it asks for the
# batch of that step, a second after the last checkpoint was begun.
TRAIN = textwrap.dedent("""
  import json, os, signal, sys, time
  from gptjax import config as config_lib
  from gptjax.data.pipeline import Dataset
  from gptjax.training.loop import train

  spec, overrides, workdirs, kill_at = json.loads(sys.argv[1])
  original = Dataset.training_batches

  def batches(self, start):
    for step, batch in enumerate(original(self, start), start):
      if step == kill_at:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
      yield batch

  Dataset.training_batches = batches
  for workdir in workdirs:
    train(config_lib.load(spec, overrides), workdir)
""")


@pytest.fixture(scope="session")
def undisturbed(corpus, environment, tmp_path_factory) -> Path:
  """The work directory of a run of 40 steps on one device that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("undisturbed")
  run(environment, corpus, [workdir], "model=debug,data=text", {})
  return workdir


@pytest.fixture(scope="session")
def killed_at_27(corpus, environment, tmp_path_factory) -> Path:
  """The work directory of the same run after it was killed, to be copied before it goes on."""
  workdir = tmp_path_factory.mktemp("killed")
  run(environment, corpus, [workdir], "model=debug,data=text", {}, kill_at=27)
  return workdir


def run(environment, corpus, workdirs, argument, overrides, kill_at=None):
  source = {} if "+" in argument else {"data.path": str(corpus)}
  values = SMALL | source | {"data.cache_dir": str(corpus.parent / "cache")} | overrides
  job = [f"{ROOT}/configs/pretrain.py:{argument}", values, [str(w) for w in workdirs], kill_at]
  done = subprocess.run(
    [sys.executable, "-c", TRAIN, json.dumps(job)],
    env=environment,
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == (0 if kill_at is None else -signal.SIGKILL), done.stderr[-2000:]
  return done


def mixture(corpus: Path) -> dict:
  return {
    "data.mixture.text.path": str(corpus),
    "data.mixture.jsonl.path": str(corpus.parent / "more.jsonl"),
    "data.mixture.jsonl.weight": 0.5,
  }


class Sayings(tfds.core.GeneratorBasedBuilder):
  """A TFDS set that is prepared without TensorFlow."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for number in range(200):
      yield number, {"text": f"{number} rats sat on {number % 7} mats and saw {number % 5} cats."}


def assert_resumed(killed: Path, before: dict[int, float], whole: Path) -> None:
  """A run that was killed at step 27, with these losses then, has gone on like a whole one."""
  assert max(before) in (26, 27)
  assert losses(killed) == losses(whole)
  assert list(losses(whole)) == list(range(1, 41))
  # What the first process saw after its checkpoint was repeated exactly.
  assert {step: losses(killed)[step] for step in before} == before


def test_killed_run_resumes_bit_for_bit(corpus, environment, killed_at_27, undisturbed, tmp_path):
  killed = shutil.copytree(killed_at_27, tmp_path / "killed")
  assert (killed / "checkpoints" / "20").is_dir()
  run(environment, corpus, [killed], "model=debug,data=text", {})
  assert_resumed(killed, losses(killed_at_27), undisturbed)


@pytest.mark.parametrize(
  "case",
  [
    pytest.param(case, marks=pytest.mark.slow)
    for case in ("mixture", "accumulation", "tfds", "fim", "dropout_ema_muon")
  ],
)
def test_any_killed_run_resumes_bit_for_bit(case, corpus, environment, tmp_path):
  argument = "model=debug,data=text"
  if case == "accumulation":
    overrides = {"grad_accumulation": 4}
  elif case == "mixture":
    rows = [{"text": f"a line about {i} rats in {i % 7} hats " * 20} for i in range(40)]
    (corpus.parent / "more.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argument, overrides = "model=debug,data=text+jsonl", mixture(corpus)
  elif case == "fim":
    overrides = {"task.fim_rate": 0.7}
  elif case == "tfds":
    Sayings(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    argument = "model=debug,data=tfds"
    overrides = {"data.path": "sayings", "data.tfds_data_dir": str(tmp_path)}
  elif case == "dropout_ema_muon":
    argument = "model=tiny,data=text,optim=muon"
    overrides = {"model.dropout.residual": 0.1, "optim.ema_decay": 0.9, "eval.every_steps": 20}
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  run(environment, corpus, [killed], argument, overrides, kill_at=27)
  before = losses(killed)
  run(environment, corpus, [killed, whole], argument, overrides)
  assert_resumed(killed, before, whole)


@pytest.mark.slow
def test_resume_on_another_number_of_devices(
  corpus, environment, cpu_devices, killed_at_27, undisturbed, tmp_path
):
  workdir = shutil.copytree(killed_at_27, tmp_path / "four")
  overrides = {"mesh.data": 2, "mesh.fsdp": 2}
  run(environment | cpu_devices(4), corpus, [workdir], "model=debug,data=text", overrides)
  assert list(losses(workdir)) == list(range(1, 41))
  assert_near(workdir, undisturbed)


def assert_near(workdir: Path, other: Path) -> None:
  """The losses of two runs on other devices differ by rounding alone."""
  a, b = (list(losses(one).values()) for one in (workdir, other))
  np.testing.assert_allclose(a, b, rtol=1e-4)


# gptjax.train with its flags, but process 1 has read of an evaluation that process 0 has dropped
# since and fails if it begins to write metrics, and all wait at the batch of step 15 to be killed.
HELD = textwrap.dedent("""
  import runpy, sys, time
  from gptjax.training import metrics
  from gptjax.data.pipeline import Dataset

  original = Dataset.training_batches

  def batches(self, start):
    for step, batch in enumerate(original(self, start), start):
      if step == 15:
        time.sleep(600)
      yield batch

  Dataset.training_batches = batches
  if "--process_id=1" in sys.argv:
    metrics.read_metrics = lambda workdir: [{"step": 0, "val/loss": 1.0}]
    metrics._drop_after = None
  runpy.run_module("gptjax.train", run_name="__main__", alter_sys=True)
""")


@contextlib.contextmanager
def two_processes(environment, corpus, ranks, *, program=("-m", "gptjax.train"), **overrides):
  """Starts gptjax.train with each rank's own flags and variables; none outlives the context."""
  values = SMALL | {"data.path": str(corpus), "data.cache_dir": str(corpus.parent / "cache")}
  values |= overrides
  processes = [
    subprocess.Popen(
      [
        sys.executable,
        *program,
        "--config=configs/pretrain.py:model=debug,data=text",
        *(f"--config.{key}={value}" for key, value in values.items()),
        *flags,
      ],
      env=environment | variables,
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for flags, variables in ranks
  ]
  try:
    yield processes
  finally:
    for process in processes:
      process.kill()
      process.wait()


def explicit_ranks(workdirs):
  """Flags that join one process for each of two work directories."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  join = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
  return [([*join, f"--process_id={i}", f"--workdir={w}"], {}) for i, w in enumerate(workdirs)]


def wait_until(condition, processes, seconds=120):
  deadline = time.monotonic() + seconds
  while not condition():
    ended = [process.communicate()[0] for process in processes if process.poll() is not None]
    assert not ended, ended
    assert time.monotonic() < deadline
    time.sleep(0.1)


@pytest.mark.slow
def test_two_processes_train_as_one(corpus, environment, tmp_path):
  """Processes that find each other as those of a Slurm job do, each with half of the rows."""
  one, two = tmp_path / "one", tmp_path / "two"
  overrides = {"total_steps": 12, "sample.every_steps": 12, "checkpoint.every_steps": 6}
  run(environment, corpus, [one], "model=debug,data=text", overrides)
  job = {
    "SLURM_JOB_ID": str(os.getpid()),  # decides the port
    "SLURM_STEP_NODELIST": "127.0.0.1",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_NTASKS": "2",
  }
  ranks = [
    (
      [f"--workdir={two}", "--distributed"],
      job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
    )
    for rank in range(2)
  ]
  with two_processes(environment, corpus, ranks, **overrides) as processes:
    printed = [process.communicate(timeout=240)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], printed
  assert "sample/0 at step 12" in printed[0]
  assert "sample/0 at step 12" not in printed[1]
  assert list(losses(two)) == list(range(1, 13))
  assert_near(two, one)
  assert (two / "checkpoints" / "12").is_dir()


@pytest.mark.slow
def test_killed_on_two_hosts_resumes_on_one(
  corpus, environment, cpu_devices, undisturbed, tmp_path
):
  two = tmp_path / "two"
  four = environment | cpu_devices(4)
  mesh = {"mesh.data": 2, "mesh.fsdp": 4}
  with two_processes(
    four,
    corpus,
    explicit_ranks([two, two]),
    program=("-c", HELD),
    **mesh,
  ) as processes:

    def held() -> bool:
      saved = (two / "checkpoints" / "10").is_dir()
      return saved and (two / "metrics.jsonl").exists() and max(losses(two), default=0) >= 14

    wait_until(held, processes)
    for process in processes:
      process.kill()
  run(four, corpus, [two], "model=debug,data=text", {"mesh.data": 2, "mesh.fsdp": 2})
  lines = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
  assert [line["step"] for line in lines if "val/loss" in line] == [0, 40]
  assert_near(two, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_host_stops_all_at_the_same_step(corpus, environment, tmp_path, number):
  ranks = explicit_ranks([tmp_path, tmp_path])
  overrides = {"total_steps": 1_000_000, "checkpoint.every_steps": 0}
  with two_processes(environment, corpus, ranks, **overrides) as processes:
    metrics = tmp_path / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and max(losses(tmp_path), default=0) > 3, processes)
    processes[1].send_signal(number)
    printed = [process.communicate(timeout=60)[0] for process in processes]
  # Whoever has only been told has the status of SIGTERM.
  assert [process.returncode for process in processes] == [143, 128 + number], printed
  assert "stopped by a signal" in printed[0]
  (saved,) = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
  assert saved == max(losses(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_loses_its_partner_ends_soon(corpus, environment, tmp_path, lost):
  ranks = explicit_ranks([tmp_path, tmp_path])
  # Without saves: jaxlib aborts a process that waits for a lost one in a save.
  overrides = {"total_steps": 1_000_000, "checkpoint.every_steps": 0}
  with two_processes(environment, corpus, ranks, **overrides) as processes:
    metrics = tmp_path / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and max(losses(tmp_path), default=0) > 7, processes)
    processes[lost].kill()
    printed = processes[1 - lost].communicate(timeout=40)[0]
  assert processes[1 - lost].returncode not in (0, None)
  if lost == 1:  # Without process 0 jaxlib aborts, and may be first.
    assert processes[0].returncode == 1
    assert "error: process 0 of 2 has lost another, whose own log says why" in printed
    assert "Traceback" not in printed


# Process 1 is killed at the save of step 5: before it, or while process 0 waits for it there.
KILLED_AT_SAVE = textwrap.dedent("""
  import os, runpy, signal, sys
  from orbax.checkpoint._src.multihost import multihost
  from gptjax.training.checkpoints import Checkpoints

  save = Checkpoints.save

  def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

  def killed(self, step, state):
    if step == 5 and "--process_id=1" in sys.argv:
      if PLACE == "before":
        die()
      multihost.get_barrier_sync_fn = lambda **_: die
    save(self, step, state)

  Checkpoints.save = killed
  runpy.run_module("gptjax.train", run_name="__main__", alter_sys=True)
""")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["before", "waiting"])
def test_a_process_that_loses_its_partner_in_a_save_ends_soon(corpus, environment, tmp_path, place):
  ranks = explicit_ranks([tmp_path, tmp_path])
  overrides = {"total_steps": 1_000_000, "checkpoint.every_steps": 5}
  program = ("-c", KILLED_AT_SAVE.replace("PLACE", repr(place)))
  with two_processes(environment, corpus, ranks, program=program, **overrides) as processes:
    processes[1].wait(timeout=100)
    printed = processes[0].communicate(timeout=40)[0]
  assert processes[1].returncode == -signal.SIGKILL
  ours = "error: process 0 of 2 has lost another, whose own log says why" in printed
  jaxlibs = "This most likely indicates that another task died" in printed
  assert ours or (place == "waiting" and jaxlibs), printed
  assert processes[0].returncode == 1 or (place == "waiting" and processes[0].returncode != 0)


# Process 1 fails alone at the batch of step 5.
FAILING = textwrap.dedent("""
  import runpy, sys
  from gptjax.data.pipeline import Dataset
  from gptjax.errors import UserError

  original = Dataset.training_batches

  def batches(self, start):
    for step, batch in enumerate(original(self, start), start):
      if step == 5 and "--process_id=1" in sys.argv:
        raise UserError("corpus/7.txt: cannot be read.")
      yield batch

  Dataset.training_batches = batches
  runpy.run_module("gptjax.train", run_name="__main__", alter_sys=True)
""")


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_soon(corpus, environment, tmp_path):
  ranks = explicit_ranks([tmp_path, tmp_path])
  overrides = {"total_steps": 1_000_000, "checkpoint.every_steps": 5}
  program = ("-c", FAILING)
  with two_processes(environment, corpus, ranks, program=program, **overrides) as processes:
    printed = [process.communicate(timeout=100)[0] for process in processes]
  assert [process.returncode for process in processes] == [1, 1], printed
  assert "error: corpus/7.txt: cannot be read." in printed[1]
  assert "process 0 of 2 has lost another" in printed[0]
  assert "Traceback" not in "".join(printed)


@pytest.mark.slow
def test_hosts_that_share_no_work_directory_are_refused(corpus, environment, tmp_path):
  workdirs = [tmp_path / "here", tmp_path / "there"]
  with two_processes(environment, corpus, explicit_ranks(workdirs)) as processes:
    printed = [process.communicate(timeout=60)[0] for process in processes]
  assert [process.returncode for process in processes] == [1, 1], printed
  for text in printed:
    assert "process 1 does not see what process 0 writes there" in text
  assert not workdirs[1].exists()


@pytest.mark.slow
def test_hosts_that_read_other_data_are_refused(corpus, environment, tmp_path):
  other = tmp_path / "other"
  shutil.copytree(corpus, other)
  (other / "0.txt").unlink()
  here, there = explicit_ranks([tmp_path / "run", tmp_path / "run"])
  there[0].append(f"--config.data.path={other}")
  with two_processes(environment, corpus, [here, there], tokenizer="bytes") as processes:
    printed = [process.communicate(timeout=60)[0] for process in processes]
  assert [process.returncode for process in processes] == [1, 1], printed
  for text in printed:
    assert "the hosts read different data" in text


@pytest.mark.parametrize(
  "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_leaves_with_its_status(corpus, environment, tmp_path, number):
  job = [
    f"{ROOT}/configs/pretrain.py:model=debug,data=text",
    SMALL | {"data.path": str(corpus), "total_steps": 1_000_000, "checkpoint.every_steps": 0},
    [str(tmp_path)],
    None,
  ]
  process = subprocess.Popen(
    [sys.executable, "-c", TRAIN, json.dumps(job)],
    env=environment,
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  for line in process.stdout:
    if line.startswith("step 0:"):
      break
  process.send_signal(number)
  rest, _ = process.communicate(timeout=60)
  assert process.returncode == 128 + number
  assert "stopped by a signal" in rest
  (saved,) = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
  assert saved == max(losses(tmp_path))


def test_learns_and_reports(corpus, tmp_path, capsys, drawn):
  overrides = {"total_steps": 60, "eval.every_steps": 30, "sample.every_steps": 60}
  overrides |= {"optim.learning_rate": 1e-2, "eval.baselines": True, "sample.max_tokens": 8}
  result = train(small_config(corpus, **overrides), tmp_path)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  evaluated = {line["step"]: line["val/bits_per_byte"] for line in lines if "val/loss" in line}
  assert list(evaluated) == [0, 30, 60]
  assert evaluated[60] < evaluated[30] < evaluated[0]
  assert result["val/bits_per_byte"] == evaluated[60]
  trained = next(line for line in lines if line["step"] == 20)
  assert trained["tokens"] == 20 * 8 * 32
  assert {"loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu"} <= set(trained)
  assert trained["mfu"] is None  # nobody publishes the peak of a CPU
  assert (tmp_path / "loss.png").exists()
  training, validation = drawn[-1].axes
  assert training.lines[0].get_xydata().tolist() == [
    [line["step"], line["loss"]] for line in lines if "loss" in line
  ]
  assert dict(validation.lines[0].get_xydata()) == evaluated
  printed = capsys.readouterr().out
  assert "sample/0 at step 60" in printed
  assert "mfu counts 6 N + 12 L H Q K per token" in printed
  assert "unknown chip 'cpu'" in printed
  last = printed.strip().splitlines()[-1]
  assert last.startswith("validation bits per byte:")
  assert "gzip -9" in last
  assert "byte 5-gram" in last

  again = train(small_config(corpus, **overrides), tmp_path)
  assert again["val/loss"] == result["val/loss"]
  assert "complete already at step 60" in capsys.readouterr().out
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(lines)


@pytest.mark.slow
def test_figures_of_the_layers_are_written_when_due_and_change_nothing(
  corpus, tmp_path, monkeypatch
):
  first = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda: first)  # for which it compiles faster
  overrides = {"total_steps": 5, "checkpoint.every_steps": 0}
  plain, observed = tmp_path / "plain", tmp_path / "observed"
  train(small_config(corpus, **overrides), plain)
  train(small_config(corpus, **overrides | {"log.layers_every_steps": 2}), observed)
  assert losses(observed) == losses(plain)
  lines = [json.loads(line) for line in (observed / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
  figures = {line["step"]: line for line in lines if "layers/residual_rms/01" in line}
  assert list(figures) == [2, 4]
  for line in lines:
    if line["step"] in figures and "grad_norm" in line:
      norms = [
        value for name, value in figures[line["step"]].items() if name.startswith("gradient_norm/")
      ]
      assert np.linalg.norm(norms) == pytest.approx(line["grad_norm"], rel=1e-4)


def test_starts_from_the_weights_of_another_run(corpus, tmp_path, capsys):
  train(small_config(corpus, total_steps=4), tmp_path / "first")
  overrides = {"init_from": str(tmp_path / "first"), "total_steps": 1, "optim.learning_rate": 1e-9}
  train(small_config(corpus, **overrides), tmp_path / "second")
  assert "parameters matched" in capsys.readouterr().out
  first = json.loads((tmp_path / "first/metrics.jsonl").read_text().splitlines()[-1])
  second = json.loads((tmp_path / "second/metrics.jsonl").read_text().splitlines()[0])
  assert second["step"] == 0
  assert second["val/loss"] == pytest.approx(first["val/loss"], abs=1e-5)


def test_a_run_does_not_go_on_with_other_files(corpus, tmp_path):
  folder, workdir = tmp_path / "corpus", tmp_path / "run"
  shutil.copytree(corpus, folder)
  train(small_config(folder, total_steps=4), workdir)
  files = [path for path in workdir.rglob("*") if path.is_file()]
  # The lock says who trains there now.
  before = {path: path.read_bytes() for path in files if path.suffix != ".lock"}
  new, old = folder / "new.txt", folder / "3.txt"
  text = old.read_text()
  for change, back in (
    (lambda: new.write_text(text), new.unlink),
    (old.unlink, lambda: old.write_text(text)),
    (lambda: old.write_text(text[::-1]), lambda: old.write_text(text)),
  ):
    change()
    with pytest.raises(UserError, match=r"was started with another training part 'text'.*--workdi"):
      train(small_config(folder, total_steps=8), workdir)
    assert {path: path.read_bytes() for path in before} == before
    back()
  # Another time stamp is no other text.
  train(small_config(folder, total_steps=8), workdir)
  assert list(losses(workdir)) == list(range(1, 9))


@pytest.mark.slow
def test_a_run_that_was_made_before_data_had_fingerprints_goes_on(corpus, tmp_path):
  train(small_config(corpus, total_steps=2), tmp_path / "run")
  (tmp_path / "run/data.json").unlink()
  train(small_config(corpus, total_steps=4), tmp_path / "run")
  assert (tmp_path / "run/data.json").exists()


def test_stops_when_nothing_is_finite_and_names_the_batch(corpus, tmp_path):
  # The only way to infinity that a config has.
  config = small_config(corpus, **{"optim.learning_rate": 1e30, "max_skipped_steps": 3})
  with pytest.raises(UserError, match=r"4th time.*training_batch\(\d+\), with seed=0"):
    train(config, tmp_path)
  assert all(np.isfinite(value) for value in losses(tmp_path).values() if value is not None)


def test_a_run_whose_loss_is_not_finite_in_the_end_has_failed(corpus, tmp_path):
  config = small_config(corpus, **{"optim.learning_rate": 1e30, "total_steps": 4})
  with pytest.raises(UserError, match=r"ended with val/loss=nan"):
    train(config, tmp_path)


def write_files(folder: Path, files: dict[str, bytes]) -> str:
  folder.mkdir()
  for name, content in files.items():
    (folder / name).write_bytes(content)
  return str(folder)


def test_bad_input_is_named(corpus, tmp_path):
  data = tmp_path / "data"
  data.mkdir()
  binary = write_files(data / "binary", {"a.txt": b"\xff\xfe\0\1", "b.txt": b"text"})
  empty = write_files(data / "empty", {"a.txt": b"", "b.txt": b""})
  short = write_files(data / "short", {"a.txt": b"few words", "b.txt": b"are here"})
  blocked = data / "blocked"
  blocked.write_text("a file where a folder should be")
  cases = [
    ({"data.path": empty}, None, r"empty.*no text"),
    ({"data.path": binary}, None, r"binary/a\.txt: not UTF-8 text"),
    ({"data.path": str(data / "nowhere")}, None, "nowhere: no such file or folder"),
    (
      {"data.path": short, "sequence_length": 100},
      None,
      "a row takes 100 tokens, but the training",
    ),
    ({}, blocked / "run", "cannot be written"),
    ({"batch_size": 7}, None, "batch_size=7 does not divide"),
    ({"model.num_heads": 3}, None, "embed_dim=16 is not divisible by model.num_heads=3"),
    ({"mesh.data": 3}, None, r"mesh data=3 needs 3 devices, this run sees"),
    ({"tokenizer": "bpe:12"}, None, "bpe:N must be a whole number of 260 or more"),
    ({"sequence_length": 257}, None, "exceeds model.position.max_positions=256"),
    ({"optim.name": "adamx"}, None, r"no algorithm 'adamx'\. Did you mean"),
    ({"checkpoint.best_metric": "val/los"}, None, r"Did you mean 'val/loss'"),
    (
      {"argument": "model=debug,task=masked,data=text"},
      None,
      "needs model.visibility='bidirectional', not 'causal'",
    ),
    ({"task.name": "masked"}, None, r"task\.\w+ is no option of task='masked'"),
    (
      {
        "argument": "model=debug,task=prefix,data=text",
        "model.visibility": "prefix",
        "checkpoint.best_metric": "val/bits_per_byte",
      },
      None,
      "checkpoint.best_metric: no metric 'val/bits_per_byte' of task='prefix'",
    ),
  ]
  for number, (overrides, workdir, sentence) in enumerate(cases):
    with pytest.raises(UserError, match=sentence):
      train(small_config(corpus, **overrides), workdir or tmp_path / str(number))


@pytest.mark.parametrize(
  ("task", "changes"),
  [
    ("masked", {"model.visibility": "bidirectional", "tokenizer": "bpe:300+mask"}),
    pytest.param(
      "span_corruption",
      {
        "model.encoder_layers": 1,
        "model.position.kind": "t5",
        "model.execution.scan_layers": True,
        "tokenizer": "bpe:400+sentinels",
      },
      marks=pytest.mark.slow,
    ),
  ],
)
def test_tasks_that_denoise_learn(corpus, tmp_path, task, changes):
  changes |= {"optim.learning_rate": 1e-2, "eval.every_steps": 40}
  config = small_config(corpus, f"model=debug,task={task},data=text", **changes)
  validation = train(config, tmp_path)
  first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
  assert validation["val/loss"] < first["val/loss"] - 0.5
  # Not all of the text is predicted, so this is not known.
  assert "val/bits_per_byte" not in validation


@pytest.mark.slow
def test_another_vocabulary_than_the_checkpoint_has_is_named(corpus, tmp_path):
  train(small_config(corpus, total_steps=2), tmp_path)
  wider = small_config(corpus, **{"total_steps": 4, "model.vocab_size": 512})
  with pytest.raises(UserError, match=r"embed/embedding was saved as float32\[300, 16\]"):
    train(wider, tmp_path)
  # Nothing was lost: the right config goes on.
  train(small_config(corpus, total_steps=4), tmp_path)
  assert max(losses(tmp_path)) == 4


@pytest.mark.slow
def test_damaged_checkpoint_is_passed_over(corpus, tmp_path, caplog):
  train(small_config(corpus, total_steps=20), tmp_path)
  before = losses(tmp_path)
  newest = tmp_path / "checkpoints" / "20"
  payload = [path for path in (newest / "state").rglob("d/*") if path.is_file()]
  assert payload
  for path in payload:
    path.write_bytes(path.read_bytes()[:-20])
  train(small_config(corpus, total_steps=20), tmp_path)
  assert "20: skipped, the checkpoint is damaged" in caplog.text
  assert losses(tmp_path) == before


def test_command_line(corpus, environment, tmp_path):
  command = [
    sys.executable,
    "-m",
    "gptjax.train",
    "--config=configs/pretrain.py:model=gpt2-124m,data=text",
    f"--config.data.path={corpus}",
  ]

  def call(*more):
    return subprocess.run(
      [*command, *more], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )

  dry = call("--dry_run")
  assert dry.returncode == 0, dry.stderr
  assert "parameters: 124439808" in dry.stdout
  assert "memory of optimizer: 949.4 MiB" in dry.stdout
  unknown = call("--dry_run", "--config.model.num_layer=3")
  assert unknown.returncode == 1
  assert "no config key 'model.num_layer'. Did you mean 'model.num_layers'" in unknown.stderr
  assert "Traceback" not in unknown.stderr
  assert "--workdir is missing" in call().stderr


@pytest.mark.slow
@pytest.mark.parametrize(
  ("flag", "sentence"),
  [
    ("--process_id=0", "--coordinator and --num_processes are missing"),
    ("--config=configs/pretrain.py:model=gpt2-125m", "no model preset 'gpt2-125m'. Did you mean"),
    ("--help", "--workdir"),
  ],
)
def test_the_command_line_answers_a_flag(environment, flag, sentence):
  command = [sys.executable, "-m", "gptjax.train", "--config=configs/pretrain.py", flag]
  found = subprocess.run(
    command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert sentence in found.stdout + found.stderr


@pytest.mark.slow
def test_a_run_that_is_stopped_early_has_a_checkpoint_of_its_last_step(corpus, tmp_path):
  """Evaluations between checkpoints, and the newest of these is what the run has made."""
  changes = {"optim.learning_rate": 0.0, "eval.every_steps": 3, "eval.patience": 2}
  changes |= {"checkpoint.every_steps": 1000, "checkpoint.final": "newest"}
  result = train(small_config(corpus, **changes), tmp_path)
  model, step = load_checkpoint(tmp_path)
  assert step == max(losses(tmp_path)) == 9
  assert model.config.num_layers == 2
  # Run again, it is where it was.
  assert train(small_config(corpus, **changes), tmp_path) == result
  assert max(losses(tmp_path)) == 9


@pytest.mark.slow
def test_the_config_of_a_finished_run_stays_as_it_was_run(corpus, tmp_path, capsys):
  train(small_config(corpus, total_steps=2), tmp_path)
  before = (tmp_path / "config.json").read_text()
  capsys.readouterr()
  train(small_config(corpus, total_steps=2, **{"optim.learning_rate": 0.5}), tmp_path)
  assert (tmp_path / "config.json").read_text() == before
  assert "without effect: optim.learning_rate: 0.001 -> 0.5" in capsys.readouterr().out
  train(small_config(corpus, total_steps=4, **{"optim.learning_rate": 0.5}), tmp_path)
  assert '"learning_rate": 0.5' in (tmp_path / "config.json").read_text()


def test_devices_of_this_test_run():
  # The tests above mean to run on a mesh: see tests/conftest.py.
  assert jax.device_count() == 4


# --- What costs the devices their time ---------------------------------------------------------


class Pending:
  """An array that a device is still to write."""

  ready = False

  def block_until_ready(self):
    self.ready = True
    return self


def test_a_profile_ends_when_its_last_step_has(corpus, tmp_path, monkeypatch):
  calls, losses = [], [Pending() for _ in range(4)]
  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(losses[2].ready))
  config = small_config(corpus, **{"profile.start": 1, "profile.steps": 2}).profile
  for step, loss in enumerate(losses):
    with loop.profile(config, step, tmp_path) as outputs:
      outputs.append({"loss": loss})
  assert calls == ["start", True]
  assert not losses[0].ready, "a step that is not traced was waited for"


@pytest.mark.slow
def test_hosts_ask_each_other_about_patience_after_evaluations_alone(corpus, tmp_path, monkeypatch):
  asked = []
  from_all_hosts = loop.from_all_hosts

  def counting(value):
    asked.append(value)
    return from_all_hosts(value)

  monkeypatch.setattr(loop, "from_all_hosts", counting)
  counts = []
  for patience in (0, 5):
    asked.clear()
    changes = {"total_steps": 12, "eval.every_steps": 4, "eval.patience": patience}
    train(small_config(corpus, **changes), tmp_path / str(patience))
    counts.append(len(asked))
  # At the start, and after the evaluations of steps 4 and 8; that of step 12 is the last.
  assert counts[1] - counts[0] <= 4
