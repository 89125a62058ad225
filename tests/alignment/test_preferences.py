"""Losses of pairs are those of the papers, however the pairs lie in rows, batches and meshes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from gptjax import config as config_lib
from gptjax.alignment.preferences import CPO, DPO, ORPO, SimPO
from gptjax.data import tokenizer as tokenizers
from gptjax.data.batch import Batch
from gptjax.devices import sharding
from gptjax.errors import UserError
from gptjax.model.gpt import model_graph
from gptjax.training.loop import train
from gptjax.training.metrics import read_metrics
from gptjax.training.pretrained import save_model

V, T = 32, 16
ONE = dict.fromkeys(sharding.MESH_AXES, 1)
# Tokens of a prompt, and of the better and the worse answer.
SIZES = [(2, 3, 1), (1, 2, 4), (3, 1, 1), (1, 4, 2)]


def conversations():
  rng = np.random.default_rng(0)
  for prompt, *answers in SIZES:
    before = rng.integers(1, V, prompt)
    yield prompt, [np.concatenate([before, rng.integers(1, V, size)]) for size in answers]


def make_batch(pairs_of_rows):
  """Rows [B, T] of whole pairs."""
  made = list(conversations())
  fields = {name: np.zeros((len(pairs_of_rows), T), np.int32) for name in ("x", "y", "s", "p")}
  weights, values = (np.zeros((len(pairs_of_rows), T), np.float32) for _ in range(2))
  for row, numbers in enumerate(pairs_of_rows):
    at = segment = 0
    for number in numbers:
      prompt, sides = made[number]
      for side, tokens in enumerate(sides):
        segment, end = segment + 1, at + len(tokens) - 1
        fields["x"][row, at:end], fields["y"][row, at:end] = tokens[:-1], tokens[1:]
        fields["s"][row, at:end], fields["p"][row, at:end] = segment, np.arange(end - at)
        values[row, at + prompt - 1 : end] = -1 if side else 1
        weights[row, at + prompt - 1] = not side
        at = end
  return Batch(
    fields["x"], fields["y"], weights, fields["s"], fields["p"], values=values[..., None]
  )


PACKED, PADDED = make_batch([[0, 1], [3, 2]]), make_batch([[0], [1], [2], [3]])


@pytest.fixture
def models(tiny_config, random_params):
  config = tiny_config(vocab_size=V, **{"head.tied": False, "head.soft_cap": 20.0})
  return [(model_graph(config), random_params(config, seed)) for seed in (0, 1)]


def answer_log_probs(graph, params):
  """Of each pair, ((sum, tokens) of the better and of the worse answer), one text at a time."""
  model, found = nnx.merge(graph, params), []
  for prompt, sides in conversations():
    of_pair = []
    for tokens in sides:
      log_probs = jax.nn.log_softmax(model(tokens[None, :-1])[0])
      picked = np.take_along_axis(np.asarray(log_probs), tokens[1:, None], 1)[prompt - 1 :, 0]
      of_pair.append((picked.sum(dtype=np.float64), len(picked)))
    found.append(of_pair)
  return torch.tensor(np.array(found, np.float64))


def by_paper(task, policy, reference):
  """The loss of each pair in PyTorch, from its log probabilities [N, 2] and tokens."""
  log_sigmoid = torch.nn.functional.logsigmoid
  sums, means = policy[..., 0], policy[..., 0] / policy[..., 1]
  if isinstance(task, SimPO):
    return -log_sigmoid(task.beta * (means[:, 0] - means[:, 1]) - task.gamma)
  if isinstance(task, CPO):
    return -log_sigmoid(task.beta * (sums[:, 0] - sums[:, 1])) - task.alpha * means[:, 0]
  if isinstance(task, ORPO):
    odds = means.exp() / (1 - means.exp())
    return -means[:, 0] - task.beta * log_sigmoid(torch.log(odds[:, 0] / odds[:, 1]))
  theirs = torch.zeros_like(policy[..., 0]) if task.reference_free else reference[..., 0]
  ratios = sums - theirs
  if task.per_token or task.kind == "ipo":
    ratios = ratios / policy[..., 1]
  margin = ratios[:, 0] - ratios[:, 1]
  if task.kind == "ipo":
    return (margin - 1 / (2 * task.beta)) ** 2
  if task.kind == "hinge":
    return torch.relu(1 - task.beta * margin)
  right, wrong = log_sigmoid(task.beta * margin), log_sigmoid(-task.beta * margin)
  return -(1 - task.label_smoothing) * right - task.label_smoothing * wrong


TASKS = {
  "dpo": DPO(reference="r"),
  "smoothed": DPO(reference="r", label_smoothing=0.1, beta=0.3),
  "per token": DPO(reference="r", per_token=True, beta=2.0),
  "free": DPO(reference_free=True),
  "ipo": DPO(reference="r", kind="ipo"),
  "hinge": DPO(reference="r", kind="hinge", beta=0.05),
  "simpo": SimPO(gamma=0.4),
  "cpo": CPO(alpha=0.5),
  "orpo": ORPO(beta=0.3),
}


def loss_and_gradient(task, models, batch, *, same=False):
  (graph, params), (other, theirs) = models

  def loss(params):
    model = nnx.merge(graph, params)
    model.second = nnx.merge(other, params if same else theirs)
    return task.loss(model, batch).total / batch.weights.sum()

  return jax.jit(jax.value_and_grad(loss))(params)


QUICK = ("dpo", "ipo", "orpo")


@pytest.mark.parametrize(
  "task",
  [
    pytest.param(task, marks=[] if name in QUICK else pytest.mark.slow, id=name)
    for name, task in TASKS.items()
  ],
)
def test_losses_are_those_of_the_papers_packed_and_padded(models, task):
  found = by_paper(task, *(answer_log_probs(*one) for one in models))
  packed, gradient = loss_and_gradient(task, models, PACKED)
  assert float(packed) == pytest.approx(float(found.mean()), rel=1e-5)
  padded, again = loss_and_gradient(task, models, PADDED)
  assert float(padded) == pytest.approx(float(packed), rel=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, again)


@pytest.mark.parametrize("name", ["dpo", "orpo"])
def test_gradients_are_those_of_all_logits(models, name):
  """By finite differences of the loss of the papers, along two directions."""
  task, ((graph, params), other) = TASKS[name], models
  _, gradient = loss_and_gradient(task, models, PACKED)
  reference = answer_log_probs(*other)
  for seed in (0, 1):
    rng = np.random.default_rng(seed)
    way = jax.tree.map(lambda x, rng=rng: rng.normal(size=x.shape).astype(np.float32), params)
    values = []
    for sign in (1, -1):
      moved = jax.tree.map(lambda x, d, sign=sign: x + sign * 1e-3 * d, params, way)
      values.append(float(by_paper(task, answer_log_probs(graph, moved), reference).mean()))
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float((g * d).sum()), gradient, way)))
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(slope, rel=2e-2)


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2}, {"fsdp": 2, "context": 2}], ids=str)
def test_the_first_loss_of_dpo_is_ln_2_on_every_mesh(models, sizes):
  with jax.set_mesh(sharding.make_mesh(ONE | sizes)):
    loss, _ = loss_and_gradient(DPO(reference="r"), models, PACKED, same=True)
  assert float(loss) == pytest.approx(np.log(2), abs=1e-6)


def test_validation_tells_how_often_the_better_answer_is_favoured(models):
  (graph, params), (other, theirs) = models
  model = nnx.merge(graph, params)
  model.second = nnx.merge(other, theirs)
  told, _ = DPO(reference="r").evaluate(model, PACKED)
  ratios = answer_log_probs(graph, params)[..., 0] - answer_log_probs(other, theirs)[..., 0]
  margins = 0.1 * (ratios[:, 0] - ratios[:, 1])
  found = {name: float(total / weight) for name, (total, weight) in told.items()}
  assert found["accuracy"] == pytest.approx(float((margins > 0).double().mean()))
  assert found["margin"] == pytest.approx(float(margins.mean()), rel=1e-4)


# --- Runs --------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, tiny_config, random_params):
  """Pairs whose better answers have one letter and whose worse ones another, and a model."""
  told = [{"prompt": "?" * (n % 3 + 1), "chosen": "aaa", "rejected": "bbb"} for n in range(40)]
  (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, told)))
  config = tiny_config(vocab_size=260, **{"position.max_positions": 512})
  model = nnx.merge(model_graph(config), jax.tree.map(jnp.asarray, random_params(config)))
  save_model(tmp_path / "start", model, tokenizers.load("bytes"), None)
  return tmp_path


def make_config(files, task="dpo", **changes):
  return config_lib.load(
    f"configs/align.py:task={task}",
    {
      "init_from": str(files / "start"),
      "data.path": str(files / "pairs.jsonl"),
      "data.cache_dir": str(files / "cache"),
      "data.validation_fraction": 0.2,
      "task.chat_template": "alpaca",
      "sequence_length": 512,
      "batch_size": 4,
      "total_epochs": 8.0,
      "eval.every_epochs": 4.0,
      "checkpoint.every_epochs": 8.0,
      "optim.learning_rate": 3e-3,
      "log.tensorboard": False,
      **changes,
    },
  )


@pytest.fixture
def one_device(monkeypatch):
  """Makes runs see one device, for which they compile faster."""
  first = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *_: first)


@pytest.mark.slow
def test_a_run_comes_to_favour_the_better_answers(files, one_device):
  config = make_config(files, **{"task.reference": str(files / "start")})
  train(config, files / "run")
  before, *_, after = [line for line in read_metrics(files / "run") if "val/loss" in line]
  assert before["val/loss"] == pytest.approx(np.log(2), abs=1e-6)
  assert after["val/loss"] < 0.6
  assert after["val/accuracy"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("task", ["simpo", "cpo", "orpo"])
def test_tasks_without_a_reference_come_to_favour_them_too(files, one_device, task):
  train(make_config(files, task), files / "run")
  before, *_, after = [line for line in read_metrics(files / "run") if "val/loss" in line]
  assert after["val/margin"] > before["val/margin"] + 0.1
  assert after["val/accuracy"] == 1


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({}, "needs task.reference"),
    ({"reference": "r", "reference_free": True}, "takes no task.reference"),
    ({"reference": "r", "beta": 0.0}, "task.beta"),
    ({"reference": "r", "kind": "ipo", "label_smoothing": 0.1}, "is of task.kind='sigmoid'"),
    ({"reference": "r", "kind": "ipo", "per_token": True}, "means over tokens anyway"),
    ({"reference": "r", "kind": "logistic"}, "no 'logistic'|'logistic'"),
    ({"reference": "r", "z_loss": 0.1}, "task.z_loss=0.1 is not of task='dpo'"),
  ],
)
def test_options_that_cannot_be_used_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    DPO(**changes).second_model  # noqa: B018


def test_a_reference_with_other_tokens_is_refused(files, tiny_config, random_params):
  config = tiny_config(vocab_size=300, **{"position.max_positions": 512})
  model = nnx.merge(model_graph(config), random_params(config))
  save_model(files / "other", model, tokenizers.load("bytes"), None)
  task = dataclasses.replace(TASKS["dpo"], reference=str(files / "other"))
  with pytest.raises(UserError, match=r"task\.reference=.* has 300; make it the same"):
    task.check_model(tiny_config(vocab_size=260))
