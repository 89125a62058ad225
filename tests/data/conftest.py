"""A small real corpus, and configs over it."""

import inspect
import json
import string
import textwrap

import ml_collections
import pytest

from gptjax.data import pipeline
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data.options import read_options
from gptjax.objectives.task import make_task, task_defaults
from gptjax.presets.parts import data as presets

DOCUMENTS = [
  inspect.getsource(textwrap),
  inspect.getsource(string),
  inspect.getsource(json),
  "从明天起，做一个幸福的人。\n喂马、劈柴，周游世界。\n" * 20,
  "Emoji 👩‍👩‍👧 and é, <|endoftext|> as plain text.\n" * 20,
  "short",
]

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>",
            "<|end_header_id|>"]  # fmt: skip


def open_dataset(config, workdir, **options):
  """Opens the data of a config with the labels of its records, as a run does."""
  task = make_task(config.task)
  if task.packs_batches:
    task = task.settle(read_options(config), ())
  return pipeline.open_dataset(config, workdir, task, **options)


@pytest.fixture(scope="session")
def write_tokenizer():
  """Returns a function that writes a byte-level tokenizer and what a template's model has."""
  made = json.loads(tokenizer_lib.train("bpe:300", ["a little text"])._files["tokenizer.json"])
  size = len(made["model"]["vocab"])
  plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  made["added_tokens"] += [
    {"id": size + number, "content": text, "special": True, **plain}
    for number, text in enumerate(SPECIALS)
  ]

  def write(folder, template):
    (folder / "tokenizer.json").write_text(json.dumps(made))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer_lib.load(str(folder))

  return write


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
  """Returns a function that makes a config over the corpus, with some keys of the task or of the
  data changed."""

  def make(
    tokenizer="bytes",
    batch_size=4,
    sequence_length=64,
    seed=0,
    preset="text",
    task="next_token",
    visibility="causal",
    **keys_of_both,
  ):
    task = task_defaults(task)
    task |= {key: keys_of_both.pop(key) for key in task if key in keys_of_both}
    keys = presets.get(preset) | {"cache_dir": str(tmp_path / "cache")}
    if preset == "text":
      keys |= {"path": str(corpus), "validation_fraction": 0.2}
    return ml_collections.ConfigDict(
      {
        "seed": seed,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "tokenizer": tokenizer,
        "task": task,
        "model": {"decoder_start": 0, "visibility": visibility},
        "data": keys | keys_of_both,
      }
    )

  return make


@pytest.fixture
def make_label_config(make_config, tmp_path):
  """Returns a function that makes a config of records with labels, kept in records.jsonl.

  They are for training and validation both, unless there is a `validation_fraction`.
  """

  def make(records, task="classification", **keys):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    if "validation_fraction" not in keys:
      keys.setdefault("validation_path", str(path))
    return make_config(preset="jsonl", path=str(path), task=task, **keys)

  return make


@pytest.fixture
def wordpiece(tmp_path):
  """Returns the path of a tiny vocab.txt as of BERT."""
  path = tmp_path / "vocab.txt"
  tokens = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on mat ##s . ann lee 我 爱"
  path.write_text(tokens.replace(" ", "\n") + "\n")
  return path


@pytest.fixture
def encode(make_label_config):
  """Returns a function that encodes records with labels: (the `Examples`, the tokenizer)."""

  def make(records, tokenizer="bytes", **keys):
    config = make_label_config(records, tokenizer=str(tokenizer), **keys)
    task, options = make_task(config.task), read_options(config)
    texts, _ = task.open_pair(options.parts["jsonl"], options)
    tokenizer = tokenizer_lib.load(str(tokenizer))
    return task.encode(texts, tokenizer, options, progress=False), tokenizer

  return make
