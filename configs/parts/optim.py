"""Optimizer presets: the keys of `config.optim`.

`rules` gives each parameter, by the first pattern found in its name, multipliers of the learning
rate (`lr`) and of the weight decay (`decay`), another `algorithm`, or `frozen=True`. A pattern
'role:norm|bias' is for what parameters are, whatever their names (gptjax/model/layers.py: ROLES).
"""

# Norm scales, biases, sinks and the weights of mixtures are not decayed: pulling them to zero is no
# regularisation.
_VECTORS = "role:norm|bias|scalar"
_DECAY_MATRICES = ((_VECTORS, {"decay": 0.0}), (r".*", {}))

# Muon and SOAP are for matrices inside the network; the rest trains with AdamW.
_HIDDEN_MATRICES = (
  (_VECTORS, {"algorithm": "adamw", "decay": 0.0}),
  ("role:embedding|head", {"algorithm": "adamw"}),
  (r".*", {}),
)

DEFAULTS = {
  "name": "adamw",
  "learning_rate": 1e-3,
  "schedule": "cosine",
  "final_fraction": 0.1,
  "warmup_percent": 5.0,
  "decay_percent": 20.0,
  "weight_decay": 0.1,
  "b1": 0.9,
  "b2": 0.95,
  "eps": 1e-8,
  "momentum": 0.95,
  "preconditioner_interval": 10,
  "clip_norm": 1.0,
  "ema_decay": 0.0,
  # Fine-tuning: the learning rate of each layer is this times that of the layer above it; what is
  # found in the name of a parameter freezes it, such as '^embed' or, all but the head of labels,
  # '^(?!label_head)'; so many of the lowest layers are frozen, with the embeddings; and a duration
  # after which, again and again, one more layer is trained, from the head down (0: all at once).
  "layer_decay": 1.0,
  "freeze": "",
  "freeze_layers": 0,
  "unfreeze_every_steps": 0,
  "rules": _DECAY_MATRICES,
}

OPTIMIZERS = {
  "adamw": {},
  "adam": {"name": "adam", "weight_decay": 0.0},
  "sgd": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
  "adafactor": {"name": "adafactor", "learning_rate": 1e-2, "weight_decay": 0.0},
  # A tenth of AdamW's learning rate and ten times its decay (Chen et al. 2023, section 5).
  "lion": {"name": "lion", "learning_rate": 1e-4, "b2": 0.99, "weight_decay": 1.0},
  "muon": {"name": "muon", "learning_rate": 5e-3, "rules": _HIDDEN_MATRICES},
  # The best composite of experiments/learning_efficiency.
  "speedrun": {
    "name": "muon",
    "learning_rate": 2e-2,
    "schedule": "wsd",
    "decay_percent": 40.0,
    "final_fraction": 0.0,
    "rules": _HIDDEN_MATRICES,
  },
  # The learning rate is of their section 5.
  "soap": {"name": "soap", "learning_rate": 3e-3, "rules": _HIDDEN_MATRICES},
}
