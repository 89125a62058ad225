"""The folder of a run: who may write it, and how it is taken up again."""

import os
import re
import subprocess
import sys

import pytest

from gptjax.errors import UserError
from gptjax.training.loop import train
from gptjax.training.workdir import make_workdir, only_trainer
from tests.training.test_loop import ROOT, corpus, environment, losses, small_config  # noqa: F401


def test_a_second_trainer_is_told_who_is_there(tmp_path):
  hold = "from gptjax.training.workdir import *; print('?', flush=True)\n"
  hold += f"with only_trainer(epath.Path({str(tmp_path)!r})): print('held', flush=True); input()"
  with subprocess.Popen(
    [sys.executable, "-c", hold],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  ) as holder:
    assert [holder.stdout.readline() for _ in range(2)][1] == b"held\n"
    sentence = rf"a run trains there already \(process {holder.pid} on .*, since 20\d\d-"
    with pytest.raises(UserError, match=sentence):
      train({}, tmp_path)
    holder.kill()
  with only_trainer(make_workdir(tmp_path)):  # The lock goes with the process.
    pass


def test_a_web_address_is_no_work_directory():
  with pytest.raises(UserError, match="--workdir=http://a/b: a web address cannot be written"):
    make_workdir("http://a/b")


@pytest.mark.slow
def test_a_work_directory_alone_goes_on(corpus, environment, tmp_path):  # noqa: F811
  train(small_config(corpus, total_steps=4), tmp_path / "run")

  def call(*arguments):
    command = [sys.executable, "-m", "gptjax.train", *arguments]
    return subprocess.run(
      command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )

  found = call(f"--workdir={tmp_path}/run", "--config.total_steps=6")
  assert found.returncode == 0, found.stderr
  assert max(losses(tmp_path / "run")) == 6
  assert "resuming at step 4 of 6" in found.stdout
  assert re.search(r"compiling the step \.\.\.\ncompiling the step: \d+\.\d s\n", found.stderr)
  found = call(f"--workdir={tmp_path}/none")
  assert found.stderr.startswith(f"error: --config is missing, and --workdir={tmp_path}/none has")
