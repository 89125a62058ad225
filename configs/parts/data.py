"""Corpora by name: `get("stdlib")`, or a mixture in equal shares, `get("stdlib+text")`.

The public ones are exercised on mock data where they cannot be downloaded.
"""

from typing import Any

from gptjax.errors import UserError, did_you_mean

# The keys of one corpus, also of a part of a mixture.
PART_DEFAULTS = {
  "source": "",  # text | jsonl | parquet | tfds | hf | stdlib
  "path": "",  # a file, a folder or a glob; tfds: NAME[/config]; hf: id[:config]
  # jsonl, parquet, tfds, hf: where the text of a record is; chat and prompt read whole records.
  "text_key": "text",
  "split": "train",  # tfds, hf
  "validation_split": "",  # tfds, hf: a split of its own to validate on, such as 'validation'
  "validation_path": "",  # files of their own to validate on
  "validation_fraction": 0.05,  # if neither is given: the share of the documents to validate on
  "undecodable": "error",  # what is not UTF-8 is an 'error'; 'skip' only warns (text, jsonl)
  "tfds_data_dir": "",  # '' is TFDS's own, ~/tensorflow_datasets
}

DEFAULTS = PART_DEFAULTS | {
  "cache_dir": "",  # where tokens are kept; '' is $XDG_CACHE_HOME/gptjax or ~/.cache/gptjax
  "mixture": {},  # name -> the keys of PART_DEFAULTS and weight; replaces the single corpus above
}

DATA = {
  # The running Python's own modules: 10 MB of code on every machine. PSF license.
  "stdlib": {"source": "stdlib"},
  # Your own: set data.path.
  "text": {"source": "text"},
  "jsonl": {"source": "jsonl"},
  "parquet": {"source": "parquet"},
  "tfds": {"source": "tfds"},
  "hf": {"source": "hf"},
  # 40,000 lines of Shakespeare's plays as one document: 1.1 MB. Public domain.
  "tiny_shakespeare": {
    "source": "tfds",
    "path": "tiny_shakespeare",
    "validation_split": "validation",
  },
  # One Billion Word Benchmark, news by shuffled sentences: 30,301,028 of them, 4.2 GB. No license
  # is stated for the text.
  "lm1b": {"source": "tfds", "path": "lm1b", "validation_split": "test"},
  # The next three are in TFDS too, but it needs Apache Beam to build them, and a cluster for C4.
  # C4, Common Crawl cleaned for T5, English: 364,868,892 pages, 305 GB. ODC-BY.
  "c4": {"source": "hf", "path": "allenai/c4:en", "validation_split": "validation"},
  # English Wikipedia of November 2023: 6.4 million articles, 20 GB. CC BY-SA 3.0 and GFDL.
  "wikipedia": {
    "source": "hf",
    "path": "wikimedia/wikipedia:20231101.en",
    "validation_fraction": 0.0005,
  },
  # OpenWebText, pages that Reddit links to: 8,013,769 documents, 39.8 GB. CC0, but for the text.
  "openwebtext": {
    "source": "hf",
    "path": "Skylion007/openwebtext",
    "validation_fraction": 0.0005,
  },
  # FineWeb's sample of 10 billion GPT-2 tokens of Common Crawl: 15 million pages. ODC-BY.
  "fineweb": {
    "source": "hf",
    "path": "HuggingFaceFW/fineweb:sample-10BT",
    "validation_fraction": 0.0005,
  },
}


def get(name: str) -> dict[str, Any]:
  """Returns all data keys of a preset, or of a mixture 'a+b' in equal shares."""
  names = name.split("+")
  for part in names:
    if part not in DATA:
      raise UserError(f"no data preset {part!r}. {did_you_mean(part, DATA)}")
  if len(names) == 1:
    return DEFAULTS | DATA[name]
  if len(set(names)) < len(names):
    raise UserError(f"data preset {name!r} names a part twice; set its weight instead.")
  return DEFAULTS | {
    "mixture": {part: PART_DEFAULTS | DATA[part] | {"weight": 1.0} for part in names}
  }
