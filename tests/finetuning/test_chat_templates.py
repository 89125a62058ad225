import pytest

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.errors import UserError
from gptjax.finetuning.chat_templates import TEMPLATES, set_template
from gptjax.templates.chat import ChatTemplate

SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "U"}
INPUT = {"role": "user", "content": "U\n\nX", "instruction": "U", "input": "X"}
ANSWER = {"role": "assistant", "content": "A"}

CHATML = "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
LLAMA3 = (
  "<s><|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
  "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
# As the repository of Stanford Alpaca has them.
ALPACA = (
  "Below is an instruction that describes a task. Write a response that appropriately completes "
  "the request.\n\n### Instruction:\nU\n\n### Response:"
)
ALPACA_INPUT = (
  "Below is an instruction that describes a task, paired with an input that provides further "
  "context. Write a response that appropriately completes the request.\n\n### Instruction:\nU\n\n"
  "### Input:\nX\n\n### Response:"
)


@pytest.fixture(scope="module")
def named(write_tokenizer, tmp_path_factory):
  tokenizer = write_tokenizer(tmp_path_factory.mktemp("plain"), None)
  return {name: ChatTemplate(set_template(tokenizer, name)) for name in TEMPLATES}


@pytest.mark.parametrize(
  ("name", "messages", "text"),
  [
    ("chatml", [USER], CHATML),
    ("chatml", [SYSTEM, USER], "<|im_start|>system\nS<|im_end|>\n" + CHATML),
    ("chatml", [USER, ANSWER, USER], f"{CHATML}A<|im_end|>\n{CHATML}"),
    ("llama3", [USER], LLAMA3),
    ("llama3", [USER, ANSWER, USER], f"{LLAMA3}A<|eot_id|>{LLAMA3.removeprefix('<s>')}"),
    ("alpaca", [USER], ALPACA),
    ("alpaca", [INPUT], ALPACA_INPUT),
    ("alpaca", [SYSTEM, USER], "S\n\n### Instruction:\nU\n\n### Response:"),
    (
      "alpaca",
      [USER, ANSWER, USER],
      f"{ALPACA}A</s>\n\n### Instruction:\nU\n\n### Response:",
    ),
  ],
)
def test_a_named_template_writes_the_published_format(named, name, messages, text):
  assert named[name].render(messages) == text


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_template_refuses_tools_rather_than_leave_them_out(named, name):
  call = ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
  for messages, tools in (([USER, call], ()), ([USER], ({"name": "f"},))):
    with pytest.raises(UserError, match="it has no form for tools"):
      named[name].render(messages, tools=tools)


def test_a_named_template_stays_with_the_tokenizer(write_tokenizer, tmp_path):
  own = write_tokenizer(tmp_path, "{{ messages[0].content }}")
  chosen = set_template(own, "chatml")
  assert set_template(own, "") is own
  assert chosen.fingerprint() != own.fingerprint()
  assert chosen.specials["<|im_end|>"] in chosen.stops
  assert (chosen.vocab_size, chosen.encode("a text")) == (own.vocab_size, own.encode("a text"))
  chosen.save(tmp_path / "saved")
  again = tokenizer_lib.open_saved(tmp_path / "saved")
  assert again.chat_template == chosen.chat_template != own.chat_template
  assert set_template(again, "chatml").fingerprint() == again.fingerprint() == chosen.fingerprint()


def test_a_tokenizer_made_here_ends_alpaca_turns_with_its_separator(tmp_path):
  chosen = set_template(tokenizer_lib.load("bytes"), "alpaca")
  assert ChatTemplate(chosen).encode([USER, ANSWER], add_generation_prompt=False)[-1] == 256
  assert chosen.stops == {256}


@pytest.mark.parametrize(
  ("name", "problem"),
  [
    ("", "tokenizer 'bytes' has no chat template of its own. Set --config.task.chat_template= to"),
    ("chatm", "task.chat_template: no template 'chatm'. Did you mean 'chatml'"),
    ("llama3", "task.chat_template='llama3' needs the special token '<|start_header_id|>', which"),
  ],
)
def test_a_template_that_cannot_be_had_is_named(name, problem):
  with pytest.raises(UserError) as error:
    set_template(tokenizer_lib.load("bytes"), name)
  assert problem in str(error.value)
