"""Supervised fine-tuning of a pretrained model: the config of configs/pretrain.py, other defaults.

    python -m gptjax.train --config=configs/finetune.py:task=chat,model=init_from,data=jsonl \\
      --config.init_from=hf:FOLDER --config.data.path=chats.jsonl --workdir=runs/chat

Parts: task, and those of configs/pretrain.py, of which model=init_from and data=jsonl need not be
said. The tasks:

    chat            learns the assistant's turns of conversations, packed whole into rows; their
                    formats are those of gptjax/finetuning/conversations.py
    prompt          learns what to write after a prompt: translation, summaries, answers, code;
                    task.prompt is the prompt's template, task.answer that of the answer
    text            goes on with plain text
    classification  one label of a text, or of a pair of them (task.pair_key)
    multi_label     any number of labels
    regression      a number
    tagging         one tag of each word, such as B-PER (names of people, places ...)
    span            the part of a context (task.pair_key) that answers a question
    preference      which of two answers is better, by a reward for each

The last six have a head of labels in the place of the vocabulary's, and batch_size counts their
examples. What the rows are is shown by

    python -m gptjax.show --config=configs/finetune.py:task=chat --config.init_from=hf:FOLDER \\
      --config.data.path=chats.jsonl --row=0

Learning rate (AdamW's), its warm-up and cosine, weight decay and epochs are those of Stanford
Alpaca (Taori et al. 2023) for a model of 7B parameters. Not measured by us on such models. Of the
tasks with labels they are those of BERT (Devlin et al. 2019, appendix A.3), with its linear decay.
The best checkpoint by `checkpoint.best_metric` is what the run has made in the end.
"""

from ml_collections import ConfigDict

from gptjax.config import override, parse_argument
from gptjax.objectives.task import TASKS, find_task
from gptjax.presets import pretrain

_COMMON = {
  "total_epochs": 3.0,
  "optim.final_fraction": 0.0,
  "eval.every_epochs": 1.0,
  "checkpoint.every_epochs": 1.0,
  "checkpoint.final": "best",
  "sample.every_steps": 0,
}
_WRITING = _COMMON | {
  "batch_size": 16,
  "sequence_length": 1024,
  "optim.learning_rate": 2e-5,
  "optim.weight_decay": 0.0,
  "optim.warmup_percent": 3.0,
}
_LABELS = _COMMON | {
  "batch_size": 16,
  "sequence_length": 256,
  "optim.learning_rate": 3e-5,
  "optim.weight_decay": 0.01,
  "optim.b2": 0.999,
  "optim.schedule": "linear",
  "optim.warmup_percent": 10.0,
}

# Plain text, learnt as the model was pretrained.
_TEXT = "text"


def get_config(arg: str | None = None) -> ConfigDict:
  items = [item for item in (arg or "").split(",") if item]
  own = [item for item in items if item.startswith("task=")]
  name = parse_argument(",".join(own), task=("chat", (*TASKS, _TEXT)))["task"]
  others = [item for item in items if item not in own]
  overrides = _WRITING
  task = [] if name == _TEXT else [f"task={name}"]
  if task and not find_task(name).predicts_tokens:
    overrides = _LABELS | {"data.text_key": find_task(name).text_key}
  config = pretrain.get_config(",".join(["model=init_from,data=jsonl", *task, *others]))
  for key, value in overrides.items():
    override(config, key, value)
  return config
