"""Tokenizers behind one interface: trained here, or read from the formats in use.

A spec names one:

    bytes                       256 bytes and 4 special tokens
    bpe:N                       byte-level BPE of N tokens in all, trained on the training text
    FOLDER                      GPT-2's encoder.json + vocab.bpe, or vocab.json + merges.txt,
                                or a tokenizer.json
    FILE.tiktoken               one of OpenAI's, told apart by its name
    tokenizer.json, FILE.model  of the Hugging Face library, of SentencePiece

A run keeps its tokenizer in its own folder, so it never trains one twice nor needs the original.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from gptjax.data import tokenizer_formats as formats
from gptjax.errors import UserError

_META = "gptjax_tokenizer.json"
_BYTES, _BPE = "bytes", "bpe:"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Text to token ids and back.

  Encoding adds nothing and parses nothing: text that looks like a special token is plain text.

  Attributes:
    spec: what it was made from.
    vocab_size: number of ids, unused ones included.
    end_of_text: id of the separator between documents.
    fim_prefix, fim_middle, fim_suffix: ids for fill-in-the-middle, or None.
    specials: the ids of all special tokens by their text.
  """

  spec: str
  _format: formats.Format
  _files: Mapping[str, bytes]

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
    """Returns the ids of `text`, no special among them."""
    return self.encode_batch([text])[0].tolist()

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Encodes each text to uint32 [its tokens], in parallel where the library can."""
    return self._format.encode_batch(texts)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of a whole document; bytes that are not UTF-8 become U+FFFD."""
    text = self.decode_bytes(ids).decode("utf-8", errors="replace")
    return text.removeprefix(" ") if self._format.adds_space else text

  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """Returns the bytes of any piece of a document, so that pieces can be joined; specials are
    nothing."""
    table = self._format.token_bytes
    return b"".join(table[token] for token in ids)

  def bytes_per_token(self) -> np.ndarray:
    """Returns int32 [vocab_size], the UTF-8 bytes that each id stands for; 0 for specials."""
    return np.array([len(token) for token in self._format.token_bytes], np.int32)

  def fingerprint(self) -> str:
    """Returns a hash of all that decides the encoding."""
    digest = hashlib.sha256(self._format.kind.encode())
    for name, content in sorted(self._files.items()):
      digest.update(f"\0{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()

  def save(self, folder: epath.PathLike) -> None:
    """Writes all that `open_saved` needs; `folder` may be remote (gs://...)."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in self._files.items():
      (folder / name).write_bytes(content)
    # The last file to be written tells a whole folder from half of one.
    meta = {"spec": self.spec, "kind": self._format.kind, "vocab_size": self.vocab_size}
    (folder / _META).write_text(json.dumps({**meta, "files": sorted(self._files)}))


def open_saved(folder: epath.PathLike) -> Tokenizer | None:
  """Opens what `Tokenizer.save` wrote; None if `folder` holds no whole tokenizer."""
  folder = epath.Path(folder)
  if not (folder / _META).exists():
    return None
  meta = json.loads((folder / _META).read_text())
  files = {name: (folder / name).read_bytes() for name in meta["files"]}
  return _make(meta["spec"], meta["kind"], files, meta["vocab_size"])


def load(spec: str) -> Tokenizer:
  """Loads the tokenizer that `spec` names; UserError if there is none, or if it must be trained."""
  if spec == _BYTES:
    return _make(spec, "bytes", {})
  if spec.startswith(_BPE):
    raise UserError(f"tokenizer {spec!r} must be trained; a run keeps it in WORKDIR/tokenizer.")
  path = Path(spec).expanduser()
  kind, names = formats.recognise(path)
  if kind is None:
    found = "holds no tokenizer that we read" if path.exists() else "is no file or folder"
    raise UserError(
      f"tokenizer {spec!r} {found}. Give 'bytes', 'bpe:N', a folder with encoder.json and "
      "vocab.bpe (or vocab.json and merges.txt), or a tokenizer.json, *.tiktoken or *.model file."
    )
  folder = path if path.is_dir() else path.parent
  return _make(spec, kind, {name: (folder / name).read_bytes() for name in names})


def train(spec: str, texts: Iterable[str], *, progress: bool = False) -> Tokenizer:
  """Trains the byte-level BPE `bpe:N` on `texts`. The same texts give the same tokenizer."""
  vocab_size = declared_vocab_size(spec)
  content = formats.train_bpe(texts, vocab_size, progress)
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
  number = spec.removeprefix(_BPE)
  smallest = 256 + len(formats.SPECIALS)
  if not number.isdecimal() or int(number) < smallest:
    raise UserError(
      f"tokenizer {spec!r}: N in bpe:N must be a whole number of {smallest} or more "
      f"(256 bytes and {len(formats.SPECIALS)} special tokens)."
    )
  return int(number)


def _make(
  spec: str, kind: str, files: Mapping[str, bytes], vocab_size: int | None = None
) -> Tokenizer:
  try:
    made = formats.READERS[kind](files)
  except UserError as error:
    raise UserError(f"tokenizer {spec!r}: {error}") from error
  if vocab_size is not None:  # A small text gives fewer merges than were asked for.
    unused = (b"",) * (vocab_size - len(made.token_bytes))
    made = dataclasses.replace(made, token_bytes=made.token_bytes + unused)
  return Tokenizer(spec, made, files)
