"""Reads the tokenizer formats in use, and trains byte-level BPE, with their own libraries."""

import base64
import binascii
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from gptjax.data.pattern_trial import patterns_that_give_up, try_patterns
from gptjax.data.tokenizer_settings import Settings
from gptjax.errors import UserError, did_you_mean
from gptjax.small_files import parse_json

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB = 1 << 24
SPECIALS = (END_OF_TEXT, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
# Special tokens that a spec asks for after a '+': masked language models and span corruption.
SUFFIXES = {
  "mask": ("<|mask|>",),
  "sentinels": tuple(f"<|sentinel_{number}|>" for number in range(100)),
}
# Names of special tokens with a purpose, in the order in which they are looked for.
MASKS = ("<|mask|>", "[MASK]", "<mask>")
SENTINELS = ("<|sentinel_{}|>", "<extra_id_{}>")

# GPT-2's words, and GPT-4's: numbers by three digits, signs with the line ends after them, runs of
# blanks without the last, which belongs to the next word. Training here uses GPT-4's.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4_PATTERN = (
  r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O_PATTERN = (
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}"
  rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
  r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# OpenAI's encodings: pattern and special ids, as `tiktoken` publishes them.
_PUBLISHED = {
  "r50k_base": (GPT2_PATTERN, {END_OF_TEXT: 50256}),
  "p50k_base": (GPT2_PATTERN, {END_OF_TEXT: 50256}),
  "cl100k_base": (
    GPT4_PATTERN,
    {
      END_OF_TEXT: 100257,
      "<|fim_prefix|>": 100258,
      "<|fim_middle|>": 100259,
      "<|fim_suffix|>": 100260,
      "<|endofprompt|>": 100276,
    },
  ),
  "o200k_base": (GPT4O_PATTERN, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
}

# Names of the separator between documents in families with tokenizer.json or SentencePiece.
_SEPARATORS = (
  END_OF_TEXT,
  "<|end_of_text|>",
  "<｜end▁of▁sentence｜>",
  "<|im_end|>",
  "</s>",
  "<eos>",
  "[SEP]",
)
# GPT-1 has no separator but was trained on lines, whose end its library drops from every text.
_LINE_END = "\n</w>"
_FIM = tuple(
  f"{left}fim_{part}{right}"
  for left, right in (("<|", "|>"), ("<", ">"))
  for part in ("prefix", "middle", "suffix")
)


@dataclasses.dataclass(frozen=True)
class Format:
  """A tokenizer that was read from any format.

  Attributes:
    kind: the reader that made it.
    encode_batch: texts to their ids, uint32, special tokens never parsed.
    encode_with_specials: a text to its ids, special tokens parsed.
    token_bytes: the bytes of each id; none for special and unused ids.
    specials: special ids by their text.
    end_of_text: id of the separator between documents.
    start: ids that the format's own library puts before a text; None if it adds nothing at all.
    adds_space: whether encoding puts a space before a text, which decoding takes away.
    ends_with_space: whether the last token's bytes end with a space that is not in the text.
  """

  kind: str
  encode_batch: Callable[[Sequence[str]], list[np.ndarray]]
  encode_with_specials: Callable[[str], list[int]]
  token_bytes: tuple[bytes, ...]
  specials: Mapping[str, int]
  end_of_text: int
  start: tuple[int, ...] | None = None
  adds_space: bool = False
  ends_with_space: bool = False


def recognise(path: Path) -> tuple[str | None, tuple[str, ...]]:
  """Returns the reader for a file or folder, and the names of the files it needs."""
  if path.is_dir():
    for kind, names in (
      ("tokenizer.json", ("tokenizer.json",)),
      ("gpt2", ("encoder.json", "vocab.bpe")),
      ("gpt2", ("vocab.json", "merges.txt")),
      ("sentencepiece", ("tokenizer.model",)),
      ("sentencepiece", ("spiece.model",)),
      ("wordpiece", ("vocab.txt",)),
    ):
      if all((path / name).is_file() for name in names):
        return kind, names
  elif path.is_file():
    if path.name.endswith("tokenizer.json"):
      return "tokenizer.json", (path.name,)
    if path.name == "vocab.txt":
      return "wordpiece", (path.name,)
    if path.suffix in (".tiktoken", ".model"):
      return {".tiktoken": "tiktoken", ".model": "sentencepiece"}[path.suffix], (path.name,)
  return None, ()


def train_bpe(
  texts: Iterable[str], vocab_size: int, specials: Sequence[str], progress: bool
) -> bytes:
  """Trains a byte-level BPE (Sennrich et al. 2016; bytes as in Radford et al. 2019).

  Returns a tokenizer.json of at most `vocab_size` tokens, `specials` first.
  """
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(GPT4_PATTERN), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(specials),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=progress,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer.to_str().encode()


def _read_bytes(files: Mapping[str, bytes], settings: Settings) -> Format:
  """Reads the tokenizer whose ids are the bytes, then `SPECIALS` and those of 'specials.json'."""
  del settings
  added = parse_json(files["specials.json"], "specials.json") if files else ()
  specials = {text: 256 + number for number, text in enumerate((*SPECIALS, *added))}

  def encode(text: str) -> list[int]:
    return list(text.encode())

  return Format(
    "bytes",
    lambda texts: [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts],
    lambda text: _between_specials(text, specials, encode),
    tuple(bytes([byte]) for byte in range(256)) + (b"",) * len(specials),
    specials,
    end_of_text=256,
  )


def _between_specials(
  text: str,
  specials: Mapping[str, int],
  encode: Callable[[str], list[int]],
  encode_later: Callable[[str], list[int]] | None = None,
) -> list[int]:
  """Encodes the text between special tokens (the longest that match) with `encode`, or with
  `encode_later` after the first of them."""
  names = sorted(specials, key=len, reverse=True)
  first, *later = re.split(f"({'|'.join(map(re.escape, names))})", text)
  ids = encode(first) if first else []
  for piece in filter(None, later):
    ids += [specials[piece]] if piece in specials else (encode_later or encode)(piece)
  return ids


def _read_gpt2(files: Mapping[str, bytes], settings: Settings) -> Format:
  """Reads a vocabulary and a list of merges, with GPT-2's pattern."""
  vocab_name = "encoder.json" if "encoder.json" in files else "vocab.json"
  merges_name = "vocab.bpe" if "vocab.bpe" in files else "merges.txt"
  vocab = parse_json(files[vocab_name], vocab_name)
  lines = files[merges_name].decode("utf-8").splitlines()
  merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
  if END_OF_TEXT not in vocab:
    raise UserError(f"{vocab_name} has no {END_OF_TEXT!r}.")
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  specials = [text for text in SPECIALS if text in vocab]
  tokenizer.add_special_tokens(specials)
  return _read_made(tokenizer, settings, "gpt2")


def _read_wordpiece(files: Mapping[str, bytes], settings: Settings) -> Format:
  """Reads BERT's list of words and pieces (Devlin et al. 2019), one a line."""
  ((name, content),) = files.items()
  # Not splitlines: some characters that end a line elsewhere are tokens here.
  lines = content.decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
  vocab = {token: number for number, token in enumerate(lines)}
  specials = [text for text in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if text in vocab]
  if missing := {"[UNK]", "[CLS]", "[SEP]"} - {*specials}:
    raise UserError(f"{name} has no {_either(sorted(missing))}.")
  tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
  tokenizer.normalizer = normalizers.BertNormalizer(lowercase=settings.lowercase)
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.post_processor = processors.BertProcessing(
    ("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"])
  )
  tokenizer.add_special_tokens(specials)
  return _read_made(tokenizer, settings, "wordpiece")


def _read_made(tokenizer: tokenizers.Tokenizer, settings: Settings, kind: str) -> Format:
  files = {"tokenizer.json": tokenizer.to_str().encode()}
  return dataclasses.replace(_read_tokenizer_json(files, settings), kind=kind)


def _read_tokenizer_json(files: Mapping[str, bytes], settings: Settings) -> Format:
  """Reads BPE, Unigram (Kudo 2018) and WordPiece with the library's own code."""
  ((name, content),) = files.items()
  description = parse_json(content, name)
  description.setdefault("added_tokens", [])
  model = _model_kind(description)
  to_bytes = _to_bytes(description, model, name)
  added = {token["content"]: token for token in description["added_tokens"]}
  line_end = description["model"]["vocab"].get(_LINE_END) if model == "BPE" else None
  names = (settings.roles.get("sep_token"), *_SEPARATORS, settings.roles.get("eos_token"))
  # The first special one: Gemma's '</s>' is an HTML tag. Some files mark no token as special.
  separators = [text for text in names if text in added]
  end_of_text = max(separators, key=lambda text: added[text]["special"], default=None)
  if end_of_text is None and line_end is None:
    found = ", ".join(map(repr, added)) or "none"
    raise UserError(f"{name} has no separator {_either(_SEPARATORS)} (special tokens: {found}).")
  for text in (end_of_text, *_FIM):
    if text in added:
      added[text]["special"] = True  # Some files omit it, and then plain text would be parsed.
  specials = {text: token["id"] for text, token in added.items() if token["special"]}
  if end_of_text is None:
    end_of_text, specials[_LINE_END] = _LINE_END, line_end
  # Truncation and padding are the caller's choice.
  description |= {"truncation": None, "padding": None}
  plain = description if model == "BPE" else _with_unspellable_specials(description, specials)
  vocab = _vocab(description)
  table = [b""] * _count(vocab.values(), name)
  tokenizer = tokenizers.Tokenizer.from_str(json.dumps(plain))
  tokenizer.encode_special_tokens = True
  # Added tokens decode to their text, except for blanks (Gemma's '▁▁▁▁').
  as_written = () if to_bytes is _piece_bytes else added
  for text, token in vocab.items():
    if text not in specials:
      table[token] = text.encode() if text in as_written else to_bytes(text)

  def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
    with patterns_that_give_up(name):
      encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.uint32) for encoding in encodings]

  @functools.cache
  def parsing() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(description))

  with patterns_that_give_up(name):
    try_patterns(description, tokenizer.encode, name)
  letter = b"".join(table[token] for token in encode_batch(["a"])[0])
  return Format(
    "tokenizer.json",
    encode_batch,
    lambda text: parsing().encode(text, add_special_tokens=False).ids,
    tuple(table),
    specials,
    specials[end_of_text],
    start=_start(description.get("post_processor")),
    adds_space=letter.startswith(b" "),
    ends_with_space=letter.endswith(b" ") and not letter.startswith(b" "),
  )


