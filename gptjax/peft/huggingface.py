"""Adapters in the format of the `peft` library: adapter_config.json, adapter_model.safetensors.

The names of modules come from a family's table (`gptjax.interop.families`). If one projection of
theirs is several of ours (GPT-2's c_attn), our low-rank products are blocks of theirs. Parameters
that are trained whole beside the adapters are in the fields `modules_to_save` and `bias`.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx, traverse_util

from gptjax import tree
from gptjax.errors import UserError
from gptjax.interop.family import Family
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT, describe_parameters
from gptjax.peft import whole
from gptjax.peft.config import VIRTUAL_METHODS, PeftConfig
from gptjax.peft.projections import Projection, find_entries, find_projections, is_target
from gptjax.peft.surgery import abstract_model, by_name, describe_adapters, merge, put_on
from gptjax.small_files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TYPES = {
  "LORA": "lora",
  "ADALORA": "adalora",
  "IA3": "ia3",
  "PROMPT_TUNING": "prompt",
  "P_TUNING": "prompt",
  "PREFIX_TUNING": "prefix",
}
_TASK_TYPES = {
  "ForSequenceClassification": "SEQ_CLS",
  "ForTokenClassification": "TOKEN_CLS",
  "ForQuestionAnswering": "QUESTION_ANS",
}

# Bookkeeping, options of training, and fields that repeat the names and shapes of the tensors.
_NOT_READ = {
  "auto_mapping",
  "base_model_name_or_path",
  "revision",
  "inference_mode",
  "peft_version",
  "task_type",
  "lora_dropout",
  "feedforward_modules",
  "rank_pattern",
  "r",
  "target_r",
  "tinit",
  "tfinal",
  "deltaT",
  "beta1",
  "beta2",
  "total_step",
  "orth_reg_weight",
  "fan_in_fan_out",
  "megatron_core",
  "qalora_group_size",
  "init_ia3_weights",
  "init_weights",
  "prompt_tuning_init",
  "prompt_tuning_init_text",
  "tokenizer_name_or_path",
  "tokenizer_kwargs",
  "num_layers",
  "num_attention_heads",
  "token_dim",
  "num_virtual_tokens",
  "encoder_hidden_size",
  "encoder_reparameterization_type",
  "encoder_num_layers",
  "encoder_dropout",
  "prefix_projection",
}
# The only values of these fields with which the tensors alone decide the model.
_ONLY = {
  "bias": ("none", "all", "lora_only"),
  # The others change the parameters of the model itself.
  "init_lora_weights": (True, False, "gaussian"),
  "num_transformer_submodules": (1, None),
}
# Fields whose texts are regular expressions, and the required fields of each kind of adapter.
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "alpha_pattern")
_NEEDED = {
  "LORA": ("target_modules", "lora_alpha"),
  "ADALORA": ("target_modules", "lora_alpha", "init_r"),
  "IA3": ("target_modules",),
}
_READ = {
  *("peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "init_r"),
  *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
  *("modules_to_save", "ensure_weight_tying"),
}


def read(
  folder: Path, model_config: ModelConfig, family: Family
) -> tuple[PeftConfig, dict[str, Any]]:
  """Reads a folder of the `peft` library for a model of a family, as input for `surgery.put_on`.

  P-tuning is stored as the embeddings that its network makes, and read as prompt tuning.

  Raises:
    UserError: the folder lacks a file, a field has an unknown value, or a tensor is missing, has
      another shape or no place in the model.
  """
  fields, tensors = _read_fields(folder), _Tensors(folder)
  method = _TYPES[fields["peft_type"]]
  if method in ("prompt", "prefix"):
    config, flat = _read_virtual(method, tensors, model_config)
  else:
    entries = find_entries(model_config, family)
    projections = find_projections(entries, model_config)
    read_all = _read_ia3 if method == "ia3" else _read_lora
    config, flat = read_all(fields, tensors, projections)
    own = whole.read(fields, tensors, entries, family, model_config)
    unfrozen = tuple(f"^{name}$" for name in own)
    config, flat = dataclasses.replace(config, unfrozen=unfrozen), flat | own
  tensors.refuse_unread()
  for name, info in describe_adapters(model_config, config).items():
    if name not in flat:
      raise UserError(f"{folder}: no tensor of {name!r}, which is trained with the adapters.")
    if (found := flat[name].shape) != info.shape:
      raise UserError(f"{folder}: {name} is {list(found)}, the model makes it {list(info.shape)}.")
  return config, traverse_util.unflatten_dict(flat, sep="/")


def merge_folder(model: GPT, folder: Path, family: Family) -> GPT:
  """Merges the adapters of a folder into a model; UserError as `read` and `merge`."""
  return merge(put_on(model, *read(folder, model.config, family)))


def write(
  folder: Path,
  model_config: ModelConfig,
  config: PeftConfig,
  adapters: Mapping[str, Any],
  family: Family,
  base: str = "",
) -> None:
  """Writes trained parameters, a nested dict, into an existing folder; `base` is the model's name.

  Raises:
    UserError: the `peft` library lacks the method, or the family a place for an adapter.
  """
  flat = {name: np.asarray(x, np.float32) for name, x in tree.named_leaves(adapters).items()}
  fields: dict[str, Any] = {
    "task_type": _task_type(model_config, family),
    "base_model_name_or_path": base or None,
    "inference_mode": True,
  }
  entries = find_entries(model_config, family)
  projections = find_projections(entries, model_config)
  config = by_name(config, describe_parameters(model_config))
  match config.method:
    case "lora" | "adalora" | "dora":
      own, tensors = _write_lora(config, flat, projections)
    case "ia3":
      own, tensors = _write_ia3(config, flat, projections)
    case "prompt" | "ptuning" | "prefix":
      own, tensors = _write_virtual(config, flat, model_config)
    case _:
      raise UserError(f"peft.method={config.method!r} is not one of the `peft` library.")
  if config.method not in VIRTUAL_METHODS:
    adapted = {one.module for one in projections if is_target(own, one.modules[0])}
    has_bias = config.method != "ia3"
    more = whole.write(flat, adapted, entries, family, model_config, has_bias=has_bias)
    own, tensors = own | more[0], tensors | more[1]
  elif config.unfrozen or model_config.label_head.num_labels:
    raise UserError(
      f"peft.method={config.method!r}: parameters that are trained whole are not written with it."
    )
  (folder / CONFIG).write_text(json.dumps(fields | own, indent=2, sort_keys=True) + "\n")
  contiguous = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
  safetensors.numpy.save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})


def _read_fields(folder: Path) -> dict[str, Any]:
  path = folder / CONFIG
  if not path.exists():
    raise UserError(f"{folder}: no {CONFIG}, so not a folder of the `peft` library.")
  fields = read_json(path)
  if not isinstance(fields, dict):
    raise UserError(f"{path}: not an object of fields.")
  if fields.get("peft_type") not in _TYPES:
    raise UserError(
      f"{path}: no peft_type {fields.get('peft_type')!r} is known, only {', '.join(_TYPES)}."
    )
  for name, value in fields.items():
    if name in _ONLY:
      if value not in _ONLY[name]:
        known = ", ".join(map(repr, _ONLY[name]))
        raise UserError(f"{path}: field {name!r} is {value!r}; only {known} is known.")
    elif value and name not in _NOT_READ | _READ:
      raise UserError(f"{path}: field {name!r} is {value!r}, which is not known.")
  for name in _NEEDED.get(fields["peft_type"], ()):
    if fields.get(name) is None:
      raise UserError(f"{path}: no field {name!r}, which {fields['peft_type']} needs.")
  for name in _PATTERNS:
    value = fields.get(name) or []
    for pattern in [value] if isinstance(value, str) else value:
      try:
        re.compile(pattern)
      except re.error as error:
        raise UserError(
          f"{path}: field {name!r} has {pattern!r}, which is no regular expression ({error})."
        ) from error
  return fields


class _Tensors:
  """The tensors of a folder, float32, and the names of those that were read."""

  def __init__(self, folder: Path):
    self._path = folder / WEIGHTS
    if not self._path.exists():
      raise UserError(f"{folder}: no {WEIGHTS}; pickles (.bin) are not read.")
    try:
      self._tensors = safetensors.numpy.load_file(self._path)
    except safetensors.SafetensorError as error:
      raise UserError(f"{self._path}: damaged or cut short ({error}).") from error
    self._unread = set(self._tensors)

  def __contains__(self, name: str) -> bool:
    return name in self._tensors

  def take(self, name: str, *shape: int) -> np.ndarray:
    """The tensor `name`, which must have the `shape` if one is given; -1 stands for any size."""
    if name not in self._tensors:
      raise UserError(f"{self._path}: no tensor {name!r}, which {CONFIG} asks for.")
    self._unread.discard(name)
    tensor = self._tensors[name].astype(np.float32)
    found = [*tensor.shape] + [1] * (len(shape) - tensor.ndim)
    right = [size if one == -1 else one for size, one in zip(found, shape, strict=False)]
    if shape and [*tensor.shape] != right:
      raise UserError(
        f"{self._path}: {name!r} is {[*tensor.shape]}, not {right} as for this model; the adapters "
        "are of another one."
      )
    return tensor

  def refuse_unread(self) -> None:
    if self._unread:
      raise UserError(f"{self._path}: tensor {min(self._unread)!r} has no place in the model.")


def _task_type(model_config: ModelConfig, family: Family) -> str | None:
  """The field by which the library chooses its class of model; None is its general class."""
  if family.label_head is not None:
    if "." in family.label_head.theirs:
      return None  # Other classes train the whole module that contains the head (RoBERTa).
    architecture = family.architecture(model_config)
    return next(task for name, task in _TASK_TYPES.items() if architecture.endswith(name))
  if model_config.encoder_layers:
    return "SEQ_2_SEQ_LM"
  if model_config.visibility == "bidirectional":
    return None if model_config.head.transform else "FEATURE_EXTRACTION"
  return "CAUSAL_LM"


def _path(name: str, leaf: str) -> str:
  """'blocks/mlp/up/kernel' -> 'blocks/mlp/up/LEAF'."""
  return f"{name.removesuffix('kernel')}{leaf}"


def _read_lora(fields, tensors: _Tensors, projections):
  flat: dict[str, np.ndarray] = {}
  rules = []
  method = "dora" if fields.get("use_dora") else _TYPES[fields["peft_type"]]
  for projection in projections:
    adapted = [is_target(fields, module) for module in projection.modules]
    if not any(adapted):
      continue
    if method == "dora" and not all(adapted):
      raise UserError(
        f"{CONFIG}: use_dora with layers_to_transform is not known: {projection.target!r} has a "
        "magnitude in every layer, or in none."
      )
    take = functools.partial(_take_layers, tensors, projection, adapted)
    # Each layer of 'adalora' is stored without the triplets whose singular value was set to 0.
    fewer = method == "adalora"
    a_name, b_name = (_factor(method, part) for part in "AB")
    first = projection.tensor_names(a_name)[adapted.index(True)]
    rank = fields["init_r"] if fewer else len(tensors.take(first, -1, projection.inputs))
    size = -1 if fewer else rank
    a = [_padded(x, rank, 0) for x in take(a_name, size, projection.inputs)]
    b = [_padded(x, rank, 1) for x in take(b_name, projection.outputs, size)]
    extra = [{} for _ in projection.names]
    if method == "adalora":
      values = np.stack([_padded(x, rank, 0)[:, 0] for x in take("lora_E", -1, 1)])
      extra = [{"singular_values": values} for _ in projection.names]
    elif method == "dora":
      magnitudes = projection.split(take("lora_magnitude_vector", projection.outputs))
      extra = [{"magnitude": magnitude} for magnitude in magnitudes]
    a = np.stack(a).swapaxes(1, 2).reshape(projection.layers, *projection.in_shape, rank)
    alpha = _alpha(fields, projection, adapted)
    for name, b_of_name, more in zip(
      projection.names, projection.split(b, rank), extra, strict=True
    ):
      rules.append((f"^{name}$", {"rank": rank, "alpha": alpha}))
      leaves = {"lora_a": a, "lora_b": b_of_name} | more
      flat |= {_path(name, leaf): value for leaf, value in leaves.items()}
  stabilized = bool(fields.get("use_rslora")) and method != "adalora"
  target_rank = {"target_rank": 1} if method == "adalora" else {}
  return PeftConfig(method, tuple(rules), rank_stabilized=stabilized, **target_rank), flat


def _take_layers(
  tensors: _Tensors, projection: Projection, adapted: Sequence[bool], suffix: str, *shape: int
) -> list[np.ndarray]:
  """A tensor for each layer; zeros for a layer that is not adapted, with sizes of 0 for -1."""
  nothing = np.zeros([max(size, 0) for size in shape], np.float32)
  return [
    tensors.take(name, *shape) if is_adapted else nothing
    for name, is_adapted in zip(projection.tensor_names(suffix), adapted, strict=True)
  ]


def _factor(method: str, part: str) -> str:
  """The library's name of A or B."""
  return f"lora_{part}" if method == "adalora" else f"lora_{part}.weight"


