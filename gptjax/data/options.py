"""The data keys of a config, each read and checked here and nowhere else."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.errors import UserError, did_you_mean

SOURCES = ("text", "jsonl", "parquet", "tfds", "hf", "stdlib")
UNDECODABLE = ("error", "skip")
FORMATS = ("text", "chat", "prompt", "labels")
RECORD_SOURCES = ("jsonl", "parquet", "tfds", "hf")
TRAIN_ON = ("assistant", "all")
OVERLONG = ("truncate", "drop")
LABEL_OBJECTIVES = ("classification", "multi_label", "regression", "tagging", "span")
OBJECTIVES = ("next_token", "prefix", "masked", "span_corruption", *LABEL_OBJECTIVES)
CLASS_WEIGHTS = ("none", "balanced")


@dataclasses.dataclass(frozen=True)
class PartOptions:
  """One corpus. `configs/parts/data.py` says what each key means."""

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
  """All that decides the batches. A single corpus is a mixture of one part, named after it."""

  seed: int
  batch_size: int
  sequence_length: int
  tokenizer: str
  objective: str
  decoder_start: int
  cache_dir: str
  fim_rate: float
  spm_rate: float
  mask_rate: float
  whole_words: bool
  mean_span: float
  format: str
  chat_template: str
  train_on: str
  overlong: str
  prompt: str
  answer: str
  pair_key: str
  label_key: str
  labels: tuple[str, ...]
  label_at: str
  class_weights: str
  examples_per_label: int
  word_separator: str
  parts: dict[str, PartOptions]
  weights: dict[str, float]


def read_options(config: Any) -> DataOptions:
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
  if data.format in ("chat", "prompt", "labels"):
    parts = {name: _of_records(name, part, data.format) for name, part in parts.items()}
  for name, weight in weights.items():
    _check(weight > 0, f"data.mixture.{name}.weight", weight, "a number above 0")
  options = DataOptions(
    seed=config.seed,
    batch_size=config.batch_size,
    sequence_length=config.sequence_length,
    tokenizer=config.tokenizer,
    objective=config.objective,
    decoder_start=config.model.decoder_start,
    cache_dir=data.cache_dir,
    fim_rate=data.fim_rate,
    spm_rate=data.spm_rate,
    mask_rate=data.mask_rate,
    whole_words=data.whole_words,
    mean_span=data.mean_span,
    format=data.format,
    chat_template=data.chat_template,
    train_on=data.train_on,
    overlong=data.overlong,
    prompt=data.prompt,
    answer=data.answer,
    pair_key=data.pair_key,
    label_key=data.label_key,
    labels=tuple(data.labels),
    # Where a causal model has read all that it is to judge.
    label_at="first" if config.model.visibility == "bidirectional" else "last",
    class_weights=data.class_weights,
    examples_per_label=data.examples_per_label,
    word_separator=data.word_separator,
    parts=parts,
    weights=weights,
  )
  _check(options.seed >= 0, "seed", options.seed, "0 or more")
  _check(options.batch_size >= 1, "batch_size", options.batch_size, "1 or more")
  _check(options.sequence_length >= 1, "sequence_length", options.sequence_length, "1 or more")
  _check(0 <= options.fim_rate <= 1, "data.fim_rate", options.fim_rate, "from 0 to 1")
  _check(0 <= options.spm_rate <= 1, "data.spm_rate", options.spm_rate, "from 0 to 1")
  _check(0 < options.mask_rate < 1, "data.mask_rate", options.mask_rate, "between 0 and 1")
  _check(options.mean_span >= 1, "data.mean_span", options.mean_span, "1 or more")
  _check_choice("data.format", options.format, FORMATS)
  _check_choice("data.train_on", options.train_on, TRAIN_ON)
  _check_choice("data.overlong", options.overlong, OVERLONG)
  _check_choice("data.class_weights", options.class_weights, CLASS_WEIGHTS)
  count = options.examples_per_label
  _check(count >= 0, "data.examples_per_label", count, "0, which is all, or more")
  check_objective(options.objective)
  of_labels = options.objective in LABEL_OBJECTIVES
  if of_labels != (options.format == "labels"):
    needs = "one of " + ", ".join(LABEL_OBJECTIVES) if options.format == "labels" else "of tokens"
    raise UserError(
      f"data.format={options.format!r} needs an objective {needs}, not {options.objective!r}."
    )
  whole = options.format in ("chat", "prompt")
  if whole and (options.objective != "next_token" or options.fim_rate):
    raise UserError(
      f"data.format={options.format!r} needs objective='next_token' and data.fim_rate=0, not "
      f"{options.objective!r} and {options.fim_rate}."
    )
  if options.format == "prompt" and not (options.prompt and options.answer):
    raise UserError("data.format='prompt' needs data.prompt, a template's file, and data.answer.")
  if options.fim_rate and options.objective != "next_token":
    raise UserError(
      f"data.fim_rate={options.fim_rate} needs objective='next_token', not {options.objective!r}."
    )
  return options


def check_objective(objective: str) -> None:
  """Raises UserError for a name that is not among OBJECTIVES."""
  _check_choice("objective", objective, OBJECTIVES)


def _check_choice(key: str, value: str, choices: Sequence[str]) -> None:
  if value not in choices:
    raise UserError(f"{key}: no choice {value!r}. {did_you_mean(value, choices)}")


def _read_part(part: Mapping[str, Any], key: str) -> PartOptions:
  fields = dataclasses.fields(PartOptions)
  options = PartOptions(**{field.name: _read(part, field.name, key) for field in fields})
  if options.source not in SOURCES:
    raise UserError(
      f"{key}.source: no source {options.source!r}. {did_you_mean(options.source, SOURCES)}"
    )
  if options.undecodable not in UNDECODABLE:
    raise UserError(
      f"{key}.undecodable: no policy {options.undecodable!r}. "
      f"{did_you_mean(options.undecodable, UNDECODABLE)}"
    )
  if options.source != "stdlib" and not options.path:
    raise UserError(f"{key}.path: a {options.source!r} source needs one. Set --config.{key}.path=.")
  if not (options.validation_split or options.validation_path):
    fraction = options.validation_fraction
    _check(0 < fraction < 1, f"{key}.validation_fraction", fraction, "between 0 and 1")
  return options


def _of_records(name: str, part: PartOptions, format: str) -> PartOptions:
  """The same part with whole records as its documents; of labels the text has still its key."""
  if part.source not in RECORD_SOURCES:
    raise UserError(
      f"data part {name!r}: a {part.source!r} source has no records. "
      f"data.format={format!r} takes {', '.join(RECORD_SOURCES)}."
    )
  return part if format == "labels" else dataclasses.replace(part, text_key="")


def _read(part: Mapping[str, Any], name: str, key: str) -> Any:
  if name not in part:
    raise UserError(f"{key}: no key {name!r}. Start the part from configs/parts/data.py.")
  return part[name]


def _check(valid: bool, key: str, value: Any, right: str) -> None:
  if not valid:
    raise UserError(f"{key} is {value!r}; it must be {right}.")