def _count(ids: Iterable[int], name: str) -> int:
  """Returns how many ids a vocabulary has; UserError if they are negative or far too large."""
  largest = max(ids)
  if not 0 <= largest < MAX_VOCAB:
    raise UserError(f"{name} has the id {largest}; no vocabulary is as large.")
  return largest + 1


def _vocab(description: Mapping[str, Any]) -> dict[str, int]:
  """Returns the id of each token of a tokenizer.json, added ones included."""
  vocab = description["model"]["vocab"]
  if isinstance(vocab, list):
    vocab = {piece: number for number, (piece, _) in enumerate(vocab)}
  return vocab | {token["content"]: token["id"] for token in description["added_tokens"]}


def _model_kind(description: Mapping[str, Any]) -> str | None:
  """Returns the type of the model; in old files it follows from the model's parts."""
  model = description.get("model", {})
  parts = {"merges": "BPE", "unk_id": "Unigram", "continuing_subword_prefix": "WordPiece"}
  return model.get("type") or next((parts[part] for part in parts if part in model), None)


def _to_bytes(
  description: Mapping[str, Any], model: str | None, name: str
) -> Callable[[str], bytes]:
  """Returns a function from a token to its bytes."""
  parts = ("decoder", "pre_tokenizer", "normalizer")
  steps = json.dumps([description.get(part) for part in parts])
  if model == "WordPiece":
    prefix = description["model"]["continuing_subword_prefix"]
    return lambda token: (
      token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"
    ).encode()
  if model == "BPE" and '"ByteLevel"' in steps:
    return _byte_level_bytes
  if model == "BPE" and (suffix := description["model"].get("end_of_word_suffix")):
    return lambda token: token.replace(suffix, " ").encode()
  if model in ("BPE", "Unigram") and json.dumps("▁") in steps:
    return _piece_bytes
  if model in ("BPE", "Unigram"):
    raise UserError(f"{name} is neither byte-level nor does it write '▁' for a space.")
  raise UserError(f"{name} is a {model} model; BPE, Unigram and WordPiece are read.")


