"""The queue: every key runs once, whoever enqueues, claims or dies."""

import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from optuna.trial import TrialState

from gptjax import config
from gptjax.errors import UserError
from gptjax.sweeps.definition import Search
from gptjax.sweeps.study import Study

ROOT = Path(__file__).parents[2]
KEYS = tuple(f"key-{number}" for number in range(6))


def sweep(keys, search=None, metric="val/loss"):
  """A sweep with no more than its study asks for."""
  base = config.load(f"{ROOT}/configs/pretrain.py:model=debug", {"eval.every_steps": 1})
  return types.SimpleNamespace(trials=dict.fromkeys(keys), search=search, metric=metric, base=base)


JOURNAL = pytest.param("journal", marks=pytest.mark.slow)


@pytest.fixture(params=["", JOURNAL], ids=["sqlite", "journal"])
def join(request, tmp_path):
  """Returns a function that joins the study as one more worker."""

  def make(keys=KEYS, search=None, **options):
    return Study(sweep(keys, search), tmp_path, request.param, **options)

  return make


def drain(*workers):
  """The keys that the workers get, taking turns."""
  got = []
  while claims := [claim for worker in workers if (claim := worker.claim())]:
    got += [claim.key for claim in claims]
  return got


def test_enqueued_twice_each_key_is_handed_out_once(join):
  one, two = join(), join()
  # Both saw an empty study, then both enqueued.
  for worker in (one, two):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(worker, "current", dict)
      worker.queue_missing()
  assert len(one._study.trials) == 2 * len(KEYS)
  assert sorted(drain(one, two)) == sorted(KEYS)
  assert set(two.states().values()) == {"running"}


WORKER = """
import sys, time, types
from pathlib import Path
from gptjax.sweeps.study import Study

storage, folder, start = sys.argv[1:]
time.sleep(max(0, float(start) - time.time()))
trials = {f"key-{number}": None for number in range(20)}
sweep = types.SimpleNamespace(trials=trials, search=None, metric="val/loss")
study = Study(sweep, Path(folder), storage)
study.queue_missing()
while claim := study.claim():
  print(claim.key, flush=True)
  study.finish(claim, "done", 1.0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["", "journal"])
def test_processes_that_start_at_once_share_the_keys(storage, tmp_path):
  arguments = [sys.executable, "-c", WORKER, storage, str(tmp_path), str(time.time() + 3)]
  workers = [
    subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
  ]
  got = [worker.communicate(timeout=120)[0].split() for worker in workers]
  assert [worker.returncode for worker in workers] == [0, 0, 0]
  assert sorted(key for keys in got for key in keys) == sorted(
    f"key-{number}" for number in range(20)
  )


DYING = """
import os, signal, sys, types
from pathlib import Path
from gptjax.sweeps.study import Study

