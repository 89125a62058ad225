"""The queue: every key runs once, whoever enqueues, claims or dies."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptjax.errors import UserError
from gptjax.sweeps.study import Study, make_pruner, make_sampler

ROOT = Path(__file__).parents[2]
KEYS = tuple(f"key-{number}" for number in range(6))


@pytest.fixture(params=["", "journal"], ids=["sqlite", "journal"])
def join(request, tmp_path):
  """Returns a function that joins the study as one more worker."""

  def make(keys=KEYS, **options):
    return Study(request.param, "study", tmp_path, keys, **options)

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
      patch.setattr(worker, "in_force", dict)
      worker.enqueue_missing()
  assert len(one._study.trials) == 2 * len(KEYS)
  assert sorted(drain(one, two)) == sorted(KEYS)
  assert set(two.states().values()) == {"running"}


WORKER = """
import sys, time
from pathlib import Path
from gptjax.sweeps.study import Study

storage, folder, start = sys.argv[1:]
time.sleep(max(0, float(start) - time.time()))
study = Study(storage, "study", Path(folder), [f"key-{number}" for number in range(20)])
study.enqueue_missing()
while claim := study.claim():
  print(claim.key, flush=True)
  study.finish(claim, "done", 1.0)
"""


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


def test_the_trial_of_a_dead_worker_goes_to_another(join):
  dead, alive = join(["key"], grace_seconds=0.5), join(["key"], grace_seconds=0.5)
  dead.enqueue_missing()
  claim = dead.claim()
  assert alive.reap() == []
  assert alive.claim() is None
  time.sleep(0.6)
  assert alive.reap() == ["key"]
  second = alive.claim()
  assert second.key == "key"
  # The first one was only asleep: it learns that it has lost, and changes nothing any more.
  claim.beaten = float("-inf")
  assert not dead.beat(claim)
  dead.finish(claim, "failed")
  assert dead.states() == {"key": "running"}
  alive.finish(second, "done", 1.0)
  assert dead.states() == {"key": "done"}
  assert dead.claim() is None


def test_a_worker_that_says_it_lives_keeps_its_trial(join):
  worker, other = join(["key"], grace_seconds=0.8), join(["key"], grace_seconds=0.8)
  worker.enqueue_missing()
  claim = worker.claim()
  for _ in range(8):
    time.sleep(0.2)
    assert worker.beat(claim)
    assert other.reap() == []


def test_what_is_given_back_waits_again_and_what_failed_does_not(join):
  study = join(["back", "failed"])
  study.enqueue_missing()
  back, failed = study.claim(), study.claim()
  study.finish(back, "given back")
  study.finish(failed, "failed")
  assert study.states() == {"back": "waiting", "failed": "failed"}
  assert drain(study) == ["back"]
  # Two workers that are both told to try again.
  for worker in (study, join(["back", "failed"])):
    with pytest.MonkeyPatch.context() as patch:
      entries = study.in_force()
      patch.setattr(worker, "in_force", lambda entries=entries: entries)
      worker.enqueue_missing(retry_failed=True)
  study.enqueue_missing(retry_failed=True)
  assert drain(study) == ["failed"]


def test_new_arms_are_added_and_old_ones_left(join):
  old = join(["a", "b"])
  old.enqueue_missing()
  new = join(["b", "c"])
  new.enqueue_missing()
  assert drain(new) == ["b", "c"]
  assert drain(old) == ["a"]


def test_a_search_suggests_the_same_again_for_a_trial_that_was_given_back(join):
  study = join(["trial-0", "trial-1"], sampler=lambda number: make_sampler("random", 0, number))
  study.enqueue_missing()
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
  sampler = lambda number: make_sampler("tpe", 0, number)  # noqa: E731
  study = Study(
    "journal", "study", tmp_path, keys, sampler=sampler, lower_is_better=lower_is_better
  )
  study.enqueue_missing()
  suggested = []
  while claim := study.claim():
    suggested.append(claim.trial.suggest_float("x", 0, 1))
    study.finish(claim, "done", suggested[-1])
  late = suggested[10:]  # The first ten are drawn at random.
  assert max(late) < 0.5 if lower_is_better else min(late) > 0.5


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_the_pruner_stops_the_trials_of_worse_values(lower_is_better, tmp_path):
  keys, pruner = [f"trial-{number}" for number in range(5)], make_pruner("halving", 1)
  study = Study("", "study", tmp_path, keys, pruner=pruner, lower_is_better=lower_is_better)
  study.enqueue_missing()
  claims = [study.claim() for _ in keys]
  for claim in claims[:3]:
    study.should_prune(claim, 0.5, 1)
  assert study.should_prune(claims[3], 0.2, 1) != lower_is_better
  assert study.should_prune(claims[4], 0.8, 1) == lower_is_better


def test_a_storage_that_is_none_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"--storage=jurnal: expected 'journal' or a URL"):
    Study("jurnal", "study", tmp_path, ["key"])
  with pytest.raises(UserError, match=r"--storage=nosuch://x: cannot be opened"):
    Study("nosuch://x", "study", tmp_path, ["key"])
