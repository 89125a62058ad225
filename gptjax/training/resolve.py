"""Completes a config from files: the model to start from, its tokenizer, the labels of the data."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from gptjax.config import flatten
from gptjax.data.options import read_options
from gptjax.data.tokenizer import declared_vocab_size
from gptjax.errors import UserError
from gptjax.model.config import ModelConfig
from gptjax.objectives.task import OF_THE_MODEL, make_task, task_defaults
from gptjax.training.pretrained import labels_of, read_model_config, tokenizer_of

# The tokenizer of the model that a run starts from.
INIT_FROM = "init_from"

# The task that a language model was made for, by its visibility and whether it has an encoder.
_PRETRAINING = {
  ("causal", False): "next_token",
  ("prefix", False): "prefix",
  ("bidirectional", False): "masked",
  ("causal", True): "span_corruption",
}


def resolve(config: ConfigDict) -> ConfigDict:
  """Returns a copy of a config with everything that a run depends on filled in.

  These are the tokenizer and the model of `init_from`, the vocabulary's size, the task that the
  model was made for, and the labels of the training records with the size of their head. Nothing is
  written, and a complete config is returned unchanged.

  Raises:
    UserError: a file cannot be read, or a key contradicts what it says.
  """
  config = ConfigDict(config.to_dict())
  if config.tokenizer == INIT_FROM:
    config.tokenizer = tokenizer_of(config.init_from)
  if not config.model.num_layers and (config.init_from or not config.model.embed_dim):
    config.model.update_from_flattened_dict(_architecture_to_start_from(config))
  if not config.model.vocab_size:
    config.model.vocab_size = declared_vocab_size(config.tokenizer)
  if config.task.name == OF_THE_MODEL:
    model = ModelConfig.from_config(config.model)
    config.task = task_defaults(_PRETRAINING[model.visibility, model.encoder_layers > 0])
  _settle_task(config)
  return config.lock()


def _architecture_to_start_from(config: ConfigDict) -> dict[str, Any]:
  """The architecture of the checkpoint `init_from`; UserError if there is none or a key differs."""
  if not config.init_from:
    raise UserError(
      "model=init_from needs init_from: a run, a folder of Hugging Face's or a GGUF file."
    )
  architecture = read_model_config(config.init_from).architecture
  given = flatten(config.model)
  for name, default in ModelConfig.defaults().items():
    if name in architecture and given[name] not in (default, architecture[name]):
      raise UserError(
        f"model.{name}={given[name]!r}, but init_from={config.init_from} has "
        f"{architecture[name]!r}; leave it out."
      )
  return architecture


def _settle_task(config: ConfigDict) -> None:
  task, head = make_task(config.task), config.model.label_head
  if not task.predicts_tokens:
    if not task.num_labels:
      known = labels_of(config.init_from) if config.init_from else None
      task = task.settle(read_options(config), known.names if known else ())
    if head.num_labels not in (0, task.num_labels):
      raise UserError(
        f"model.label_head.num_labels={head.num_labels}, but task={task.name!r} has "
        f"{task.num_labels} here; leave it out."
      )
    head.num_labels = task.num_labels
  elif head.num_labels:
    raise UserError(
      f"model.label_head.num_labels={head.num_labels}: task={task.name!r} has no labels; "
      "leave it out."
    )
  config.task.update(dataclasses.asdict(task))
