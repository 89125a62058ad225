"""A worker and its processes, with a stand-in for the training."""

import fcntl
import io
import json
import os
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import pytest

from gptjax.errors import UserError
from gptjax.sweeps.definition import load
from gptjax.sweeps.devices import Host, Slot, split
from gptjax.sweeps.runner import Worker, check_unchanged
from gptjax.sweeps.study import Study, sample_trial

ROOT = Path(__file__).parents[2]
# What `init_from` says is what the training does.
TRAINING = textwrap.dedent("""
  import json, os, sys, time
  from pathlib import Path

  folder = Path(sys.argv[1])
  does = json.loads((folder / "config.json").read_text())["init_from"]
  with (folder / "starts").open("a") as file:
    cores = sorted(os.sched_getaffinity(0))
    file.write(json.dumps([cores, os.environ["JAX_COMPILATION_CACHE_DIR"]]) + "\\n")
  deadline = time.monotonic() + 60 * does.startswith("meet")
  while len([*folder.parent.glob("meet*/starts")]) < 2 and time.monotonic() < deadline:
    time.sleep(0.05)
  if does == "fail" and not (folder / "repaired").exists():
    sys.exit("out of luck")
  step = {"stop": 3, "stop early": 0}.get(does, 4)
  value = None if does == "diverge" else 1.5
  with (folder / "metrics.jsonl").open("w") as file:
    file.write(json.dumps({"step": step, "loss": 2.0}) + "\\n")
    if does == "stop early":
      for step, value in ((0, 3.0), (1, 1.25), (2, 1.75)):
        file.write(json.dumps({"step": step, "val/bits_per_byte": value}) + "\\n")
    if step == 4:
      file.write(json.dumps({"step": 4, "val/bits_per_byte": value}) + "\\n")
""")


@pytest.fixture
def start(tmp_path):
  """Returns a function that runs a sweep with an arm for each thing a training can do."""

  def make(*does, slots=None, final="newest", **options):
    path = tmp_path / "sweep.py"
    path.write_text(
      textwrap.dedent(f"""
        from gptjax import config

        def base():
          return config.load("{ROOT}/configs/pretrain.py:model=debug,data=stdlib",
                             {{"total_steps": 4, "batch_size": 8, "eval.patience": 1,
                              "checkpoint.best_metric": "val/bits_per_byte",
                              "checkpoint.final": "{final}"}})

        def sweep():
          for does in {does}:
            yield does, {{"init_from": does}}
      """)
    )
    sweep = load(str(path), {}, sample_trial)
    check_unchanged(sweep, tmp_path)
    study = Study(sweep, tmp_path)
    slots = slots or [Slot({}, tuple(os.sched_getaffinity(0)))]
    command = lambda folder: [sys.executable, "-c", TRAINING, str(folder)]  # noqa: E731
    return Worker(sweep, study, tmp_path, slots, command=command).run(**options)

  return make


def trial(tmp_path, arm):
  return json.loads((tmp_path / f"trials/{arm}-seed0/trial.json").read_text())


def starts(tmp_path, arm):
  lines = (tmp_path / f"trials/{arm}-seed0/starts").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_a_failing_trial_is_told_and_the_rest_goes_on(start, tmp_path, capsys):
  states = start("fail", "stop", "diverge", "succeed")
  assert states == {
    "fail-seed0": "failed",
    "stop-seed0": "failed",
    "diverge-seed0": "failed",
    "succeed-seed0": "done",
  }
  assert trial(tmp_path, "fail")["error"] == "out of luck\n(exit status 1)"
  assert "it stopped before its last step" in trial(tmp_path, "stop")["error"]
  assert "val/bits_per_byte is not finite" in trial(tmp_path, "diverge")["error"]
  done = trial(tmp_path, "succeed")
  assert (done["state"], done["error"], done["arm"], done["seed"]) == ("done", None, "succeed", 0)
  assert done["overrides"] == {"init_from": "succeed", "seed": 0}
  assert done["config"]["total_steps"] == 4
  printed = capsys.readouterr().out
  assert "out of luck" in printed
  assert "succeed seed 0: done at step 4, val/bits_per_byte 1.5000" in printed
  assert json.loads((tmp_path / "sweep.json").read_text())["baseline"] == "fail"


