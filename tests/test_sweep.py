"""The sweep from the command line, with real trainings of a small model."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = {
  "batch_size": 4,
  "sequence_length": 16,
  "tokenizer": "bytes",
  "model.num_layers": 1,
  "model.embed_dim": 16,
  "model.num_heads": 1,
  "model.mlp_dim": 16,
  "log.every_steps": 10,
  "log.tensorboard": False,
  "eval.every_steps": 0,
  "sample.every_steps": 0,
  "checkpoint.every_steps": 0,
}


@pytest.fixture(scope="module")
def environment(cpu_devices):
  return os.environ | cpu_devices(1)


@pytest.fixture
def sweep(environment, tmp_path):
  """Returns a function that starts `gptjax.sweep` on a file that ends in `text`."""
  (tmp_path / "corpus.txt").write_text("the cat sat on a mat and saw one rat in its hat\n" * 80)
  processes = []

  def start(text, *flags, **base):
    base = {k.replace("__", "."): v for k, v in base.items()}
    paths = {"data.path": str(tmp_path / "corpus.txt"), "data.cache_dir": str(tmp_path / "cache")}
    path = tmp_path / "sweep.py"
    path.write_text(
      "from gptjax import config\n"
      "from gptjax.sweeps.definition import cross, seeds\n"
      "def base():\n"
      f"  return config.load('configs/pretrain.py:model=debug,data=text', {BASE | paths | base})\n"
      + textwrap.dedent(text)
    )
    processes.append(
      subprocess.Popen(
        [
          sys.executable,
          "-m",
          "gptjax.sweep",
          f"--sweep={path}",
          f"--workdir={tmp_path / 'run'}",
          *flags,
        ],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
    )
    return processes[-1]

  yield start
  for process in processes:
    process.kill()
    process.wait()


def trials(tmp_path):
  found = [json.loads(p.read_text()) for p in (tmp_path / "run/trials").glob("*/trial.json")]
  return {f"{trial['arm']}-seed{trial['seed']}": trial for trial in found}


def metrics(tmp_path, folder):
  path = tmp_path / "run/trials" / folder / "metrics.jsonl"
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if "\n" in line]


def wait_until(condition, process, seconds=120):
  deadline = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline
    time.sleep(0.1)


@pytest.mark.slow  # A minute of an idle machine.
def test_of_two_workers_one_is_killed_and_every_trial_ends_once(sweep, tmp_path):
  arms = """
  def sweep():
    rates = {f"rate {rate}": {"optim.learning_rate": rate} for rate in (1e-3, 1e-2)}
    return cross(rates, seeds(6))
  """
  killed, other = [
    sweep(arms, "--grace_seconds=4", total_steps=100, checkpoint__every_steps=40) for _ in range(2)
  ]

  def both_are_at_work():
    states = [trial["state"] for trial in trials(tmp_path).values()]
    return states.count("done") >= 2 and states.count("running") == 2

  wait_until(both_are_at_work, killed)
  killed.kill()
  printed = other.communicate(timeout=300)[0]
  assert other.returncode == 0, printed
  assert "its worker is dead; queued again" in printed
  assert "12 done of 12 trials" in printed
  assert {trial["state"] for trial in trials(tmp_path).values()} == {"done"}
  assert len(trials(tmp_path)) == 12
  for folder in (tmp_path / "run/trials").iterdir():
    lines = metrics(tmp_path, folder.name)
    assert [line["step"] for line in lines if "loss" in line] == [*range(10, 101, 10)]
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 100]
    # Whoever came second to a whole run did no step of it.
    log = (folder / "log.txt").read_text()
    assert len(re.findall("^validation bits", log, re.M)) - log.count("complete already") == 1


def training_of(worker):
  """The process id of the training that a worker has started; None between two of them."""
  children = subprocess.run(["pgrep", "-P", str(worker.pid)], capture_output=True, text=True)
  return int(children.stdout) if children.stdout.strip() else None


@pytest.mark.slow  # Four trainings, one after the other.
def test_a_trial_whose_process_was_killed_resumes_bit_for_bit(sweep, environment, tmp_path):
  arms = "def sweep(): return cross({'a': {}})"
  options = {"total_steps": 2000, "checkpoint__every_steps": 100, "eval__every_steps": 500}
  folder = tmp_path / "run/trials/a-seed0"

  def starts():
    log = folder / "log.txt"
    return log.read_text().count("resuming at step") if log.exists() else 0

  def is_at_work(times):
    return starts() == times and len(metrics(tmp_path, "a-seed0")) > 20 + 20 * times

  worker = sweep(arms, "--grace_seconds=4", **options)
  wait_until(lambda: is_at_work(0), worker)
  os.kill(training_of(worker), signal.SIGKILL)  # As the kernel does where memory is short.
  wait_until(lambda: is_at_work(1), worker)
  training = training_of(worker)
  worker.kill()
  os.kill(training, signal.SIGKILL)
  other = sweep(arms, "--grace_seconds=4", **options)
  printed = other.communicate(timeout=300)[0]
  assert other.returncode == 0, printed
  assert "its worker is dead; queued again" in printed
  assert starts() == 2
  assert "queued again" in worker.communicate()[0]

  def run(module, *arguments):
    command = [sys.executable, "-m", f"gptjax.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

  whole = str(tmp_path / "whole")
  assert not run("train", f"--config={folder / 'config.json'}", f"--workdir={whole}").returncode
  compared = run("sweep", "compare", str(folder), whole, "--exact")
  assert compared.stdout == "Equal in all 215 numbers, to step 2000.\n"


@pytest.mark.slow
def test_a_signal_is_passed_on_and_the_trial_resumes(sweep, tmp_path):
  arms = "def sweep(): return cross({'a': {}})"
  first = sweep(arms, total_steps=3000)
  wait_until(lambda: metrics(tmp_path, "a-seed0")[1:], first)
  first.send_signal(signal.SIGTERM)
  printed = first.communicate(timeout=60)[0]
  assert first.returncode == 128 + signal.SIGTERM
  assert "stopped by a signal; run again" in printed
  assert "1 waiting of 1 trials" in printed
  folder = tmp_path / "run/trials/a-seed0"
  (saved,) = [int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()]
  assert saved < 3000
  second = sweep(arms, total_steps=3000)
  printed = second.communicate(timeout=120)[0]
  assert second.returncode == 0, printed
  assert f"resuming at step {saved:,}" in (folder / "log.txt").read_text()
  third = sweep(arms, total_steps=3000)
  assert "nothing is left to run" in third.communicate(timeout=60)[0]


@pytest.mark.slow
def test_a_hopeless_trial_is_pruned_and_keeps_its_checkpoint(sweep, tmp_path):
  search = """
  SEARCH = {"trials": 2, "pruner": "halving", "sampler": "random"}
  def search(trial):
    good = trial.number == 0
    return {"optim.learning_rate": 1e-2 if good else 1e-9, "total_steps": 60 if good else 100_000}
  """
  process = sweep(search, total_steps=60, eval__every_steps=20)
  printed = process.communicate(timeout=180)[0]
  assert process.returncode == 0, printed
  found = trials(tmp_path)
  assert found["trial-0000-seed0"]["state"] == "done"
  assert found["trial-0001-seed0"]["state"] == "pruned"
  folder = tmp_path / "run/trials/trial-0001-seed0/checkpoints"
  (saved,) = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
  assert 20 <= saved < 100_000
  assert json.loads((tmp_path / "run/sweep.json").read_text())["search"]["pruner"] == "halving"


@pytest.mark.slow
def test_a_dry_run_adds_the_trials_up(sweep, tmp_path):
  arms = """
  def sweep():
    return cross({"short": {}, "long": {"total_steps": 200}}, seeds(3))
  """
  flags = ("--dry_run", "--parallel=1", "--config.sequence_length=32")
  printed = sweep(arms, *flags, total_steps=100).communicate(timeout=60)[0]
  short, long = (
    float(re.search(rf"{arm} .* 3 .*?([\d.]+e\+\d+)", printed)[1]) for arm in ("short", "long")
  )
  assert long == pytest.approx(2 * short, rel=0.01)
  total = re.search(r"total: 6 trials, ([\d.]+e\+\d+) FLOPs", printed)
  assert float(total[1]) == pytest.approx(9 * short, rel=0.01)
  assert "seconds are an estimate" in printed
  assert "compared by val/bits_per_byte, lower is better" in printed
  assert "of a matrix product's rate on cpu" in printed
  # What was measured is preferred to what is guessed.
  folder = tmp_path / "run/trials/x"
  folder.mkdir(parents=True)
  (folder / "trial.json").write_text('{"state": "done"}')
  (folder / "metrics.jsonl").write_text('{"step": 1, "flops": 3e6, "seconds": 2.0}\n')
  printed = sweep(arms, *flags, total_steps=100).communicate(timeout=60)[0]
  assert "1.5e+06 FLOP/s a trial, as measured in 1 finished trials" in printed
  assert not (tmp_path / "run/study.db").exists()


@pytest.mark.slow
def test_what_cannot_be_done_is_one_sentence(sweep, environment):
  def call(*arguments):
    return subprocess.run(
      [sys.executable, "-m", "gptjax.sweep", *arguments],
      cwd=ROOT,
      env=environment,
      capture_output=True,
      text=True,
      check=False,
    )

  assert call().stderr.startswith("error: --sweep is missing: the sweep file, or one of report")
  assert "Examples:\n\n    python -m gptjax.sweep --sweep=experiments/" in call("--help").stdout
  word = call("reprot", "runs/x")
  assert (word.returncode, word.stderr) == (
    1,
    "error: no command 'reprot'. Did you mean 'report'?\n",
  )
  assert "compare: expected RUN_A RUN_B, got 1 words" in call("compare", "a", "--exact").stderr
  arms = "def sweep(): yield 'a', {'model.num_layer': 1}"
  printed = sweep(arms).communicate(timeout=60)[0]
  assert re.search(r"error: \S+sweep\.py: arm 'a': no config key 'model\.num_layer'", printed)
  many = sweep("def sweep(): yield 'a', {}", "--parallel=1001").communicate(timeout=60)[0]
  assert "--parallel=1001 does not divide the" in many
  none = """
  SEARCH = {"pruner": "halving"}
  def search(trial):
    return {}
  """
  assert "set eval.every_steps" in sweep(none).communicate(timeout=60)[0]
