"""Imports wings from the spine, by name and only when something asks for it.

The spine imports no wing, so that any of them can be deleted. Where a config, a checkpoint or a
command names something that a wing provides, `load` imports it then.
"""

import importlib
from typing import Any

from gptjax.errors import UserError


def load(path: str, asked_by: str) -> Any:
  """Imports an object of a wing.

  Args:
    path: 'gptjax.WING.MODULE:NAME'.
    asked_by: what needs it, as a user would write it ("peft.method='lora'"), for the error.

  Raises:
    UserError: the wing is not installed.
  """
  module, _, name = path.partition(":")
  try:
    return getattr(importlib.import_module(module), name)
  except ModuleNotFoundError as error:
    if not f"{module}.".startswith(f"{error.name}."):
      raise  # A library that the wing needs; the message names it.
    raise UserError(f"{asked_by} needs {error.name}, which is not installed here.") from error
