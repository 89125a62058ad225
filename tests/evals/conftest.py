"""A tiny model to evaluate, and files of examples."""

import json

import pytest
from flax import nnx

from gptjax.data import tokenizer as tokenizers
from gptjax.evals.subject import Subject
from gptjax.model.gpt import model_graph


@pytest.fixture(scope="session")
def subject(tiny_config, random_params):
  config = tiny_config(
    vocab_size=264, num_layers=1, **{"position.kind": "rope", "position.max_positions": 64}
  )
  model = nnx.merge(model_graph(config), random_params(config))
  return Subject(model, tokenizers.load("bytes"), batch_size=4)


@pytest.fixture
def write_task(tmp_path):
  """Returns a function that writes a task's file and its examples, and returns the file's path."""

  def write(examples, train=None, **settings):
    for name, records in (("data", examples), ("train", train)):
      if records is not None:
        lines = (json.dumps(record, ensure_ascii=False) for record in records)
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        settings = {name: f"{name}.jsonl"} | settings
    path = tmp_path / "task.json"
    path.write_text(json.dumps(settings))
    return str(path)

  return write
