"""Common settings of sweeps on English prose: short runs that keep only their metrics."""

from collections.abc import Mapping
from typing import Any

from experiments import datasets
from gptjax import config


def short_run(argument: str, overrides: Mapping[str, Any]) -> Any:
  """A config of configs/pretrain.py on the prose of datasets.py, which validates on a hundredth."""
  shared = {
    "data.path": str(datasets.fetch("prose")),
    "data.validation_fraction": 0.01,
    "batch_size": 8,
    "sequence_length": 128,
    "model.bias": False,
    "checkpoint.every_steps": 0,
    "checkpoint.keep": 1,
    "sample.every_steps": 0,
    "log.tensorboard": False,
  }
  return config.load(f"configs/pretrain.py:{argument},data=text", {**shared, **overrides})
