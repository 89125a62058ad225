"""A small GPT on the source of this machine's Python standard library, in minutes on a CPU.

    python -m gptjax.train --config=configs/quickstart.py --workdir=runs/demo

No download and no account. The validation set is a twentieth of the files. `make demo` runs it.
"""

from ml_collections import ConfigDict

from gptjax.presets import pretrain


def get_config(arg: str | None = None) -> ConfigDict:
  config = pretrain.get_config(arg or "model=tiny,data=stdlib,optim=muon")
  config.tokenizer = "bpe:4096"
  config.batch_size = 8
  config.sequence_length = 256
  config.total_steps = 1100
  config.optim.schedule = "wsd"
  config.optim.decay_percent = 40.0
  config.optim.final_fraction = 0.0
  config.eval.every_steps = 275
  config.eval.baselines = True
  config.checkpoint.every_steps = 275
  config.sample.every_steps = 275
  # A prompt is the start of a file; words take the space before them, so none ends in one.
  config.sample.prompts = ('"""', "import os\n\n\ndef")
  return config
