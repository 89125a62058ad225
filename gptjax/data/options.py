"""The data keys of a config, each read and checked here and nowhere else."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gptjax.errors import UserError, check_number, did_you_mean

SOURCES = ("text", "jsonl", "parquet", "tfds", "hf", "stdlib")
RECORD_SOURCES = ("jsonl", "parquet", "tfds", "hf")
UNDECODABLE = ("error", "skip")


@dataclasses.dataclass(frozen=True)
class PartOptions:
  """Options of one corpus. `configs/parts/data.py` says what each key means.

  `key` is the section of the config that they come from, 'data' or 'data.mixture.NAME'.
  """

  key: str
  source: str
  path: str
  text_key: str
  split: str
  validation_split: str
  validation_path: str
  validation_fraction: float
  undecodable: str
  tfds_data_dir: str


@dataclasses.dataclass(frozen=True)
class DataOptions:
  """Options of the data that every task uses. A single corpus is a mixture of one part.

  Attributes:
    decoder_start: the token that a decoder beside an encoder starts from.
    scores_at: the token whose hidden state scores a text: the 'first' in a bidirectional model, the
      'last' in a causal one.
    row_multiple: where rows are packed anew for each batch, their number is a multiple of this.
  """

  seed: int
  batch_size: int
  sequence_length: int
  tokenizer: str
  cache_dir: str
  decoder_start: int
  scores_at: str
  row_multiple: int
  parts: dict[str, PartOptions]
  weights: dict[str, float]


def read_options(config: Any, *, row_multiple: int = 1) -> DataOptions:
  """Reads `config` (attributes and keys, such as a ConfigDict); UserError for a bad value."""
  data = config.data
  mixture = data.mixture
  if mixture:
    parts = {name: _read_part(part, f"data.mixture.{name}") for name, part in mixture.items()}
    weights = {
      name: _read(part, "weight", f"data.mixture.{name}") for name, part in mixture.items()
    }
  else:
    part = _read_part(data, "data")
    parts, weights = {part.source: part}, {part.source: 1.0}
  for name, weight in weights.items():
    check_number(f"data.mixture.{name}.weight", weight, above=0)
  check_number("seed", config.seed, at_least=0, below=2**63)
  check_number("batch_size", config.batch_size, at_least=1)
  check_number("sequence_length", config.sequence_length, at_least=1)
  return DataOptions(
    seed=config.seed,
    batch_size=config.batch_size,
    sequence_length=config.sequence_length,
    tokenizer=config.tokenizer,
    cache_dir=data.cache_dir,
    decoder_start=config.model.decoder_start,
    scores_at="first" if config.model.visibility == "bidirectional" else "last",
    row_multiple=row_multiple,
    parts=parts,
    weights=weights,
  )


def check_path(part: PartOptions) -> None:
  """Raises UserError for a corpus without the path that its source needs."""
  if part.source != "stdlib" and not part.path:
    raise UserError(
      f"{part.key}.path: a {part.source!r} source needs one. Set --config.{part.key}.path=."
    )


def check_records(parts: Mapping[str, PartOptions], task: str) -> None:
  """Raises UserError for a part of plain text, if the task takes records with keys."""
  for name, part in parts.items():
    if part.source not in RECORD_SOURCES:
      raise UserError(
        f"data part {name!r}: a {part.source!r} source has no records. "
        f"task={task!r} takes {', '.join(RECORD_SOURCES)}."
      )


def _read_part(part: Mapping[str, Any], key: str) -> PartOptions:
  names = [field.name for field in dataclasses.fields(PartOptions) if field.name != "key"]
  options = PartOptions(key, **{name: _read(part, name, key) for name in names})
  if options.source not in SOURCES:
    raise UserError(
      f"{key}.source: no source {options.source!r}. {did_you_mean(options.source, SOURCES)}"
    )
  if options.undecodable not in UNDECODABLE:
    raise UserError(
      f"{key}.undecodable: no policy {options.undecodable!r}. "
      f"{did_you_mean(options.undecodable, UNDECODABLE)}"
    )
  if not (options.validation_split or options.validation_path):
    check_number(f"{key}.validation_fraction", options.validation_fraction, above=0, below=1)
  return options


def _read(part: Mapping[str, Any], name: str, key: str) -> Any:
  if name not in part:
    raise UserError(f"{key}: no key {name!r}. Start the part from configs/parts/data.py.")
  return part[name]
