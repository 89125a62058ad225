"""A task in one file and one line of the table: preferences by a reward, through the whole loop."""

import json

import jax
import numpy as np
import pytest
import torch
from torch.nn import functional

from gptjax import config as config_lib
from gptjax.data import tokenizer as tokenizers
from gptjax.data.options import read_options
from gptjax.errors import UserError
from gptjax.evals.evaluate import evaluate
from gptjax.evals.subject import Subject
from gptjax.finetuning.preference import Preference
from gptjax.objectives.task import make_task
from gptjax.training.loop import train
from gptjax.training.pretrained import load_model

END = 256  # Of the tokenizer 'bytes'.


def record(prompt, chosen, rejected):
  return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.fixture
def pairs(tmp_path):
  """Files of prompts with an answer that says thanks somewhere and one that does not."""
  rng = np.random.default_rng(0)
  for name, count in (("train", 96), ("validation", 32)):
    lines = []
    for _ in range(count):
      prompt, good, bad = (list(rng.choice(["it", "is", "so", "no", "at"], 4)) for _ in range(3))
      good[rng.integers(4)], bad[rng.integers(4)] = "thx", "bah"
      lines.append(json.dumps(record(" ".join(prompt), " ".join(good), " ".join(bad))))
    (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
  return tmp_path


def load(folder, **changes):
  small = {
    "tokenizer": "bytes",
    "total_epochs": 6.0,
    "batch_size": 8,
    "sequence_length": 96,
    "model.num_layers": 1,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "model.mlp_dim": 32,
    "optim.learning_rate": 0.01,
    "log.tensorboard": False,
    "data.path": str(folder / "train.jsonl"),
    "data.validation_path": str(folder / "validation.jsonl"),
  }
  return config_lib.load("configs/finetune.py:task=preference,model=debug", small | changes)


def pack(folder, records, **changes):
  path = folder / "records.jsonl"
  path.write_text("\n".join(map(json.dumps, records)))
  config = load(folder, **{"data.path": str(path), "data.validation_path": str(path)} | changes)
  task, data = make_task(config.task), read_options(config)
  (part,) = data.parts.values()
  training, _ = task.open_pair(part, data)
  encoded = task.encode(training, tokenizers.load("bytes"), data, progress=False)
  return task, encoded, task.collate(encoded.examples, data)


def test_the_loss_is_that_of_bradley_and_terry_and_pairs_do_not_mix(tmp_path):
  records = [record("p", "aa", "b"), record("q", "c", "ddd")]
  task, _, batch = pack(tmp_path, records)
  assert len(batch.inputs) == 1
  # Two pairs of two segments side by side, none of which sees another.
  assert batch.segment_ids.max() == 4
  logits = np.random.default_rng(0).normal(size=(1, 96, 1)).astype(np.float32)
  ends = [int(np.flatnonzero(batch.segment_ids[0] == n)[-1]) for n in range(1, 5)]
  assert all(batch.inputs[0, end] == END for end in ends)
  rewards = torch.tensor(logits[0, ends, 0]).reshape(2, 2)
  expected = -functional.logsigmoid(rewards[:, 0] - rewards[:, 1]).sum()
  loss, gradient = jax.value_and_grad(lambda x: task.loss_of_logits(x, batch).total)(logits)
  assert float(loss) == pytest.approx(float(expected), rel=1e-5)
  assert batch.weights.sum() == 2
  assert set(np.flatnonzero(np.asarray(gradient)[0, :, 0])) == set(ends)


@pytest.mark.parametrize(
  ("bad", "problem"),
  [
    ({"prompt": "p", "chosen": "a"}, r":2: no key 'rejected' \(found: 'prompt', 'chosen'\)\."),
    (record("p", "a", "a"), ":2: 'chosen' and 'rejected' are the same text"),
    (record("p", " ", "a"), ":2: an empty text"),
    (record("p", ["a"], "b"), ":2: a text is list, not a string"),
  ],
)
def test_a_bad_record_is_named(tmp_path, bad, problem):
  with pytest.raises(UserError, match=problem):
    pack(tmp_path, [record("p", "a", "b"), bad])


def test_answers_that_are_cut_alike_are_left_out(tmp_path):
  records = [record("p" * 60, "a", "b"), record("p", "a" * 60, "b")]
  _, encoded, batch = pack(tmp_path, records)
  assert (encoded.truncated, encoded.dropped) == (1, 1)
  assert batch.weights.sum() == 1


@pytest.mark.slow
def test_a_reward_is_learnt_and_evaluated_and_resumed(pairs, tmp_path):
  result = train(load(pairs), tmp_path / "run")
  assert result["val/accuracy"] > 0.9
  assert result["val/loss"] < 0.5
  assert result["val/reward_margin"] > 0
  subject = Subject(*load_model(tmp_path / "run"))
  saved = config_lib.open_saved(tmp_path / "run")
  path = f"labels:{pairs / 'validation.jsonl'}"
  (found,) = evaluate(subject, [path], resamples=10, config=saved)
  assert found.metrics["accuracy"].value == pytest.approx(result["val/accuracy"])
  again = train(load(pairs), tmp_path / "run")
  assert again == result


def test_an_option_of_another_task_is_refused():
  with pytest.raises(UserError, match=r"task\.label_key is no option of task='preference'"):
    make_task({"name": "preference", "label_key": "label"})
  assert make_task({"name": "preference"}) == Preference()
