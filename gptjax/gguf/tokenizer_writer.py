"""Turns a tokenizer into the fields of a GGUF file: byte-level BPE, and SentencePiece's BPE."""

import json
import tempfile
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from absl import logging
from tokenizers import models

from gptjax.data.tokenizer import META, Tokenizer
from gptjax.data.tokenizer_formats import GPT2_PATTERN, bytes_as_bpe
from gptjax.data.tokenizer_settings import FILES
from gptjax.errors import UserError
from gptjax.gguf import tokenizer as reader
from gptjax.gguf.tokenizer import CONTROL, NORMAL, PATTERNS, UNKNOWN, UNUSED, USER_DEFINED
from gptjax.small_files import read_json

# Text and type of each id.
_Tokens = dict[int, tuple[str, int]]
# Parts of patterns, as they are written here and in published files.
_SPELLINGS = {
  "'(?i:[sdmt]|ll|ve|re)": "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
  "'(?:[sdmt]|ll|ve|re)": "'s|'t|'re|'ve|'m|'ll|'d",
}
# A score for tokens that no text is cut into.
_LOWEST_SCORE = -1000.0


def make_fields(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
  """The fields that tell llama.cpp a tokenizer. Ids below `vocab_size` without a token are unused
  tokens '[PADn]', as llama.cpp's converter names them.

  Raises:
    UserError: llama.cpp would cut texts into other tokens.
  """
  tokens, values = _read(tokenizer)
  tokens |= {token: (text, CONTROL) for text, token in tokenizer.specials.items()}
  rows = [tokens.get(token, (f"[PAD{token}]", UNUSED)) for token in range(vocab_size)]
  values["tokens"], values["token_type"] = map(list, zip(*rows, strict=True))
  if "scores" in values:
    values["scores"] += [_LOWEST_SCORE] * (vocab_size - len(values["scores"]))
  values |= _special_tokens(tokenizer, rows)
  fields = {f"{reader.PREFIX}{name}": value for name, value in values.items()}
  if tokenizer.chat_template:
    fields[reader.CHAT_TEMPLATE] = tokenizer.chat_template
  return fields


def _special_tokens(tokenizer: Tokenizer, rows: list[tuple[str, int]]) -> dict[str, Any]:
  if len(tokenizer.start) > 1:
    raise UserError(
      f"tokenizer {tokenizer.spec!r}: it begins a text with {len(tokenizer.start)} tokens, "
      "llama.cpp with one."
    )
  ids = {text: token for token, (text, _) in enumerate(rows)}
  kinds = [kind for _, kind in rows]
  unknown = ids.get(tokenizer.roles.get("unk_token"))
  eos = ids.get(tokenizer.roles.get("eos_token"), tokenizer.end_of_text)
  # Files name three tokens at which a text ends; llama.cpp knows the separators by their texts.
  eom, eot, *others = [*sorted(tokenizer.stops - {eos, tokenizer.end_of_text}), None, None]
  if left_out := [token for token in others if token is not None]:
    logging.warning("%s: llama.cpp will not end a text at the tokens %s.", tokenizer.spec, left_out)
  found = {
    # Without one, llama.cpp takes the token 11.
    "bos": (*tokenizer.start, tokenizer.prefix)[0],
    "eos": eos,
    "eot": eot,
    "eom": eom,
    "unknown": kinds.index(UNKNOWN) if UNKNOWN in kinds else unknown,
    "padding": tokenizer.token_ids["pad_token_id"],
  }
  named = {f"{name}_token_id": token for name, token in found.items() if token is not None}
  return {"add_bos_token": bool(tokenizer.start)} | named


def _read(tokenizer: Tokenizer) -> tuple[_Tokens, dict[str, Any]]:
  """Reads a tokenizer's own files: its tokens, and the fields that say how it cuts texts."""
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    tokenizer.save(folder)
    saved = read_json(folder / META)
    paths = [folder / name for name in saved["files"] if name not in FILES]
    match saved["kind"]:
      case "bytes":
        description = json.loads(bytes_as_bpe(tokenizer.specials).to_str())
      case "tokenizer.json":
        description = read_json(paths[0])
      case "gpt2":
        vocab, merges = sorted(paths, key=lambda path: path.suffix != ".json")
        vocab, merges = models.BPE.read_file(str(vocab), str(merges))
        words = {"type": "ByteLevel", "add_prefix_space": False}
        description = {"model": {"vocab": vocab, "merges": merges}, "pre_tokenizer": words}
      case "sentencepiece":
        return _sentencepiece(paths[0].read_bytes(), tokenizer.spec)
      case kind:
        raise UserError(
          f"tokenizer {tokenizer.spec!r}: files for llama.cpp hold byte-level BPE or "
          f"SentencePiece's BPE, not {kind}."
        )
  return _byte_level(description, tokenizer.spec)


def _byte_level(description: Mapping[str, Any], spec: str) -> tuple[_Tokens, dict[str, Any]]:
  pre = _name_words(description, spec)
  added = description.get("added_tokens") or ()
  for token in added:
    if any(token.get(name) for name in ("single_word", "lstrip", "rstrip")):
      raise UserError(
        f"tokenizer {spec!r}: llama.cpp does not take the blanks around {token['content']!r}, or "
        "what is beside it, into account."
      )
  tokens = {token: (text, NORMAL) for text, token in description["model"]["vocab"].items()}
  tokens |= {token["id"]: (token["content"], USER_DEFINED) for token in added}
  merges = [
    merge if isinstance(merge, str) else " ".join(merge) for merge in description["model"]["merges"]
  ]
  return tokens, {"model": "gpt2", "pre": pre, "merges": merges or [reader.NO_MERGES]}


def _name_words(description: Mapping[str, Any], spec: str) -> str:
  """The 'tokenizer.ggml.pre' with which llama.cpp cuts texts into the same words."""
  model, words = description["model"], description.get("pre_tokenizer")
  normalizer, patterns = description.get("normalizer"), _patterns(words)
  kind = model.get("type", "BPE")
  is_plain = kind == "BPE" and '"ByteLevel"' in json.dumps(words)
  is_plain &= not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
  if is_plain and normalizer in (None, {"type": "NFC"}):
    if not model["merges"] and normalizer is None:
      return "gpt-2"  # Whatever the words are, their tokens are the bytes.
    wanted = (patterns, normalizer is not None, bool(model.get("ignore_merges")))
    for pre, known in PATTERNS.items():
      if wanted == (tuple(map(_spell, known)), pre in reader.NFC, pre in reader.LLAMA3):
        return pre
  raise UserError(
    f"tokenizer {spec!r}: llama.cpp knows no tokenizer of the kind {kind} with the "
    f"pre_tokenizer {json.dumps(words)} and the normalizer {json.dumps(normalizer)}."
  )


def _patterns(step: Any) -> tuple[str, ...] | None:
  """The patterns by which a pre-tokenizer cuts, in turn; None if it does anything else."""
  match step:
    case {"type": "Sequence", "pretokenizers": [*steps]}:
      found = [_patterns(one) for one in steps]
      return None if None in found else tuple(chain.from_iterable(found))
    case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
      return (_spell(pattern),)
    case {"type": "Digits", "individual_digits": True}:
      return (r"\p{N}",)
    case {"type": "ByteLevel", "add_prefix_space": False}:
      return (_spell(GPT2_PATTERN),) if step.get("use_regex", True) else ()
  return None


def _spell(pattern: str) -> str:
  """A pattern as it is spelled in published files."""
  for ours, published in _SPELLINGS.items():
    pattern = pattern.replace(ours, published)
  return pattern


def _sentencepiece(content: bytes, spec: str) -> tuple[_Tokens, dict[str, Any]]:
  from sentencepiece import sentencepiece_model_pb2  # Slow to import.

  model = sentencepiece_model_pb2.ModelProto.FromString(content)
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  changes = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
  if trainer.model_type != trainer.BPE or trainer.treat_whitespace_as_suffix or changes:
    raise UserError(
      f"tokenizer {spec!r}: of SentencePiece's models, llama.cpp's 'llama' is a BPE that leaves "
      "characters and blanks as they are, which this one is not."
    )
  tokens = {token: (piece.piece, piece.type) for token, piece in enumerate(model.pieces)}
  scores = [piece.score for piece in model.pieces]
  values = {"model": "llama", "pre": "default", "scores": scores}
  return tokens, values | {"add_space_prefix": normalizer.add_dummy_prefix}