def _padded(x: np.ndarray, rank: int, axis: int) -> np.ndarray:
  return np.pad(x, [(0, rank - size if i == axis else 0) for i, size in enumerate(x.shape)])


def _alpha(fields: Mapping[str, Any], projection: Projection, adapted: Sequence[bool]) -> float:
  patterns = fields.get("alpha_pattern") or {}
  found = {
    float(
      next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)),
        fields["lora_alpha"],
      )
    )
    for module, is_adapted in zip(projection.modules, adapted, strict=True)
    if is_adapted
  }
  if len(found) > 1:
    raise UserError(f"{CONFIG}: alpha_pattern: {projection.target!r} differs between layers.")
  return found.pop()


def _write_lora(config: PeftConfig, flat, projections):
  kernels = _kernels(flat, "lora_a")
  options = {
    name: (found.get("rank", config.rank), found.get("alpha", config.alpha))
    for name, found in tree.match_rules(kernels, config.rules, "peft.targets").items()
  }
  tensors: dict[str, np.ndarray] = {}
  ranks, alphas = {}, {}
  adapted = list(_adapted(projections, options))
  for projection in adapted:
    rank, alpha, a, b = _joined(projection, options, flat, config)
    ranks[projection.pattern], alphas[projection.pattern] = rank, alpha
    parts = {_factor(config.method, "A"): a, _factor(config.method, "B"): projection.join(b, rank)}
    if config.method == "adalora":
      parts |= {"lora_A": a[:, :, :-1], "lora_E": a[:, :, -1:]}
    for part, layers in parts.items():
      tensors |= dict(zip(projection.tensor_names(part), layers, strict=True))
    if config.method == "dora":
      if lacking := [name for name in projection.names if name not in options]:
        raise UserError(f"{projection.target!r} cannot be written: {lacking[0]!r} is not adapted.")
      magnitudes = projection.join([flat[_path(name, "magnitude")] for name in projection.names])
      names = projection.tensor_names("lora_magnitude_vector")
      tensors |= dict(zip(names, magnitudes, strict=True))
  first = next(iter(ranks))
  fields = {
    "target_modules": _targets(adapted),
    "fan_in_fan_out": any(projection.fan_in_fan_out for projection in adapted),
    "lora_dropout": 0.0,
  }
  if config.method == "adalora":
    # The library has one rank and one factor for all; the values make up for other ones.
    scales = {name: config.scale(rank, alphas[name]) for name, rank in ranks.items()}
    rank = max(ranks.values())
    for projection in adapted:
      for part, axis in (("A", 0), ("B", 1), ("E", 0)):
        factor = scales[projection.pattern] / scales[first] if part == "E" else 1.0
        for name in projection.tensor_names(f"lora_{part}"):
          tensors[name] = np.float32(factor) * _padded(tensors[name], rank, axis)
    return fields | {
      "peft_type": "ADALORA",
      "init_r": rank,
      "target_r": config.target_rank,
      "lora_alpha": scales[first] * rank,
      "total_step": 1,  # The library requires one, even if nothing is trained.
    }, tensors
  return fields | {
    "peft_type": "LORA",
    "r": ranks[first],
    "lora_alpha": alphas[first],
    "rank_pattern": {name: rank for name, rank in ranks.items() if rank != ranks[first]},
    "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != alphas[first]},
    "use_rslora": config.rank_stabilized,
    "use_dora": config.method == "dora",
  }, tensors


