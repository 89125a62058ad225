import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from gptjax.data import files, sources
from gptjax.data.options import PartOptions
from gptjax.errors import UserError
from gptjax.finetuning import conversations
from gptjax.finetuning.conversations import Conversation, Conversations
from gptjax.presets.parts import data as presets


def said(role, content, **more):
  return {"role": role, "content": content, **more}


HI, HELLO, MORE = said("user", "Hi"), said("assistant", "Hello"), said("user", "And?")
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
PARSED = CALL | {"function": {"name": "f", "arguments": {"x": "é"}}}
LETTERS = {"type": "text", "text": "H"}, {"type": "text", "text": "i"}

RECORDS = {
  "openai": ({"messages": [HI, HELLO], "id": 7}, [HI, HELLO]),
  "openai, parts": ({"messages": [said("user", [*LETTERS]), HELLO]}, [HI, HELLO]),
  "openai, nulls": ({"messages": [HI | {"name": None}, HELLO], "tools": None}, [HI, HELLO]),
  "openai, blanks": ({"messages": [HI, HELLO], "tools": "", "system": ""}, [HI, HELLO]),
  "openai, columns": (
    {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Hello"]}},
    [HI, HELLO],
  ),
  "openai, tools": (
    {
      "messages": [
        said("developer", "D"),
        HI,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        said("tool", "", tool_call_id="1"),
        HELLO,
        MORE,
      ]
    },
    [
      said("developer", "D"),
      HI,
      said("assistant", "", tool_calls=[PARSED]),
      said("tool", "", tool_call_id="1"),
      HELLO,
      MORE,
    ],
  ),
  "sharegpt": (
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    [HI, HELLO],
  ),
  "sharegpt, system": (
    {"conversations": [{"from": "user", "value": "Hi"}, HELLO], "system": "S"},
    [said("system", "S"), HI, HELLO],
  ),
  "alpaca": ({"instruction": "Hi", "input": "", "output": "Hello"}, [HI, HELLO]),
  "alpaca, input": (
    {"instruction": "Add", "input": "1, 2", "output": "3"},
    [said("user", "Add\n\n1, 2", instruction="Add", input="1, 2"), said("assistant", "3")],
  ),
  "prompt": ({"prompt": "Hi", "completion": "Hello"}, [HI, HELLO]),
  "prompt, messages": ({"prompt": [HI], "completion": [HELLO]}, [HI, HELLO]),
  "several": ({"prompt": "no", "completion": "no", "messages": [HI, HELLO]}, [HI, HELLO]),
}


@pytest.mark.parametrize("name", RECORDS)
def test_each_format_is_recognised_by_its_keys(name):
  record, messages = RECORDS[name]
  conversation = conversations.read(record, "a.jsonl:1")
  assert list(conversation.messages) == messages
  assert Conversation.from_json(conversation.to_json()) == conversation
  assert conversation.name == "a.jsonl:1"


@pytest.mark.parametrize("tools", [[CALL], json.dumps([CALL])])
def test_tools_stand_beside_the_messages(tools):
  assert conversations.read({"messages": [HI, HELLO], "tools": tools}, "").tools == (CALL,)


@pytest.mark.parametrize(
  ("record", "problem"),
  [
    ({"text": "x"}, r"no conversation \(found: 'text'\)\. A record has 'messages', 'conv"),
    ({}, r"no conversation \(found: nothing\)"),
    ({"instruction": "x"}, "no conversation"),
    ({"instruction": 1, "output": "x"}, "'instruction' and 'input' are not both strings"),
    ({"messages": "x"}, "'messages' is str, not a list of messages"),
    ({"prompt": [HI], "completion": "x"}, "'completion' is str, not a list of messages"),
    (
      {"messages": {"role": ["user"], "content": []}},
      "the columns of 'messages' are not of the same",
    ),
    ({"messages": ["x"]}, "message 0 is str, not an object"),
    ({"messages": [{"content": "x"}]}, "message 0: no role None. Choose one of"),
    ({"messages": [HI, said("asistant", "x")]}, "message 1: no role 'asistant'. Did you mean 'ass"),
    ({"conversations": [{"from": "bing", "value": "x"}]}, "message 0: no role 'bing'"),
    ({"conversations": [{"from": ["gpt"], "value": "x"}]}, r"message 0: no role \['gpt'\]"),
    ({"messages": [HI, said("assistant", 1)]}, "message 1: its content is int, not a string"),
    ({"messages": [said("user", [{"type": "image"}])]}, "message 0: a part of its content is no t"),
    (
      {"messages": [HI, said("assistant", " \n")]},
      "message 1, of role 'assistant', has no content",
    ),
    ({"messages": [{"role": "user"}]}, "message 0, of role 'user', has no content"),
    ({"prompt": "", "completion": "x"}, "message 0, of role 'user', has no content"),
    ({"messages": []}, "no message is the assistant's"),
    ({"messages": [HI]}, "no message is the assistant's"),
    ({"messages": [HELLO]}, "message 0: one of 'assistant' is the first; it must follow 'user' or"),
    (
      {"messages": [HI, MORE, HELLO]},
      "message 1: one of 'user' follows one of 'user'; it must fol",
    ),
    ({"messages": [HI, HELLO, HELLO]}, "message 2: one of 'assistant' follows one of 'assistant'"),
    (
      {"messages": [HI, said("tool", "x"), HELLO]},
      "message 1: one of 'tool' follows one of 'user'",
    ),
    (
      {"messages": [HI, said("system", "x"), HELLO]},
      "message 1: a 'system' message, which can only",
    ),
    ({"messages": [HI, HELLO | {"tool_calls": [{}]}]}, "message 1: a tool call without a function"),
    (
      {"messages": [HI, HELLO | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
      "message 1: the arguments of tool call 'f': not JSON",
    ),
    ({"messages": [HI, HELLO], "tools": "["}, "'tools': not JSON"),
    ({"messages": [HI, HELLO], "tools": {"f": 1}}, "'tools' is dict, not a list"),
  ],
)
def test_what_is_no_conversation_gets_one_sentence_with_its_place(record, problem):
  with pytest.raises(UserError, match=rf"^a\.jsonl:3: {problem}"):
    conversations.read(record, "a.jsonl:3")


def options(source, **changes):
  keys = presets.PART_DEFAULTS | {"source": source, "text_key": "", "validation_fraction": 0.5}
  return PartOptions("data", **(keys | changes))


def read(pair):
  """All messages, of both sides of a split."""
  opened = [Conversations(side) for side in pair]
  texts = [text for side in opened for text in sources.documents(side)]
  return sorted((Conversation.from_json(text) for text in texts), key=lambda c: c.name)


def test_json_lines_are_read_with_their_line_in_errors(tmp_path):
  path = tmp_path / "a.jsonl"
  records = [record for record, _ in RECORDS.values()]
  path.write_text("\n".join([json.dumps(records[0]), "", *map(json.dumps, records[1:])]))
  found = read(sources.open_pair(options("jsonl", path=str(path))))
  names = [f"{path}:{line}" for line in (1, *range(3, 2 + len(records)))]  # The second is empty.
  expected = [conversations.read(*pair) for pair in zip(records, names, strict=True)]
  assert found == sorted(expected, key=lambda c: c.name)


def test_a_broken_line_is_named(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"messages": []}\n{"messages": 1}\n[]')
  broken = Conversations(files.open_by_suffix(str(path), "", "error"))
  for line, problem in enumerate(["no message is", "'messages' is int", "a JSON list, not"]):
    with pytest.raises(UserError, match=rf"a\.jsonl:{line + 1}: {problem}"):
      broken[line]


def test_a_single_record_is_not_split(tmp_path):
  (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
  with pytest.raises(UserError, match=r"a\.jsonl:1: a single record .*data\.validation_path="):
    sources.open_pair(options("jsonl", path=f"{tmp_path}/a.jsonl"))


def test_parquet_rows_are_records(tmp_path):
  rows = [{"messages": [HI, HELLO | {"name": "x"}], "score": 0.5}] * 3
  pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
  found = read(sources.open_pair(options("parquet", path=str(tmp_path))))
  assert [list(c.messages) for c in found] == [[HI, HELLO | {"name": "x"}]] * 3
  assert [c.name for c in found] == [f"{tmp_path}/a.parquet:{row}" for row in (1, 2, 3)]


class Dialogues(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    text = tfds.features.Text()
    messages = tfds.features.Sequence({"role": text, "content": text})
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict({"messages": messages, "n": np.int64})
    )

  def _split_generators(self, manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for number in range(4):
      yield number, {"messages": [HI, said("assistant", "é")], "n": number}


def test_tfds_records_of_bytes_and_columns_are_read(tmp_path):
  Dialogues(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  pair = sources.open_pair(options("tfds", path="dialogues", tfds_data_dir=str(tmp_path)))
  found = read(pair)
  assert [list(c.messages) for c in found] == [[HI, said("assistant", "é")]] * 4


def test_what_is_said_is_text_to_train_a_tokenizer_on(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text("\n".join(json.dumps({"messages": [HI, HELLO]}) for _ in range(3)))
  source = Conversations(files.open_by_suffix(str(path), "", "error"))
  assert list(conversations.texts(source, [0, 2])) == ["Hi\nHello"] * 2
