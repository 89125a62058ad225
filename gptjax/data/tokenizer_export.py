"""Writes a tokenizer as a folder of files that the Hugging Face library reads."""

import json
from pathlib import Path

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.tokenizer_formats import bytes_as_bpe
from gptjax.errors import UserError


def export(folder: Path, tokenizer: Tokenizer) -> None:
  """Writes the tokenizer's files, and what `transformers` needs beside them where they lack it.

  Raises:
    UserError: its files are in no format of Hugging Face's.
  """
  tokenizer.save(folder)
  if tokenizer.spec.split("+")[0] == "bytes":
    (folder / "tokenizer.json").write_text(bytes_as_bpe(tokenizer.specials).to_str())
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