def _kernels(flat: Mapping[str, Any], leaf: str) -> list[str]:
  """Names of the kernels that have an adapter 'LEAF'."""
  return [name.removesuffix(leaf) + "kernel" for name in flat if name.endswith(f"/{leaf}")]


def _adapted(projections, names: Mapping[str, Any]) -> Iterator[Projection]:
  """Yields the projections that contain one of the names; UserError if a name is in none."""
  held = {name for projection in projections for name in projection.names}
  if homeless := set(names) - held:
    raise UserError(f"the family has no projection for {min(homeless)!r}.")
  for projection in projections:
    if any(name in names for name in projection.names):
      yield projection


def _joined(projection: Projection, options, flat, config: PeftConfig):
  """Rank, alpha, A [L, rank, in] and B [L, rank, *out] of each name, joined to one product.

  Singular values are the last column of A.
  """
  adapted = [name for name in projection.names if name in options]
  a_of = {
    name: flat[_path(name, "lora_a")].reshape(projection.layers, -1, options[name][0])
    for name in adapted
  }
  if config.method == "adalora":
    for name, a in a_of.items():
      a_of[name] = np.concatenate([a, flat[_path(name, "singular_values")][:, None]], axis=1)
  b_of = {name: flat[_path(name, "lora_b")] for name in adapted}
  rank, alpha = options[adapted[0]]
  same = all(
    options[name] == (rank, alpha) and np.array_equal(a_of[name], a_of[adapted[0]])
    for name in adapted
  )
  if same:
    total, a, places = rank, a_of[adapted[0]], dict.fromkeys(adapted, 0)
  else:
    ranks = [options[name][0] for name in adapted]
    total = sum(ranks)
    a = np.concatenate([a_of[name] for name in adapted], axis=-1)
    places = dict(zip(adapted, np.cumsum([0, *ranks[:-1]]), strict=True))
  scale = config.scale(rank, alpha)
  b = []
  for name in projection.names:
    joined = np.zeros((projection.layers, total, *projection.out_shape(name)), np.float32)
    if name in b_of:
      own_rank = options[name][0]
      rows = slice(places[name], places[name] + own_rank)
      joined[:, rows] = b_of[name] * np.float32(config.scale(*options[name]) / scale)
    b.append(joined)
  alpha = scale * (math.sqrt(total) if config.rank_stabilized else total)
  return total, alpha, a.swapaxes(1, 2), b