sweep = types.SimpleNamespace(trials={"key": None}, search=None, metric="val/loss")
study = Study(sweep, Path(sys.argv[2]), sys.argv[1], 2)
study.queue_missing()
claim = study.claim()
print(claim.trial.suggest_float("x", 0, 1), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("storage", [pytest.param("", marks=pytest.mark.slow), JOURNAL])
def test_the_trial_of_a_process_that_died_goes_to_another_as_it_was(storage, tmp_path):
  arguments = [sys.executable, "-c", DYING, storage, str(tmp_path)]
  dead = subprocess.run(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
  assert dead.returncode == -9
  alive = Study(sweep(["key"]), tmp_path, storage, 2)
  assert alive.queue_dead() == []
  assert alive.claim() is None
  time.sleep(4)  # SQLite tells the time in whole seconds.
  assert alive.queue_dead() == ["key"]
  second = alive.claim()
  assert second.key == "key"
  assert second.trial.suggest_float("x", 0, 1) == float(dead.stdout)
  alive.finish(second, "done", 1.0)
  assert alive.states() == {"key": "done"}


def test_a_worker_that_only_slept_learns_that_it_lost_and_changes_nothing(join):
  asleep, other = join(["key"], grace_seconds=1), join(["key"], grace_seconds=1)
  asleep.queue_missing()
  claim = asleep.claim()
  time.sleep(3)
  assert other.queue_dead() == ["key"]
  second = other.claim()
  assert not asleep.beat(claim)
  asleep.finish(claim, "failed")
  assert asleep.states() == {"key": "running"}
  other.finish(second, "done", 1.0)
  assert asleep.states() == {"key": "done"}
  assert asleep.claim() is None


def test_a_worker_that_says_it_lives_keeps_its_trial(join):
  worker, other = join(["key"], grace_seconds=2), join(["key"], grace_seconds=2)
  worker.queue_missing()
  claim = worker.claim()
  for _ in range(25):
    time.sleep(0.2)
    assert worker.beat(claim)
    assert other.queue_dead() == []


def test_a_worker_that_died_between_two_steps_of_a_retry_costs_no_trial(join):
  dead, alive = join(["key"]), join(["key"])
  dead.queue_missing()
  claim = dead.claim()
  dead._storage.set_trial_state_values(claim.id, TrialState.FAIL)
  assert alive.states() == {"key": "waiting"}
  alive.queue_dead()
  assert drain(alive) == ["key"]


def test_a_trial_that_was_killed_waits_again_and_remembers_it(join):
  study = join(["key"])
  study.queue_missing()
  for kills in range(3):
    claim = study.claim()
    assert claim.kills == kills
    study.finish(claim, "killed")


def test_what_is_given_back_waits_again_and_what_failed_does_not(join):
  study = join(["back", "failed"])
  study.queue_missing()
  back, failed = study.claim(), study.claim()
  study.finish(back, "given back")
  study.finish(failed, "failed")
  assert study.states() == {"back": "waiting", "failed": "failed"}
  assert drain(study) == ["back"]
  # Two workers that are both told to try again.
  for worker in (study, join(["back", "failed"])):
    with pytest.MonkeyPatch.context() as patch:
      entries = study.current()
      patch.setattr(worker, "current", lambda entries=entries: entries)
      worker.queue_missing(retry_failed=True)
  study.queue_missing(retry_failed=True)
  assert drain(study) == ["failed"]


def test_new_arms_are_added_and_old_ones_left(join):
  old = join(["a", "b"])
  old.queue_missing()
  new = join(["b", "c"])
  new.queue_missing()
  assert drain(new) == ["b", "c"]
  assert drain(old) == ["a"]


def test_a_search_suggests_the_same_again_for_a_trial_that_was_given_back(join):
  study = join(["trial-0", "trial-1"], Search(sampler="random"))
  study.queue_missing()
  first, second = study.claim(), study.claim()
  values = [claim.trial.suggest_float("x", 0, 1) for claim in (first, second)]
  assert values[0] != values[1]
  study.finish(second, "given back")
  again = study.claim()
  assert again.key == "trial-1"
  assert again.trial.suggest_float("x", 0, 1) == values[1]


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_a_search_goes_where_values_are_better(lower_is_better, tmp_path):
  keys = [f"trial-{number}" for number in range(20)]
  metric = "val/loss" if lower_is_better else "val/accuracy"
  study = Study(sweep(keys, Search(), metric), tmp_path, "journal")
  study.queue_missing()
  suggested = []
  while claim := study.claim():
    suggested.append(claim.trial.suggest_float("x", 0, 1))
    study.finish(claim, "done", suggested[-1])
  late = suggested[10:]  # The first ten are drawn at random.
  assert max(late) < 0.5 if lower_is_better else min(late) > 0.5


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_the_pruner_stops_the_trials_of_worse_values(lower_is_better, tmp_path):
  keys = [f"trial-{number}" for number in range(5)]
  metric = "val/loss" if lower_is_better else "val/accuracy"
  study = Study(sweep(keys, Search(pruner="halving"), metric), tmp_path)
  study.queue_missing()
  claims = [study.claim() for _ in keys]
  for claim in claims[:3]:
    study.should_prune(claim, 0.5, 1)
  assert study.should_prune(claims[3], 0.2, 1) != lower_is_better
  assert study.should_prune(claims[4], 0.8, 1) == lower_is_better


def test_a_storage_that_is_none_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"--storage=jurnal: expected 'journal' or a URL"):
    Study(sweep(["key"]), tmp_path, "jurnal")
  with pytest.raises(UserError, match=r"--storage=nosuch://x: cannot be opened"):
    Study(sweep(["key"]), tmp_path, "nosuch://x")
  (tmp_path / "study.db").write_bytes(bytes(range(256)) * 8)
  with pytest.raises(UserError, match=r"^\S+/study\.db: cannot be opened: .*not a database$"):
    Study(sweep(["key"]), tmp_path, "")
