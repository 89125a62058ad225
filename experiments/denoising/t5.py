"""A small encoder-decoder that denoises the Python standard library.

    python -m gptjax.train --config=experiments/denoising/t5.py --workdir=runs/t5

Result and cost: README.md.
"""

from gptjax import config


def get_config(arg: str | None = None):
  return config.load(
    "configs/pretrain.py:model=tiny,task=span_corruption,data=stdlib,optim=muon",
    {
      "tokenizer": "bpe:4096+sentinels",
      "data.validation_fraction": 0.01,
      "model.encoder_layers": 2,
      "model.num_layers": 2,
      "model.embed_dim": 128,
      "model.num_heads": 2,
      "model.mlp_dim": 384,
      "total_steps": 2000,
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
