"""Presets of parameter-efficient fine-tuning: the keys of `config.peft`, explained by `PeftConfig`.

The learning rates that the papers use are up to 100 times those of training all parameters.
"""

DEFAULTS = {
  "method": "none",
  "targets": (),
  "unfrozen": (),
  "rank": 8,
  "alpha": 16.0,
  "rank_stabilized": False,
  "target_rank": 8,
  "orthogonal_penalty": 0.1,
  "budget_initial_percent": 10.0,
  "budget_final_percent": 50.0,
  "budget_every_steps": 10,
  "virtual_tokens": 20,
  "base": "float32",
}

# Hu et al. 2021, section 4.2.
_QUERY_AND_VALUE = ((r"attention/(query|value)/kernel$", {}),)
# Zhang et al. 2023, section 4.
_ALL_MATRICES = (("role:hidden", {}),)
# Houlsby et al. 2019, figure 2: behind both branches of each layer.
_BRANCHES = ((r"attention/out/kernel$|mlp/down/kernel$", {}),)

PEFT = {
  "none": {},
  "lora": {"method": "lora", "targets": _QUERY_AND_VALUE},
  "rslora": {"method": "lora", "targets": _QUERY_AND_VALUE, "rank_stabilized": True},
  # As many again by half at first as in the end (Zhang et al. 2023, section 3.3).
  "adalora": {"method": "adalora", "targets": _ALL_MATRICES, "rank": 12, "target_rank": 8},
  "dora": {"method": "dora", "targets": _QUERY_AND_VALUE},
  # Liu et al. 2022, section 3.3: keys, values, and what the feed-forward network makes within.
  "ia3": {
    "method": "ia3",
    "targets": (
      (r"attention/(key|value)/kernel$", {}),
      (r"mlp/down/kernel$", {"scale_input": True}),
    ),
  },
  "bitfit": {"method": "bitfit", "targets": (("role:bias", {}),)},
  "houlsby": {"method": "houlsby", "targets": _BRANCHES, "rank": 64},
  # A factor of 4, as of He et al. 2022, section 4.6.
  "parallel": {
    "method": "parallel",
    "targets": ((r"blocks/mlp$", {}),),
    "rank": 64,
    "alpha": 256.0,
  },
  "prompt": {"method": "prompt"},
  "ptuning": {"method": "ptuning"},
  "prefix": {"method": "prefix"},
}
