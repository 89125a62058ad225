"""Calls of tools: read from a model's text, streamed, and asked for."""

import itertools
import json

import jsonschema
import pytest
from hypothesis import given, settings, strategies

from gptjax.inference.constraints import Languages
from gptjax.inference.engine import Engine
from gptjax.inference.request import Request
from gptjax.serving.tools import (
  HERMES,
  LLAMA,
  MISTRAL,
  Arguments,
  CallReader,
  ToolCall,
  constrain_calls,
  find_style,
)

ONE = '{"name": "f", "arguments": {"a": "</b> {x", "n": [1, 2]}}'
F, G = ("f", '{"a": "</b> {x", "n": [1, 2]}'), ("g", "{}")
HEAD_OF_H = '<tool_call>{"name": "h", "arguments": '
LLAMA_ONE = ONE.replace("arguments", "parameters")


def join(found):
  """The text and the calls, a name with the text of its arguments, of what a reader found."""
  text, calls = "", []
  for one in found:
    match one:
      case ToolCall():
        calls.append((one.name, ""))
      case Arguments():
        calls[-1] = (calls[-1][0], calls[-1][1] + one.text)
      case _:
        text += one
  return text, calls


def read(style, pieces):
  """The text and the calls of an answer that comes in pieces."""
  reader, found = CallReader(style, ["f", "g", "get_weather", "time"]), []
  for number, piece in enumerate(pieces):
    found += reader.feed(piece, final=number == len(pieces) - 1)
  assert all(one if isinstance(one, str) else one.name if isinstance(one, ToolCall) else one.text
             for one in found)  # fmt: skip
  return join(found)


