"""/v1/responses and /v1/embeddings."""

import base64
import json

import jax
import numpy as np
import pytest

from gptjax.inference.engine import Engine

SCRIPT = "Call me Ishmael, é世."
START = 3 + 5 + 2


@pytest.fixture
def client(serve, reciting, chat_tokenizer):
  tokenizer = chat_tokenizer()
  return serve(Engine(reciting(tokenizer, SCRIPT, START), tokenizer, rows=1))


def ask(client, given="hello", **options):
  fields = {"model": "tiny", "input": given, "temperature": 0} | options
  return client.post("/v1/responses", json=fields)


def named_events(response):
  """The events of a stream, whose names and numbers have to be right."""
  found = []
  for number, block in enumerate(filter(None, response.text.split("\n\n"))):
    name, data = block.split("\n")
    event = json.loads(data.removeprefix("data: "))
    assert name == f"event: {event['type']}"
    assert event["sequence_number"] == number
    found.append(event)
  return found


def stable(value):
  """A value without ids, times and what the cache held."""
  if isinstance(value, dict):
    changing = ("id", "call_id", "created_at", "item_id", "cached_tokens")
    return {key: stable(one) for key, one in value.items() if key not in changing}
  return [stable(one) for one in value] if isinstance(value, list) else value


def test_an_input_is_answered(client):
  told = ask(client, instructions=None, store=True, reasoning={"effort": "low"}).json()
  (item,) = told["output"]
  assert (told["object"], told["status"], told["store"]) == ("response", "completed", False)
  assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
  assert item["content"] == [
    {"type": "output_text", "text": SCRIPT, "annotations": [], "logprobs": []}
  ]
  size = len(SCRIPT.encode()) + 1
  assert told["usage"]["input_tokens"] == START
  assert (told["usage"]["output_tokens"], told["usage"]["total_tokens"]) == (size, size + START)


def test_a_stream_tells_the_same_step_by_step(client):
  events = named_events(ask(client, stream=True))
  kinds = [event["type"].removeprefix("response.") for event in events]
  assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
  assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
  assert set(kinds[4:-4]) == {"output_text.delta"}
  assert "".join(event["delta"] for event in events[4:-4]) == SCRIPT
  assert events[2]["item"]["content"] == []
  assert events[3]["part"]["text"] == ""
  assert stable(events[-1]["response"]) == stable(ask(client).json())


def test_an_answer_that_is_cut_is_incomplete(client):
  told = ask(client, max_output_tokens=4).json()
  assert told["status"] == "incomplete"
  assert told["incomplete_details"] == {"reason": "max_output_tokens"}
  assert told["output"][0]["content"][0]["text"] == "Call"
  assert named_events(ask(client, max_output_tokens=4, stream=True))[-1]["type"].endswith(
    "incomplete"
  )


