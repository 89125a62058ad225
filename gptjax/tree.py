"""Parameters by name: turns a tree into names and matches names to rules."""

import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

from gptjax.errors import UserError

# Prefix of a pattern for the roles of parameters, not for their names.
_ROLE = "role:"


def key_name(path: Sequence[Any]) -> str:
  """'blocks/attention/query/kernel' for the key path that JAX gives a leaf."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
  """Returns {name: leaf} in the order of `jax.tree.leaves`."""
  return {key_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(function, tree: Any, *rest: Any) -> Any:
  """`jax.tree.map` whose function receives the leaf's name before the leaves."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: function(key_name(path), *leaves), tree, *rest
  )


def without(params: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
  """A nested dict of the parameters that are not among the names."""
  flat = traverse_util.flatten_dict(params, sep="/")
  kept = {name: x for name, x in flat.items() if name not in names}
  return traverse_util.unflatten_dict(kept, sep="/")


def count_bytes(abstract: Any) -> tuple[int, int]:
  """Bytes of the arrays of an abstract tree, in total and on one device."""
  leaves = jax.tree.leaves(abstract)
  total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  shard = sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
  )
  return total, shard


def name_roles(rules: Sequence[tuple[str, Any]], roles: Mapping[str, str]) -> list[tuple[str, Any]]:
  """Replaces 'role:PATTERN' in rules by the names of the parameters with such a role.

  Args:
    rules: (pattern, value) pairs, as in `match_rules`.
    roles: {name: role}.
  """
  named = []
  for rule in rules:
    if isinstance(rule, str) or len(rule) != 2:
      raise UserError(f"rule {rule!r} is not a pair of a pattern and what it gives.")
    pattern, value = rule
    if pattern.startswith(_ROLE):
      wanted = re.compile(pattern.removeprefix(_ROLE))
      names = [re.escape(name) for name, role in roles.items() if wanted.fullmatch(role)]
      # If there are none, a pattern that is found nowhere.
      pattern = f"^({'|'.join(names)})$" if names else "(?!)"
    named.append((pattern, value))
  return named


def match_rules(
  names: Iterable[str], rules: Sequence[tuple[str, Any]], what: str
) -> dict[str, Any]:
  """Gives every name the value of the first rule whose regular expression is found in it.

  Args:
    names: parameter names such as 'blocks/mlp/up/kernel'.
    rules: (pattern, value) pairs in order of precedence; patterns are searched, not anchored.
    what: what the rules decide ("weight decay"), for the error message.

  Raises:
    UserError: a pattern is not a regular expression, or a name is matched by no rule.
  """
  compiled = []
  for pattern, value in rules:
    try:
      compiled.append((re.compile(pattern), value))
    except re.error as error:
      raise UserError(f"{what}: rule {pattern!r} is not a regular expression: {error}.") from None
  matched = {}
  for name in names:
    for pattern, value in compiled:
      if pattern.search(name):
        matched[name] = value
        break
    else:
      patterns = ", ".join(repr(pattern) for pattern, _ in rules)
      raise UserError(
        f"{what}: no rule matches parameter {name!r} (rules: {patterns}). "
        "End the list with a rule for '.*'."
      )
  return matched
