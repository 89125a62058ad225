"""Keys, limits, health, measures, and what clients get wrong."""

import json
import re
import threading
import time

import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import compilations
from gptjax.serving.middleware import parse_rate
from gptjax.serving.service import Limits

ASK = {"model": "tiny", "prompt": "a", "max_tokens": 2, "temperature": 0}
JSON = {"content-type": "application/json"}


def error(response, status):
  assert response.status_code == status, response.text
  told = response.json()["error"]
  assert set(told) == {"message", "type", "param", "code"}
  return told


def test_keys_open_the_api_alone(serve, random_engine):
  client = serve(random_engine, app={"keys": ["first", "second"]})
  for path in ("/healthz", "/readyz", "/openapi.json"):
    assert client.get(path).status_code == 200
  for path in ("/v1/models", "/metrics"):
    response = client.get(path)
    assert error(response, 401)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
  for wrong in ("Bearer firs", "Bearer ", "Basic first", "first", "Bearer \xe9"):
    headers = {"authorization": wrong.encode("latin-1")}
    error(client.post("/v1/completions", json=ASK, headers=headers), 401)
  for key in ("first", "second"):
    headers = {"authorization": f"Bearer {key}"}
    assert client.post("/v1/completions", json=ASK, headers=headers).status_code == 200


def test_a_key_may_ask_so_often(serve, random_engine):
  client = serve(random_engine, app={"keys": ["a", "b"]}, limits=Limits(rate="2/minute"))

  def ask(key):
    return client.get("/v1/models", headers={"authorization": f"Bearer {key}"})

  assert [ask("a").status_code for _ in range(3)] == [200, 200, 429]
  response = ask("a")
  assert error(response, 429)["type"] == "rate_limit_error"
  assert 1 <= int(response.headers["retry-after"]) <= 61
  assert ask("b").status_code == 200
  assert client.get("/healthz").status_code == 200
  with pytest.raises(UserError, match=r"--rate_limit='often' is no rate; write one like 60/minute"):
    parse_rate("often")