def test_log_probabilities_are_told_if_asked_for(client):
  for options in ({"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}):
    told = ask(client, **options).json()["output"][0]["content"][0]["logprobs"]
    assert bytes(byte for token in told for byte in token["bytes"]).decode() == SCRIPT
    assert len(told[0]["top_logprobs"]) == options.get("top_logprobs", 0)


def test_items_are_a_conversation(serve, random_engine):
  client, seen = serve(random_engine), []
  submit = random_engine.submit
  random_engine.submit = lambda request: (seen.append(request.tokens), submit(request))[1]
  items = [
    {"role": "developer", "content": "Be kind."},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Time?"}]},
    {"type": "reasoning", "id": "x", "summary": []},
    {"type": "function_call", "call_id": "1", "name": "time", "arguments": '{"zone": "UTC"}'},
    {"type": "function_call_output", "call_id": "1", "output": "noon"},
  ]
  try:
    assert ask(client, items, instructions="Hm.", max_output_tokens=1).status_code == 200
  finally:
    del random_engine.submit
  assert random_engine.tokenizer.decode(seen[0]) == (
    'sHm.sBe kind.uTime?a<tool_call>{"name": "time", "arguments": {"zone": "UTC"}}</tool_call>'
    "tnoona"
  )


FUNCTION = {"type": "function", "name": "time", "description": "Now.", "strict": True}


def test_a_function_is_called(serve, random_engine):
  client = serve(random_engine)
  options = {"tools": [{"type": "web_search"}, FUNCTION], "tool_choice": "required", "seed": 2}
  options["parallel_tool_calls"] = False
  told = ask(client, **options).json()
  (call,) = told["output"]
  assert (call["type"], call["name"], call["arguments"]) == ("function_call", "time", "{}")
  assert told["status"] == "completed"
  events = named_events(ask(client, stream=True, **options))
  kinds = [event["type"].removeprefix("response.") for event in events[2:]]
  deltas = [event["delta"] for event in events if event["type"].endswith("arguments.delta")]
  assert "".join(deltas) == call["arguments"]
  assert len(deltas) > 1
  assert list(dict.fromkeys(kinds)) == [
    "output_item.added",
    "function_call_arguments.delta",
    "function_call_arguments.done",
    "output_item.done",
    "completed",
  ]
  assert stable(events[-1]["response"]) == stable(told)


def test_an_answer_is_in_a_format(serve, random_engine):
  schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
  schema["additionalProperties"] = False
  form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
  told = ask(serve(random_engine), text={"format": form}).json()
  assert json.loads(told["output"][0]["content"][0]["text"])["a"] in (True, False)
  assert told["text"]["format"] == form


@pytest.mark.parametrize(
  ("fields", "param", "message"),
  [
    ({"given": []}, "input", "input has 0 items"),
    ({"given": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "choose one of"),
    ({"given": [{"role": "tool", "content": "x"}]}, "input[0].role", "no choice"),
    ({"previous_response_id": "x"}, "previous_response_id", "send the whole conversation"),
    ({"truncation": "auto"}, "truncation", "truncation: no choice"),
    ({"tools": [{"type": "function"}]}, "tools[0].name", "tools[0].name is missing"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "?"}}}},
     "text.format", "text.format.schema cannot be enforced"),
  ],
)  # fmt: skip
def test_a_wrong_field_is_named(client, fields, param, message):
  response = ask(client, **fields)
  assert response.status_code == 400
  assert response.json()["error"]["param"] == param
  assert message in response.json()["error"]["message"]


# --- Embeddings ----------------------------------------------------------------------------------


def embed(client, given, **options):
  return client.post("/v1/embeddings", json={"model": "tiny", "input": given} | options)


def test_a_vector_is_the_mean_of_the_last_hidden_states(serve, random_engine, random_model):
  client, tokenizer = serve(random_engine), random_engine.tokenizer
  texts = ["one", "a longer text, which has more tokens than a page of the cache"]
  told = embed(client, texts).json()
  assert [one["index"] for one in told["data"]] == [0, 1]
  for text, one in zip(texts, told["data"], strict=True):
    tokens = np.array([tokenizer.encode_prompt(text)])
    hidden, _ = jax.jit(lambda model, tokens: model.hidden(tokens))(random_model, tokens)
    mean = np.asarray(hidden, np.float32)[0].mean(0)
    np.testing.assert_allclose(one["embedding"], mean / np.linalg.norm(mean), atol=1e-5)
  tokens = sum(len(tokenizer.encode_prompt(text)) for text in texts)
  assert told["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
  coded = embed(client, texts[0], encoding_format="base64").json()["data"][0]["embedding"]
  vector = np.frombuffer(base64.b64decode(coded), "<f4")
  np.testing.assert_array_equal(vector, np.float32(told["data"][0]["embedding"]))
  ids = tokenizer.encode_prompt(texts[0])
  assert embed(client, ids).json()["data"] == told["data"][:1]


def test_what_cannot_be_a_vector_is_refused(serve, random_engine):
  client = serve(random_engine)
  for fields, param in (({"dimensions": 3}, "dimensions"), ({"encoding_format": "int"}, None)):
    error = embed(client, "a", **fields).json()["error"]
    assert error["param"] == (param or "encoding_format")
  assert embed(client, "a" * 2000).json()["error"]["code"] == "context_length_exceeded"
