"""A step of fine-tuning is that of PyTorch, where each conversation is alone and masked by hand."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gptjax import config as config_lib
from gptjax import tree
from gptjax.finetuning.answers import Chat
from gptjax.interop.huggingface import HuggingFaceModel
from gptjax.model.gpt import describe_parameters
from gptjax.optim import optimizer as optim
from gptjax.peft import huggingface
from gptjax.peft.surgery import abstract_model, describe_adapters
from gptjax.presets.parts import optim as presets
from gptjax.training import step as step_lib
from gptjax.training.datasets import open_dataset
from tests.data.conftest import write_tokenizer  # noqa: F401

LLAMA = {
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 48,
  "max_position_embeddings": 128,
  "bos_token_id": None,
  "eos_token_id": None,
}
LORA = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}
# A small epsilon would make of the rounding of a gradient near 0 an update of the learning rate.
ADAMW = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.99, "eps": 1e-4, "weight_decay": 0.1}
CONVERSATIONS = (
  [("system", "Be short."), ("user", "Who?"), ("assistant", "Melville."), ("user", "When?"),
   ("assistant", "In 1851.")],
  [("user", "2 + 2?"), ("assistant", "4 他")],
)  # fmt: skip


@pytest.fixture(scope="module")
def llama(reference, make_reference, load_params, write_tokenizer, tmp_path_factory):  # noqa: F811
  """(their model, its folder, ours as opened, its parameters, the tokenizer) of a random Llama."""
  folder = tmp_path_factory.mktemp("llama")
  tokenizer = write_tokenizer(folder, None)
  fields = LLAMA | {"vocab_size": tokenizer.vocab_size}
  model = make_reference("LlamaForCausalLM", "LlamaConfig", **fields)
  model.save_pretrained(folder)
  opened = HuggingFaceModel(str(folder))
  return model, folder, opened, load_params(opened), tokenizer


@pytest.fixture(scope="module")
def batch(llama, tmp_path_factory):
  """A packed row with both conversations, as a run of configs/finetune.py gets it."""
  folder = tmp_path_factory.mktemp("chats")
  records = [
    {"messages": [{"role": role, "content": content} for role, content in conversation]}
    for conversation in CONVERSATIONS
  ]
  (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, records)))
  config = config_lib.load(
    "configs/finetune.py:task=chat",
    {
      "tokenizer": str(llama[1]),
      "data.path": str(folder / "chats.jsonl"),
      "data.validation_path": str(folder / "chats.jsonl"),
      "task.chat_template": "chatml",
      "data.cache_dir": str(folder / "cache"),
      "batch_size": 1,
      "sequence_length": 128,
    },
  )
  batch = open_dataset(config, folder / "run").training_batch(0)
  assert batch.segment_ids.max() == 2
  return batch


def train_step(config, peft, params, frozen, batch):
  """(loss, gradient, parameters after it) of one step of AdamW."""
  described = describe_adapters(config, peft) if peft else describe_parameters(config)
  values = presets.DEFAULTS | ADAMW | {"clip_norm": 0.0, "rules": ((".*", {}),)}
  schedule = optax.constant_schedule(ADAMW["learning_rate"])
  optimizer = optim.make_optimizer(types.SimpleNamespace(**values), described, schedule)
  step = step_lib.make_train_step(
    nnx.graphdef(abstract_model(config.replace({"execution.scan_layers": True}), peft)),
    Chat(),
    optimizer,
    step_lib.StepOptions(seed=0),
  )
  params = jax.tree.map(jnp.array, params)
  state = step_lib.TrainState(
    *(jnp.int32(0), jnp.int32(0), params, optimizer.init(params), None),
    base_checksum=jnp.uint32(0) if peft else None,
  )
  state, metrics = step(state, batch, frozen)
  # After one step the first moment is (1 - b1) of the gradient.
  gradient = jax.tree.map(
    lambda m: m / (1 - ADAMW["b1"]), optax.tree_utils.tree_get(state.opt_state, "mu")
  )
  return metrics["loss"], gradient, state.params


def masked(tokenizer, conversation):
  """Ids of a conversation in ChatML, and those that are labels, -100 for the others."""
  start, end = tokenizer.specials["<|im_start|>"], tokenizer.specials["<|im_end|>"]
  ids, labels = [], []
  for role, content in conversation:
    if role == "assistant":
      asked, said = [start, *tokenizer.encode("assistant\n")], [*tokenizer.encode(content), end]
    else:
      asked, said = [start, *tokenizer.encode(f"{role}\n{content}"), end], []
    line_end = tokenizer.encode("\n")
    ids += [*asked, *said, *line_end]
    labels += [-100] * len(asked) + said + [-100] * len(line_end)
  return ids, labels


def torch_step(torch, model, tokenizer):
  """The loss of a step of AdamW that `model` then has done; its parameters keep their gradients."""
  examples = [masked(tokenizer, conversation) for conversation in CONVERSATIONS]
  count = sum(label != -100 for _, labels in examples for label in labels)
  trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
  names = {"lr": "learning_rate", "eps": "eps", "weight_decay": "weight_decay"}
  options = {theirs: ADAMW[ours] for theirs, ours in names.items()}
  optimizer = torch.optim.AdamW(trained, betas=(ADAMW["b1"], ADAMW["b2"]), **options)
  loss = 0
  for ids, labels in examples:
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    loss += torch.nn.functional.cross_entropy(
      logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum"
    )
  loss = loss / count
  loss.backward()
  optimizer.step()
  return loss.item()


def put_gradients(torch, model):
  """Puts the gradients of a model in the place of its parameters, to be read as those are."""
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter.copy_(parameter.grad)


def assert_same(actual, expected):
  actual, expected = tree.named_leaves(actual), tree.named_leaves(expected)
  assert set(actual) == set(expected)
  for name, values in expected.items():
    largest = np.abs(values).max()
    assert largest > 0, name
    np.testing.assert_allclose(actual[name], values, rtol=0, atol=1e-5 * largest, err_msg=name)


def test_a_step_of_all_parameters_is_that_of_pytorch(
  llama, batch, reference, load_params, tmp_path
):
  torch, _ = reference
  original, _, opened, params, tokenizer = llama
  model = type(original)(original.config)
  model.load_state_dict(original.state_dict())
  expected_loss = torch_step(torch, model, tokenizer)

  def read(name):
    model.save_pretrained(tmp_path / name)
    return load_params(HuggingFaceModel(str(tmp_path / name)))

  expected_params = read("after")
  put_gradients(torch, model)
  loss, gradient, after = train_step(opened.config, None, params, None, batch)
  assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
  assert_same(gradient, read("gradient"))
  assert_same(after, expected_params)


def test_a_step_of_lora_is_that_of_the_peft_library(llama, batch, reference, tmp_path):
  torch, _ = reference
  import peft

  original, _, opened, params, tokenizer = llama
  model = type(original)(original.config)
  model.load_state_dict(original.state_dict())
  torch.manual_seed(1)
  adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
  with torch.no_grad():
    for parameter in adapted.parameters():
      if parameter.requires_grad:
        parameter.add_(0.1 * torch.randn_like(parameter))

  def read(name):
    adapted.save_pretrained(tmp_path / name)
    return huggingface.read(tmp_path / name, opened.config, opened.family)

  config, adapters = read("before")
  expected_loss = torch_step(torch, adapted, tokenizer)
  _, expected_adapters = read("after")
  put_gradients(torch, adapted)
  loss, gradient, after = train_step(opened.config, config, adapters, params, batch)
  assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
  assert_same(gradient, read("gradient")[1])
  assert_same(after, expected_adapters)