@pytest.mark.parametrize(("final", "value"), [("best", 1.25), ("newest", 1.75)])
def test_a_trial_that_stops_early_is_done_with_what_it_has_made(
  final, value, start, tmp_path, monkeypatch, capsys
):
  finished, finish = [], Study.finish
  monkeypatch.setattr(
    Study, "finish", lambda self, *end: finished.append(end[1:]) or finish(self, *end)
  )
  assert start("stop early", final=final) == {"stop-early-seed0": "done"}
  assert finished == [("done", value)]
  assert f"stop early seed 0: done at step 2, val/bits_per_byte {value:.4f}" in (
    capsys.readouterr().out
  )
  assert trial(tmp_path, "stop-early")["state"] == "done"


def test_a_search_is_not_gone_on_with_by_another_metric(start, tmp_path):
  start("succeed")
  sweep = types.SimpleNamespace(search=object(), metric="val/loss", trials={})
  with pytest.raises(UserError, match=r"judged by val/bits_per_byte, METRIC is val/loss; give --w"):
    check_unchanged(sweep, tmp_path)
  sweep.search = None  # Arms are only compared when they are reported on.
  check_unchanged(sweep, tmp_path)


def test_started_again_it_runs_only_what_is_new_or_told_to_retry(start, tmp_path):
  start("fail", "succeed")
  assert set(start("fail", "succeed", "more").values()) == {"failed", "done"}
  assert [len(starts(tmp_path, arm)) for arm in ("fail", "succeed", "more")] == [1, 1, 1]
  (tmp_path / "trials/fail-seed0/repaired").touch()
  assert set(start("fail", "succeed", "more", retry_failed=True).values()) == {"done"}
  assert [len(starts(tmp_path, arm)) for arm in ("fail", "succeed", "more")] == [2, 1, 1]
  assert trial(tmp_path, "fail")["state"] == "done"


def test_an_arm_whose_config_was_changed_is_refused(start, tmp_path):
  start("succeed")
  path = tmp_path / "trials/succeed-seed0/trial.json"
  saved = json.loads(path.read_text())
  saved["config"]["optim"]["learning_rate"] = 7.0
  path.write_text(json.dumps(saved))
  with pytest.raises(UserError, match=r"arm 'succeed', seed 0, .*optim\.learning_rate was 7\.0"):
    start("succeed")


def test_a_folder_that_another_training_still_writes_is_waited_for(start, tmp_path):
  folder = tmp_path / "trials/succeed-seed0"
  folder.mkdir(parents=True)
  released = []

  def release():
    while not (tmp_path / "sweep.json").exists():  # Until the worker is at work.
      time.sleep(0.05)
    time.sleep(3)
    released.append((folder / "starts").exists())
    orphan.close()

  with (folder / ".lock").open("w") as orphan:
    fcntl.flock(orphan, fcntl.LOCK_EX)
    thread = threading.Thread(target=release)
    thread.start()
    assert start("succeed") == {"succeed-seed0": "done"}
    thread.join()
  assert released == [False]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_trials_at_once_have_their_own_cores_and_share_compiled_programs(
  start, tmp_path, monkeypatch
):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  before = os.sched_getaffinity(0)
  cores = tuple(map(str, sorted(before)[:2]))
  start("meet a", "meet b", slots=split(Host("cpu", "cpu", 1, cores), 2))
  used = [starts(tmp_path, arm)[0] for arm in ("meet-a", "meet-b")]
  assert sorted(mine for mine, _ in used) == [[int(core)] for core in cores]
  assert {cache for _, cache in used} == {str(tmp_path / "compilation_cache")}
  assert os.sched_getaffinity(0) == before


def test_accelerators_are_dealt_out():
  gpus = split(Host("gpu", "NVIDIA H100 80GB HBM3", 2, ("4", "5", "6", "7")), 2)
  assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in gpus] == ["4,5", "6,7"]
  tpus = split(Host("tpu", "TPU v5e", 1, ("0", "1", "2", "3")), 4)
  assert [slot.environment["TPU_VISIBLE_CHIPS"] for slot in tpus] == ["0", "1", "2", "3"]
  assert {slot.environment["TPU_CHIPS_PER_PROCESS_BOUNDS"] for slot in tpus} == {"1,1,1"}
  assert len({slot.environment["TPU_PROCESS_PORT"] for slot in tpus}) == 4


def test_a_table_is_not_drawn_again_and_again_in_a_notebook(start, monkeypatch):
  class Terminal(io.StringIO):
    """The output of `!python -m gptjax.sweep` in a notebook, which cannot go up a line."""

    def isatty(self):
      return True

  monkeypatch.setattr(sys, "stdout", shown := Terminal())
  monkeypatch.setenv("JPY_PARENT_PID", "1")
  start("end", "end again")
  assert "end again seed 0: done" in shown.getvalue()
  assert "\x1b[" not in shown.getvalue()
