"""Upgrades configs that older versions saved: the only place that knows old keys."""

from collections.abc import Mapping
from typing import Any

# Old keys of `config.data` that are now options of tasks.
_OF_TASKS = {
  "next_token": ("fim_rate", "spm_rate"),
  "prefix": (),
  "masked": ("mask_rate", "whole_words"),
  "span_corruption": ("mask_rate", "mean_span"),
  "chat": ("chat_template", "train_on", "overlong"),
  "prompt": ("prompt", "answer", "overlong"),
  "classification": ("label_key", "pair_key", "labels", "class_weights", "examples_per_label"),
  "multi_label": ("label_key", "pair_key", "labels"),
  "regression": ("label_key", "pair_key"),
  "tagging": ("label_key", "labels", "class_weights", "word_separator"),
  "span": ("label_key", "pair_key"),
}
_WITH_LABELS = ("classification", "multi_label", "regression", "tagging", "span")
_MOVED = {*(key for keys in _OF_TASKS.values() for key in keys), "format"}


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a saved config as today's version would have saved it.

  Gradients were added up over devices in the dtype of the computation, which is now asked for by
  `mesh.reduce_dtype`. Until a task was one object, it was spread over `objective`, `data.format`,
  keys of `data`, and `z_loss`, `label_smoothing` and `r_drop` at the top.
  """
  config = dict(config)
  if "mesh" in config:
    config["mesh"] = {"reduce_dtype": "float32"} | config["mesh"]
  if "task" in config or "objective" not in config:
    return config
  objective, data = config.pop("objective"), dict(config.get("data", {}))
  formats = data.get("format", "text")
  name = formats if formats in ("chat", "prompt") else objective
  task = {"name": name, **{key: data[key] for key in _OF_TASKS[name] if key in data}}
  top = {key: config.pop(key) for key in ("z_loss", "label_smoothing", "r_drop") if key in config}
  if name not in _WITH_LABELS:
    task["z_loss"] = top.get("z_loss", 0.0)
  else:
    task |= {"overlong": data.get("overlong", "truncate"), "r_drop": top.get("r_drop", 0.0)}
    if name in ("classification", "multi_label", "tagging"):
      task["label_smoothing"] = top.get("label_smoothing", 0.0)
  config["task"] = task
  if "data" in config:
    config["data"] = {key: value for key, value in data.items() if key not in _MOVED}
  return config
