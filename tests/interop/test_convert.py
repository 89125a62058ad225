"""Conversion: every bit there and back, what is refused, and that nothing half-written stays."""

import base64
import contextlib
import dataclasses
import io
import json
import os
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from flax import nnx, traverse_util

from gptjax import config as config_lib
from gptjax import convert as convert_command
from gptjax import tree
from gptjax.convert import main, name_source
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.errors import UserError
from gptjax.interop import convert as convert_lib
from gptjax.interop.convert import convert
from gptjax.interop.huggingface import HuggingFaceModel
from gptjax.interop.verify import Agreement
from gptjax.model.gpt import describe_parameters
from gptjax.peft.config import PeftConfig
from gptjax.peft.surgery import initial_adapters
from gptjax.training.checkpoints import Checkpoints, checksum
from gptjax.training.loop import train
from gptjax.training.metrics import read_metrics
from gptjax.training.pretrained import Labels, load_model
from tests.interop.conftest import LLAMA, VOCAB_SIZE, save_folder

TEXT = "again the fox, 1234\n 人工"


@pytest.fixture(scope="module")
def original(tiny_config, random_params, tmp_path_factory):
  """(folder of a small Llama, its parameters by name)."""
  config = tiny_config(**LLAMA)
  params = random_params(config)
  folder = tmp_path_factory.mktemp("original") / "model"
  return save_folder(folder, config, params), tree.named_leaves(params)


