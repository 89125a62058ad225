"""Parameters that are trained whole beside adapters: `modules_to_save` and `bias` of `peft`."""

from collections.abc import Container, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gptjax.errors import UserError
from gptjax.interop.family import Family
from gptjax.interop.tensors import Entry
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import describe_parameters
from gptjax.peft.projections import PREFIX, is_saved, is_target


class Tensors(Protocol):
  """The tensors of a file of adapters, by name."""

  def __contains__(self, name: str) -> bool: ...

  def take(self, name: str, *shape: int) -> np.ndarray: ...


def read(
  fields: Mapping[str, Any],
  tensors: Tensors,
  entries: Sequence[Entry],
  family: Family,
  model_config: ModelConfig,
) -> dict[str, np.ndarray]:
  """Reads the model's own parameters from the file, which must match its `fields`.

  Raises:
    UserError: one is missing in a layer, or was trained separately from the one it is tied to.
  """
  parameters = describe_parameters(model_config)
  _check_ties(tensors, _ties(entries, family))
  found = {}
  for entry in entries:
    names = [name for name, _ in entry.names(parameters)]
    written = [_written(tensors, name) for name in names]
    if not any(name in tensors for name in written) and not any(
      _is_asked_for(fields, name) for name in names
    ):
      continue
    shape = entry.shape(parameters, model_config)
    layers = [entry.split(tensors.take(name, *shape), parameters, model_config) for name in written]
    for ours, parts in zip(entry.ours, zip(*layers, strict=True), strict=True):
      found[ours] = np.stack(parts).reshape(parameters[ours].shape)
  return found


def write(
  flat: Mapping[str, np.ndarray],
  adapted: Container[str],
  entries: Sequence[Entry],
  family: Family,
  model_config: ModelConfig,
  *,
  has_bias: bool,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Returns the fields and the tensors for the model's own parameters that are trained.

  Args:
    flat: all that is trained, adapters and parameters of the model.
    adapted: the modules of projections that have adapters, `{i}` being the layer.
    entries: the tensors of the model.
    family, model_config: the model's.
    has_bias: whether the library's method has fields for biases and tied embeddings.

  Raises:
    UserError: the library's fields cannot express this set of parameters.
  """
  parameters = describe_parameters(model_config)
  trained = [entry for entry in entries if any(name in flat for name in entry.ours)]
  for entry in trained:
    for name in entry.ours:
      if name not in flat:
        raise _apart(next(name for name in entry.ours if name in flat), name)
  bias, saved = _say(trained, entries, adapted, has_bias=has_bias)
  modules, tensors = [], {}
  for entry in trained:
    for name, index in entry.names(parameters):
      module, leaf = _module_and_leaf(name)
      layer = entry.join([flat[ours][index] for ours in entry.ours], parameters, model_config)
      if entry in saved:
        modules.append(module)
      elif _module_and_leaf(entry.theirs)[0] in adapted:
        name = f"{module}.base_layer.{leaf}"
      tensors[PREFIX + name] = layer
  ties = {copy: name for copy, name in _ties(entries, family).items() if PREFIX + name in tensors}
  tensors |= {PREFIX + copy: tensors[PREFIX + name] for copy, name in ties.items()}
  tied_modules = set(modules) & {_module_and_leaf(name)[0] for name in ties.values()}
  if tied_modules and not has_bias:
    raise UserError(
      f"{min(tied_modules)!r} is trained whole and tied to another tensor, which the `peft` "
      "library cannot be told of this method."
    )
  fields: dict[str, Any] = {"modules_to_save": list(dict.fromkeys(modules)) or None}
  if has_bias:
    fields |= {"bias": bias, "ensure_weight_tying": bool(tied_modules)}
  return fields, tensors


def _say(
  trained: Sequence[Entry], entries: Sequence[Entry], adapted: Container[str], *, has_bias: bool
) -> tuple[str, list[Entry]]:
  """The value of the field `bias`, and the trained tensors that it does not cover, which belong to
  whole modules."""
  biases = [entry for entry in entries if entry.theirs.endswith(".bias")]
  values = {"none": []}
  if has_bias:
    values["lora_only"] = [one for one in biases if _module_and_leaf(one.theirs)[0] in adapted]
    values["all"] = biases
  problems = []
  for value, said in values.items():
    rest = [entry for entry in trained if entry not in said]
    lacking = [entry for entry in said if entry not in trained]
    problem = _find_apart(rest, trained, entries, adapted)
    if not lacking and problem is None:
      return value, rest
    problems.append(problem)
  raise next(problem for problem in problems if problem is not None)


def _find_apart(
  saved: Sequence[Entry],
  trained: Sequence[Entry],
  entries: Sequence[Entry],
  adapted: Container[str],
) -> UserError | None:
  """Reasons why some tensors are not those of whole modules without adapters."""
  for entry in saved:
    module, _ = _module_and_leaf(entry.theirs)
    if module in adapted:
      return UserError(
        f"{entry.ours[0]!r} is trained, and its projection has adapters, which the `peft` library "
        "does not have together."
      )
    for other in entries:
      if _module_and_leaf(other.theirs)[0] == module and other not in trained:
        return _apart(entry.ours[0], other.ours[0])
  return None


def _apart(trained: str, frozen: str) -> UserError:
  return UserError(
    f"{trained!r} is trained and {frozen!r} is not, of which the `peft` library trains both or "
    "neither: add it to peft.unfrozen."
  )


def _is_asked_for(fields: Mapping[str, Any], name: str) -> bool:
  """Whether, by the fields, a tensor of the model is in the file."""
  module, leaf = _module_and_leaf(name)
  if leaf == "bias":
    match fields.get("bias"):
      case "all":
        return True
      case "lora_only" if is_target(fields, module):
        return True
  return is_saved(fields, module)


def _written(tensors: Tensors, name: str) -> str:
  """The name in the file of a tensor of the model; it differs if the module has an adapter."""
  module, leaf = _module_and_leaf(name)
  inside = f"{PREFIX}{module}.base_layer.{leaf}"
  return inside if inside in tensors else PREFIX + name


def _ties(entries: Sequence[Entry], family: Family) -> dict[str, str]:
  """{tensor of the library's model: the tensor that it is tied to}; empty for a model with a label
  head, which has no output projection."""
  if family.label_head is not None:
    return {}
  own = {entry.theirs for entry in entries}
  return {copy: name for copy, name in family.copies.items() if copy not in own and name in own}


def _check_ties(tensors: Tensors, ties: Mapping[str, str]) -> None:
  """Refuses a tensor whose tied copies are missing or differ: the library trained it alone."""
  for name in set(ties.values()):
    copies = [copy for copy, original in ties.items() if original == name]
    there = [copy for copy in copies if PREFIX + copy in tensors]
    if not there and PREFIX + name not in tensors:
      continue
    both = there and PREFIX + name in tensors
    if not both or not all(_equal(tensors, PREFIX + copy, PREFIX + name) for copy in there):
      raise UserError(
        f"{name!r} is trained apart from {copies[0]!r}, to which the model ties it: untie the two "
        "in the model first."
      )


def _equal(tensors: Tensors, one: str, other: str) -> bool:
  return np.array_equal(tensors.take(one), tensors.take(other))


def _module_and_leaf(name: str) -> tuple[str, str]:
  """Splits a name: 'model.norm.weight' -> ('model.norm', 'weight')."""
  module, _, leaf = name.rpartition(".")
  return module, leaf