def _read_ia3(fields, tensors: _Tensors, projections):
  flat: dict[str, np.ndarray] = {}
  rules = []
  for projection in projections:
    names = projection.tensor_names("ia3_l")
    adapted = [is_target(fields, module) for module in projection.modules]
    if not any(adapted):
      continue
    of_input = len(tensors.take(names[adapted.index(True)], -1, -1)) == 1
    shape = (1, projection.inputs) if of_input else (projection.outputs, 1)
    # Parts that are not adapted are scaled by 1.
    layers = _take_layers(tensors, projection, adapted, "ia3_l", *shape)
    layers = [x if is_adapted else x + 1 for x, is_adapted in zip(layers, adapted, strict=True)]
    if of_input:
      ours = [np.stack(layers).reshape(projection.layers, *projection.in_shape)]
      ours *= len(projection.names)
    else:
      ours = projection.split([layer[:, 0] for layer in layers])
    for name, scale in zip(projection.names, ours, strict=True):
      rules.append((f"^{name}$", {"scale_input": of_input}))
      flat[_path(name, "ia3_scale")] = scale
  return PeftConfig("ia3", targets=tuple(rules)), flat


def _write_ia3(config: PeftConfig, flat, projections):
  kernels = _kernels(flat, "ia3_scale")
  options = tree.match_rules(kernels, config.rules, "peft.targets")
  tensors: dict[str, np.ndarray] = {}
  adapted, feedforward = list(_adapted(projections, options)), []
  for projection in adapted:
    names = projection.tensor_names("ia3_l")
    of_input = {options.get(name, {}).get("scale_input", False) for name in projection.names}
    if of_input == {True} and len(projection.names) == 1:
      feedforward.append(projection)
      scale = flat[_path(projection.names[0], "ia3_scale")]
      vectors = scale.reshape(projection.layers, 1, -1)
    elif of_input == {False}:
      ours = [
        flat.get(
          _path(name, "ia3_scale"),
          np.ones((projection.layers, *projection.out_shape(name)), np.float32),
        )
        for name in projection.names
      ]
      vectors = [vector[:, None] for vector in projection.join(ours)]
    else:
      raise UserError(f"{projection.target!r} cannot be written: it scales inputs of several.")
    tensors |= dict(zip(names, vectors, strict=True))
  return {
    "peft_type": "IA3",
    "target_modules": _targets(adapted),
    "feedforward_modules": _targets(feedforward),
    "fan_in_fan_out": any(projection.fan_in_fan_out for projection in adapted),
  }, tensors


