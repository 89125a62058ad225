import json

import pytest

from gptjax import config as config_lib
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from gptjax.inference.generate import chat_prompts
from gptjax.interop import huggingface
from gptjax.training.loop import train
from gptjax.training.metrics import read_metrics

FINETUNE = "configs/finetune.py"


def test_a_task_is_pretraining_with_other_defaults():
  config = config_lib.load(f"{FINETUNE}:task=chat,model=gpt2-124m,optim=lion")
  pretraining = config_lib.load("configs/pretrain.py:model=gpt2-124m,data=jsonl,optim=lion")
  assert set(config.data) == set(pretraining.data)
  assert config.model == pretraining.model
  assert (config.task.name, config.data.source, config.optim.name) == ("chat", "jsonl", "lion")
  assert (config.total_epochs, config.optim.learning_rate) == (3.0, 2e-5)
  assert config_lib.load(f"{FINETUNE}:task=text,data=text").task.name == "of_the_model"
  assert config_lib.load(f"{FINETUNE}:task=prompt").task.name == "prompt"


def test_without_arguments_it_goes_on_from_a_checkpoint_and_its_tokenizer():
  config = config_lib.load(FINETUNE, {"total_steps": "5"})
  assert (config.tokenizer, config.data.source, config.task.name) == (
    "init_from",
    "jsonl",
    "chat",
  )
  assert "total_epochs" not in config


@pytest.mark.parametrize(
  ("argument", "problem"),
  [
    ("task=chats", r"finetune\.py: no task preset 'chats'\. Did you mean 'chat'"),
    ("modl=tiny", "config argument 'modl=tiny' is not PART=NAME"),
  ],
)
def test_a_wrong_argument_is_answered(argument, problem):
  with pytest.raises(UserError, match=problem):
    config_lib.load(f"{FINETUNE}:{argument}")


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, tiny_config, random_params):
  """The work directory of a run that began from a folder as Hugging Face's."""
  folder = tmp_path_factory.mktemp("finetuned")
  tokenizers.train("bpe:300", ["What is it? It is a number."]).save(folder / "model")
  model = tiny_config(vocab_size=300, num_layers=1, **{"position.max_positions": 256})
  huggingface.save(folder / "model", model, random_params(model), huggingface.find_family(model))
  records = [{"prompt": f"What is {n}?", "completion": "It is a number."} for n in range(40)]
  (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, records)))
  config = config_lib.load(
    f"{FINETUNE}:task=chat",
    {
      "init_from": f"hf:{folder}/model",
      "data.path": str(folder / "chats.jsonl"),
      "data.cache_dir": str(folder / "cache"),
      "task.chat_template": "alpaca",
      "batch_size": 4,
      "sequence_length": 256,
      "optim.learning_rate": 1e-2,
      "total_epochs": 2.0,
      "log.tensorboard": False,
    },
  )
  train(config, folder / "run")
  return folder / "run"


@pytest.mark.slow
def test_a_pretrained_model_is_trained_on_chats(finetuned):
  lines = read_metrics(finetuned)
  losses = [line["val/loss"] for line in lines if "val/loss" in line]
  assert len(losses) == 3  # At the start and after each epoch.
  assert losses[-1] < 0.8 * losses[0]
  assert not [line for line in lines if "val/bits_per_byte" in line]


def test_the_run_is_talked_to_as_it_was_trained(finetuned):
  tokenizer = tokenizers.open_saved(finetuned / "tokenizer")
  (ids,) = chat_prompts(tokenizer, ["What is 5?"], None)
  text = tokenizer.decode(ids)
  assert "### Instruction:\nWhat is 5?\n\n### Response:" in text
