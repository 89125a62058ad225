"""The models that are measured, as files of the same weights for every engine.

    python -m experiments.decoding.models gpt2-124m

Prints a folder of the cache: hf/ (float32, for gptjax and `transformers`), and float32.gguf,
bfloat16.gguf and int8.gguf (llama.cpp's Q8_0), rounded from the same float32. Vectors stay float32
in all of them.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from experiments import datasets
from gptjax.devices.hosts import cache_root
from gptjax.errors import UserError, check_choice
from gptjax.interop.convert import convert

FORMATS = ("float32", "bfloat16", "int8")
END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Shape:
  """A GPT-2 with random weights."""

  layers: int
  width: int
  heads: int
  vocab: int
  positions: int


SHAPES = {
  "gpt2-124m": Shape(12, 768, 12, 50_257, 1024),
  "tiny": Shape(2, 64, 2, 512, 1024),
}
MODELS = (*SHAPES, "smollm2-135m")


def prepare(name: str) -> Path:
  """Returns the folder of a model's files, written if it is not there yet.

  Raises:
    UserError: there is no such model, or a package that is needed is missing.
  """
  check_choice("models", name, MODELS)
  version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
  folder = cache_root() / "decoding" / f"{name}-{version}"

  def write(made: Path) -> None:
    if name in SHAPES:
      _write_gpt2(SHAPES[name], made)
    else:
      _write_smollm2(made)

  return datasets.make_once(folder, write)


def bytes_of_step(folder: Path, format: str) -> int:
  """Bytes of weights that a step has to read: the matrices of the layers, and the table of tokens
  once, as the head."""
  with safetensors.safe_open(folder / "hf" / "model.safetensors", "numpy") as file:
    shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
  values = sum(
    shape[0] * shape[1]
    for name, shape in shapes.items()
    if len(shape) == 2 and not name.endswith("wpe.weight")
  )
  return values * {"float32": 4, "bfloat16": 2, "int8": 1}[format]


# --- GPT-2 with random weights -----------------------------------------------------------------


def _write_gpt2(shape: Shape, folder: Path) -> None:
  tensors = _random_gpt2(shape)
  hf = folder / "hf"
  hf.mkdir()
  safetensors.numpy.save_file(tensors, hf / "model.safetensors", {"format": "pt"})
  end = shape.vocab - 1
  config = {
    **{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
    **{"n_layer": shape.layers, "n_embd": shape.width, "n_head": shape.heads},
    **{"vocab_size": shape.vocab, "n_positions": shape.positions, "n_ctx": shape.positions},
    **{"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "dtype": "float32"},
    **{"bos_token_id": end, "eos_token_id": end, "tie_word_embeddings": True},
  }
  (hf / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  (hf / "tokenizer.json").write_text(_tokenizer(shape.vocab))
  settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END_OF_TEXT}
  (hf / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")
  renamed = {_gguf_name(name): _as_in_gguf(name, x) for name, x in tensors.items()}
  for format in FORMATS:
    _write_gguf(folder / f"{format}.gguf", "gpt2", format, renamed, shape=shape)


def _random_gpt2(shape: Shape) -> dict[str, np.ndarray]:
  """Weights in the names of `transformers`, drawn as GPT-2's were, from a fixed seed."""
  rng = np.random.default_rng(0)
  D = shape.width

  def normal(*size: int) -> np.ndarray:
    return rng.standard_normal(size, np.float32) * np.float32(0.02)

  tensors = {
    "transformer.wte.weight": normal(shape.vocab, D),
    "transformer.wpe.weight": normal(shape.positions, D),
  }
  for i in range(shape.layers):
    block = f"transformer.h.{i}"
    sizes = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D)}
    sizes |= {"mlp.c_fc": (D, 4 * D), "mlp.c_proj": (4 * D, D)}
    for name, size in sizes.items():
      tensors[f"{block}.{name}.weight"] = normal(*size)
      tensors[f"{block}.{name}.bias"] = normal(size[1])
    for name in ("ln_1", "ln_2"):
      tensors |= _norm(f"{block}.{name}", D)
  return tensors | _norm("transformer.ln_f", D)


def _norm(name: str, width: int) -> dict[str, np.ndarray]:
  return {f"{name}.weight": np.ones(width, np.float32), f"{name}.bias": np.zeros(width, np.float32)}


_GGUF_NAMES = {
  **{"transformer.wte": "token_embd", "transformer.wpe": "position_embd"},
  **{"transformer.ln_f": "output_norm", "transformer.h": "blk"},
  **{"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv"},
  **{"attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
}


def _gguf_name(name: str) -> str:
  for theirs, own in _GGUF_NAMES.items():
    name = name.replace(theirs, own)
  return name


def _as_in_gguf(name: str, x: np.ndarray) -> np.ndarray:
  """llama.cpp keeps a row for each output, GPT-2's projections a row for each input."""
  return np.ascontiguousarray(x.T) if ".c_" in name and x.ndim == 2 else x


def _tokenizer(vocab: int) -> str:
  """A byte-level tokenizer.json of so many tokens: the bytes, made-up words, the end of a text."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  words = [f"Ġ{i:x}" for i in range(vocab - len(letters) - 1)]
  tokens = {token: i for i, token in enumerate([*letters, *words, END_OF_TEXT])}
  tokenizer = Tokenizer(models.BPE(tokens, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens([END_OF_TEXT])
  return tokenizer.to_str()


# --- SmolLM2 -----------------------------------------------------------------------------------


def _write_smollm2(folder: Path) -> None:
  (source,) = datasets.fetch("smollm2").glob("*.gguf")
  convert(f"gguf:{source}", folder / "hf", to="hf")
  import gguf
  from gguf.quants import dequantize

  reader = gguf.GGUFReader(source)
  tensors = {
    tensor.name: dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist())
    for tensor in reader.tensors
  }
  for format in FORMATS:
    _write_gguf(folder / f"{format}.gguf", "llama", format, tensors, fields=reader.fields)


# --- GGUF --------------------------------------------------------------------------------------


def _write_gguf(
  path: Path,
  architecture: str,
  format: str,
  tensors: Mapping[str, np.ndarray],
  *,
  shape: Shape | None = None,
  fields: Mapping | None = None,
) -> None:
  """Writes matrices in a format and vectors in float32, with the fields of another file or those of
  a GPT-2 without a tokenizer."""
  import gguf
  from gguf.quants import quantize

  kind = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}[format]
  kind = gguf.GGMLQuantizationType[kind]
  writer = gguf.GGUFWriter(path, architecture)
  for name, field in (fields or {}).items():
    if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
      element = field.types[-1] if len(field.types) > 1 else None
      writer.add_key_value(name, field.contents(), field.types[0], element)
  writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"] if format != "float32" else 0)
  if shape:
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(4 * shape.width)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
  for name, x in tensors.items():
    x = x.astype(np.float32)
    if x.ndim < 2:
      writer.add_tensor(name, x)
    else:
      writer.add_tensor(name, quantize(x, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


if __name__ == "__main__":
  try:
    if len(sys.argv) != 2:
      raise UserError(f"name one model: {', '.join(MODELS)}.")
    print(prepare(sys.argv[1]))
  except UserError as error:
    sys.exit(f"error: {error}")
