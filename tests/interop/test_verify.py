"""Two models are compared, and what we write is the same model in `transformers`."""

import dataclasses
import sys

import numpy as np
import pytest

from gptjax.convert import check
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.errors import UserError
from gptjax.interop.convert import convert
from gptjax.interop.huggingface import HuggingFaceModel
from gptjax.interop.labels import Labels
from gptjax.interop.verify import compare, verify
from gptjax.model.config import ModelConfig
from gptjax.presets.parts.models import MODELS
from gptjax.training.pretrained import load_model
from tests.interop.conftest import LLAMA, VOCAB_SIZE, save_folder

SMALL = {"vocab_size": VOCAB_SIZE, "num_layers": 2, "position.max_positions": 16}
PRESETS = {"debug": "gpt2", "llama2-7b": "llama", "tiny": "qwen3"}


def test_figures_of_agreement_are_those_of_their_definitions():
  reference = np.log([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).astype(np.float32)
  ours = np.log([[0.25, 0.5, 0.25], [0.25, 0.5, 0.25]]).astype(np.float32)
  found = compare(ours, reference)
  assert found.largest_difference == pytest.approx(np.log(2))
  assert found.scale == pytest.approx(np.log(4))
  assert found.kl == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2)
  assert found.top1 == 0.5
  assert compare(reference, reference) == dataclasses.replace(
    found, largest_difference=0, kl=0, top1=1
  )


@pytest.mark.parametrize(
  "preset",
  [pytest.param(name, marks=[pytest.mark.slow] * (name == "llama2-7b")) for name in PRESETS],
)
def test_a_run_of_a_preset_is_the_same_model_in_transformers(
  preset, random_params, reference, tmp_path, capsys
):
  shape = {"embed_dim": 32, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 48}
  config = ModelConfig.from_config(MODELS[preset] | SMALL | ({} if preset == "debug" else shape))
  folder = save_folder(tmp_path / "model", config, random_params(config))
  convert(f"hf:{folder}", tmp_path / "run", to="gptjax")
  convert(str(tmp_path / "run"), tmp_path / "exported", to="hf")
  exported = f"hf:{tmp_path / 'exported'}"
  assert HuggingFaceModel(exported.removeprefix("hf:")).family.model_type == PRESETS[preset]
  model, tokenizer = load_model(str(tmp_path / "run"))
  assert check(model, tokenizer, exported) == 0
  assert "the same model" in capsys.readouterr().out
  if preset == "debug":
    embedding = model.embed.embedding
    embedding[...] = embedding[...].at[65, 3].add(1.0)
    assert check(model, tokenizer, exported) == 1
    printed = capsys.readouterr().out
    assert "NOT the same model" in printed
    assert all(figure in printed for figure in ("max difference", "KL", "top-1 agreement"))
    _, transformers = reference
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    text = "the fox, 1234 again\n  çé 人工"
    assert theirs.encode(text) == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.end_of_text


OTHERS = {
  "encoder": {
    "visibility": "bidirectional",
    "norm.placement": "post",
    "embed.norm": True,
    "embed.token_types": 2,
    "head.pooler": True,
  },
  "roberta": {
    "visibility": "bidirectional",
    "norm.placement": "post",
    "embed.norm": True,
    "embed.token_types": 1,
    # Room for the 64 random tokens, of which one would be padding, without a position.
    "position.max_positions": 66,
    "position.offset": 2,
    "mlp.activation": "gelu",
    "head.transform": True,
    "head.bias": True,
  },
  "encoder-decoder": {
    "norm.kind": "rmsnorm",
    "bias": False,
    "mlp.activation": "relu",
    "position.kind": "t5",
    "encoder_layers": 1,
    "attention.scale": 1.0,
    "head.scale": 0.25,
  },
  "classifier": {"label_head.num_labels": 3},
  "answerer": {
    "label_head.num_labels": 2,
    "visibility": "bidirectional",
    "norm.placement": "post",
    "embed.norm": True,
    "embed.token_types": 2,
  },
}
LABELS = {
  "classifier": Labels("classification", ("a", "b", "c")),
  "answerer": Labels("span", ("LABEL_0", "LABEL_1")),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_without_causal_logits_are_held_against_theirs_too(
  kind, tiny_config, random_params, reference, tmp_path
):
  config = tiny_config(vocab_size=VOCAB_SIZE, **OTHERS[kind])
  params = random_params(config)
  folder = save_folder(tmp_path / "model", config, params, labels=LABELS.get(kind))
  model, tokenizer = load_model(f"hf:{folder}")
  for found in verify(model, HuggingFaceModel(str(folder)), tokenizer.encode).values():
    assert found.largest_difference < 1e-4 * found.scale
    assert found.top1 == 1


def test_the_tokenizer_of_bytes_is_the_same_in_transformers(
  tiny_config, random_params, reference, tmp_path
):
  config = tiny_config(vocab_size=VOCAB_SIZE)
  folder = save_folder(tmp_path / "model", config, random_params(config))
  convert(f"hf:{folder}", tmp_path / "run", to="gptjax")
  own = tokenizer_lib.load("bytes+mask")
  own.save(tmp_path / "run" / "tokenizer")
  convert(str(tmp_path / "run"), tmp_path / "exported", to="hf")
  text = "".join(map(chr, range(300))) + "人工 <|mask|>"
  _, transformers = reference
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
  ours = tokenizer_lib.load(str(tmp_path / "exported"))
  assert ours.encode(text) == own.encode(text)
  assert theirs.encode(text, add_special_tokens=False) == own.encode_with_specials(text)
  assert theirs.encode(text) == [*own.start, *own.encode_with_specials(text)]
  assert ours.specials == own.specials


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_what_is_needed_is_asked_for(package, tiny_config, random_params, monkeypatch, tmp_path):
  config = tiny_config(**LLAMA)
  folder = save_folder(tmp_path / "model", config, random_params(config))
  model, tokenizer = load_model(f"hf:{folder}")
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(UserError, match="pip install torch transformers"):
    verify(model, HuggingFaceModel(str(folder)), tokenizer.encode)
