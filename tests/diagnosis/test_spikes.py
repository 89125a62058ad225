import json
import math
import shutil

import jax
import numpy as np
import pytest

from gptjax.diagnosis import spikes
from gptjax.errors import UserError
from gptjax.objectives.text import NextToken
from gptjax.training.datasets import open_dataset
from gptjax.training.pretrained import load_checkpoint


def lines(losses):
  return [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]


def test_a_spike_stands_out_of_a_noisy_descent():
  rng = np.random.default_rng(0)
  losses = np.linspace(3.2, 3, 200) + rng.normal(0, 0.02, 200)
  assert spikes.find(lines(losses), 50, 8.0) == []
  losses[119] += 0.5
  (spike,) = spikes.find(lines(losses), 50, 8.0)
  before = losses[69:119]
  assert (spike.step, spike.loss) == (120, losses[119])
  assert spike.expected == pytest.approx(np.median(before))
  deviation = np.median(np.abs(before - np.median(before)))
  assert spike.excess == pytest.approx((losses[119] - np.median(before)) / deviation)


def test_a_loss_that_is_not_finite_is_a_spike_and_no_measure():
  losses = [*np.linspace(3.1, 3, 40)] + [None] * 30 + [3.0]
  found = spikes.find([{"step": 0, "val/loss": 9.0}, *lines(losses)], 20, 8.0)
  assert [spike.step for spike in found] == list(range(41, 71))
  assert all(spike.loss == math.inf for spike in found)


@pytest.mark.slow
def test_the_batch_of_a_spike_is_shown(trained, make_config, write_losses, tmp_path, capsys):
  workdir = tmp_path / "run"
  shutil.copytree(trained, workdir)
  write_losses(workdir, [3.0, 3.1] * 5 + [7.0, 3.0])
  (spike,) = spikes.report(workdir, 50, 8.0)
  assert (spike.step, spike.loss, spike.expected, spike.grad_norm) == (11, 7.0, 3.05, 1.5)
  printed = capsys.readouterr().out
  assert "rule: loss - median of the 50 logged steps before > 8 x" in printed
  assert "batch of step 11, under the checkpoint of step 12" in printed
  assert "only every" not in printed

  dataset = open_dataset(make_config(), workdir)
  batch = dataset.training_batch(10)
  model, step = load_checkpoint(workdir, near=9)
  assert step == 8
  model, _ = load_checkpoint(workdir)
  losses = spikes.row_losses(NextToken(), model, batch)
  worst = int(np.argmax(losses))
  text = dataset.tokenizer.decode(batch.inputs[worst][:40].tolist())
  shown = printed.index(f"row {worst}, loss {losses[worst]:.3f}: {text!r}")
  others = [printed.find(f"row {row},") for row in range(8) if row != worst]
  assert all(other == -1 or other > shown for other in others)
  logits = model(batch.inputs, positions_BT=batch.positions, segment_ids_BT=batch.segment_ids)
  each = -np.take_along_axis(
    np.asarray(jax.nn.log_softmax(logits)), batch.targets[..., None], axis=-1
  )[..., 0]
  means = (each * batch.weights).sum(1) / batch.weights.sum(1)
  np.testing.assert_allclose(losses, means, rtol=1e-4)


def test_a_sparse_log_is_said_to_be_one(trained, tmp_path, capsys):
  shutil.copy(trained / "config.json", tmp_path)
  sparse = [{"step": 10 * step, "loss": 3.0} for step in range(1, 30)]
  text = "".join(json.dumps(line) + "\n" for line in sparse)
  (tmp_path / "metrics.jsonl").write_text(text)
  assert spikes.report(tmp_path, 50, 8.0) == []
  assert "only every 10th step was logged" in capsys.readouterr().out


def test_bad_arguments_are_refused(trained, write_losses, tmp_path):
  with pytest.raises(UserError, match="--window=5"):
    spikes.report(trained, 5, 8.0)
  with pytest.raises(UserError, match="not the work directory of a run"):
    spikes.report(tmp_path, 50, 8.0)
  shutil.copy(trained / "config.json", tmp_path)
  write_losses(tmp_path, [3.0] * 4)
  with pytest.raises(UserError, match=r"metrics.jsonl: 4 logged steps"):
    spikes.report(tmp_path, 50, 8.0)
