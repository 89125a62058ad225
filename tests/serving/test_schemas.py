"""Answers in the JSON of schemas like those of common APIs."""

import concurrent.futures
import json
from pathlib import Path

import jsonschema
import pytest

from gptjax.inference.engine import Engine
from gptjax.inference.speculation import MOST, Speculation

SCHEMAS = json.loads((Path(__file__).parent / "data/schemas.json").read_text())
MESSAGES = [{"role": "user", "content": "JSON, please."}]


def ask(client, form, **options):
  # A model that says anything at random would never end a text or an array.
  encode = client.service.tokenizer.encode
  ends = {str(encode(letter)[0]): 6 for letter in '"}]'}
  numbers = {str(encode(letter)[0]): 3 for letter in ",:"}
  fields = {"model": "tiny", "messages": MESSAGES, "seed": 3, "response_format": form}
  fields |= {"max_completion_tokens": 900, "logit_bias": ends | numbers}
  return client.post("/v1/chat/completions", json=fields | options)


def answered(client, name, schema):
  """The answer, which is in the schema; None if the schema is refused."""
  form = {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}
  response = ask(client, form)
  if response.status_code == 400:
    error = response.json()["error"]
    assert error["param"] == "response_format"
    assert "response_format.json_schema.schema cannot be enforced: " in error["message"]
    return None
  (choice,) = response.json()["choices"]
  assert choice["finish_reason"] == "stop", (name, choice["message"]["content"])
  content = choice["message"]["content"]
  value = json.loads(content)
  checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
  jsonschema.validate(value, schema, jsonschema.Draft202012Validator, format_checker=checker)
  return content


def answers(client, schemas):
  """The answer in each schema, some asked for at the same time."""
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    asked = {name: pool.submit(answered, client, name, one) for name, one in schemas.items()}
    return {name: one.result() for name, one in asked.items()}


@pytest.fixture(scope="module")
def guessing_engine(random_model, random_engine):
  """The same with guesses, which are always asked for."""
  engine = Engine(random_model, random_engine.tokenizer, rows=4, chunk=64, draft="lookup")

  class Always(Speculation):
    def propose(self, answers):
      return self.drafter.propose(answers, MOST)

  engine._speculation = Always(engine._speculation.drafter)
  return engine


@pytest.mark.slow
def test_answers_are_in_their_schemas_or_refused_with_guesses_or_without(
  serve, random_engine, guessing_engine
):
  plain = answers(serve(random_engine), SCHEMAS)
  taken = {name for name, answer in plain.items() if answer is not None}
  refused = set(SCHEMAS) - taken
  assert len(taken) >= 50
  assert {name for name in SCHEMAS if name.startswith("wrong")} <= refused
  assert {name for name in refused if not name.startswith(("wrong", "unsupported"))} == set()
  guessed = answers(serve(guessing_engine), {name: SCHEMAS[name] for name in taken})
  assert guessed == {name: plain[name] for name in taken}
  counts = guessing_engine.counts
  assert 0 < counts.accepted_tokens < counts.drafted_tokens


def test_an_answer_is_any_json_object(serve, random_engine):
  client = serve(random_engine)
  (choice,) = ask(client, {"type": "json_object"}).json()["choices"]
  assert isinstance(json.loads(choice["message"]["content"]), dict)
  (choice,) = ask(client, {"type": "text"}, max_completion_tokens=3).json()["choices"]
  assert choice["finish_reason"] == "length"


def test_an_answer_is_in_an_expression_or_a_grammar(serve, random_engine):
  client = serve(random_engine)
  (choice,) = ask(client, {"type": "regex", "pattern": "yes|no"}).json()["choices"]
  assert choice["message"]["content"] in ("yes", "no")
  (choice,) = ask(client, {"type": "grammar", "grammar": 'start: "a" "b"'}).json()["choices"]
  assert choice["message"]["content"] == "ab"


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_have_a_way_each(serve, random_engine, stream_events, stream):
  client = serve(random_engine)
  form = {"type": "regex", "pattern": "[ab]{8}"}
  response = ask(client, form, n=4, stream=stream)
  if stream:
    texts = [""] * 4
    for event in stream_events(response):
      (choice,) = event["choices"]
      texts[choice["index"]] += choice["delta"].get("content", "")
  else:
    texts = [choice["message"]["content"] for choice in response.json()["choices"]]
  assert all(len(text) == 8 and set(text) <= {"a", "b"} for text in texts)
  assert len(set(texts)) > 1
