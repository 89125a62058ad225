"""Reads the tokenizer formats in use, and trains one of them, with the libraries that own them."""

import base64
import binascii
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptjax.errors import UserError, did_you_mean

END_OF_TEXT = "<|endoftext|>"
SPECIALS = (END_OF_TEXT, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")

# GPT-2's words, and GPT-4's: numbers by three digits, signs with the line ends after them, runs of
# blanks whole but for the one that belongs to the next word. What is trained here uses the latter.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4_PATTERN = (
  r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O_PATTERN = (
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}"
  rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
  r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# OpenAI's encodings: pattern and special ids, as `tiktoken` publishes them.
_PUBLISHED = {
  "r50k_base": (_GPT2_PATTERN, {END_OF_TEXT: 50256}),
  "p50k_base": (_GPT2_PATTERN, {END_OF_TEXT: 50256}),
  "cl100k_base": (
    _GPT4_PATTERN,
    {
      END_OF_TEXT: 100257,
      "<|fim_prefix|>": 100258,
      "<|fim_middle|>": 100259,
      "<|fim_suffix|>": 100260,
      "<|endofprompt|>": 100276,
    },
  ),
  "o200k_base": (_GPT4O_PATTERN, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
}

# The separator between documents, as the families that use tokenizer.json or SentencePiece call it.
_SEPARATORS = (
  END_OF_TEXT,
  "<|end_of_text|>",
  "<｜end▁of▁sentence｜>",
  "<|im_end|>",
  "</s>",
  "<eos>",
)
_FIM = tuple(
  f"{left}fim_{part}{right}"
  for left, right in (("<|", "|>"), ("<", ">"))
  for part in ("prefix", "middle", "suffix")
)


@dataclasses.dataclass(frozen=True)
class Format:
  """What all formats come down to.

  Attributes:
    kind: which reader made it.
    encode_batch: texts to their ids, uint32, special tokens never parsed.
    token_bytes: the bytes of each id; none for special and unused ids.
    specials: special ids by their text.
    end_of_text: id of the separator between documents.
    adds_space: whether encoding puts a space before a text, which decoding takes away.
  """

  kind: str
  encode_batch: Callable[[Sequence[str]], list[np.ndarray]]
  token_bytes: tuple[bytes, ...]
  specials: Mapping[str, int]
  end_of_text: int
  adds_space: bool = False


def recognise(path: Path) -> tuple[str | None, tuple[str, ...]]:
  """Returns the reader for a file or folder, and the names of the files it needs."""
  if path.is_dir():
    for kind, names in (
      ("gpt2", ("encoder.json", "vocab.bpe")),
      ("gpt2", ("vocab.json", "merges.txt")),
      ("tokenizer.json", ("tokenizer.json",)),
    ):
      if all((path / name).is_file() for name in names):
        return kind, names
  elif path.is_file():
    if path.name.endswith("tokenizer.json"):
      return "tokenizer.json", (path.name,)
    if path.suffix in (".tiktoken", ".model"):
      return {".tiktoken": "tiktoken", ".model": "sentencepiece"}[path.suffix], (path.name,)
  return None, ()


def train_bpe(texts: Iterable[str], vocab_size: int, progress: bool) -> bytes:
  """Trains a byte-level BPE (Sennrich et al. 2016; bytes as in Radford et al. 2019).

  Returns a tokenizer.json of at most `vocab_size` tokens, `SPECIALS` first.
  """
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_GPT4_PATTERN), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIALS),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=progress,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer.to_str().encode()


def _read_bytes(files: Mapping[str, bytes]) -> Format:
  del files  # Nothing to read: the ids are the bytes.
  return Format(
    "bytes",
    lambda texts: [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts],
    tuple(bytes([byte]) for byte in range(256)) + (b"",) * len(SPECIALS),
    {text: 256 + number for number, text in enumerate(SPECIALS)},
    end_of_text=256,
  )


def _read_gpt2(files: Mapping[str, bytes]) -> Format:
  """Reads a vocabulary and a list of merges, with GPT-2's pattern."""
  vocab_name = "encoder.json" if "encoder.json" in files else "vocab.json"
  merges_name = "vocab.bpe" if "vocab.bpe" in files else "merges.txt"
  vocab = _json(files[vocab_name], vocab_name)
  lines = files[merges_name].decode("utf-8").splitlines()
  merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
  if END_OF_TEXT not in vocab:
    raise UserError(f"{vocab_name} has no {END_OF_TEXT!r}.")
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  specials = [text for text in SPECIALS if text in vocab]
  tokenizer.add_special_tokens(specials)
  return dataclasses.replace(
    _read_tokenizer_json({"tokenizer.json": tokenizer.to_str().encode()}), kind="gpt2"
  )


