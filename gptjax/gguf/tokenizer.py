"""Turns the tokenizer inside a GGUF file into the files of another format; weights are not read.

Keys are those of the GGUF specification, 'tokenizer.ggml.*'; patterns and defaults, which the
specification leaves open, follow llama.cpp's src/llama-vocab.cpp.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gptjax.data import tokenizer_settings
from gptjax.data.tokenizer_formats import (
  END_OF_TEXT,
  GPT2_PATTERN,
  GPT4_PATTERN,
  GPT4O_PATTERN,
)
from gptjax.errors import UserError, did_you_mean
from gptjax.gguf.files import open_gguf

PREFIX, CHAT_TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Stands for no merges at all, since arrays are not empty: two special tokens never meet in a word.
NO_MERGES = f"{END_OF_TEXT} {END_OF_TEXT}"
_QWEN2_PATTERN = GPT4_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_DIGIT_THEN_GPT2 = (r"\p{N}", GPT2_PATTERN)
# Patterns that cut a text into words, applied in turn, by 'tokenizer.ggml.pre'.
PATTERNS: Mapping[str, Sequence[str]] = {
  "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]"),
  **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "dbrx-gpt2"), (GPT2_PATTERN,)),
  **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGIT_THEN_GPT2),
  **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), (GPT4_PATTERN,)),
  **dict.fromkeys(("dbrx", "smaug-bpe"), (GPT4_PATTERN,)),
  **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2_PATTERN,)),
  "gpt-4o": (GPT4O_PATTERN,),
}
# These begin every text with 'bos' unless the file says otherwise, and keep a word that is a token
# whole even if no merges lead to it.
LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3")
# These models were trained on texts in Unicode's normal form C, into which llama.cpp does not bring
# them.
NFC = ("qwen2",)


def read(path: Path) -> tuple[str, dict[str, bytes]]:
  """Returns the reader for a GGUF file's tokenizer, and the contents of the files it needs.

  Raises:
    UserError: it is not a GGUF file, or its kind of tokenizer is not supported.
  """
  values = _values(path)
  kind = values.get("model")
  if kind == "gpt2":
    return "tokenizer.json", _byte_level(values, path) | _settings(values)
  if kind == "llama":
    return "sentencepiece", _sentencepiece(values) | _settings(values)
  raise UserError(f"{path}: its tokenizer.ggml.model is {kind!r}; 'gpt2' and 'llama' are read.")


def _values(path: Path) -> dict[str, Any]:
  """Returns the tokenizer's values in the file, by their names without the prefix."""
  fields = open_gguf(path).fields
  values = {
    name.removeprefix(PREFIX): field.contents()
    for name, field in fields.items()
    if name.startswith(PREFIX)
  }
  if template := fields.get(CHAT_TEMPLATE):
    values["chat_template"] = template.contents()
  return values


def _settings(values: Mapping[str, Any]) -> dict[str, bytes]:
  tokens = values["tokens"]
  ids = {
    role: values.get(f"{name}_token_id")
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
  }
  ends = [values.get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
  begins = values["model"] == "llama" or values.get("pre") in LLAMA3
  return tokenizer_settings.write(
    {f"{role}_token": tokens[token] for role, token in ids.items() if token is not None},
    [token for token in ends if token is not None],
    bool(values.get("add_bos_token", begins)),
    values.get("chat_template"),
  )


def _byte_level(values: Mapping[str, Any], path: Path) -> dict[str, bytes]:
  """Writes a byte-level BPE as a tokenizer.json."""
  pre = values.get("pre", "default")
  if pre not in PATTERNS:
    raise UserError(f"{path}: no known tokenizer.ggml.pre {pre!r}. {did_you_mean(pre, PATTERNS)}")
  tokens, types = values["tokens"], values["token_type"]
  merges = [merge for merge in values["merges"] if merge != NO_MERGES]
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab={text: number for number, text in enumerate(tokens)},
      merges=[tuple(merge.split(" ")) for merge in merges],
      ignore_merges=pre in LLAMA3,
    )
  )
  if pre in NFC:
    tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      *(
        pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
        for pattern in PATTERNS[pre]
      ),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  special = [text for text, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNUSED)]
  plain = [text for text, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
  tokenizer.add_special_tokens(special)
  tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in plain])
  return {"tokenizer.json": tokenizer.to_str().encode()}


def _sentencepiece(values: Mapping[str, Any]) -> dict[str, bytes]:
  """Writes a BPE with scores as a SentencePiece model, whose token types GGUF shares."""
  from sentencepiece import sentencepiece_model_pb2

  model = sentencepiece_model_pb2.ModelProto()
  columns = (values[name] for name in ("tokens", "scores", "token_type"))
  for text, score, kind in zip(*columns, strict=True):
    model.pieces.add(piece=text, score=score, type=kind)
  model.trainer_spec.model_type = model.trainer_spec.BPE
  model.trainer_spec.vocab_size = len(model.pieces)
  model.trainer_spec.byte_fallback = BYTE in values["token_type"]
  model.trainer_spec.unk_id = values.get("unknown_token_id", 0)
  model.normalizer_spec.name = "identity"
  model.normalizer_spec.add_dummy_prefix = bool(values.get("add_space_prefix", True))
  model.normalizer_spec.remove_extra_whitespaces = False
  return {"tokenizer.model": model.SerializeToString()}
