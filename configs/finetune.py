"""Supervised fine-tuning of a pretrained model: the config of configs/pretrain.py, other defaults.

    python -m gptjax.train --config=configs/finetune.py:task=chat,model=init_from,data=jsonl \\
      --config.init_from=hf:FOLDER --config.data.path=chats.jsonl --workdir=runs/chat

Parts: task, and those of configs/pretrain.py, of which model=init_from and data=jsonl need not be
said. task=chat learns the assistant's turns of conversations (their formats are those of
gptjax/data/conversations.py), packed whole into rows; task=text goes on with plain text. What the
rows are is shown by

    python -m gptjax.show --config=configs/finetune.py:task=chat --config.init_from=hf:FOLDER \\
      --config.data.path=chats.jsonl --row=0

Learning rate (AdamW's), its warm-up and cosine, weight decay and epochs are those of Stanford
Alpaca (Taori et al. 2023) for a model of 7B parameters. Not measured by us on such models.
"""

from ml_collections import ConfigDict

from configs import pretrain
from gptjax.config import override, parse_argument

TASKS = ("chat", "text")


def get_config(arg: str | None = None) -> ConfigDict:
  items = [item for item in (arg or "").split(",") if item]
  own = [item for item in items if item.startswith("task=")]
  task = parse_argument(",".join(own), task=("chat", TASKS))["task"]
  others = [item for item in items if item not in own]
  config = pretrain.get_config(",".join(["model=init_from,data=jsonl", *others]))
  for key, value in {
    "data.format": task,
    "total_epochs": 3.0,
    "batch_size": 16,
    "sequence_length": 1024,
    "optim.learning_rate": 2e-5,
    "optim.weight_decay": 0.0,
    "optim.warmup_percent": 3.0,
    "optim.final_fraction": 0.0,
    "eval.every_epochs": 1.0,
    "checkpoint.every_epochs": 1.0,
    "sample.every_steps": 0,
  }.items():
    override(config, key, value)
  return config
