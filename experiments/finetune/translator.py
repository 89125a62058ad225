"""A small translator from nothing but the pairs of `libreoffice_en_zh`, English to Chinese.

    python -m gptjax.train --config=experiments/finetune/translator.py \\
      --config.data.path=PATH/train.jsonl --config.data.validation_path=PATH/validation.jsonl \\
      --workdir=runs/finetune/translator
"""

from gptjax import config


def get_config(arg: str | None = None):
  return config.load(
    "configs/pretrain.py:model=tiny,task=prompt,data=jsonl,optim=muon",
    {
      "tokenizer": "bpe:8192",
      "task.prompt": "translation_en_zh.jinja",
      "task.answer": "{{ zh }}",
      "model.vocab_size": 0,
      "model.embed_dim": 256,
      "model.num_heads": 4,
      "model.mlp_dim": 704,
      "model.dropout.residual": 0.1,
      "model.dtype": "bfloat16",
      "total_epochs": 6.0,
      "batch_size": 16,
      "sequence_length": 256,
      "optim.schedule": "wsd",
      "optim.decay_percent": 40.0,
      "optim.final_fraction": 0.0,
      "eval.every_epochs": 1.0,
      "checkpoint.every_epochs": 1.0,
      "checkpoint.keep": 1,
      "checkpoint.best_metric": "val/loss",
      "checkpoint.final": "best",
      "sample.every_steps": 0,
      "log.tensorboard": False,
    },
  )
