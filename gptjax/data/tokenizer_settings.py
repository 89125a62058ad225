"""Settings in the files beside a tokenizer's own: special tokens by role, and the chat template."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.small_files import parse_json

_CONFIG = "tokenizer_config.json"
_ROLES = "special_tokens_map.json"
_GENERATION = "generation_config.json"
_TEMPLATE = "chat_template.jinja"
FILES = (_CONFIG, _ROLES, _GENERATION, _TEMPLATE)
# The model's own file; these of its fields are read.
_MODEL = "config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a Hugging Face tokenizer; one without such files has the defaults.

  Attributes:
    roles: texts of special tokens by role, such as 'bos_token', 'eos_token', 'unk_token'.
    ids: the fields 'bos_token_id', 'eos_token_id' and 'pad_token_id' that are there; each an id or
      a list of ids.
    adds_bos: whether a text begins with 'bos_token'; None if the files do not say.
    lowercase: whether a WordPiece vocabulary is of lower-cased text.
    legacy: whether SentencePiece puts a space after each special token, not at the start alone;
      None if the files do not say.
    added: text of the tokens beyond the vocabulary, by id, with whether each is special.
    extra_ids: number of T5's sentinels beyond the vocabulary.
    chat_template: in Jinja, or None.
  """

  roles: Mapping[str, str]
  ids: Mapping[str, int | list[int]]
  adds_bos: bool | None
  lowercase: bool
  legacy: bool | None
  added: Mapping[int, tuple[str, bool]]
  extra_ids: int
  chat_template: str | None

  @property
  def end_ids(self) -> Sequence[int]:
    """The ids with which generation ends."""
    ids = self.ids.get("eos_token_id", ())
    return [ids] if isinstance(ids, int) else ids


def read_folder(folder: Path) -> dict[str, bytes]:
  """Reads the `FILES` that are in a folder. Ids that only the model's config.json names are added
  to generation_config.json, as `transformers` does."""
  files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
  if (folder / _MODEL).is_file():
    generation = parse_json(files.get(_GENERATION, b"{}"), _GENERATION)
    model = parse_json((folder / _MODEL).read_bytes(), _MODEL)
    if added := {name: model[name] for name in _named_ids(model).keys() - _named_ids(generation)}:
      files[_GENERATION] = json.dumps(generation | added, sort_keys=True).encode()
  return files


def read(files: Mapping[str, bytes]) -> Settings:
  """Reads settings from the content of `FILES`; UserError for one that is not JSON."""
  config, roles, generation = (
    parse_json(files[name], name) if name in files else {}
    for name in (_CONFIG, _ROLES, _GENERATION)
  )
  added = config.get("added_tokens_decoder", {})
  return Settings(
    roles=_texts(roles) | _texts(config),
    ids=_named_ids(generation),
    adds_bos=config.get("add_bos_token"),
    lowercase=config.get("do_lower_case", True),
    legacy=config.get("legacy"),
    added={int(i): (token["content"], token["special"]) for i, token in added.items()},
    extra_ids=config.get("extra_ids", 0),
    chat_template=(
      files[_TEMPLATE].decode() if _TEMPLATE in files else _default(config.get("chat_template"))
    ),
  )


def write(
  roles: Mapping[str, str], end_ids: list[int], adds_bos: bool, chat_template: str | None
) -> dict[str, bytes]:
  """Returns the files from which `read` gives these settings."""
  config = {**roles, "add_bos_token": adds_bos, "chat_template": chat_template}
  return {
    _CONFIG: json.dumps(config).encode(),
    _GENERATION: json.dumps({"eos_token_id": end_ids}).encode(),
  }


def chat_template_files(template: str, roles: Mapping[str, str]) -> dict[str, bytes]:
  """Returns files with a chat template and roles, to replace the tokenizer's own."""
  return {_TEMPLATE: template.encode(), _ROLES: json.dumps(dict(roles)).encode()}


def _named_ids(values: Mapping[str, Any]) -> dict[str, Any]:
  return {name: values[name] for name in _IDS if values.get(name) is not None}


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
  """The texts of the tokens among the values, each given as text or as a description."""
  contents = {
    role: value.get("content") if isinstance(value, dict) else value
    for role, value in values.items()
    if role.endswith("_token")
  }
  return {role: text for role, text in contents.items() if isinstance(text, str)}


def _default(template: str | list[dict[str, str]] | None) -> str | None:
  """The template, or among several the one named 'default', as `transformers` chooses."""
  if isinstance(template, list):
    return {one["name"]: one["template"] for one in template}.get("default")
  return template
