"""What others' programs make of the server: OpenAI's client, lm-eval and schemathesis."""

import collections
import json
import re
from pathlib import Path

import numpy as np
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from gptjax.evals.subject import Subject

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
  "type": "object",
  "properties": {"sunny": {"type": "boolean"}, "wind": {"enum": ["none", "strong"]}},
  "required": ["sunny", "wind"],
  "additionalProperties": False,
}
FUNCTION = {"name": "report", "parameters": SCHEMA, "strict": True}


@pytest.fixture(scope="module")
def server(start_process):
  return start_process("--rows=4", "--api_key=secret", "--name=tiny")


@pytest.fixture
def client(server):
  return openai.OpenAI(
    api_key="secret", base_url=f"http://127.0.0.1:{server.port}/v1", max_retries=0
  )


@pytest.mark.slow
class TestOpenAI:
  """The official client."""

  def test_chats(self, client):
    options = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 20, "seed": 4}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    (choice,) = whole.choices
    assert len(choice.logprobs.content[0].top_logprobs) == 3
    chunks = list(
      client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == choice.message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens

  def test_answers_in_a_schema(self, client):
    form = {"name": "weather", "schema": SCHEMA, "strict": True}
    told = client.chat.completions.create(
      model="tiny",
      messages=HELLO,
      response_format={"type": "json_schema", "json_schema": form},
    )
    assert json.loads(told.choices[0].message.content)["sunny"] in (True, False)

  def test_calls_of_tools(self, client):
    options = {
      "model": "tiny",
      "messages": HELLO,
      "tools": [{"type": "function", "function": FUNCTION}],
      "tool_choice": {"type": "function", "function": {"name": "report"}},
      "seed": 1,
    }
    (choice,) = client.chat.completions.create(**options).choices
    (call,) = choice.message.tool_calls
    with client.chat.completions.stream(**options) as stream:
      final = stream.get_final_completion().choices[0]
    (streamed,) = final.message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    assert final.finish_reason == choice.finish_reason == "tool_calls"
    chunks = list(client.chat.completions.create(**options, stream=True))
    pieces = [call.function for one in chunks for call in one.choices[0].delta.tool_calls or ()]
    assert (pieces[0].name, pieces[0].arguments) == ("report", "")
    assert "".join(piece.arguments for piece in pieces) == call.function.arguments
    assert len(pieces) > 5
    messages = [
      *HELLO,
      choice.message.model_dump(exclude_none=True),
      {"role": "tool", "tool_call_id": call.id, "content": "thanks"},
    ]
    client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)

  def test_completions(self, client):
    told = client.completions.create(
      model="tiny", prompt=["a", "b"], max_tokens=3, echo=True, logprobs=1, temperature=0
    )
    assert [choice.text[0] for choice in told.choices] == ["a", "b"]
    assert told.choices[0].logprobs.token_logprobs[0] is None

  def test_responses(self, client):
    form = {"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA}}
    options = {"model": "tiny", "input": "hello", "text": form, "temperature": 0}
    whole = client.responses.create(**options)
    with client.responses.stream(**options) as stream:
      assert stream.get_final_response().output_text == whole.output_text
    assert "wind" in json.loads(whole.output_text)
    tools = [{"type": "function", **FUNCTION}, {"type": "web_search"}]
    told = client.responses.create(
      model="tiny", input="hello", tools=tools, tool_choice="required", parallel_tool_calls=False
    )
    assert told.output[0].name == "report"

  def test_a_call_that_is_streamed(self, client):
    tools, choice = [{"type": "function", **FUNCTION}], {"type": "function", "name": "report"}
    options = {"model": "tiny", "input": "hello", "tools": tools, "tool_choice": choice}
    options["extra_body"] = {"seed": 1}
    (whole,) = client.responses.create(**options).output
    with client.responses.stream(**options) as stream:
      events = list(stream)
      (call,) = stream.get_final_response().output
    pieces = [one.delta for one in events if one.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call.arguments == whole.arguments
    assert len(pieces) > 5

  def test_embeddings(self, client):
    told = client.embeddings.create(model="tiny", input=["hello", "hello", "other"])
    first, again, other = (np.array(one.embedding) for one in told.data)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(np.linalg.norm(other), 1, rtol=1e-5)
    assert first @ other < 1 - 1e-6

  def test_models_and_errors(self, client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError):
      client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError) as error:
      client.chat.completions.create(model="tiny", messages=[])
    assert error.value.param == "messages"
    stranger = openai.OpenAI(api_key="wrong", base_url=str(client.base_url), max_retries=0)
    with pytest.raises(openai.AuthenticationError):
      stranger.models.list()

  def test_the_example_of_the_page(self, client, server, capsys):
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for there, here in (
      ("localhost:8000", f"127.0.0.1:{server.port}"),
      ("SECRET", "secret"),
      ('model="chat"', 'model="tiny", max_tokens=20, temperature=0'),
    ):
      assert there in code
      code = code.replace(there, here)
    exec(code, {"openai": openai})
    messages = [{"role": "user", "content": "Hello"}]
    options = {"messages": messages, "max_tokens": 20, "temperature": 0}
    told = client.chat.completions.create(model="tiny", **options)
    assert capsys.readouterr().out == told.choices[0].message.content


# --- lm-eval -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lm_eval_finds_the_score_of_the_model(server, monkeypatch, random_model, random_engine):
  from lm_eval.api.instance import Instance
  from lm_eval.models.openai_completions import LocalCompletionsAPI

  from gptjax.evals.harness import HarnessModel

  monkeypatch.setenv("OPENAI_API_KEY", "secret")
  client = LocalCompletionsAPI(
    base_url=f"http://127.0.0.1:{server.port}/v1/completions",
    model="tiny",
    tokenizer=random_engine.tokenizer.spec,
    tokenizer_backend="huggingface",
    batch_size=2,
    max_length=1024,
  )
  texts = [("The answer is", " yes"), ("The answer is", " no"), ("One, two,", " three, four.")]
  requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts)]
  found = client.loglikelihood(requests)
  expected = HarnessModel(Subject(random_model, random_engine.tokenizer)).loglikelihood(requests)
  for (log_likelihood, greedy), (wanted, is_best) in zip(found, expected, strict=True):
    assert abs(log_likelihood - wanted) < 1e-4
    assert greedy == is_best


# --- schemathesis --------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_request_that_the_description_allows_breaks_the_server(serve, random_engine):
  client = serve(random_engine)
  schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
  statuses = collections.Counter()
  for found in schema.get_all_operations():
    operation = found.ok()

    @settings(
      max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(operation.as_strategy())
    def ask(case):
      body = {"json": case.body} if case.method == "POST" else {}
      response = client.request(case.method, case.formatted_path, **body)
      assert response.status_code < 500, (case.method, case.path, case.body, response.text)
      statuses[case.path, response.status_code] += 1

    ask()
  for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
    assert sum(count for (one, _), count in statuses.items() if one == path) >= 20


@pytest.mark.slow
def test_the_description_is_valid(serve, random_engine):
  description = serve(random_engine).get("/openapi.json").json()
  assert schemathesis.openapi.from_dict(description).validate() is None
  assert set(description["paths"]) >= {"/v1/chat/completions", "/v1/responses", "/v1/embeddings"}