@pytest.fixture(scope="module")
def run(original, tmp_path_factory):
  """The work directory that the small Llama becomes."""
  target = tmp_path_factory.mktemp("converted") / "run"
  convert(f"hf:{original[0]}", target, to="gptjax")
  return target


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Returns a function that trains a small GPT on text for two steps: (work directory, output)."""

  def make(**changes):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "a.txt").write_text("the quick brown fox\n" * 200)
    overrides = {"data.path": str(folder / "a.txt"), "total_steps": 2, "tokenizer": "bytes"}
    overrides |= {"batch_size": 8, "sequence_length": 32, "log.tensorboard": False} | changes
    config = config_lib.load("pretrain.py:model=debug,data=text", overrides)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
      train(config, folder / "run")
    return folder / "run", printed.getvalue()

  return make


@pytest.mark.slow
def test_a_run_is_exported_with_its_model_card(trained, tmp_path):
  run, printed = trained()
  assert "convert --format=hf" not in printed
  convert(str(run), tmp_path / "hf", to="hf")
  card = (tmp_path / "hf" / "README.md").read_text()
  assert card.startswith("---\nlibrary_name: transformers\n---\n")
  assert "| base model | none, from random weights |" in card
  assert "| task | next_token |" in card
  assert f"| data | text {run.parent}/a.txt |" in card
  assert "| steps | 2 |" in card
  last = read_metrics(run)[-1]
  assert last["step"] == 2
  assert f"| val/loss | {last['val/loss']:.4f} |" in card
  assert "gptjax generate --checkpoint=FOLDER" in card
  named = json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"][0]
  assert f"transformers.{named}.from_pretrained" in card
  assert "$" not in card


def test_what_has_no_form_there_is_told_before_training(trained):
  _, printed = trained(**{"model.residual.values": True, "total_steps": 1})
  told = [line for line in printed.splitlines() if "convert --format=hf" in line]
  assert len(told) == 1
  assert "no family of Hugging Face can be this model" in told[0]
  assert "residual.values" in told[0]


@pytest.mark.parametrize(
  ("changes", "task", "reason"),
  [
    ({}, "next_token", ""),
    ({"label_head.num_labels": 2, "label_head.bias": False}, "classification", ""),
    ({"label_head.num_labels": 2, "label_head.bias": True}, "classification", "label_head.bias"),
    ({"label_head.num_labels": 3}, "multi_label", "label_head.bias"),
  ],
)
def test_what_will_not_be_written_is_known_by_config_and_task(tiny_config, changes, task, reason):
  found = convert_lib.unwritable(tiny_config(**LLAMA | changes), task)
  assert reason in found if reason else found == ""


def named_params(model):
  return tree.named_leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def test_every_bit_and_every_token_come_back(original, run, tmp_path):
  folder, params = original
  convert(str(run), tmp_path / "back", to="hf")
  assert [path.name for path in tmp_path.iterdir()] == ["back"]
  ids = tokenizer_lib.load(str(folder)).encode(TEXT)
  for checkpoint in (str(run), f"hf:{tmp_path / 'back'}"):
    model, tokenizer = load_model(checkpoint)
    loaded = named_params(model)
    assert loaded.keys() == params.keys()
    for name, expected in params.items():
      np.testing.assert_array_equal(loaded[name], expected, err_msg=name)
    assert tokenizer.encode(TEXT) == ids
    assert tokenizer.end_of_text == 0
  before, after = (
    safetensors.numpy.load_file(place / "model.safetensors")
    for place in (folder, tmp_path / "back")
  )
  assert before.keys() == after.keys()
  for name in before:
    np.testing.assert_array_equal(before[name], after[name], err_msg=name)


def test_an_empty_folder_is_taken_and_a_family_kept(original, tmp_path):
  (tmp_path / "empty").mkdir()
  convert(f"hf:{original[0]}", tmp_path / "empty", to="hf", family="mistral", dtype="bfloat16")
  opened = HuggingFaceModel(str(tmp_path / "empty"))
  assert opened.family.model_type == "mistral"
  convert(f"hf:{tmp_path / 'empty'}", tmp_path / "again", to="hf")
  assert HuggingFaceModel(str(tmp_path / "again")).family.model_type == "mistral"


def edit_config(folder, **fields):
  path = folder / "config.json"
  values = {name: x for name, x in json.loads(path.read_text()).items() if name not in fields}
  path.write_text(json.dumps(values | {name: x for name, x in fields.items() if x is not ...}))


@pytest.mark.parametrize("through", ["hf", "run"])
def test_the_ids_that_config_json_alone_names_are_exported(original, tmp_path, through):
  ids = {"bos_token_id": 2, "eos_token_id": [7, 9], "pad_token_id": 3}
  source = tmp_path / "source"
  shutil.copytree(original[0], source)
  edit_config(source, **ids)
  name = f"hf:{source}"
  assert load_model(name)[1].stops == {0, 7, 9}
  if through == "run":
    convert(name, tmp_path / "run", to="gptjax")
    name = str(tmp_path / "run")
  convert(name, tmp_path / "back", to="hf")
  assert json.loads((tmp_path / "back" / "config.json").read_text()).items() >= ids.items()
  assert load_model(f"hf:{tmp_path / 'back'}")[1].stops == {0, 7, 9}


def test_a_model_without_named_ids_exports_those_of_its_tokenizer(original, tmp_path):
  source = tmp_path / "source"
  shutil.copytree(original[0], source)
  edit_config(source, bos_token_id=..., eos_token_id=..., pad_token_id=...)
  convert(f"hf:{source}", tmp_path / "back", to="hf")
  # Else `transformers` takes the ids that Llama's tokenizer has, 1 and 2.
  ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
  assert json.loads((tmp_path / "back" / "config.json").read_text()).items() >= ids.items()


@pytest.mark.parametrize("pad", [0, 5])
def test_a_classifier_scores_the_same_batches_after_a_round_trip(
  tiny_config, random_params, tmp_path, pad
):
  import torch
  import transformers

  config = tiny_config(
    **LLAMA | {"label_head.num_labels": 3, "label_head.bias": False, "vocab_size": VOCAB_SIZE}
  )
  labels = Labels("classification", ("a", "b", "c"))
  save_folder(tmp_path / "source", config, random_params(config), labels=labels)
  edit_config(tmp_path / "source", pad_token_id=pad)
  convert(f"hf:{tmp_path / 'source'}", tmp_path / "back", to="hf")
  tokens = torch.tensor([[8, 9, 10, 11], [12, 13, pad, pad]])
  scores = []
  for name in ("source", "back"):
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path / name).eval()
    with torch.no_grad():
      scores.append(model(input_ids=tokens, attention_mask=(tokens != pad).long()).logits.numpy())
  np.testing.assert_allclose(scores[1], scores[0], atol=1e-6)


def cut_short(folder):
  path = folder / "model.safetensors"
  os.truncate(path, path.stat().st_size - 1)


def edit_tensors(folder, edit):
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path)


def lose_tensor(folder):
  edit_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))


def store_integers(folder):
  edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(16, np.int32)}))


def store_large_value(folder):
  edit_tensors(
    folder,
    lambda tensors: tensors.update({"model.norm.weight": np.full(16, 1e6, np.float32)}),
  )


def pickle_weights(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_tokenizer(folder):
  (folder / "tokenizer.json").unlink()


def add_tokens(folder):
  (folder / "tokenizer.json").unlink()
  tokenizer_lib.train(f"bpe:{VOCAB_SIZE + 9}", [f"{TEXT} {i}" * 9 for i in range(99)]).save(folder)


@pytest.mark.parametrize(
  ("damage", "options", "message"),
  [
    (cut_short, {}, r"model\.safetensors: damaged or cut short"),
    (lose_tensor, {}, r"no tensor 'model\.norm\.weight'"),
    (store_integers, {}, r"tensor 'model\.norm\.weight' is of dtype I32"),
    (pickle_weights, {}, r"pytorch_model\.bin is a pickle"),
    (lose_tokenizer, {}, "holds no tokenizer"),
    (add_tokens, {}, "more than the model's 280"),
    (store_large_value, {"to": "hf", "dtype": "float16"}, "too large for float16"),
    (None, {"to": "hf", "family": "gpt2"}, "family 'gpt2' lacks model"),
    (None, {"to": "hf", "family": "gpt9"}, "no family 'gpt9'"),
  ],
)
def test_what_cannot_be_converted_leaves_nothing_behind(
  original, tmp_path, damage, options, message
):
  folder = tmp_path / "source"
  shutil.copytree(original[0], folder)
  if damage is not None:
    damage(folder)
  with pytest.raises(UserError, match=message) as error:
    convert(f"hf:{folder}", tmp_path / "target", **{"to": "gptjax"} | options)
  assert "\n" not in str(error.value)
  assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("to", ["hf", "gptjax"])
def test_a_failure_to_write_leaves_nothing_behind(original, tmp_path, monkeypatch, to):
  def fail(self, folder):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(tokenizer_lib.Tokenizer, "save", fail)
  with pytest.raises(UserError, match=r"--to=.*target: cannot be written \(.*No space left"):
    convert(f"hf:{original[0]}", tmp_path / "target", to=to)
  assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(original, tmp_path):
  (tmp_path / "file").write_text("mine")
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / "file").write_text("mine")
  for name in ("file", "folder"):
    with pytest.raises(UserError, match=f"--to=.*{name} is there already and not empty"):
      convert(f"hf:{original[0]}", tmp_path / name, to="hf")
  assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "file").read_text() == "mine"
  with pytest.raises(UserError, match="cannot be written"):
    convert(f"hf:{original[0]}", tmp_path / "file" / "below", to="hf")


def test_a_model_of_no_family_is_refused_before_it_is_loaded(run, tmp_path, monkeypatch):
  other = tmp_path / "run"
  shutil.copytree(run, other)
  config = json.loads((other / "config.json").read_text())
  config["model"]["residual"]["values"] = True
  (other / "config.json").write_text(json.dumps(config))
  monkeypatch.setattr(convert_lib, "load_model", None)
  with pytest.raises(UserError, match=r"'llama', lacks model\.residual\.values=True, not False"):
    convert(str(other), tmp_path / "target", to="hf")


@pytest.mark.parametrize("spec", ["bytes", "bpe:270"])
def test_texts_begin_there_as_here(spec, run, tmp_path):
  shutil.copytree(run, tmp_path / "run")
  shutil.rmtree(tmp_path / "run/tokenizer")
  own = tokenizer_lib.load(spec) if spec == "bytes" else tokenizer_lib.train(spec, [TEXT] * 9)
  own.save(tmp_path / "run/tokenizer")
  convert(str(tmp_path / "run"), tmp_path / "hf", to="hf")
  theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
  assert theirs.encode(TEXT).ids == own.encode_prompt(TEXT)
  assert tokenizer_lib.load(str(tmp_path / "hf")).encode_prompt(TEXT) == own.encode_prompt(TEXT)


def test_a_tokenizer_without_a_form_there_is_refused(run, tmp_path):
  other, path = tmp_path / "run", tmp_path / "r50k_base.tiktoken"
  shutil.copytree(run, other)
  path.write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
  tokenizer_lib.load(str(path)).save(other / "tokenizer")
  with pytest.raises(UserError, match="is in no format of Hugging Face's; use --format=gptjax"):
    convert(str(other), tmp_path / "target", to="hf")
  assert not (tmp_path / "target").exists()


def test_checkpoints_are_named_by_what_they_are(run, original):
  assert name_source(str(run)) == str(run)
  assert name_source(str(original[0])) == f"hf:{original[0]}"
  assert name_source("org/name") == "hf:org/name"
  assert name_source("models/model.gguf") == "gguf:models/model.gguf"
  for named in ("hf:org/name", "gguf:model.gguf"):
    assert name_source(named) == named


class Flags(types.SimpleNamespace):
  """The flags of a command line, as absl parses them."""

  def __getitem__(self, name):
    return types.SimpleNamespace(value=vars(self)[name])


@pytest.fixture
def command(monkeypatch):
  """Returns a function that runs the program with flags."""

  def call(source, target, **changes):
    values = {"from": str(source), "to": str(target), "format": "gptjax", "family": None}
    values |= {"dtype": "float32", "verify": False, "adapter": None} | changes
    monkeypatch.setattr(convert_command, "FLAGS", Flags(**values))
    return main({})

  return call


def test_the_command_shows_progress_on_stderr_and_one_line_of_result(
  command, original, tmp_path, capsys
):
  assert command(original[0], tmp_path / "run") == 0
  printed = capsys.readouterr()
  count = sum(array.size for array in original[1].values())
  assert printed.out == f"{tmp_path / 'run'}: {count:,} parameters, {VOCAB_SIZE} tokens\n"
  assert "parameters: 100%" in printed.err


@pytest.mark.parametrize(("difference", "status"), [(0.009, 0), (0.011, 1), (float("nan"), 1)])
def test_the_command_fails_if_the_models_differ(
  command, original, tmp_path, monkeypatch, capsys, difference, status
):
  found = {"text": Agreement(difference, 10.0, 1e-9, 1.0)}
  references = []

  def verify(model, reference, encode):
    references.append(reference.folder)
    return found

  monkeypatch.setattr(convert_command, "verify", verify)
  assert command(original[0], tmp_path / "run", verify=True) == status
  assert ("NOT the same model" in capsys.readouterr().out) == bool(status)
  # What was rounded is held against what was written, as strictly.
  rounded = {"format": "hf", "dtype": "bfloat16"}
  assert command(original[0], tmp_path / "hf", verify=True, **rounded) == status
  assert references == [original[0], tmp_path / "hf"]


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"family": "llama"}])
def test_flags_of_the_other_format_are_refused(command, original, tmp_path, changes):
  with pytest.raises(UserError, match=f"--{next(iter(changes))} is of --format=hf"):
    command(original[0], tmp_path / "run", **changes)


@pytest.fixture(scope="module")
def make_adapter_run(original, tmp_path_factory):
  """Returns a function that makes the work directory of a run that trained adapters."""

  def make(method, targets=(), labels=()):
    opened = HuggingFaceModel(str(original[0]))
    config = opened.config.replace({"label_head.num_labels": len(labels), "label_head.bias": False})
    peft = PeftConfig(method, targets, rank=2, target_rank=1, virtual_tokens=3)
    own = describe_parameters(config)
    base = {name: value for name, value in original[1].items() if name in own}
    base = traverse_util.unflatten_dict(base, sep="/")
    initial = initial_adapters(config, peft, base, 0)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype("float32"), initial)
    workdir = tmp_path_factory.mktemp(method)
    values = {
      "model": dataclasses.asdict(config),
      "init_from": f"hf:{original[0]}",
      "peft": vars(peft),
    }
    values |= {"task": {"name": "classification", "labels": labels}} if labels else {}
    (workdir / "config.json").write_text(json.dumps(values))
    tokenizer_lib.load(str(original[0])).save(workdir / "tokenizer")
    with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
      found = jnp.uint32(checksum(jax.tree.map(jnp.asarray, base)))
      checkpoints.save(3, {"params": adapters, "base_checksum": found})
    return workdir

  return make


@pytest.mark.slow
def test_adapters_of_a_run_go_out_and_come_back_merged(
  command, make_adapter_run, original, tmp_path, capsys
):
  run = make_adapter_run("lora", (("query|mlp/down", {"alpha": 8.0}),))
  assert command(run, tmp_path / "peft", format="peft") == 0
  # Of 2 layers, 16 to 16 and 32 to 16, of rank 2.
  assert capsys.readouterr().out == f"{tmp_path / 'peft'}: 320 parameters of adapters\n"
  fields = json.loads((tmp_path / "peft/adapter_config.json").read_text())
  assert fields["base_model_name_or_path"] == str(original[0])
  expected = named_params(load_model(run)[0])
  assert command(original[0], tmp_path / "run", adapter=str(tmp_path / "peft")) == 0
  merged = named_params(load_model(tmp_path / "run")[0])
  for name, value in expected.items():
    np.testing.assert_allclose(merged[name], value, atol=1e-6, err_msg=name)
  changed = expected["blocks/mlp/down/kernel"] - original[1]["blocks/mlp/down/kernel"]
  assert np.abs(changed).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "adalora", "ptuning"])
def test_the_peft_library_puts_the_adapters_of_a_run_on_their_base(
  method, command, make_adapter_run, tmp_path
):
  import peft
  import torch
  import transformers

  run = make_adapter_run(method, () if method == "ptuning" else ("query|mlp/down",))
  assert command(run, tmp_path / "peft", format="peft") == 0
  fields = json.loads((tmp_path / "peft/adapter_config.json").read_text())
  base = transformers.AutoModelForCausalLM.from_pretrained(fields["base_model_name_or_path"])
  theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
  tokens = np.arange(12).reshape(2, 6)
  with torch.no_grad():
    expected = theirs(input_ids=torch.tensor(tokens)).logits[:, -6:].numpy()
  actual = load_model(run)[0](jnp.asarray(tokens))
  np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_a_head_of_labels_goes_along_with_its_adapters(command, make_adapter_run, tmp_path):
  run = make_adapter_run("lora", ("query",), labels=("bad", "fair", "good"))
  assert command(run, tmp_path / "peft", format="peft") == 0
  fields = json.loads((tmp_path / "peft/adapter_config.json").read_text())
  assert (fields["task_type"], fields["modules_to_save"]) == ("SEQ_CLS", ["score"])
  tensors = safetensors.numpy.load_file(tmp_path / "peft/adapter_model.safetensors")
  trained = named_params(load_model(run)[0])["label_head/kernel"]
  np.testing.assert_allclose(tensors["base_model.model.score.weight"], trained.T)


def test_adapters_that_have_no_form_there_leave_nothing_behind(
  command, make_adapter_run, original, tmp_path
):
  houlsby = make_adapter_run("houlsby", ("mlp/down",))
  with pytest.raises(UserError, match="method='houlsby' is not one of the `peft` library"):
    command(houlsby, tmp_path / "peft", format="peft")
  assert not list(tmp_path.iterdir())
  assert command(make_adapter_run("prefix"), tmp_path / "peft", format="peft") == 0
  with pytest.raises(UserError, match="PrefixAttention is not to be merged"):
    command(original[0], tmp_path / "run", adapter=str(tmp_path / "peft"))
  assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_adapters_of_what_has_none_are_refused(command, run, original, tmp_path):
  for source in (run, original[0]):
    with pytest.raises(UserError, match=r"--format=peft: .* is no run that trained adapters"):
      command(source, tmp_path / "peft", format="peft")
  with pytest.raises(UserError, match=r"no adapter_config\.json"):
    command(original[0], tmp_path / "run", adapter=str(tmp_path))
  with pytest.raises(UserError, match="--adapter is merged into a model"):
    command(run, tmp_path / "peft", format="peft", adapter=str(tmp_path))
  with pytest.raises(UserError, match="neither side is one that transformers could load"):
    command(original[0], tmp_path / "run", adapter=str(tmp_path), verify=True)
  assert not list(tmp_path.iterdir())


def test_a_run_alone_cannot_be_verified(command, run, tmp_path):
  with pytest.raises(UserError, match="neither side is one that transformers could load"):
    command(run, tmp_path / "copy", verify=True)
  assert not list(tmp_path.iterdir())
