"""Against the `peft` library: the same logits from its files, and from ours in it."""

import json

import jax
import numpy as np
import pytest

from gptjax import tree
from gptjax.errors import UserError
from gptjax.peft import huggingface
from gptjax.peft.config import PeftConfig
from gptjax.peft.surgery import initial_adapters
from tests.peft.conftest import our_logits, their_logits

LINEARS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
LORA = {"r": 3, "lora_alpha": 5}
# name: (model, config of the library, its fields)
CASES = {
  "lora": (
    "llama",
    "LoraConfig",
    LORA
    | {
      "target_modules": LINEARS,
      "rank_pattern": {"self_attn.o_proj": 2},
      "alpha_pattern": {"up_proj": 7},
    },
  ),
  "adalora": (
    "llama",
    "AdaLoraConfig",
    {"init_r": 3, "target_r": 2, "lora_alpha": 5, "total_step": 9, "target_modules": LINEARS},
  ),
  "dora": (
    "llama",
    "LoraConfig",
    LORA | {"target_modules": ["v_proj", "o_proj"], "use_dora": True},
  ),
  "ia3": (
    "llama",
    "IA3Config",
    {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
  ),
  "prompt": ("llama", "PromptTuningConfig", {"num_virtual_tokens": 3}),
  "ptuning": ("llama", "PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
  "prefix": ("llama", "PrefixTuningConfig", {"num_virtual_tokens": 3}),
  "gpt2-rslora": (
    "gpt2",
    "LoraConfig",
    LORA | {"target_modules": ["c_attn", "c_fc"], "use_rslora": True, "fan_in_fan_out": True},
  ),
  "gpt2-dora": (
    "gpt2",
    "LoraConfig",
    LORA | {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True},
  ),
  "gpt2-ia3": (
    "gpt2",
    "IA3Config",
    {
      "target_modules": ["c_attn", "mlp.c_proj"],
      "feedforward_modules": ["mlp.c_proj"],
      "fan_in_fan_out": True,
    },
  ),
  "gpt2-prompt": ("gpt2", "PromptTuningConfig", {"num_virtual_tokens": 3}),
  "gpt2-prefix": ("gpt2", "PrefixTuningConfig", {"num_virtual_tokens": 3}),
  **{
    f"{base}-{method}": (base, config, {"num_virtual_tokens": 6})
    for base in ("mistral", "gemma2", "gemma3")
    for method, config in (
      ("prompt", "PromptTuningConfig"),
      ("ptuning", "PromptEncoderConfig"),
      ("prefix", "PrefixTuningConfig"),
    )
  },
  "layers": (
    "llama",
    "LoraConfig",
    LORA | {"target_modules": LINEARS, "layers_to_transform": [1]},
  ),
  "one-module": ("llama", "LoraConfig", LORA | {"target_modules": r".*\.0\.self_attn\.[qv]_proj"}),
  "adalora-layers": (
    "llama",
    "AdaLoraConfig",
    {"init_r": 3, "target_r": 2, "total_step": 9, "target_modules": ["q_proj"]}
    | {"layers_to_transform": 0, "layers_pattern": "layers"},
  ),
  "whole": (
    "llama",
    "LoraConfig",
    LORA | {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
  ),
  "ia3-whole": (
    "llama",
    "IA3Config",
    {"target_modules": ["q_proj"], "feedforward_modules": [], "modules_to_save": ["k_proj"]},
  ),
  "tied-whole": (
    "tied",
    "LoraConfig",
    LORA
    | {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    | {"ensure_weight_tying": True},
  ),
  **{
    f"gpt2-bias-{which}": (
      "gpt2",
      "LoraConfig",
      LORA | {"target_modules": ["c_attn"], "bias": which, "fan_in_fan_out": True},
    )
    for which in ("all", "lora_only")
  },
  "bert-bias": ("bert", "LoraConfig", LORA | {"target_modules": ["query"], "bias": "all"}),
  "bert-encoder": ("bert-encoder", "LoraConfig", LORA | {"target_modules": ["query"]}),
  "bert-labels": ("bert-labels", "LoraConfig", LORA | {"target_modules": ["query"]}),
  "roberta-labels": (
    "roberta-labels",
    "LoraConfig",
    LORA | {"target_modules": ["query"], "modules_to_save": ["classifier.out_proj"]},
  ),
  "llama-labels": (
    "llama-labels",
    "LoraConfig",
    LORA | {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
  ),
  "t5": (
    "t5",
    "LoraConfig",
    LORA | {"target_modules": ["q", "wi"], "rank_pattern": {r"encoder\..*\.q": 2}},
  ),
}
# What the library makes of a model by, where it is no language model.
TASKS = {
  "bert": None,
  "bert-encoder": "FEATURE_EXTRACTION",
  "bert-labels": "SEQ_CLS",
  "roberta-labels": None,
  "llama-labels": "TOKEN_CLS",
  "t5": "SEQ_2_SEQ_LM",
}


# Each method once, on one of the models, in the quick tests.
SLOW = (
  *("dora", "ia3", "ptuning", "gpt2-prompt", "mistral-ptuning", "mistral-prefix", "gemma2-prompt"),
  *("gemma2-ptuning", "gemma3-prompt", "gemma3-prefix", "adalora-layers", "one-module"),
  *("ia3-whole", "gpt2-bias-lora_only", "bert-encoder", "llama-labels", "roberta-labels"),
)


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES]
)
def test_logits_are_those_of_the_peft_library_and_both_ways(name, bases, reference, tmp_path):
  torch, _ = reference
  import peft

  base, config_name, fields = CASES[name]
  model, opened, params = bases(base)
  task = TASKS.get(base, "CAUSAL_LM")
  config = getattr(peft, config_name)(task_type=task, **fields)
  adapted = peft.get_peft_model(model, config).eval()
  torch.manual_seed(1)
  with torch.no_grad():
    for parameter in adapted.parameters():
      if parameter.requires_grad:
        parameter.add_(0.3 * torch.randn_like(parameter))
  expected = their_logits(torch, adapted)
  adapted.save_pretrained(tmp_path / "theirs")

  read, adapters = huggingface.read(tmp_path / "theirs", opened.config, opened.family)
  actual = our_logits(opened, params, read, adapters)
  np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
  with torch.no_grad(), adapted.disable_adapter():
    plain = their_logits(torch, adapted)
  assert np.abs(plain - expected).max() > 0.1  # The adapters mattered.

  (tmp_path / "ours").mkdir()
  huggingface.write(tmp_path / "ours", opened.config, read, adapters, opened.family)
  assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["task_type"] == task
  fresh, *_ = bases(base)
  loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
  np.testing.assert_allclose(
    their_logits(torch, loaded), expected, atol=1e-4 * np.abs(expected).max()
  )
  again, same = huggingface.read(tmp_path / "ours", opened.config, opened.family)
  assert again.method == read.method
  for leaf, value in tree.named_leaves(adapters).items():
    np.testing.assert_allclose(tree.named_leaves(same)[leaf], value, rtol=1e-6, err_msg=leaf)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_several_of_our_projections_become_blocks_of_one_of_theirs(
  method, bases, reference, tmp_path
):
  torch, _ = reference
  import peft

  model, opened, params = bases("gpt2")
  targets = (("query", {"rank": 2, "alpha": 3.0}), ("value", {"rank": 4}), ("mlp/up", {}))
  config = PeftConfig(method, targets=targets, rank=3, rank_stabilized=True, target_rank=2)
  rng = np.random.default_rng(0)
  adapters = jax.tree.map(
    lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32),
    initial_adapters(opened.config, config, params, 0),
  )
  huggingface.write(tmp_path, opened.config, config, adapters, opened.family)
  fields = json.loads((tmp_path / "adapter_config.json").read_text())
  if method == "lora":
    assert sorted([fields["r"], *fields["rank_pattern"].values()]) == [3, 6]
  else:
    assert fields["init_r"] == 6
  loaded = peft.PeftModel.from_pretrained(model, tmp_path).eval()
  expected = our_logits(opened, params, config, adapters)
  np.testing.assert_allclose(
    their_logits(torch, loaded), expected, atol=1e-4 * np.abs(expected).max()
  )


def test_triplets_that_the_library_left_out_are_read_as_zeros(bases, reference, tmp_path):
  torch, _ = reference
  import peft

  model, opened, params = bases("llama")
  config = peft.AdaLoraConfig(
    task_type="CAUSAL_LM", init_r=3, total_step=9, target_modules=["q_proj"]
  )
  adapted = peft.get_peft_model(model, config).eval()
  kept = [[True, False, True], [False, True, False]]
  names = [f"model.layers.{i}.self_attn.q_proj.lora_E.default" for i in range(2)]
  with torch.no_grad():
    for name, parameter in adapted.named_parameters():
      if "lora_" in name:
        parameter.add_(0.3 * torch.randn_like(parameter))
    for name, rows in zip(names, kept, strict=True):
      adapted.get_parameter(f"base_model.model.{name}").mul_(torch.tensor(rows)[:, None])
  expected = their_logits(torch, adapted)
  adapted.peft_config["default"].rank_pattern = dict(zip(names, kept, strict=True))
  adapted.save_pretrained(tmp_path)
  read, adapters = huggingface.read(tmp_path, opened.config, opened.family)
  values = tree.named_leaves(adapters)["blocks/attention/query/singular_values"]
  assert (values != 0).sum(-1).tolist() == [2, 1]
  actual = our_logits(opened, params, read, adapters)
  np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_the_library_reads_the_prompt_that_a_network_made(bases, reference, tmp_path):
  torch, _ = reference
  import peft

  model, opened, params = bases("llama")
  config = PeftConfig("ptuning", virtual_tokens=3)
  adapters = initial_adapters(opened.config, config, params, 0)
  huggingface.write(tmp_path, opened.config, config, adapters, opened.family)
  loaded = peft.PeftModel.from_pretrained(model, tmp_path).eval()
  expected = our_logits(opened, params, config, adapters)
  np.testing.assert_allclose(
    their_logits(torch, loaded), expected, atol=1e-4 * np.abs(expected).max()
  )


@pytest.fixture(scope="module")
def written(bases, tmp_path_factory):
  """(folder, opened model) of a small LoRA of a Llama."""
  _, opened, params = bases("llama")
  folder = tmp_path_factory.mktemp("written")
  config = PeftConfig("lora", targets=("attention/query",))
  adapters = initial_adapters(opened.config, config, params, 0)
  huggingface.write(folder, opened.config, config, adapters, opened.family)
  return folder, opened


@pytest.mark.parametrize(
  ("field", "value", "sentence"),
  [
    ("bias", "some", "field 'bias' is 'some'; only 'none', 'all', 'lora_only' is known"),
    ("init_lora_weights", "pissa", "field 'init_lora_weights' is 'pissa'"),
    ("modules_to_save", ["lm_head"], r"no tensor '.*lm_head\.weight', which .* asks for"),
    ("target_modules", None, "no field 'target_modules', which LORA needs"),
    (
      "target_modules",
      "(q_proj",
      r"'target_modules' has '\(q_proj', which is no regular expression",
    ),
    ("alpha_pattern", {"*": 2}, r"'alpha_pattern' has '\*', which is no regular expression"),
    ("peft_type", "VERA", "no peft_type 'VERA' is known, only LORA"),
  ],
)
def test_a_field_that_is_not_known_is_named(written, tmp_path, field, value, sentence):
  folder, opened = written
  fields = json.loads((folder / "adapter_config.json").read_text()) | {field: value}
  (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
  (tmp_path / "adapter_model.safetensors").write_bytes(
    (folder / "adapter_model.safetensors").read_bytes()
  )
  with pytest.raises(UserError, match=sentence):
    huggingface.read(tmp_path, opened.config, opened.family)


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    (
      lambda t: t.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"),
      "no tensor",
    ),
    (lambda t: t.update({"other.weight": np.ones(2, np.float32)}), "'other.weight' has no place"),
  ],
)
def test_a_tensor_too_few_or_too_many_is_named(written, tmp_path, change, sentence):
  import safetensors.numpy

  folder, opened = written
  (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
  tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
  change(tensors)
  safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
  with pytest.raises(UserError, match=sentence):
    huggingface.read(tmp_path, opened.config, opened.family)


def test_what_the_library_does_not_have_is_refused(bases, tmp_path):
  _, opened, params = bases("gpt2")
  config = PeftConfig("bitfit", targets=("bias$",))
  adapters = initial_adapters(opened.config, config, params, 0)
  with pytest.raises(UserError, match="'bitfit' is not one of the `peft` library"):
    huggingface.write(tmp_path, opened.config, config, adapters, opened.family)
  with pytest.raises(UserError, match=r"no adapter_config\.json"):
    huggingface.read(tmp_path, opened.config, opened.family)


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"embed_dim": 32}, r"q_proj\.lora_A\.weight' is \[8, 16\], not \[8, 32\] as for this model"),
    ({"head_dim": 8}, r"q_proj\.lora_B\.weight' is \[16, 8\], not \[32, 8\] as for this model"),
    ({"num_layers": 3}, r"no tensor 'base_model\.model\.model\.layers\.2\.self_attn\.q_proj"),
    ({"num_layers": 1}, r"'base_model\.model\.model\.layers\.1\.self_attn\.q_proj.*' has no place"),
  ],
)
def test_adapters_of_a_model_of_another_shape_are_refused(written, changes, sentence):
  folder, opened = written
  with pytest.raises(UserError, match=sentence):
    huggingface.read(folder, opened.config.replace(changes), opened.family)
