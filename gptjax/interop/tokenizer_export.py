"""Writes a tokenizer as a folder of files that the Hugging Face library reads."""

import json
from pathlib import Path

import tokenizers
from tokenizers import processors

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.tokenizer_formats import bytes_as_bpe
from gptjax.errors import UserError


def export(folder: Path, tokenizer: Tokenizer, *, starts: bool) -> None:
  """Writes the tokenizer's files, and others that `transformers` needs beside them.

  Args:
    folder: the folder to write to.
    tokenizer: the tokenizer to write.
    starts: whether `transformers` is to begin a text with the same tokens as this package.

  Raises:
    UserError: its files are in no format of Hugging Face's.
  """
  tokenizer.save(folder)
  if tokenizer.spec.split("+")[0] == "bytes":
    (folder / "tokenizer.json").write_text(bytes_as_bpe(tokenizer.specials).to_str())
  if starts:
    _add_start(folder / "tokenizer.json", tokenizer)
  if (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
    end = tokenizer.end_of_text
    text = next((text for text, token in tokenizer.specials.items() if token == end), None)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": text}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
  try:
    tokenizer_lib.load(str(folder))
  except UserError as error:
    raise UserError(
      f"tokenizer {tokenizer.spec!r} is in no format of Hugging Face's; use --format=gptjax."
    ) from error


def _add_start(path: Path, tokenizer: Tokenizer) -> None:
  """Makes other libraries begin a text with the tokenizer's start tokens."""
  names = {token: text for text, token in tokenizer.specials.items()}
  start = [(names[token], token) for token in tokenizer.start]
  theirs = tokenizers.Tokenizer.from_file(str(path))
  theirs.post_processor = processors.TemplateProcessing(
    single=[*(text for text, _ in start), "$A"], special_tokens=start
  )
  path.write_text(theirs.to_str())