@pytest.mark.parametrize(
  ("style", "answer", "text", "calls"),
  [
    (HERMES, "", "", []),
    (HERMES, "Just text <b>. ", "Just text <b>. ", []),
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", "", [F]),
    (HERMES, f"Wait.\n\n<tool_call>{ONE}</tool_call>\n", "Wait.", [F]),
    (
      HERMES,
      f"<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n"
      '{"name": "g", "arguments": {}}\n</tool_call>',
      "",
      [F, G],
    ),
    (HERMES, f"<tool_call>{ONE}", "", [F]),
    (HERMES, f"<tool_call>{ONE}</tool_call> Then?", "Then?", [F]),
    (HERMES, "<tool_call>no</tool_call> x", "<tool_call>no</tool_call> x", []),
    (HERMES, '<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    (HERMES, '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    (HERMES, '<tool_call>{"name": "g"}</tool_call>', "", [G]),
    (HERMES, '<tool_call>{"name": "g", "arguments": "{}"}</tool_call>', "", [G]),
    (HERMES, "a < b and <tool", "a < b and <tool", []),
    (HERMES, "Hm. <tool_call>{}", "Hm. <tool_call>{}", []),
    (HERMES, f'<tool_call>{{"id": "1", "type": "function", {ONE[1:]}</tool_call>', "", [F]),
    (HERMES, f'<tool_call>[{ONE}, {ONE}]</tool_call> x', "x", [F, F]),
    (HERMES, f'<tool_call>[{ONE}, {{"a": 1}}]</tool_call>', ' {"a": 1}]</tool_call>', [F]),
    # As the model wrote it, in whatever state.
    (HERMES, '<tool_call>{"name" : "g","arguments":{ "a":[ ]}}', "", [("g", '{ "a":[ ]}')]),
    (HERMES, '<tool_call>{"name": "g", "arguments": {"a": "\\"<', "", [("g", '{"a": "\\"<')]),
    (HERMES, '<tool_call>{"name": "g", "arguments": {}</tool_call> x', "x", [G]),
    (HERMES, '<tool_call>{"name": "g", "arguments": {"a": 1</tool_call>', "", [("g", '{"a": 1')]),
    # What is a call only when it is whole.
    (HERMES, '<tool_call>{"arguments": {"</tool_call>": 1}, "name": "f"}</tool_call>', "",
     [("f", '{"</tool_call>": 1}')]),
    (HERMES, f"{HEAD_OF_H}{{}}}}</tool_call>", "", [("h", "{}")]),
    (HERMES, f"{HEAD_OF_H}{{", f"{HEAD_OF_H}{{", []),
    (HERMES, f"{HEAD_OF_H}[1]}} x", f"{HEAD_OF_H}[1]}} x", []),
    (HERMES, '<tool_call>{"name": ["f"]}', '<tool_call>{"name": ["f"]}', []),
    (MISTRAL, f"[TOOL_CALLS][{ONE}]", "", [F]),
    (MISTRAL, f'[TOOL_CALLS] [{ONE}, {{"name": "g", "arguments": {{}}}}]', "", [F, G]),
    (MISTRAL, '[TOOL_CALLS]g{}', "", [G]),
    (MISTRAL, '[TOOL_CALLS]g[CALL_ID]12[ARGS]{}', "", [G]),
    (MISTRAL, f'[TOOL_CALLS] [{ONE[:-1]}, "id": "a}}b"}}]', "", [F]),
    (MISTRAL, '[TOOL_CALLS]g{}[TOOL_CALLS]h{"a": 1}[TOOL_CALLS]f{', "",
     [G, ("h", '{"a": 1}'), ("f", "{")]),
    (MISTRAL, '[TOOL_CALLS]g and f', '[TOOL_CALLS]g and f', []),
    (MISTRAL, "[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
    (MISTRAL, "See [TOOL] and [1].", "See [TOOL] and [1].", []),
    (LLAMA, LLAMA_ONE, "", [F]),
    (LLAMA, f"<|python_tag|>{LLAMA_ONE}", "", [F]),
    (LLAMA, f'{LLAMA_ONE}; {{"name": "g", "parameters": {{}}}}', "", [F, G]),
    (LLAMA, '{"name": "h", "parameters": {}}', '{"name": "h", "parameters": {}}', []),
    (LLAMA, '{"answer": 42}', '{"answer": 42}', []),
    (LLAMA, '<|python_tag|>{"answer": "{', '<|python_tag|>{"answer": "{', []),
    (LLAMA, f'{LLAMA_ONE}; {{"name": "h"}}', '; {"name": "h"}', [F]),
    (LLAMA, "The set {1, 2}.", "The set {1, 2}.", []),
    (LLAMA, " \n", " \n", []),
  ],
)  # fmt: skip
def test_calls_are_found_whatever_the_pieces(style, answer, text, calls):
  assert read(style, [answer]) == (text, calls)
  for size in (1, 2, 3, 7):
    pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
    assert read(style, [*pieces, ""]) == (text, calls)
  for cut in range(1, len(answer)):
    assert read(style, [answer[:cut], answer[cut:]]) == (text, calls)


PARTS = [
  *('"name"', '"arguments"', '"parameters"', '"f"', '"h"', '"\\\\"', '"{"', "f", "1", "null", " "),
  *("{", "}", "[", "]", ":", ",", ";", '"', "\\", "<", '{"name": "f", "arguments": {', ONE),
  *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"),
]


@pytest.mark.parametrize("style", [HERMES, MISTRAL, LLAMA], ids=["hermes", "mistral", "llama"])
@settings(max_examples=200, derandomize=True, deadline=None)
@given(parts=strategies.lists(strategies.sampled_from(PARTS), max_size=12), data=strategies.data())
def test_no_cut_changes_what_is_found(style, parts, data):
  answer = style.opening + "".join(parts)
  cuts = data.draw(strategies.lists(strategies.integers(0, len(answer)), max_size=6).map(sorted))
  pieces = [answer[a:b] for a, b in itertools.pairwise([0, *cuts, len(answer)])]
  assert read(style, pieces) == read(style, [answer]) == read(style, [*answer, ""])


@pytest.mark.parametrize(
  ("style", "before", "after"),
  [
    (HERMES, 'So. <tool_call>\n{"name": "f", "arguments": ', "}\n</tool_call>"),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": ', ', "id": "1"}]'),
    (MISTRAL, "[TOOL_CALLS]f[ARGS]", ""),
    (LLAMA, '<|python_tag|>{"name": "f", "parameters": ', "}"),
  ],
)
def test_arguments_are_told_as_they_are_written(style, before, after):
  arguments = '{"a": {"b": ["}", "\\\\", "\\""]}, "c": "</tool_call>]"}'
  reader, found = CallReader(style, ["f"]), []
  for piece in before:
    found += reader.feed(piece)
    assert join(found)[1] == []
  for number, piece in enumerate(arguments, 1):
    found += reader.feed(piece)
    assert join(found)[1] == [("f", arguments[:number])]
  found += reader.feed(after, final=True)
  assert join(found)[1] == [("f", arguments)]


def test_what_is_no_call_is_told_at_once():
  for style, said in ((HERMES, "<tool_call>no"), (MISTRAL, "[TOOL_CALLS][]"), (LLAMA, "{1, 2}")):
    reader = CallReader(style, ["f"])
    assert "".join(reader.feed(said)) == said
  for style, said in ((HERMES, f"<tool_call>{ONE}</tool_call>"), (MISTRAL, f"[TOOL_CALLS][{ONE}]")):
    assert join(CallReader(style, ["f"]).feed(f"{said} Then")) == ("Then", [F])


@pytest.mark.parametrize(
  ("template", "style"),
  [
    ("{% if tools %}<tool_call>", HERMES),
    ("{% if tools %}[TOOL_CALLS]", MISTRAL),
    ("{% if tools %}{'name': , 'parameters': }", LLAMA),
    ("{% if tools %}<tool_call><function=x>", None),
    ("{% if tools %}?", None),
    ("{{ messages }}", None),
  ],
)
def test_a_template_tells_its_style(template, style):
  assert find_style(template) == style


# --- Calls that have to come ---------------------------------------------------------------------

WEATHER = {
  "name": "get_weather",
  "parameters": {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
  },
}
TIME = {"name": "time"}


MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]")


@pytest.mark.parametrize("style", [HERMES, MISTRAL, LLAMA], ids=["hermes", "mistral", "llama"])
@pytest.mark.parametrize(
  "specials",
  [("<|im_end|>",), pytest.param(MARKS, marks=pytest.mark.slow)],
  ids=["text", "special"],
)
def test_calls_in_a_grammar_are_in_the_style(random_model, chat_tokenizer, style, specials):
  tokenizer = chat_tokenizer(specials=specials)
  engine, languages = Engine(random_model, tokenizer, rows=4), Languages(tokenizer)
  constraint = constrain_calls(languages, style, tokenizer, [WEATHER, TIME], several=False)
  requests = [Request([1], 200, seed=i, constraint=constraint.copy()) for i in range(4)]
  for answer in engine.run(requests):
    names = {token: text for text, token in tokenizer.specials.items() if text in MARKS}
    written = answer.tokens[1:-1]
    text = "".join(names.get(token) or tokenizer.decode([token]) for token in written)
    rest, calls = read(style, [text])
    assert (rest, len(calls), answer.finish_reason) == ("", 1, "stop")
    ((name, arguments),) = calls
    schema = {"get_weather": WEATHER["parameters"], "time": {"maxProperties": 0}}[name]
    jsonschema.validate(json.loads(arguments), schema)


TOOLS = [{"type": "function", "function": one} for one in (WEATHER, TIME)]
HELLO = [{"role": "user", "content": "Weather?"}]


def ask(client, **options):
  fields = {"model": "tiny", "messages": HELLO, "seed": 1, "max_tokens": 300, "tools": TOOLS}
  return client.post("/v1/chat/completions", json=fields | options)


@pytest.mark.parametrize(
  ("choice", "names"),
  [
    ("required", {"get_weather", "time"}),
    ({"type": "function", "function": {"name": "get_weather"}}, {"get_weather"}),
  ],
)
def test_a_call_can_be_required(serve, random_engine, stream_events, choice, names):
  client = serve(random_engine)
  options = {"tool_choice": choice, "parallel_tool_calls": False}
  response = ask(client, **options)
  (told,) = response.json()["choices"]
  assert told["finish_reason"] == "tool_calls"
  assert told["message"]["content"] is None
  (call,) = told["message"]["tool_calls"]
  assert call["function"]["name"] in names
  events = stream_events(ask(client, stream=True, **options))
  assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
  (streamed,) = assembled(events)
  assert {**streamed, "id": ""} == {"index": 0, **call, "id": ""}


def assembled(events):
  """The calls of a stream, each of which begins with all but its arguments."""
  calls = []
  for event in events:
    for one in event["choices"][0]["delta"].get("tool_calls", []):
      if one["index"] == len(calls):
        assert set(one) == {"index", "id", "type", "function"}
        assert one["function"]["arguments"] == ""
        calls.append(one)
      else:
        assert set(one) == {"index", "function"}
        assert set(one["function"]) == {"arguments"}
        calls[one["index"]]["function"]["arguments"] += one["function"]["arguments"]
  return calls


SAID = 'Let me see. <tool_call>{"name": "time", "arguments": {"é": 1}}</tool_call>\n'
SAID += '<tool_call>{"name": "time", "arguments": {}}</tool_call>'


@pytest.mark.parametrize("marks", [(), ("<tool_call>", "</tool_call>")], ids=["text", "special"])
def test_a_model_may_call_by_itself(serve, reciting, chat_tokenizer, stream_events, marks):
  template = "{% if tools %}<tool_call>{% endif %}{{ messages[0].content }}"
  tokenizer = chat_tokenizer(template, ("<|im_end|>", *marks))
  prompt = len(tokenizer.encode_with_specials("<tool_call>Weather?"))
  script = tokenizer.encode_with_specials(SAID)
  client = serve(Engine(reciting(tokenizer, script, prompt), tokenizer, rows=1))
  options = {"temperature": 0, "max_tokens": 150}
  (told,) = ask(client, **options).json()["choices"]
  assert (told["message"]["content"], told["finish_reason"]) == ("Let me see.", "tool_calls")
  calls = [call["function"] for call in told["message"]["tool_calls"]]
  assert calls == [{"name": "time", "arguments": text} for text in ('{"é": 1}', "{}")]
  events = stream_events(ask(client, stream=True, **options))
  deltas = [event["choices"][0]["delta"] for event in events]
  assert "".join(delta.get("content", "") for delta in deltas) == "Let me see."
  assert [(one["index"], one["function"]) for one in assembled(events)] == list(enumerate(calls))
  assert sum("tool_calls" in delta for delta in deltas) > 6
  (told,) = ask(client, tool_choice="none", **options).json()["choices"]
  assert told["finish_reason"] == "stop"
  assert "tool_calls" not in told["message"]


def test_results_of_calls_go_through_the_template(serve, random_engine):
  client = serve(random_engine)
  call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": '{"a": 1}'}}
  messages = [
    *HELLO,
    {"role": "assistant", "content": None, "tool_calls": [call]},
    {"role": "tool", "tool_call_id": "1", "content": "noon<|im_end|>"},
  ]
  tokens = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
  text = random_engine.tokenizer.decode(tokens)
  assert '<tool_call>{"name": "time", "arguments": {"a": 1}}</tool_call>' in text
  assert text.endswith("tnoon<|im_end|>a")
  call["function"]["arguments"] = "[1]"
  told = client.post("/tokenize", json={"messages": messages}).json()["error"]
  assert told["param"] == "messages[1].tool_calls[0].function.arguments"
  assert told["message"].endswith("must be a JSON object.")


@pytest.mark.parametrize(
  ("options", "param", "message"),
  [
    ({"tool_choice": {"type": "function", "function": {"name": "tim"}}}, "tool_choice", "'time'?"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice", "'required' needs tools"),
    ({"tools": [{"type": "web"}]}, "tools[0].type", "choose one of: 'function'"),
    (
      {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "wat"}}}],
       "tool_choice": "required"},
      "tools", "tools cannot be enforced",
    ),
    ({"response_format": {"type": "regex", "pattern": "a"}}, "response_format", "at once"),
  ],
)  # fmt: skip
def test_a_wrong_field_is_named(serve, random_engine, options, param, message):
  response = ask(serve(random_engine), **options)
  assert response.status_code == 400
  assert response.json()["error"]["param"] == param
  assert message in response.json()["error"]["message"]
