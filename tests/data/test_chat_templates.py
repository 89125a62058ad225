import pytest

from gptjax.data.chat import ChatTemplate, set_template
from gptjax.data.chat_templates import TEMPLATES
from gptjax.errors import UserError

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
