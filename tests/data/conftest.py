"""A small real corpus, and configs over it."""

import inspect
import json
import string
import textwrap

import ml_collections
import pytest

from configs.parts import data as presets

DOCUMENTS = [
  inspect.getsource(textwrap),
  inspect.getsource(string),
  inspect.getsource(json),
  "从明天起，做一个幸福的人。\n喂马、劈柴，周游世界。\n" * 20,
  "Emoji 👩‍👩‍👧 and é, <|endoftext|> as plain text.\n" * 20,
  "short",
]


@pytest.fixture
def corpus(tmp_path):
  """Returns a folder of text files."""
  folder = tmp_path / "corpus"
  folder.mkdir()
  for number, text in enumerate(DOCUMENTS):
    (folder / f"{number}.txt").write_text(text)
  return folder


@pytest.fixture
def make_config(tmp_path, corpus):
  """Returns a function that makes a config over the corpus, with some data keys changed."""

  def make(
    tokenizer="bytes",
    batch_size=4,
    sequence_length=64,
    seed=0,
    preset="text",
    objective="next_token",
    **data,
  ):
    keys = presets.get(preset) | {"cache_dir": str(tmp_path / "cache")}
    if preset == "text":
      keys |= {"path": str(corpus), "validation_fraction": 0.2}
    return ml_collections.ConfigDict(
      {
        "seed": seed,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "tokenizer": tokenizer,
        "objective": objective,
        "model": {"decoder_start": 0},
        "data": keys | data,
      }
    )

  return make
