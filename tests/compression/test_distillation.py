"""Runs in which a student learns from a teacher: what they learn, keep and refuse."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import config as config_lib
from gptjax import tree
from gptjax.data import tokenizer as tokenizers
from gptjax.data.pipeline import Dataset
from gptjax.devices import sharding
from gptjax.diagnosis import noise_scale
from gptjax.diagnosis.dry_run import dry_run
from gptjax.errors import UserError
from gptjax.evals.evaluate import evaluate
from gptjax.evals.subject import Subject
from gptjax.finetuning.predict import predict
from gptjax.inference.generate import generate
from gptjax.model.gpt import describe_parameters, model_graph
from gptjax.objectives.forward import hidden
from gptjax.training.checkpoints import Checkpoints
from gptjax.training.datasets import open_data
from gptjax.training.loop import init_or_restore, train
from gptjax.training.metrics import read_metrics
from gptjax.training.pretrained import Labels, load_checkpoint, load_model, save_model
from gptjax.training.resolve import resolve
from gptjax.training.setup import make_setup
from tests.training.test_loop import ROOT, assert_resumed, corpus, environment, losses, run  # noqa: F401

SMALL = {
  "total_steps": 6,
  "batch_size": 8,
  "sequence_length": 32,
  "tokenizer": "bytes",
  "model.num_layers": 1,
  "model.embed_dim": 16,
  "model.num_heads": 2,
  "model.mlp_dim": 32,
  "optim.learning_rate": 1e-2,
  "log.every_steps": 1,
  "log.tensorboard": False,
  "eval.every_steps": 0,
  "sample.every_steps": 0,
  "checkpoint.every_steps": 2,
}


class Files:
  """A folder with a text, with records of two labels, and with teachers."""

  def __init__(self, folder: Path, make_model):
    self.folder, self._make_model = folder, make_model
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    rng = np.random.default_rng(0)
    words = [" ".join(rng.choice(["yes", "no", "so", "it"], 3)) for _ in range(48)]
    records = [
      {"text": text.upper() if i % 2 else text, "label": "loud" if i % 2 else "quiet"}
      for i, text in enumerate(words)
    ]
    lines = [json.dumps(record) for record in records]
    (folder / "train.jsonl").write_text("\n".join(lines[:32]))
    (folder / "validation.jsonl").write_text("\n".join(lines[32:]))
    chats = [{"prompt": text, "completion": text[::-1]} for text in words]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))

  def teacher(self, name="teacher", *, seed=0, tokenizer="bytes", labels=None, **changes) -> str:
    """The folder of a teacher twice as wide as a student."""
    found = tokenizers.load(tokenizer)
    if labels:
      changes["label_head.num_labels"] = len(labels)
    model = self._make_model(found.vocab_size, seed, **changes)
    folder = self.folder / name
    folder.mkdir()
    save_model(folder, model, found, Labels("classification", labels) if labels else None)
    return str(folder)

  def config(self, spec="pretrain.py:task=distill,model=debug,data=text", **changes):
    source = "text.txt" if "data=text" in spec else "train.jsonl"
    paths = {"data.path": str(self.folder / source), "data.cache_dir": str(self.folder / "cache")}
    if source == "train.jsonl":
      paths["data.validation_path"] = str(self.folder / "validation.jsonl")
    default = {"task.teacher": str(self.folder / "teacher")} if "task=distill" in spec else {}
    return config_lib.load(f"{ROOT}/configs/{spec}", SMALL | paths | default | changes)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_config, random_params) -> Files:
  """Files with a teacher, 'teacher'."""

  def make_model(vocab_size, seed, **changes):
    shape = {"vocab_size": vocab_size, "embed_dim": 32, "position.max_positions": 64}
    config = tiny_config(**shape | changes)
    return nnx.merge(model_graph(config), jax.tree.map(jnp.asarray, random_params(config, seed)))

  made = Files(tmp_path_factory.mktemp("files"), make_model)
  made.teacher()
  return made


@pytest.fixture
def one_device(monkeypatch):
  """Makes runs see one device, for which they compile faster."""
  first = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *_: first)


@pytest.fixture(scope="module")
def distilled(files, tmp_path_factory) -> Path:
  """The work directory of a run of 30 steps, whose teacher has been moved away since."""
  workdir, first = tmp_path_factory.mktemp("distilled"), jax.devices()[:1]
  moved = files.folder / "moved"
  shutil.copytree(files.folder / "teacher", moved)
  changes = {
    "total_steps": 30,
    "task.alpha": 0.9,
    "task.temperature": 2.0,
    "task.teacher": str(moved),
  }
  changes |= {"sample.every_steps": 30, "checkpoint.every_steps": 0}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "devices", lambda *_: first)
    patch.setattr("gptjax.inference.generate.continue_prompts", continue_alone)
    train(files.config(**changes), workdir)
  shutil.rmtree(moved)
  return workdir


def continue_alone(model, tokenizer, options):
  """In the place of `continue_prompts`: the model that it is given is the student alone."""
  named = tree.named_leaves(nnx.to_pure_dict(nnx.state(model)))
  assert named.keys() == describe_parameters(model.config).keys()
  return [f"{tokenizer.spec}, {len(options.prompts)} prompts"]


def validations(workdir: Path) -> list[dict]:
  return [line for line in read_metrics(workdir) if "val/loss" in line]


# --- What is learnt and kept -------------------------------------------------------------------


def test_a_student_comes_closer_to_its_teacher(distilled):
  before, after = validations(distilled)
  assert set(before) >= {"val/perplexity", "val/bits_per_byte", "val/kl", "val/agreement"}
  assert after["val/kl"] < 0.8 * before["val/kl"]
  assert 0 <= before["val/agreement"] < after["val/agreement"] <= 1


@pytest.mark.slow
def test_a_checkpoint_holds_the_student_alone_and_needs_no_teacher(distilled):
  manifest = json.loads((distilled / "checkpoints/30/manifest/metadata").read_text())["arrays"]
  assert "second_checksum" in manifest
  assert not any("second/" in name for name in manifest)
  assert manifest["params/embed/embedding"]["shape"] == [260, 16]
  model, tokenizer = load_model(distilled)
  assert model.second is None
  assert generate(model, tokenizer, ["the"], max_tokens=2)[0].tokens


@pytest.mark.slow
def test_what_validation_tells_is_what_the_models_say(files, one_device, tmp_path):
  """Of a student before its first update, from all logits of both models."""
  config = files.config(**{"total_steps": 1, "task.temperature": 3.0, "task.divergence": "js"})
  setup, dataset, state, frozen = opened(config, tmp_path)
  model = nnx.merge(setup.graph, state.params, frozen)
  sums = np.zeros(4)
  for batch in dataset.validation_batches():
    logits, theirs = (
      jax.device_get(one.logits(hidden(one, batch))) for one in (model, model.second)
    )
    log_q, log_p = (np.asarray(jax.nn.log_softmax(one)) for one in (logits, theirs))
    targets = np.take_along_axis(log_q, batch.targets[..., None], axis=-1)[..., 0]
    agrees = logits.argmax(-1) == theirs.argmax(-1)
    for i, x in enumerate((-targets, (np.exp(log_p) * (log_p - log_q)).sum(-1), agrees, 1.0)):
      sums[i] += (x * batch.weights).sum()
  train(config, tmp_path / "run")
  told = validations(tmp_path / "run")[0]
  found = [told[f"val/{name}"] for name in ("loss", "kl", "agreement")]
  np.testing.assert_allclose(found, sums[:3] / sums[3], rtol=1e-4)


def opened(config, workdir):
  """(setup, data, state, frozen) as the loop opens them."""
  setup = make_setup(resolve(config))
  optimizer = setup.make_optimizer(setup.run_length)
  with jax.set_mesh(setup.mesh), Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
    return setup, open_data(setup, workdir), *init_or_restore(setup, optimizer, checkpoints)


@pytest.mark.parametrize("divergence", ["forward_kl", pytest.param("js", marks=pytest.mark.slow)])
def test_the_teacher_has_no_gradient_and_stays_as_it_was(files, one_device, tmp_path, divergence):
  wide = {"model.embed_dim": 32, "task.hidden_weight": 0.5, "task.divergence": divergence}
  setup, dataset, state, frozen = opened(files.config(**wide), tmp_path)
  assert set(frozen) == {"second"}
  batch = dataset.training_batch(0)

  @jax.jit
  def gradients(params, frozen):
    def loss(params, frozen):
      return setup.task.loss(nnx.merge(setup.graph, params, frozen), batch).total

    return jax.grad(loss, (0, 1))(params, frozen)

  of_student, of_teacher = gradients(state.params, frozen)
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(of_teacher))
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_student["blocks"]["mlp"]))
  before = jax.device_get(frozen)
  with jax.set_mesh(setup.mesh):
    step = setup.make_train_step(setup.make_optimizer(setup.run_length))
    state, _ = step(state, sharding.to_global(batch, setup.mesh), frozen)
  kept = load_model(files.folder / "teacher")[0]
  expected = tree.named_leaves(nnx.to_pure_dict(nnx.state(kept, nnx.Param)))
  for found in (before, jax.device_get(frozen)):
    named = tree.named_leaves(found["second"])
    assert named.keys() == expected.keys()
    for name, x in named.items():
      np.testing.assert_array_equal(x, expected[name], err_msg=name)


@pytest.mark.slow
def test_hidden_states_that_point_the_same_way_cost_nothing(files, one_device, tmp_path):
  changes = {"model.num_layers": 2, "model.embed_dim": 32, "model.num_heads": 4}
  changes |= {
    "model.position.max_positions": 64,
    "task.hidden_weight": 1.0,
    "task.alpha": 1.0,
    "init_from": str(files.folder / "teacher"),
  }
  setup, dataset, state, frozen = opened(files.config(**changes), tmp_path)
  batch = dataset.training_batch(0)

  @jax.jit
  def total(params, task_weight):
    model = nnx.merge(setup.graph, params, frozen)
    plain = dataclasses.replace(setup.task, hidden_weight=0.0).loss(model, batch).total
    return setup.task.loss(model, batch).total - plain, plain

  apart, plain = total(state.params, 1.0)
  # The same model, which starts from the teacher.
  assert abs(float(plain)) < 1e-3
  assert abs(float(apart)) < 1e-3
  turned = jax.tree.map(lambda x: x + 0.3, state.params)
  assert total(turned, 1.0)[0] > 1


# --- Resuming, and devices ---------------------------------------------------------------------

RESUMED = {"model.dropout.residual": 0.1, "optim.ema_decay": 0.9, "task.divergence": "js"}


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
  """The work directory of a run of 6 steps on one device that nothing disturbed."""
  workdir, first = tmp_path_factory.mktemp("whole"), jax.devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "devices", lambda *_: first)
    train(files.config(**RESUMED), workdir)
  return workdir


def stopped_at_4(whole: Path, workdir: Path) -> Path:
  """A copy of a run as it was when it had saved step 4."""
  shutil.copytree(whole, workdir)
  shutil.rmtree(workdir / "checkpoints/6")
  return workdir


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(files, whole, one_device, tmp_path):
  resumed = stopped_at_4(whole, tmp_path / "resumed")
  train(files.config(**RESUMED), resumed)
  assert losses(resumed) == losses(whole)
  assert list(losses(whole)) == list(range(1, 7))
  assert validations(resumed)[-1]["val/kl"] == validations(whole)[-1]["val/kl"]


def test_a_run_does_not_go_on_with_another_teacher(files, whole, one_device, tmp_path):
  other = files.teacher("other", seed=1)
  resumed = stopped_at_4(whole, tmp_path / "resumed")
  with pytest.raises(UserError, match="another frozen model than its task names now"):
    train(files.config(**RESUMED, **{"task.teacher": other}), resumed)
  with pytest.raises(
    UserError, match="the checkpoint has second_checksum, which this config lacks"
  ):
    train(
      files.config(
        "pretrain.py:model=debug,data=text",
        **{name: value for name, value in RESUMED.items() if not name.startswith("task.")},
      ),
      resumed,
    )


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(files, corpus, environment, tmp_path):  # noqa: F811
  argument = "task=distill,model=debug,data=text"
  overrides = SMALL | {"total_steps": 40, "checkpoint.every_steps": 10}
  overrides["task.teacher"] = str(files.folder / "teacher")
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  run(environment, corpus, [killed], argument, overrides, kill_at=27)
  before = losses(killed)
  run(environment, corpus, [killed, whole], argument, overrides)
  assert_resumed(killed, before, whole)


@pytest.mark.parametrize(
  "sizes",
  [
    {"data": 2, "fsdp": 2},
    pytest.param({"data": 1, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
  ],
  ids=str,
)
@pytest.mark.slow
def test_a_mesh_learns_the_same(files, whole, tmp_path, sizes):
  config = files.config(**RESUMED, **{f"mesh.{axis}": size for axis, size in sizes.items()})
  setup = make_setup(resolve(config))
  table = setup.abstract_second()["embed"]["embedding"]
  assert table.sharding.shard_shape(table.shape) == (260 // sizes.get("tensor", 1), 16)
  train(config, tmp_path)
  found, expected = losses(tmp_path), losses(whole)
  assert list(found) == list(expected)
  np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=1e-4)
  kl = [validations(workdir)[-1]["val/kl"] for workdir in (tmp_path, whole)]
  assert kl[0] == pytest.approx(kl[1], rel=1e-3)


def test_memory_and_flops_count_the_teacher(files, capsys):
  config = files.config(**{"mesh.data": 1, "mesh.fsdp": 4})
  plain = files.config("pretrain.py:model=debug,data=text", **{"mesh.data": 1, "mesh.fsdp": 4})
  with_teacher, alone = (make_setup(resolve(one)) for one in (config, plain))
  teacher, _ = load_model(files.folder / "teacher")
  forward = 2 * sum(
    x.size
    for name, x in tree.named_leaves(nnx.to_pure_dict(nnx.state(teacher, nnx.Param))).items()
    if name.endswith("kernel") or name == "embed/embedding"
  )
  attention = 4 * 2 * 32 * 32  # Layers, widths of the heads together, keys: a forward pass.
  found = with_teacher.flops_per_token - alone.flops_per_token
  assert found == pytest.approx(forward + attention / 2, rel=0.02)
  sizes = []
  for one in (config, plain):
    dry_run(one)
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "memory of parameters" in x)
    sizes.append([float(part.split()[-1]) for part in line.split(" MiB")[:2]])
  count = sum(x.size for x in jax.tree.leaves(nnx.state(teacher, nnx.Param)))
  assert sizes[0][0] - sizes[1][0] == pytest.approx(4 * count / 2**20, abs=0.1)
  assert sizes[0][1] - sizes[1][1] == pytest.approx(count / 2**20, abs=0.1)


# --- What is refused ---------------------------------------------------------------------------


def test_a_teacher_that_does_not_fit_is_named(files, tmp_path):
  wordy = files.teacher("wordy", tokenizer="bytes+mask")
  labelled = files.teacher("labelled", labels=("a", "b"))
  blind = files.teacher("blind", visibility="bidirectional")
  cases = [
    ({"task.teacher": ""}, "task='distill' needs task.teacher"),
    ({"task.teacher": str(tmp_path / "nowhere")}, "nowhere"),
    ({"task.teacher": wordy}, r"model\.vocab_size=260, but task\.teacher=.*wordy has 261"),
    ({"task.teacher": labelled}, r"model\.label_head\.num_labels=0, but .*labelled has 2"),
    ({"task.teacher": blind}, r"model\.visibility='causal', but .*blind has 'bidirectional'"),
    ({"task.hidden_weight": 1.0}, r"model\.embed_dim=16 and task\.teacher=.* has 32"),
    ({"task.beta": 0.1}, r"task\.beta=0\.1 is of task\.divergence='js' alone"),
    ({"task.divergence": "kl"}, "task.divergence: no choice 'kl'. Choose one of: forward_kl"),
    ({"task.temperature": 0.0}, "task.temperature is 0.0; it must be above 0"),
    ({"task.alpha": 1.5}, "task.alpha is 1.5; it must be at least 0 and at most 1"),
  ]
  for changes, sentence in cases:
    with pytest.raises(UserError, match=sentence):
      make_setup(resolve(files.config(**changes)))


def test_a_teacher_of_other_tokens_is_named_before_anything_compiles(files, tmp_path, monkeypatch):
  """Both tokenizers have 300 tokens, most of which are not the same."""
  texts = {"a": "mats and cats sat", "b": "the lazy dog jumps"}
  for name, text in texts.items():
    tokenizers.train("bpe:300", [f"{text} " * 50]).save(tmp_path / name)
  teacher = files.teacher("other_tokens", tokenizer=str(tmp_path / "a"))
  monkeypatch.setattr(jax, "jit", None)
  for tokenizer in ("b", "a"):
    config = files.config(**{"task.teacher": teacher, "tokenizer": str(tmp_path / tokenizer)})
    setup = make_setup(resolve(config))
    if tokenizer == "b":
      with pytest.raises(UserError, match=r"other_tokens reads other tokens.*--config\.tokenizer="):
        open_data(setup, tmp_path / "run")
    else:
      assert isinstance(open_data(setup, tmp_path / "other_run"), Dataset)


def test_rows_that_are_too_long_for_the_teacher_are_named(files, tmp_path):
  with pytest.raises(UserError, match=r"task\.teacher=.*128 positions do not fit the 64 learned"):
    dry_run(files.config(sequence_length=128))


def test_what_looks_at_one_model_says_so(files, whole):
  with pytest.raises(UserError, match=r"task='distill': this looks at the training of one whole"):
    make_setup(resolve(files.config())).require_whole_model()
  with pytest.raises(UserError, match="the model was loaded without its teacher"):
    noise_scale.report(whole, noise_scale.MIN_BATCHES)


# --- Other tasks -------------------------------------------------------------------------------

LONG = {"position.max_positions": 256}
LABELS = "finetune.py:task=distill_classification,model=debug,data=jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("visibility", ["causal", "bidirectional"])
def test_a_classifier_learns_from_one_of_another_width(files, one_device, tmp_path, visibility):
  # Another order of labels than a run would choose.
  names, kind = ("quiet", "loud"), {"visibility": visibility}
  teacher = files.teacher(f"{visibility}_labels", labels=names, **kind)
  changes = {"task.teacher": teacher, "total_steps": 20, "task.alpha": 1.0}
  changes |= {"model.visibility": visibility, "eval.every_steps": 0, "checkpoint.final": "newest"}
  changes["sequence_length"] = 64  # All batches have as many rows, so that it compiles once.
  config = files.config(LABELS, **changes)
  assert tuple(resolve(config).task.labels) == names
  workdir = tmp_path / "run"
  told = train(config, workdir)
  before, after = validations(workdir)
  assert after["val/kl"] < 0.5 * before["val/kl"]
  assert after["val/agreement"] >= before["val/agreement"]
  assert {"val/accuracy", "val/ece"} <= set(told)
  # Used without its teacher.
  shutil.rmtree(teacher)
  model, tokenizer = load_model(workdir)
  saved, path = config_lib.open_saved(workdir), str(files.folder / "validation.jsonl")
  subject = Subject(model, tokenizer, batch_size=4)
  (found,) = evaluate(subject, [f"labels:{path}"], resamples=10, config=saved)
  assert found.metrics["accuracy"].value == pytest.approx(told["val/accuracy"], abs=1e-6)
  assert {one.label for one in predict(path, saved, model, tokenizer)} <= set(names)


def test_labels_of_a_teacher_that_do_not_fit_are_named(files):
  other = files.teacher("other_labels", labels=("quiet", "silent"))
  cases = [
    ({"task.teacher": other}, "task.labels=loud,quiet, but .*other_labels has quiet,silent"),
    ({}, r"model\.label_head\.num_labels=2, but task\.teacher=.*teacher has 0"),
    ({"task.r_drop": 1.0}, r"task\.r_drop=1\.0: task='distill_classification' makes one pass"),
  ]
  for changes, sentence in cases:
    with pytest.raises(UserError, match=sentence):
      make_setup(resolve(files.config(LABELS, **changes)))


def test_the_loss_of_labels_is_that_of_the_formula(files, one_device, tmp_path):
  teacher = files.teacher("formula", labels=("loud", "quiet"))
  changes = {"task.teacher": teacher, "task.alpha": 0.3, "task.temperature": 2.0}
  setup, dataset, state, frozen = opened(
    files.config(LABELS, **changes, **{"task.divergence": "reverse_kl"}), tmp_path
  )
  batch = dataset.training_batch(0)
  model = nnx.merge(setup.graph, state.params, frozen)
  logits, theirs = (
    one.label_logits(hidden(one, batch), batch.segment_ids) for one in (model, model.second)
  )
  picked = batch.weights > 0
  q, p = (np.asarray(jax.nn.softmax(one[picked] / 2.0)) for one in (logits, theirs))
  right = jax.nn.log_softmax(logits[picked])[np.arange(picked.sum()), batch.targets[picked]]
  expected = 0.7 * -right.sum() + 0.3 * 4 * (q * np.log(q / p)).sum()
  assert float(setup.task.loss(model, batch).total) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.slow
def test_a_chat_model_learns_from_one_that_has_another_template(files, one_device, tmp_path):
  changes = {"data.path": str(files.folder / "chats.jsonl"), "data.validation_path": ""}
  changes |= {"data.validation_fraction": 0.2, "task.chat_template": "alpaca"}
  # That template alone takes more than 100 bytes.
  changes |= {"sequence_length": 192, "task.teacher": files.teacher("chatty", **LONG)}
  config = files.config("finetune.py:task=distill_chat,model=debug,data=jsonl", **changes)
  train(config, tmp_path)
  before, after = validations(tmp_path)
  assert after["val/kl"] < before["val/kl"]


@pytest.mark.slow
def test_adapters_of_a_student_learn_from_a_teacher(files, one_device, tmp_path):
  student = files.teacher("student", seed=2)
  shape = {"model.num_layers": 0, "model.embed_dim": 0, "model.num_heads": 0, "model.mlp_dim": 0}
  spec = "pretrain.py:task=distill,model=init_from,data=text,peft=lora"
  changes = {
    "init_from": student,
    "total_steps": 20,
    "task.alpha": 1.0,
    "checkpoint.every_steps": 10,
  }
  config = files.config(spec, **shape, **changes)
  train(config, tmp_path / "run")
  before, after = validations(tmp_path / "run")
  assert after["val/kl"] < before["val/kl"]
  shutil.rmtree(tmp_path / "run/checkpoints/20")
  lines = losses(tmp_path / "run")
  train(config, tmp_path / "run")
  assert losses(tmp_path / "run") == lines
  model, step = load_checkpoint(tmp_path / "run")
  assert (model.second, step) == (None, 20)
