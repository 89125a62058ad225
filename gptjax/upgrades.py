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
# Old fields of `config.model`, which had no groups, by their new place.
OF_GROUPS = {
  "norm": {"kind": "norm", "placement": "norm_placement", "eps": "norm_eps"}
  | {"offset": "norm_offset"},
  "residual": {"kind": "residual", "scale": "residual_scale", "values": "value_residual"}
  | {"embedding": "embed_residual"},
  "attention": {"kernel": "attention", "scale": "attention_scale", "soft_cap": "attention_soft_cap"}
  | {"sinks": "attention_sinks"}
  | {name: name for name in ("qk_norm", "qk_norm_per_head", "qkv_bias", "out_bias")},
  "mlp": {"activation": "activation", "bias": "mlp_bias"},
  "position": {"kind": "position", "offset": "position_offset"}
  | {name: name for name in ("max_positions", "t5_buckets", "t5_max_distance")},
  "rope": {"low_freq_factor": "rope_slow_turns", "high_freq_factor": "rope_fast_turns"}
  | {name: f"rope_{name}" for name in ("base", "local_base", "dim", "scaling", "factor")}
  | {"original_positions": "rope_original_positions", "truncate": "rope_round"}
  | {"attention_factor": "rope_attention_factor"},
  "embed": {"norm": "embed_norm", "scale": "embed_scale", "token_types": "token_types"},
  "head": {"tied": "tied_head", "bias": "head_bias", "transform": "head_transform"}
  | {"scale": "logit_scale", "soft_cap": "logit_soft_cap"}
  | {name: name for name in ("pooler", "pooler_activation", "next_sentence")},
  "label_head": {"num_labels": "num_labels", "pooling": "label_pooling", "bias": "label_bias"},
  "experts": {"count": "num_experts", "per_token": "experts_per_token"}
  | {"shared_dim": "shared_expert_dim"}
  | {name: name for name in ("router_normalize", "router_bias")},
  "dropout": {name: f"{name}_dropout" for name in ("embed", "attention", "residual", "label")},
  "init": {"std": "init_std", "residual": "residual_init"},
  "transfer": {name: name for name in ("parametrization", "base_embed_dim", "base_num_layers")},
  "execution": {name: name for name in ("scan_layers", "remat")},
}
_WITH_LABELS = ("classification", "multi_label", "regression", "tagging", "span")
_MOVED = {*(key for keys in _OF_TASKS.values() for key in keys), "format"}


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a saved config as today's version would have saved it.

  Gradients were added up over devices in the dtype of the computation, which is now asked for by
  `mesh.reduce_dtype`. Until a task was one object, it was spread over `objective`, `data.format`,
  keys of `data`, and `z_loss`, `label_smoothing` and `r_drop` at the top. The fields of a model had
  no groups.
  """
  config = dict(config)
  if "model" in config:
    config["model"] = _group(config["model"])
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


def _group(model: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a model in their groups."""
  if any(isinstance(value, Mapping) for value in model.values()):
    return dict(model)
  moved = {old for names in OF_GROUPS.values() for old in names.values()}
  kept = {name: value for name, value in model.items() if name not in moved}
  return kept | {
    group: {new: model[old] for new, old in names.items() if old in model}
    for group, names in OF_GROUPS.items()
  }