def _with_unspellable_specials(
  description: Mapping[str, Any], specials: Mapping[str, int]
) -> dict[str, Any]:
  """Adds a space to the names of special tokens, so that no word equals them.

  BPE builds tokens by merges, never a special one. Unigram and WordPiece look words up in their
  vocabulary, so that a text with '</s>' in it would end a document.
  """

  def rename(text: str) -> str:
    return f" {text}" if text in specials else text

  model = dict(description["model"])
  if isinstance(model["vocab"], list):
    model["vocab"] = [[rename(piece), score] for piece, score in model["vocab"]]
  else:
    model["vocab"] = {rename(piece): number for piece, number in model["vocab"].items()}
  if "unk_token" in model:
    model["unk_token"] = rename(model["unk_token"])
  added = [token | {"content": rename(token["content"])} for token in description["added_tokens"]]
  return {**description, "model": model, "added_tokens": added, "post_processor": None}


def _start(post_processor: Mapping[str, Any] | None) -> tuple[int, ...] | None:
  """Returns the ids that a post-processor puts before a text; None if it adds none at all."""
  match post_processor:
    case {"type": "Sequence", "processors": steps}:
      return next((start for start in map(_start, steps) if start is not None), None)
    case {"cls": [_, start]}:
      return (start,)
    case {"single": [*pieces], "special_tokens": ids} if any("SpecialToken" in p for p in pieces):
      text = next(number for number, piece in enumerate(pieces) if "Sequence" in piece)
      before = [ids[piece["SpecialToken"]["id"]]["ids"] for piece in pieces[:text]]
      return tuple(token for one in before for token in one)
  return None