def _read_tokenizer_json(files: Mapping[str, bytes]) -> Format:
  """Reads a BPE whose tokens are bytes (GPT-2's letters for them) or pieces with '▁'."""
  ((name, content),) = files.items()
  description = _json(content, name)
  # Other models can spell a special token from plain text, so documents would end where they don't.
  if (model := description["model"]["type"]) != "BPE":
    raise UserError(f"{name} is a {model} model; only BPE is read from this format.")
  settings = json.dumps([description[key] for key in ("decoder", "pre_tokenizer", "normalizer")])
  if '"ByteLevel"' in settings:
    to_bytes = _byte_level_bytes
  elif json.dumps("▁") in settings:
    to_bytes = _piece_bytes
  else:
    raise UserError(f"{name} is neither byte-level nor does it write '▁' for a space.")
  added = {token["content"]: token for token in description["added_tokens"]}
  end_of_text = next((text for text in _SEPARATORS if text in added), None)
  if end_of_text is None:
    found = ", ".join(map(repr, added)) or "none"
    raise UserError(f"{name} has no separator {_either(_SEPARATORS)} (special tokens: {found}).")
  for text in (end_of_text, *_FIM):
    if text in added:
      added[text]["special"] = True  # Some files leave the mark out, which would parse it in text.
  specials = {text: token["id"] for text, token in added.items() if token["special"]}
  tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
  tokenizer.encode_special_tokens = True
  vocab = tokenizer.get_vocab()
  table = [b""] * (max(vocab.values()) + 1)
  for text, token in vocab.items():
    if text in added:
      table[token] = b"" if text in specials else text.encode()
    else:
      table[token] = to_bytes(text)
  first = tokenizer.encode("a", add_special_tokens=False).tokens[0]

  def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.uint32) for encoding in encodings]

  return Format(
    "tokenizer.json",
    encode_batch,
    tuple(table),
    specials,
    specials[end_of_text],
    adds_space=first.startswith(("Ġ", "▁")),
  )


def _byte_letters() -> dict[str, int]:
  """Returns GPT-2's letter for each byte: itself if printable, else the next from U+0100 on."""
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = [byte for byte in range(256) if byte not in printable]
  letters = {chr(byte): byte for byte in printable}
  return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTE_LETTERS = _byte_letters()


def _byte_level_bytes(token: str) -> bytes:
  return bytes(_BYTE_LETTERS[letter] for letter in token)


def _piece_bytes(token: str) -> bytes:
  """Returns the bytes of a SentencePiece-like piece: '<0xE4>' is a byte, '▁' a space."""
  if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
    return bytes([int(token[3:5], 16)])
  return token.replace("▁", " ").encode()


def _read_tiktoken(files: Mapping[str, bytes]) -> Format:
  ((name, content),) = files.items()
  stem = name.removesuffix(".tiktoken")
  if stem not in _PUBLISHED:
    raise UserError(f"no published encoding {stem!r}. {did_you_mean(stem, _PUBLISHED)}")
  pattern, specials = _PUBLISHED[stem]
  ranks = {}
  for number, line in enumerate(content.splitlines(), start=1):
    try:
      token, rank = line.split()
      ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
      raise UserError(f"{name}:{number}: not a base64 token and its rank.") from error
  encoding = tiktoken.Encoding(
    stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
  )
  table = [b""] * encoding.n_vocab
  for token, rank in ranks.items():
    table[rank] = token

  def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
    return [np.array(ids, np.uint32) for ids in encoding.encode_ordinary_batch(list(texts))]

  return Format("tiktoken", encode_batch, tuple(table), specials, specials[END_OF_TEXT])


def _read_sentencepiece(files: Mapping[str, bytes]) -> Format:
  ((name, content),) = files.items()
  try:
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
  except RuntimeError as error:
    raise UserError(f"{name} is not a SentencePiece model ({error}).") from error
  ids = range(processor.vocab_size())
  specials = {processor.id_to_piece(token): token for token in ids if processor.is_control(token)}
  end_of_text = next((specials[text] for text in _SEPARATORS if text in specials), None)
  if end_of_text is None:
    raise UserError(f"{name} has no control token {_either(_SEPARATORS)} to separate documents.")
  silent = {*specials.values(), processor.unk_id()}
  table = (b"" if i in silent else _piece_bytes(processor.id_to_piece(i)) for i in ids)

  def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
    encoded = processor.encode(list(texts), num_threads=-1)
    return [np.array(tokens, np.uint32) for tokens in encoded]

  return Format(
    "sentencepiece",
    encode_batch,
    tuple(table),
    specials,
    end_of_text,
    adds_space=processor.id_to_piece(processor.encode("a")[0]).startswith("▁"),
  )


def _json(content: bytes, name: str) -> Any:
  try:
    return json.loads(content)
  except ValueError as error:
    raise UserError(f"{name} is not JSON ({error}).") from error


def _either(texts: Iterable[str]) -> str:
  return " or ".join(map(repr, texts))


READERS: Mapping[str, Callable[[Mapping[str, bytes]], Format]] = {
  "bytes": _read_bytes,
  "gpt2": _read_gpt2,
  "tokenizer.json": _read_tokenizer_json,
  "tiktoken": _read_tiktoken,
  "sentencepiece": _read_sentencepiece,
}