def _targets(projections: Sequence[Projection]) -> list[str]:
  return sorted(target for projection in projections for target in projection.targets)


def _prefix_shape(config: ModelConfig, tokens: int) -> tuple[int, ...]:
  """Shape of a prefix, [P, L, 2, K, H]: keys and values of each layer in turn."""
  return (tokens, config.num_layers, 2, config.num_kv_heads, config.head_dim)


def _read_virtual(method: str, tensors: _Tensors, model_config: ModelConfig):
  embeddings = tensors.take("prompt_embeddings")
  tokens = embeddings.shape[0]
  config = PeftConfig(method, virtual_tokens=tokens)
  if method == "prompt":
    return config, {"prompt": embeddings}
  shape = _prefix_shape(model_config, tokens)
  if embeddings.shape[1] != math.prod(shape[1:]):
    raise UserError(
      f"{WEIGHTS}: prompt_embeddings is {list(embeddings.shape)}, the model makes it "
      f"{[tokens, math.prod(shape[1:])]}."
    )
  keys, values = embeddings.reshape(shape).transpose(2, 1, 0, 3, 4)
  names = ("blocks/attention/prefix_keys", "blocks/attention/prefix_values")
  return config, dict(zip(names, (keys, values), strict=True))


def _write_virtual(config: PeftConfig, flat, model_config: ModelConfig):
  fields = {
    "num_virtual_tokens": config.virtual_tokens,
    "num_layers": model_config.num_layers,
    "num_transformer_submodules": 1,
  }
  if config.method != "prefix":
    prompt = flat["prompt"]
    if config.method == "ptuning":
      model = abstract_model(model_config, config)
      nnx.update(model, traverse_util.unflatten_dict(flat, sep="/"))
      prompt = np.asarray(model.embeddings())
      fields |= {"encoder_hidden_size": model_config.embed_dim}
    return fields | {
      "peft_type": "P_TUNING" if config.method == "ptuning" else "PROMPT_TUNING",
      "token_dim": model_config.embed_dim,
      "num_attention_heads": model_config.num_heads,
    }, {"prompt_embeddings": prompt}
  pair = [flat[f"blocks/attention/prefix_{part}"] for part in ("keys", "values")]
  embeddings = np.stack(pair).transpose(2, 1, 0, 3, 4).reshape(config.virtual_tokens, -1)
  return fields | {
    "peft_type": "PREFIX_TUNING",
    "token_dim": model_config.num_kv_heads * model_config.head_dim,
    "num_attention_heads": model_config.num_kv_heads,
    "encoder_hidden_size": model_config.embed_dim,
    "prefix_projection": False,
  }, {"prompt_embeddings": embeddings}
