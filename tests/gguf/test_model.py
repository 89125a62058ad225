"""GGUF files, written as llama.cpp's converter does, against the same weights in safetensors."""

import json
import os
import struct
import sys

import gguf
import numpy as np
import pytest
import safetensors.numpy
from gguf import GGMLQuantizationType as Type

from gptjax import tree
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from gptjax.gguf.model import GGUFModel
from gptjax.interop.huggingface import HuggingFaceModel
from tests.interop.conftest import LLAMA, VOCAB_SIZE, save_folder

D, L, N, K, F = 256, 2, 4, 2, 256
SHAPE = {"embed_dim": D, "num_layers": L, "num_heads": N, "num_kv_heads": K, "mlp_dim": F}
ARCHITECTURES = {
  "llama": {},
  "qwen2": {"attention.qkv_bias": True},
  "qwen3": {"attention.qk_norm": True},
}
TYPES = (Type.Q4_K, Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1)
NAMES = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
  "model.layers": "blk",
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "self_attn.q_norm": "attn_q_norm",
  "self_attn.k_norm": "attn_k_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}
FIELDS = {
  "block_count": L,
  "context_length": 16,
  "embedding_length": D,
  "feed_forward_length": F,
  "attention.head_count": N,
  "attention.head_count_kv": K,
  "attention.layer_norm_rms_epsilon": 1e-5,
  "rope.freq_base": 10_000.0,
  "rope.dimension_count": D // N,
}


def rename(name):
  for theirs, short in NAMES.items():
    name = name.replace(theirs, short)
  return name