def _byte_letters() -> dict[str, int]:
  """Returns GPT-2's letter for each byte: itself if printable, else the next from U+0100 on."""
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = [byte for byte in range(256) if byte not in printable]
  letters = {chr(byte): byte for byte in printable}
  return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTE_LETTERS = _byte_letters()


def bytes_as_bpe(specials: Mapping[str, int]) -> tokenizers.Tokenizer:
  """The tokenizer 'bytes' as a byte-level BPE without merges, with the same ids."""
  bpe = tokenizers.Tokenizer(models.BPE(vocab=_BYTE_LETTERS, merges=[]))
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  bpe.decoder = decoders.ByteLevel()
  bpe.add_special_tokens(sorted(specials, key=specials.get))
  return bpe


def _byte_level_bytes(token: str) -> bytes:
  return bytes(_BYTE_LETTERS[letter] for letter in token)


def _piece_bytes(token: str) -> bytes:
  """Returns the bytes of a SentencePiece-like piece: '<0xE4>' is a byte, '▁' a space."""
  if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
    return bytes([int(token[3:5], 16)])
  return token.replace("▁", " ").encode()


def _read_tiktoken(files: Mapping[str, bytes], settings: Settings) -> Format:
  del settings
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

  return Format(
    "tiktoken",
    encode_batch,
    lambda text: encoding.encode(text, allowed_special="all"),
    tuple(table),
    specials,
    specials[END_OF_TEXT],
  )


def _read_sentencepiece(files: Mapping[str, bytes], settings: Settings) -> Format:
  ((name, content),) = files.items()
  try:
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
  except RuntimeError as error:
    raise UserError(f"{name} is not a SentencePiece model ({error}).") from error
  size = processor.vocab_size()
  specials = {processor.id_to_piece(i): i for i in range(size) if processor.is_control(i)}
  end_of_text = next((specials[text] for text in _SEPARATORS if text in specials), None)
  if end_of_text is None:
    raise UserError(f"{name} has no control token {_either(_SEPARATORS)} to separate documents.")
  silent = {*specials.values(), processor.unk_id()}
  table = {i: _piece_bytes(processor.id_to_piece(i)) for i in range(size) if i not in silent}
  # T5's sentinels count down to the end of the vocabulary.
  last = _count([size + settings.extra_ids - 1], "tokenizer_config.json") - 1
  specials |= {SENTINELS[1].format(number): last - number for number in range(settings.extra_ids)}
  specials |= {text: i for i, (text, special) in settings.added.items() if special and i >= size}
  total = _count([size - 1, *specials.values()], name)

  def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
    encoded = processor.encode(list(texts), num_threads=-1)
    return [np.array(tokens, np.uint32) for tokens in encoded]

  @functools.cache
  def after_special() -> sentencepiece.SentencePieceProcessor:
    return _after_special(content, settings.legacy)

  return Format(
    "sentencepiece",
    encode_batch,
    lambda text: _between_specials(text, specials, processor.encode, after_special().encode),
    tuple(table.get(i, b"") for i in range(total)),
    specials,
    end_of_text,
    start=() if processor.bos_id() < 0 else None,  # T5 has no token to start a text with.
    adds_space=processor.id_to_piece(processor.encode("a")[0]).startswith("▁"),
  )


def _after_special(content: bytes, legacy: bool | None) -> sentencepiece.SentencePieceProcessor:
  """The model for text after a special token, where only T5 and 'legacy' tokenizers put a space."""
  from sentencepiece import sentencepiece_model_pb2  # Slow to import, and only chats need it.

  model = sentencepiece_model_pb2.ModelProto.FromString(content)
  if legacy is None:
    legacy = model.trainer_spec.model_type == model.trainer_spec.UNIGRAM
  model.normalizer_spec.add_dummy_prefix &= legacy
  return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def _either(texts: Iterable[str]) -> str:
  return " or ".join(map(repr, texts))


READERS: Mapping[str, Callable[[Mapping[str, bytes], Settings], Format]] = {
  "bytes": _read_bytes,
  "gpt2": _read_gpt2,
  "tokenizer.json": _read_tokenizer_json,
  "tiktoken": _read_tiktoken,
  "sentencepiece": _read_sentencepiece,
  "wordpiece": _read_wordpiece,
}
