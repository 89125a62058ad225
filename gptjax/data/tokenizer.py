"""Tokenizers behind one interface: trained here, or read from the formats in use.

A spec names one:

    bytes                       256 bytes and 4 special tokens
    bpe:N                       byte-level BPE of N tokens in all, trained on the training text
    bytes+mask, bpe:N+sentinels the same with '<|mask|>', with 100 sentinels, or both
    FOLDER                      tokenizer.json; or GPT-2's encoder.json + vocab.bpe, or vocab.json +
                                merges.txt; or tokenizer.model, spiece.model, or vocab.txt; or the
                                copy in the work directory of a run
    FILE.tiktoken               one of OpenAI's, told apart by its name
    tokenizer.json, FILE.model  files of the Hugging Face library and of SentencePiece
    vocab.txt                   BERT's WordPiece
    FILE.gguf                   the tokenizer inside a model of llama.cpp

Beside the files of a foreign tokenizer, `tokenizer_settings.FILES` are read if they are there. A
run keeps its tokenizer in its own folder, so it never trains one twice nor needs the original.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from gptjax import wings
from gptjax.data import tokenizer_formats as formats
from gptjax.data import tokenizer_settings as settings_lib
from gptjax.errors import UserError, did_you_mean
from gptjax.small_files import plain_name, read_json, write_atomically

META = "gptjax_tokenizer.json"
_BPE = "bpe:"
# Tokens that end a turn of a chat in the templates in use.
_ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|return|>", "<|call|>")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Text to token ids and back.

  Encoding adds nothing and parses nothing: text that looks like a special token is plain text.

  Attributes:
    spec: the spec that it was made from.
    vocab_size: number of ids, unused ones included.
    end_of_text: id of the separator between documents.
    is_own: whether it was made here, not by another library.
    start: ids that a text begins with; for a foreign tokenizer, those that its own library adds,
      which may be none.
    prefix: id to put before a text that nothing else precedes: the start of a sequence if there is
      such a token, else its end (`prefix_token_id` of lm-eval).
    stops: ids that end a completion.
    fim_prefix: id of the separator before the prefix for fill-in-the-middle, or None.
    fim_middle: id of the one before the middle.
    fim_suffix: id of the one before the suffix.
    mask: id of the mask token, or None.
    sentinels: ids of the sentinels for removed spans, in order (Raffel et al. 2020); may be empty.
    specials: the ids of all special tokens by their text.
    roles: texts of special tokens by their role in its files ('bos_token', 'eos_token', ...).
    chat_template: the model's own, in Jinja, or None.
  """

  spec: str
  _format: formats.Format
  _settings: settings_lib.Settings
  _files: Mapping[str, bytes]
  is_own: bool

  @property
  def vocab_size(self) -> int:
    return len(self._format.token_bytes)

  @property
  def specials(self) -> Mapping[str, int]:
    return self._format.specials

  @property
  def end_of_text(self) -> int:
    return self._format.end_of_text

  @property
  def start(self) -> tuple[int, ...]:
    if self.is_own:
      return (self.end_of_text,)
    bos = self.specials.get(self.roles.get("bos_token"))
    if self._settings.adds_bos and bos is not None:
      return (bos,)
    return () if self._settings.adds_bos is False else self._format.start or ()

  @property
  def prefix(self) -> int:
    if self.is_own:
      return self.end_of_text
    named = (self.specials.get(self.roles.get(role)) for role in ("bos_token", "eos_token"))
    return next((token for token in named if token is not None), self.end_of_text)

  @property
  def stops(self) -> frozenset[int]:
    template = self.chat_template or ""
    names = (self.roles.get("eos_token"), *(text for text in _ENDS_OF_TURN if text in template))
    named = {self.specials[text] for text in names if text in self.specials}
    return frozenset({self.end_of_text, *named, *self._settings.end_ids})

  @property
  def token_ids(self) -> dict[str, int | list[int] | None]:
    """The fields 'bos_token_id', 'eos_token_id' and 'pad_token_id' of a model's config.json."""
    bos, pad = (self.specials.get(self.roles.get(role)) for role in ("bos_token", "pad_token"))
    ends = sorted(self.stops)
    eos = ends if len(ends) > 1 else ends[0]
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    return ids | dict(self._settings.ids)

  @property
  def roles(self) -> Mapping[str, str]:
    return self._settings.roles

  @property
  def chat_template(self) -> str | None:
    return self._settings.chat_template

  @property
  def mask(self) -> int | None:
    return next((self.specials[text] for text in formats.MASKS if text in self.specials), None)

  @property
  def sentinels(self) -> tuple[int, ...]:
    for name in formats.SENTINELS:
      if name.format(0) in self.specials:
        ids = (self.specials.get(name.format(number)) for number in itertools.count())
        return tuple(itertools.takewhile(lambda token: token is not None, ids))
    return ()

  @property
  def fim_prefix(self) -> int | None:
    return self._fim("prefix")

  @property
  def fim_middle(self) -> int | None:
    return self._fim("middle")

  @property
  def fim_suffix(self) -> int | None:
    return self._fim("suffix")

  def _fim(self, part: str) -> int | None:
    named = (self.specials.get(f"<|fim_{part}|>"), self.specials.get(f"<fim_{part}>"))
    return next((token for token in named if token is not None), None)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, without special tokens."""
    return self.encode_batch([text])[0].tolist()

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Encodes each text to uint32 [its tokens], in parallel if the library can; UserError for half
    of a surrogate pair, which is no character."""
    for text in texts:
      _check(text)
    return self._format.encode_batch(texts)

  def encode_prompt(self, text: str) -> list[int]:
    """Returns the ids of a prompt that a model is to continue: at least one."""
    return [*self.start, *self.encode(text)] or [self.prefix]

  def encode_with_specials(self, text: str) -> list[int]:
    """Returns the ids of `text`, special tokens parsed, as for a rendered chat template."""
    _check(text)
    return self._format.encode_with_specials(text)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of a whole document; bytes that are not UTF-8 become U+FFFD."""
    return self.trim(self.decode_bytes(ids).decode("utf-8", errors="replace"))

  def trim(self, text: str) -> str:
    """Returns a whole document without the spaces that its encoding adds around it."""
    text = text.removeprefix(" ") if self._format.adds_space else text
    return text.removesuffix(" ") if self._format.ends_with_space else text

  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """Returns the bytes of any piece of a document; pieces can be joined. Specials have none."""
    table = self._format.token_bytes
    return b"".join(table[token] for token in ids)

  def bytes_per_token(self) -> np.ndarray:
    """Returns int32 [vocab_size], the UTF-8 bytes that each id stands for; 0 for specials."""
    return np.array([len(token) for token in self._format.token_bytes], np.int32)

  def means_the_same(self, other: "Tokenizer") -> bool:
    """Whether the ids of both stand for the same. (A chat template, which `fingerprint` covers, may
    be another.)"""
    own, theirs = (
      ([one.decode_bytes([token]) for token in range(one.vocab_size)], dict(one.specials))
      for one in (self, other)
    )
    return own == theirs

  def fingerprint(self) -> str:
    """Returns a hash of everything that decides the encoding."""
    digest = hashlib.sha256(self._format.kind.encode())
    for name, content in sorted(self._files.items()):
      digest.update(f"\0{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()

  def with_chat_template(self, template: str) -> "Tokenizer":
    """Returns the tokenizer with another chat template; its 'eos_token' is the separator of
    documents, unless the tokenizer has one."""
    names = {token: text for text, token in self.specials.items()}
    roles = {"eos_token": names[self.end_of_text]} | dict(self.roles)
    files = {**self._files, **settings_lib.chat_template_files(template, roles)}
    return _make(self.spec, self._format.kind, files, self.vocab_size)

  @property
  def adds_space(self) -> bool:
    """Whether encoding puts a space before a text, so that it cannot be encoded piece by piece."""
    return self._format.adds_space

  def save(self, folder: epath.PathLike) -> None:
    """Writes everything that `open_saved` needs; `folder` may be remote (gs://...)."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in self._files.items():
      write_atomically(folder / name, content)
    # Written last: a folder without this file is incomplete.
    meta = {
      "spec": self.spec,
      "is_own": self.is_own,
      "kind": self._format.kind,
      "vocab_size": self.vocab_size,
      "files": sorted(self._files),
      "fingerprint": self.fingerprint(),
    }
    write_atomically(folder / META, json.dumps(meta))


def open_saved(folder: epath.PathLike) -> Tokenizer | None:
  """Opens a tokenizer that `Tokenizer.save` wrote; None if `folder` holds no complete one.

  Raises:
    UserError: a file is damaged, missing, outside the folder, or changed since it was saved.
  """
  path = epath.Path(folder) / META
  if not path.exists():
    return None
  meta = read_json(path)
  try:
    files = {name: (path.parent / plain_name(name, path)).read_bytes() for name in meta["files"]}
    spec, kind, vocab_size = str(meta["spec"]), meta["kind"], int(meta["vocab_size"])
    if kind not in formats.READERS or not 0 < vocab_size <= formats.MAX_VOCAB:
      raise UserError(f"{path}: kind={kind!r} and vocab_size={vocab_size} are of no tokenizer.")
  except OSError as error:
    raise UserError(f"{path}: a file that it names cannot be read ({error}).") from error
  except (KeyError, TypeError) as error:
    raise UserError(f"{path}: not what a run writes of its tokenizer ({error}).") from error
  tokenizer = _make(spec, kind, files, vocab_size)
  tokenizer = dataclasses.replace(tokenizer, is_own=bool(meta.get("is_own", tokenizer.is_own)))
  # Older versions wrote neither.
  if meta.get("fingerprint", tokenizer.fingerprint()) != tokenizer.fingerprint():
    raise UserError(
      f"{path.parent}: {' or '.join(sorted(files))} is not what the run saved there, so that ids "
      "stand for other tokens; put the original back."
    )
  return tokenizer


def load(spec: str) -> Tokenizer:
  """Loads the tokenizer that `spec` names; UserError if there is none, or if it must be trained."""
  if spec.split("+")[0] == "bytes":
    _, specials = _parse(spec)
    added = specials[len(formats.SPECIALS) :]
    return _make(spec, "bytes", {"specials.json": json.dumps(added).encode()} if added else {})
  if spec.startswith(_BPE):
    raise UserError(f"tokenizer {spec!r} must be trained; a run keeps it in WORKDIR/tokenizer.")
  path = Path(spec).expanduser()
  if path.suffix == ".gguf" and path.is_file():
    read = wings.load("gptjax.gguf.tokenizer:read", f"tokenizer {spec!r}")
    return _make(spec, *read(path))
  # Beside a model of Hugging Face's, its own files tell more.
  if not (path / "config.json").exists() and (saved := open_saved(path)):
    return dataclasses.replace(saved, spec=spec)
  kind, names = formats.recognise(path)
  if kind is None:
    found = "holds no tokenizer that we read" if path.exists() else "is no file or folder"
    raise UserError(
      f"tokenizer {spec!r} {found}. Give 'bytes', 'bpe:N', a folder with tokenizer.json, "
      "encoder.json and vocab.bpe (or vocab.json and merges.txt), tokenizer.model, spiece.model or "
      "vocab.txt, one of these files, or a *.tiktoken, *.model or *.gguf file."
    )
  folder = path if path.is_dir() else path.parent
  own = {name: (folder / name).read_bytes() for name in names}
  return _make(spec, kind, own | settings_lib.read_folder(folder))


def train(spec: str, texts: Iterable[str], *, progress: bool = False) -> Tokenizer:
  """Trains the byte-level BPE `bpe:N` on `texts`. The same texts give the same tokenizer."""
  vocab_size = declared_vocab_size(spec)
  content = formats.train_bpe(texts, vocab_size, _parse(spec)[1], progress)
  return _make(spec, "tokenizer.json", {"tokenizer.json": content}, vocab_size)


def train_or_load(
  spec: str,
  texts: Callable[[], Iterable[str]],
  folder: epath.PathLike,
  *,
  save: bool = True,
  progress: bool = False,
) -> Tokenizer:
  """Returns the tokenizer saved in `folder`, else loads or trains `spec` and saves it there.

  Args:
    spec: which tokenizer.
    texts: gives the text to train on; called only to train.
    folder: the run's own copy.
    save: whether to write that copy (one process of a run does).
    progress: whether to show a progress bar.

  Raises:
    UserError: if `spec` is unknown, or is not the one that `folder` holds.
  """
  if tokenizer := open_saved(folder):
    if tokenizer.spec != spec:
      raise UserError(
        f"{folder} holds the tokenizer {tokenizer.spec!r}, not {spec!r}. "
        f"Set --config.tokenizer={tokenizer.spec} or start in another --workdir."
      )
    return tokenizer
  trained = spec.startswith(_BPE)
  tokenizer = train(spec, texts(), progress=progress) if trained else load(spec)
  if save:
    tokenizer.save(folder)
  return tokenizer


def declared_vocab_size(spec: str) -> int:
  """Returns the vocabulary size of `spec` without training anything."""
  if not spec.startswith(_BPE):
    return load(spec).vocab_size
  base, specials = _parse(spec)
  number = base.removeprefix(_BPE)
  smallest = 256 + len(specials)
  if not number.isdecimal() or not smallest <= int(number) <= formats.MAX_VOCAB:
    raise UserError(
      f"tokenizer {spec!r}: N in bpe:N must be a whole number of {smallest} or more (256 "
      f"bytes and {len(specials)} special tokens), and at most {formats.MAX_VOCAB}."
    )
  return int(number)


def _parse(spec: str) -> tuple[str, tuple[str, ...]]:
  """Splits the spec of a tokenizer made here into its kind and its special tokens."""
  base, *suffixes = spec.split("+")
  for suffix in suffixes:
    if suffix not in formats.SUFFIXES:
      raise UserError(
        f"tokenizer {spec!r}: no suffix {suffix!r}. {did_you_mean(suffix, formats.SUFFIXES)}"
      )
  asked = [texts for suffix, texts in formats.SUFFIXES.items() if suffix in suffixes]
  return base, tuple(itertools.chain(formats.SPECIALS, *asked))


def _check(text: str) -> None:
  """Refuses text that has no UTF-8 encoding, which the libraries replace or fail on."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f"a text has half of a surrogate pair (U+{ord(text[error.start]):04X}) at character "
      f"{error.start}, which is no character; replace it, by U+FFFD for example."
    ) from error


def _make(
  spec: str, kind: str, files: Mapping[str, bytes], vocab_size: int | None = None
) -> Tokenizer:
  try:
    settings = settings_lib.read(files)
    own = {name: content for name, content in files.items() if name not in settings_lib.FILES}
    made = formats.READERS[kind](own, settings)
  except UserError as error:
    raise UserError(f"tokenizer {spec!r}: {error}") from error
  except Exception as error:
    reason = f"{type(error).__name__}: {error}".split("\n")[0]
    raise UserError(f"tokenizer {spec!r} ({', '.join(files)}) is damaged ({reason}).") from error
  if vocab_size is not None:  # A small text gives fewer merges than were asked for.
    unused = (b"",) * (vocab_size - len(made.token_bytes))
    made = dataclasses.replace(made, token_bytes=made.token_bytes + unused)
  is_own = spec.startswith(_BPE) or spec.split("+")[0] == "bytes"
  return Tokenizer(spec, made, settings, files, is_own)
