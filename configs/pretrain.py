"""Pretraining from text: a model, a data set and an optimizer, each by its preset.

    python -m gptjax.train --config=configs/pretrain.py:model=gpt2-124m,data=text,optim=adamw \\
      --config.data.path=corpus/ --workdir=runs/first

Parts: model (configs/parts/models.py; 'init_from' is that of the checkpoint to start from), task
(gptjax/objectives; by default the one that the model is made for), data (data.py; 'a+b' is a
mixture), optim (optim.py), mesh (mesh.py), peft (peft.py: LoRA and others,
which train few parameters beside the model of init_from) and tuned (tuned/: layouts that
`gptjax.compile --search` found). Any key can be overridden with --config.KEY=VALUE, for example
--config.model.num_layers=6. A duration is one key with a unit, _steps, _tokens, _epochs or
_percent: --config.total_tokens=1e9 takes the place of total_steps.
"""

from flax import traverse_util
from ml_collections import ConfigDict

from gptjax.config import override, parse_argument
from gptjax.model.config import ModelConfig
from gptjax.objectives.task import OF_THE_MODEL, TASKS, find_task, task_defaults
from gptjax.presets.parts import compiler, data, mesh, models, optim, peft, tuned
from gptjax.training.adaptation import NOT_ROUNDED

# The preset of a model, and the tokenizer, that are those of the checkpoint of `init_from`.
INIT_FROM = "init_from"

# The special tokens that a task needs.
_SPECIALS = {"masked": "+mask", "span_corruption": "+sentinels"}


def _task(model: dict) -> str:
  """The task that a model of this visibility is pretrained for."""
  if model["encoder_layers"]:
    return "span_corruption"
  return {"bidirectional": "masked", "prefix": "prefix"}.get(model["visibility"], "next_token")


def get_config(arg: str | None = None) -> ConfigDict:
  parts = parse_argument(
    arg,
    model=("tiny", (*models.MODELS, INIT_FROM)),
    task=("", ("", *TASKS)),
    data=("text", None),  # `data.get` checks the names of a mixture one by one
    optim=("adamw", optim.OPTIMIZERS),
    mesh=("data", mesh.MESHES),
    peft=("none", peft.PEFT),
    tuned=("none", ("none", *tuned.names())),
  )
  model = ModelConfig.defaults() | models.MODELS.get(parts["model"], {})
  task = parts["task"] or (OF_THE_MODEL if parts["model"] == INIT_FROM else _task(model))
  tokenizer = f"bpe:{model['vocab_size'] or 4096}{_SPECIALS.get(task, '')}"
  config = ConfigDict(
    {
      "seed": 0,
      "total_steps": 1000,
      # Rows a step over all hosts and micro-batches; tokens a step = batch_size * sequence_length.
      # Of tasks that score labels: examples a step, which share rows of sequence_length tokens.
      "batch_size": 16,
      "sequence_length": 256,
      "grad_accumulation": 1,
      # 'bytes', 'bpe:N' (trained on the corpus), or the path of one; see gptjax/data/tokenizer.py.
      # 'init_from' is that of the model to start from.
      "tokenizer": INIT_FROM if parts["model"] == INIT_FROM else tokenizer,
      # What is learnt, and its own options, which are the fields of its class in gptjax/objectives.
      "task": task_defaults(task),
      # Of a mixture of experts: factors of what keeps the load of the experts even, and of the
      # z-loss of the routers' logits, in what is minimised.
      "router_balance_loss": 0.01,
      "router_z_loss": 0.001,
      # What to start from: the work directory of a run, hf:FOLDER or hf:ORG/NAME, or gguf:FILE.
      "init_from": "",
      # A step whose loss or gradient is not finite is skipped, this many times.
      "max_skipped_steps": 10,
      "model": traverse_util.unflatten_dict(model, sep="."),
      "data": data.get(parts["data"]),
      "optim": optim.DEFAULTS | optim.OPTIMIZERS[parts["optim"]],
      # Few parameters in the place of all, beside a frozen model; see gptjax/peft/config.py.
      "peft": peft.DEFAULTS | peft.PEFT[parts["peft"]],
      # Weights, and activations if wanted, rounded to few bits in the forward pass of training; see
      # gptjax/compression/rounding.py.
      "quantize": dict(NOT_ROUNDED),
      "mesh": mesh.DEFAULTS | mesh.MESHES[parts["mesh"]],
      "compile": compiler.DEFAULTS,
      # Durations of 0 are never; evaluation at the start and the end, and a last checkpoint, always
      # are. baselines: also print what gzip and a byte 5-gram model reach on the validation text.
      # patience: stop when so many evaluations in a row are not better than the best before, by
      # checkpoint.best_metric; 0 never.
      "eval": {"every_steps": 250, "patience": 0, "baselines": False},
      # layers_every: also the norms of each layer's gradients, updates, parameters and activations;
      # one more forward and backward pass each time.
      "log": {"every_steps": 10, "layers_every_steps": 0, "tensorboard": True, "wandb": False},
      "checkpoint": {
        "every_steps": 250,
        "keep": 2,
        "keep_every_steps": 0,
        "best_metric": "val/loss" if task == OF_THE_MODEL else find_task(task).best_metric,
        # What the run has made in the end: the 'newest' checkpoint, or the 'best' by best_metric.
        "final": "newest",
      },
      "sample": {
        "every_steps": 250,
        "prompts": ("", ""),
        "max_tokens": 64,
        "temperature": 0.8,
        "top_p": 0.95,
      },
      # steps of jax.profiler traces, written to WORKDIR/profile for TensorBoard or xprof.
      "profile": {"start": 10, "steps": 0},
    }
  )
  for key, value in tuned.get(parts["tuned"]).items():
    override(config, key, value)
  return config