@pytest.mark.parametrize(
  ("body", "message"),
  [
    (b"", "The body is no JSON"),
    (b"{", "The body is no JSON"),
    (b"[]", "must be a JSON object"),
    (b"\xff\xfe", "The body is no JSON"),
    (b"[" * 100_000, "The body is no JSON"),
    (b'{"prompt": NaN}', "NaN is no number of JSON"),
    (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
    (b'{"model": "tiny", "prompt": "a", "n": 1' + b"0" * 4000 + b"}", "n is a huge number"),
    (b'{"model": "tiny", "prompt": "a", "n": 1' + b"0" * 9000 + b"}", "The body is no JSON"),
  ],
)  # fmt: skip
def test_a_body_that_is_none_is_refused(serve, random_engine, body, message):
  response = serve(random_engine).post("/v1/completions", content=body, headers=JSON)
  assert message in error(response, 400)["message"]


def test_a_body_of_another_type_is_refused(serve, random_engine):
  # A page of another site may send it without being asked.
  client = serve(random_engine)
  response = client.post(
    "/v1/completions", content=json.dumps(ASK), headers={"content-type": "text/plain"}
  )
  assert "Content-Type: application/json" in error(response, 415)["message"]


def test_a_large_body_is_not_read(serve, random_engine):
  client = serve(random_engine, limits=Limits(max_body=1000))
  body = json.dumps(ASK | {"prompt": "x" * 1000})
  response = client.post("/v1/completions", content=body, headers=JSON)
  assert "1000 bytes" in error(response, 413)["message"]

  def chunks():
    yield from [b"x" * 100] * 11

  error(client.post("/v1/completions", content=chunks(), headers=JSON), 413)


def test_a_prompt_of_a_megabyte_is_too_long(serve, random_engine):
  response = serve(random_engine).post("/v1/completions", json=ASK | {"prompt": "word " * 200_000})
  told = error(response, 400)
  assert (told["code"], told["param"]) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize(
  ("path", "status"),
  [
    ("/nothing", 404),
    ("/page/index.html", 404),
    ("/v1/completions", 405),
    ("/v1/models/other", 404),
    ("/v1/models/..%2f..%2fetc%2fpasswd", 404),
    ("/v1/models/../../metrics/x", 404),
  ],
)
def test_a_path_that_is_none(serve, random_engine, path, status):
  client = serve(random_engine)
  error(client.get(path), status)


def test_the_page_may_load_nothing_from_elsewhere(serve, random_engine):
  client = serve(random_engine)
  page = client.get("/")
  assert page.headers["content-type"].startswith("text/html")
  assert "default-src 'none'" in page.headers["content-security-policy"]
  scripts = re.findall(r'(?:src|href)="(?:\./|/)?([\w.]+\.(?:js|css))"', page.text)
  assert scripts
  for name in scripts:
    kind = client.get(f"/{name}").headers["content-type"]
    assert kind.startswith("text/javascript" if name.endswith("js") else "text/css")


def test_the_models_are_told(serve, random_engine):
  client = serve(random_engine)
  (model,) = client.get("/v1/models").json()["data"]
  assert model == client.get("/v1/models/tiny").json()
  assert (model["id"], model["max_model_len"]) == ("tiny", 1024)


def test_texts_are_split_and_joined(serve, random_engine):
  client, text = serve(random_engine), "é<|im_end|>"
  told = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
  assert told["tokens"] == client.service.tokenizer.encode(text)
  assert told["count"] == len(text.encode())
  assert client.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": text}
  assert error(client.post("/detokenize", json={"tokens": [5000]}), 400)["param"] == "tokens"
  assert error(client.post("/tokenize", json={}), 400)["param"] == "prompt"


def test_measures_are_told(serve, random_engine):
  client = serve(random_engine)
  client.post("/v1/completions", json=ASK)
  client.get("/v1/models/whatever")
  client.get("/whatever")
  text = client.get("/metrics").text
  for line in (
    'gptjax_requests_total{route="/v1/completions",status="200"} 1.0',
    'gptjax_requests_total{route="/v1/models/",status="404"} 1.0',
    'gptjax_requests_total{route="other",status="404"} 1.0',
    "gptjax_first_token_seconds_count 1.0",
    "gptjax_queue_length 0.0",
    "gptjax_running_rows 0.0",
    "gptjax_rows 4.0",
  ):
    assert line in text.splitlines()
  assert "gptjax_written_tokens_total" in text
  assert "gptjax_cache_pages_used 0.0" in text


def test_browsers_are_told_to_be_careful(serve, random_engine):
  client = serve(random_engine, app={"hosts": ["testserver"]})
  headers = client.get("/healthz").headers
  assert "default-src 'none'; script-src 'self'" in headers["content-security-policy"]
  assert headers["x-content-type-options"] == "nosniff"
  assert headers["referrer-policy"] == "no-referrer"
  origin = {"origin": "https://a.example"}
  assert "access-control-allow-origin" not in client.get("/healthz", headers=origin).headers
  assert client.get("/healthz", headers={"host": "evil.example"}).status_code == 400
  client = serve(random_engine, app={"origins": ["https://a.example"]})
  assert client.get("/healthz", headers=origin).headers["access-control-allow-origin"]


# --- The engine's thread -------------------------------------------------------------------------


class Slow(Engine):
  """An engine whose steps wait until they are let go."""

  def __init__(self, *args, **options):
    super().__init__(*args, **options)
    self.go = threading.Event()
    self.breaks = False

  def step(self):
    self.go.wait(30)
    updates = super().step()
    if self.breaks:
      self.breaks = False
      raise MemoryError("no memory")
    return updates


@pytest.fixture
def slow(random_model, random_engine):
  return Slow(random_model, random_engine.tokenizer, rows=1, chunk=64)


def in_background(client, **fields):
  answers = []
  thread = threading.Thread(
    target=lambda: answers.append(client.post("/v1/completions", json=ASK | fields))
  )
  thread.start()
  return thread, answers


def until(condition):
  for _ in range(1000):
    if condition():
      return
    time.sleep(0.01)
  raise AssertionError("it did not come to that")


def test_a_full_queue_is_told_to_come_again(serve, slow):
  client = serve(slow, limits=Limits(max_queue=1))
  waiting = [in_background(client) for _ in range(2)]
  until(lambda: client.service.thread.open == 2)
  response = client.post("/v1/completions", json=ASK)
  assert error(response, 503)["code"] == "overloaded"
  assert int(response.headers["retry-after"]) >= 1
  slow.go.set()
  for thread, answers in waiting:
    thread.join()
    assert answers[0].status_code == 200
  assert client.service.thread.open == 0


def test_a_step_that_fails_is_answered_and_the_next_goes_on(serve, slow, caplog):
  client = serve(slow)
  concerned = in_background(client)
  until(lambda: client.service.thread.open == 1)
  slow.breaks = True
  slow.go.set()
  concerned[0].join()
  told = error(concerned[1][0], 500)
  assert told["code"] in told["message"]
  assert told["code"] in caplog.text
  assert "MemoryError: no memory" in caplog.text
  assert client.post("/v1/completions", json=ASK).status_code == 200
  assert slow.idle
  assert slow.reader.pages.used == 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_given_up(serve, slow, stream):
  client = serve(slow, limits=Limits(timeout=0.2))
  fields = ASK | {"stream": stream, "max_tokens": 900, "ignore_eos": True}
  response = client.post("/v1/completions", json=fields)
  if stream:
    event = json.loads(response.text.strip().removeprefix("data: "))
    assert event["error"]["code"] == "timeout"
  else:
    assert error(response, 504)["code"] == "timeout"
  slow.go.set()
  until(lambda: slow.idle and slow.reader.pages.used == 0)
  assert slow.counts.written_tokens < 10


def test_a_server_that_ends_takes_nothing_new(serve, slow):
  client = serve(slow)
  running = in_background(client)
  until(lambda: client.service.thread.open == 1)
  client.service.thread.draining = True
  for response in (client.post("/v1/completions", json=ASK), client.get("/readyz")):
    assert "shutting down" in error(response, 503)["message"]
    assert response.headers["retry-after"] == "5"
  slow.go.set()
  running[0].join()
  assert running[1][0].status_code == 200


@pytest.mark.slow
def test_the_usual_is_compiled_before_the_server_is_ready(serve, random_engine):
  client = serve(random_engine, warm_up=True)
  until(lambda: client.get("/readyz").status_code == 200)
  assert random_engine.counts.steps == 0
  assert np.isclose(random_engine.reader.pages.used, 0)
  before = compilations.copy()
  long = {"prompt": [1] * 1000, "max_tokens": 20, "ignore_eos": True, "frequency_penalty": 1}
  for fields in (long, long | {"temperature": 1.0, "logprobs": 2, "n": 3}):
    assert client.post("/v1/completions", json=ASK | fields).status_code == 200
  assert compilations - before == {}


# --- A filter ------------------------------------------------------------------------------------


class NoFox:
  """Refuses prompts about cats, and ends answers before a fox."""

  window = 8

  def refuses(self, prompt):
    return "it is about cats." if "cat" in prompt else ""

  def cut(self, answer):
    at = answer.find("fox")
    return at if at >= 0 else None


SCRIPT = "The quick brown fox jumps."


@pytest.fixture
def filtered(serve, reciting, chat_tokenizer):
  tokenizer = chat_tokenizer()

  def make(script=SCRIPT):
    engine = Engine(reciting(tokenizer, script, 1), tokenizer, rows=2)
    return serve(engine, judge=NoFox())

  return make


def test_a_filter_refuses_a_prompt(filtered):
  told = error(filtered().post("/v1/completions", json=ASK | {"prompt": "a cat"}), 400)
  assert (told["code"], told["param"]) == ("content_filter", "prompt")


def test_a_filter_cuts_an_answer(filtered, stream_events):
  client = filtered()
  fields = ASK | {"prompt": [84], "max_tokens": 60, "logprobs": 1}
  (choice,) = client.post("/v1/completions", json=fields).json()["choices"]
  assert (choice["text"], choice["finish_reason"]) == ("The quick brown ", "content_filter")
  chunks = stream_events(client.post("/v1/completions", json=fields | {"stream": True}))
  said = "".join(chunk["choices"][0]["text"] for chunk in chunks)
  assert said == "The quick brown "
  assert chunks[-1]["choices"][0]["finish_reason"] == "content_filter"
  until(lambda: client.service.thread.engine.idle)


def test_a_filter_that_finds_nothing_changes_nothing(filtered, stream_events):
  client = filtered("The quick brown cow jumps.")
  fields = ASK | {"prompt": [84], "max_tokens": 60, "logprobs": 1, "stream": True}
  choices = [
    one["choices"][0] for one in stream_events(client.post("/v1/completions", json=fields))
  ]
  assert "".join(choice["text"] for choice in choices) == "The quick brown cow jumps."
  assert "".join("".join(one["logprobs"]["tokens"]) for one in choices).startswith("The quick")
