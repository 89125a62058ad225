"""Numbers that no run can use are refused by their key before anything is compiled or read."""

import json
from pathlib import Path

import pytest

from gptjax import config as config_lib
from gptjax.diagnosis.dry_run import dry_run
from gptjax.errors import UserError, check_number
from gptjax.inference.sampling import Sampling

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
  ("key", "value"),
  [
    *(("optim.learning_rate", value) for value in ("nan", "inf", "-0.1")),
    *(("optim.b1", value) for value in ("1", "1.5", "-0.1", "nan")),
    ("optim.b2", "1"),
    ("optim.momentum", "1"),
    ("optim.eps", "-1e-8"),
    ("optim.eps", "0"),
    ("optim.clip_norm", "-1"),
    ("optim.weight_decay", "nan"),
    ("optim.final_fraction", "-1"),
    ("optim.ema_decay", "1"),
    ("optim.layer_decay", "0"),
    ("optim.freeze_layers", "-1"),
    ("seed", "-1"),
    ("batch_size", "0"),
    ("batch_size", "-8"),
    ("sequence_length", "0"),
    ("grad_accumulation", "0"),
    ("max_skipped_steps", "-1"),
    ("task.z_loss", "nan"),
    ("router_z_loss", "-1"),
    ("sample.temperature", "-1"),
    ("sample.temperature", "nan"),
    ("sample.top_p", "2"),
    ("sample.max_tokens", "0"),
    ("total_tokens", "nan"),
    ("total_steps", "-5"),
    ("model.norm.eps", "nan"),
    ("model.num_layers", "0"),
    ("model.num_layers", str(2**32)),
    ("task.fim_rate", "nan"),
    ("profile.start", "-1"),
    ("profile.steps", "-1"),
  ],
)
def test_a_number_that_no_run_can_use_is_refused_in_a_dry_run(key, value):
  with pytest.raises(UserError, match=key.rpartition(".")[2]):
    dry_run(
      config_lib.load(
        "pretrain.py:model=debug,data=text",
        {"tokenizer": "bytes", "data.path": str(ROOT), key: value},
      )
    )


def test_a_single_label_is_refused(tmp_path):
  lines = [json.dumps({"text": f"text {number}", "label": "good"}) for number in range(20)]
  (tmp_path / "data.jsonl").write_text("\n".join(lines))
  overrides = {
    "tokenizer": "bytes",
    "task.label_key": "label",
    "data.path": str(tmp_path / "data.jsonl"),
  }
  spec = "pretrain.py:model=debug,data=jsonl,task=classification"
  with pytest.raises(UserError, match=r"the only label is 'good'.*label_key"):
    dry_run(config_lib.load(spec, overrides))


def test_two_lengths_of_a_run_are_refused():
  spec = "pretrain.py:model=debug,data=text"
  with pytest.raises(UserError, match=r"--config\.total_tokens and --config\.total_steps"):
    config_lib.load(spec, {"total_steps": "10", "total_tokens": "1e6"})
  with pytest.raises(UserError, match=r"--config\.eval\.every_"):
    config_lib.load(spec, {"eval.every_steps": "10", "eval.every_percent": "5"})
  config_lib.load(spec, {"eval.every_steps": "10", "log.every_percent": "5"})


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0])
def test_a_temperature_that_is_none_is_refused(temperature):
  with pytest.raises(UserError, match="temperature"):
    Sampling(temperature=temperature)


def test_what_is_within_its_bounds_passes():
  check_number("a", 0.0, at_least=0, below=1)
  check_number("a", 1, above=0, at_most=1)
  with pytest.raises(UserError, match=r"^a is 1\.0; it must be at least 0 and below 1\.$"):
    check_number("a", 1.0, at_least=0, below=1)
  with pytest.raises(UserError, match=r"^a is None; it must be a finite number"):
    check_number("a", None)
