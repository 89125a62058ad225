"""Learns from pairs of answers which is better: the config of configs/finetune.py, other defaults.

    python -m gptjax.train --config=configs/align.py:task=dpo --config.init_from=hf:FOLDER \\
      --config.task.reference=hf:FOLDER --config.data.path=pairs.jsonl --workdir=runs/dpo

Parts: task, and those of configs/finetune.py. The tasks, all on records as
gptjax/alignment/pairs.py lists them:

    dpo    favours the better answer more than a reference model does; task.kind=ipo or hinge too
    simpo  favours it by its mean log probability, without a reference
    cpo    favours it without a reference, and learns to write it
    orpo   learns to write it, and makes its odds larger than the worse one's

batch_size counts rows, which hold as many pairs as fit. Learning rates are those of the papers for
models of several billion parameters (Rafailov et al. 2023; Hong et al. 2024), of cpo and simpo that
of dpo; not measured by us on such models. One epoch, after a tenth of which the learning
rate falls linearly.
"""

from ml_collections import ConfigDict

from gptjax.config import override, parse_argument
from gptjax.presets import finetune

TASKS = ("dpo", "simpo", "cpo", "orpo")
_PAIRS = {
  "total_epochs": 1.0,
  "optim.learning_rate": 1e-6,
  "optim.schedule": "linear",
  "optim.warmup_percent": 10.0,
}


def get_config(arg: str | None = None) -> ConfigDict:
  items = [item for item in (arg or "").split(",") if item]
  own = [item for item in items if item.startswith("task=")]
  name = parse_argument(",".join(own), task=("dpo", TASKS))["task"]
  others = [item for item in items if item not in own]
  config = finetune.get_config(",".join([f"task={name}", *others]))
  changes = _PAIRS | ({"optim.learning_rate": 8e-6} if name == "orpo" else {})
  for key, value in changes.items():
    override(config, key, value)
  return config
