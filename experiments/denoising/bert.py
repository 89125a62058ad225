"""A small masked language model of Chinese, on the People's Daily of January 1998.

    python -m experiments.datasets people_daily
    python -m gptjax.train --config=experiments/denoising/bert.py --config.data.path=PATH \\
      --workdir=runs/bert

Result and cost: README.md.
"""

from gptjax import config


def get_config(arg: str | None = None):
  return config.load(
    "configs/pretrain.py:model=tiny,task=masked,data=text,optim=muon",
    {
      "tokenizer": "bpe:4096+mask",
      "model.visibility": "bidirectional",
      "model.embed_dim": 128,
      "model.num_heads": 2,
      "model.mlp_dim": 384,
      "total_steps": 4000,
      "batch_size": 8,
      "sequence_length": 128,
      "optim.schedule": "wsd",
      "optim.decay_percent": 40.0,
      "optim.final_fraction": 0.0,
      "eval.every_steps": 500,
      "checkpoint.every_steps": 1000,
      "checkpoint.keep": 1,
      "sample.every_steps": 0,
    },
  )