def permute(tensor, heads):
  """The order of rows in which llama.cpp keeps queries and keys of Llama."""
  return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def quantise(tensor, kind):
  """(bytes or floats as they are in the file, the floats that they stand for)."""
  if kind is Type.Q4_K:  # gguf reads it, but does not make it: 2 scales, 12 bytes, 128 bytes.
    rng = np.random.default_rng(tensor.size)
    blocks = rng.integers(0, 256, (tensor.size // 256, 144), np.uint8)
    scales = rng.uniform(1e-4, 1e-3, (len(blocks), 2)).astype(np.float16)
    blocks[:, :4] = scales.view(np.uint8)
    stored = blocks.reshape(tensor.shape[0], -1)
  else:
    stored = gguf.quants.quantize(tensor, kind)
  return stored, gguf.quants.dequantize(stored, kind)


def write(path, tensors, architecture="llama", tokenizer=None, **changes):
  """Writes {name: (stored, kind)}, and the fields with some changed or, by None, left out."""
  writer = gguf.GGUFWriter(path, architecture)
  add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
  fields = {f"{architecture}.{name}": value for name, value in (FIELDS | changes).items()}
  fields |= {f"tokenizer.ggml.{name}": value for name, value in (tokenizer or {}).items()}
  for name, value in fields.items():
    if value is not None:
      add.get(type(value), writer.add_array)(name, value)
  for name, (stored, kind) in tensors.items():
    writer.add_tensor(name, stored, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return str(path)


def make_pair(folder, config, params, architecture="llama", kinds=TYPES):
  """Writes a model's folder and returns its tensors, of other types, for `write`; the folder then
  has the values that these stand for."""
  save_folder(folder, config, params)
  named = safetensors.numpy.load_file(folder / "model.safetensors")
  tensors, expected = {}, {}
  for number, (name, tensor) in enumerate(sorted(named.items())):
    kind = kinds[number % len(kinds)] if tensor.ndim > 1 else Type.F32
    stored, expected[name] = quantise(tensor, kind)
    heads = {"q_proj": N, "k_proj": K}.get(name.split(".")[-2])
    if architecture == "llama" and heads:
      stored = permute(stored, heads)
    tensors[rename(name)] = (stored, kind)
  safetensors.numpy.save_file(expected, folder / "model.safetensors")
  return tensors


@pytest.fixture(scope="module")
def make(tiny_config, random_params, tmp_path_factory):
  """Returns a function that makes (tensors for `write`, folder of the same weights)."""

  def make(architecture, **changes):
    config = tiny_config(**LLAMA | SHAPE | ARCHITECTURES[architecture] | changes)
    folder = tmp_path_factory.mktemp(architecture) / "model"
    return make_pair(folder, config, random_params(config), architecture), folder

  return make


@pytest.fixture(scope="module")
def llama(make):
  return make("llama")


def check_equal(load_params, path, folder):
  ours, theirs = GGUFModel(path), HuggingFaceModel(str(folder))
  assert ours.config.differences(theirs.config) == []
  expected = tree.named_leaves(load_params(theirs))
  loaded = tree.named_leaves(load_params(ours))
  assert loaded.keys() == expected.keys()
  for name in expected:
    np.testing.assert_array_equal(loaded[name], expected[name], err_msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_weight_of_every_type_is_that_of_the_safetensors(
  make, load_params, tmp_path, architecture
):
  tensors, folder = make(architecture)
  assert {kind for _, kind in tensors.values()} == set(TYPES)
  check_equal(load_params, write(tmp_path / "model.gguf", tensors, architecture), folder)


def test_a_file_without_an_output_ties_it(llama, tmp_path):
  tensors = {name: tensor for name, tensor in llama[0].items() if name != "output.weight"}
  assert GGUFModel(write(tmp_path / "model.gguf", tensors)).config.head.tied


def llama3_factors(width, base, factor, original):
  """The divisors of frequencies in llama.cpp's converter, by Llama 3.1's published code."""
  factors = []
  for frequency in base ** (-np.arange(0, width, 2) / width):
    turns = original * frequency / (2 * np.pi)
    smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
    factors.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(factors, np.float32)


def test_the_rotary_positions_of_llama_3_are_told_by_their_factors(make, load_params, tmp_path):
  scaling = {"rope.scaling": "llama3", "rope.factor": 8.0, "rope.original_positions": 8192}
  tensors, folder = make("llama", **scaling, **{"rope.base": 500_000.0})
  factors = llama3_factors(D // N, 500_000.0, 8, 8192)
  assert 0 < ((factors > 1) & (factors < 8)).sum() < (factors == 8).sum() + (factors == 1).sum()
  path = tmp_path / "model.gguf"
  tensors |= {"rope_freqs.weight": (factors, Type.F32)}
  check_equal(load_params, write(path, tensors, **{"rope.freq_base": 500_000.0}), folder)
  for wrong in (factors**2, factors[:-1]):
    tensors |= {"rope_freqs.weight": (wrong, Type.F32)}
    with pytest.raises(UserError, match=r"'rope_freqs\.weight' is not the scaling of Llama 3\.1"):
      GGUFModel(write(path, tensors, **{"rope.freq_base": 500_000.0}))


def test_scaled_positions_are_read(llama, tmp_path):
  fields = {"type": "yarn", "factor": 4.0, "original_context_length": 8}
  changes = {f"rope.scaling.{name}": value for name, value in fields.items()}
  config = GGUFModel(write(tmp_path / "model.gguf", llama[0], **changes)).config
  assert config.rope.scaling == "yarn"
  assert (config.rope.factor, config.rope.original_positions) == (4.0, 8)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sandwich": 3}, "field 'sandwich' = 3 is not known"),
    ({"expert_count": 8}, "field 'expert_count' = 8 is not known"),
    ({"block_count": None}, "no field 'block_count'"),
    ({"block_count": 3}, "no tensor 'blk.2."),
    ({"attention.head_count": [4, 4]}, "field 'attention.head_count' is [4, 4], not a value of"),
    ({"attention.head_count": 3}, "model.embed_dim=256 is not divisible by"),
    ({"rope.scaling.type": "longrope"}, "field 'rope.scaling.type' is 'longrope'; only 'none'"),
    ({"feed_forward_length": 128}, "the config makes it"),
  ],
)
def test_a_field_that_is_wrong_is_named(llama, tmp_path, changes, message):
  with pytest.raises(UserError) as error:
    GGUFModel(write(tmp_path / "model.gguf", llama[0], **changes))
  assert message in str(error.value)
  assert "model.gguf" in str(error.value)


def test_an_unknown_architecture_is_named(llama, tmp_path):
  with pytest.raises(UserError, match=r"no architecture 'rwkv' is read from GGUF\. Choose one of"):
    GGUFModel(write(tmp_path / "model.gguf", llama[0], "rwkv"))


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.ffn_up.weight"])
def test_a_missing_tensor_is_named(llama, tmp_path, name):
  tensors = {other: tensor for other, tensor in llama[0].items() if other != name}
  with pytest.raises(UserError, match=f"no tensor '{name}'"):
    GGUFModel(write(tmp_path / "model.gguf", tensors))


def test_a_tensor_without_a_place_is_named(llama, tmp_path):
  tensors = llama[0] | {"blk.0.attn_q.bias": (np.ones(D, np.float32), Type.F32)}
  with pytest.raises(UserError, match=r"'blk\.0\.attn_q\.bias' has no place"):
    GGUFModel(write(tmp_path / "model.gguf", tensors))


def test_integers_are_refused_when_they_are_read(llama, load_params, tmp_path):
  tensors = llama[0] | {"output_norm.weight": (np.ones(D, np.int32), Type.I32)}
  with pytest.raises(UserError, match=r"tensor 'output_norm\.weight' is I32"):
    load_params(GGUFModel(write(tmp_path / "model.gguf", tensors)))


def test_a_file_that_was_cut_short_anywhere_is_refused(llama, tmp_path):
  path = write(tmp_path / "model.gguf", llama[0])
  size = os.path.getsize(path)
  for cut in (size - 1, size // 2, *range(3000, 0, -271), 3, 0):
    os.truncate(path, cut)
    with pytest.raises(UserError, match=r"model\.gguf: not a GGUF file, or cut short"):
      GGUFModel(path)


def string(text):
  return struct.pack("<Q", len(text)) + text


HEADERS = {
  "2**60 fields": struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**60),
  "2**60 tensors": struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 0),
  "an array of 2**60 numbers": struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
  + string(b"a")
  + struct.pack("<IIQ", 9, 4, 2**60),
  "an array of 2**60 texts": struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
  + string(b"a")
  + struct.pack("<IIQ", 9, 8, 2**60),
  "arrays of arrays": struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
  + string(b"a")
  + struct.pack("<I", 9)
  + struct.pack("<IQ", 9, 1) * 2000,
  "a text of 2**60": struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", 2**60),
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_the_file_cannot_keep_is_refused_at_once(tmp_path, header):
  path = tmp_path / "model.gguf"
  path.write_bytes(header + bytes(100))
  for read in (GGUFModel, tokenizers.load):
    with pytest.raises(UserError, match=r"model\.gguf: not a GGUF file, or cut short \("):
      read(str(path))


def test_more_blocks_than_any_model_has_are_refused(llama, tmp_path):
  with pytest.raises(UserError, match=r"model\.gguf: model\.num_layers is 4294967295"):
    GGUFModel(write(tmp_path / "model.gguf", llama[0], block_count=2**32 - 1))


def test_numbers_that_are_none_are_refused(llama, load_params, tmp_path):
  with pytest.raises(UserError, match=r"model\.gguf: field 'rope\.freq_base' is nan"):
    GGUFModel(write(tmp_path / "model.gguf", llama[0], **{"rope.freq_base": float("nan")}))
  weights = np.ones(D, np.float32)
  weights[7] = np.nan
  tensors = llama[0] | {"output_norm.weight": (weights, Type.F32)}
  with pytest.raises(UserError, match=r"tensor 'output_norm\.weight' has a value that is not fini"):
    load_params(GGUFModel(write(tmp_path / "model.gguf", tensors)))


def test_what_is_no_gguf_file_is_refused(tmp_path):
  (tmp_path / "model.gguf").write_text(json.dumps({"model": "none"}) * 99)
  with pytest.raises(UserError, match="not a GGUF file"):
    GGUFModel(str(tmp_path / "model.gguf"))
  with pytest.raises(UserError, match=r"other\.gguf: no such file"):
    GGUFModel(str(tmp_path / "other.gguf"))


def test_the_package_is_asked_for(llama, tmp_path, monkeypatch):
  path = write(tmp_path / "model.gguf", llama[0])
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(UserError, match=r"model\.gguf needs the package gguf: pip install gguf"):
    GGUFModel(path)


def test_the_vocabulary_is_that_of_the_embedding(llama, tmp_path):
  assert GGUFModel(write(tmp_path / "model.gguf", llama[0])).config.vocab_size == VOCAB_SIZE
