"""Completions over HTTP."""

import pytest

from gptjax.inference.engine import Engine
from gptjax.inference.request import Request
from gptjax.inference.sampling import Sampling

SCRIPT = "The quick brown fox jumps over the lazy dog."


@pytest.fixture
def client(serve, reciting, chat_tokenizer):
  tokenizer = chat_tokenizer()
  return serve(Engine(reciting(tokenizer, SCRIPT, 1), tokenizer, rows=2))


def ask(client, prompt="", **options):
  fields = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 100} | options
  return client.post("/v1/completions", json=fields)


def texts(response):
  return [choice["text"] for choice in response.json()["choices"]]


@pytest.fixture
def start(client):
  """How many tokens a prompt begins with."""
  return len(client.service.tokenizer.encode_prompt("x")) - 1


def test_a_prompt_is_a_text_or_texts_or_ids(client, start):
  ids = client.service.tokenizer.encode("abc")
  assert texts(ask(client, "abc")) == [SCRIPT[start + 2 :]]
  assert texts(ask(client, ["abc", "a"])) == [SCRIPT[start + 2 :], SCRIPT[start:]]
  assert texts(ask(client, ids)) == [SCRIPT[2:]]
  assert texts(ask(client, [ids, ids[:1]], n=2)) == [SCRIPT[2:]] * 2 + [SCRIPT] * 2


def test_a_stream_says_the_same(client, start, stream_events):
  options = {"stream": True, "echo": True, "stream_options": {"include_usage": True}}
  *chunks, last = stream_events(ask(client, ["ab", "abcd"], **options))
  said = ["", ""]
  for chunk in chunks:
    (choice,) = chunk["choices"]
    said[choice["index"]] += choice["text"]
  assert said == ["ab" + SCRIPT[start + 1 :], "abcd" + SCRIPT[start + 3 :]]
  assert last["usage"]["prompt_tokens"] == 2 * start + 6


def test_log_probabilities_of_a_prompt_and_its_completion(serve, random_engine):
  client, tokenizer = serve(random_engine), random_engine.tokenizer
  prompt = tokenizer.encode("Zürich is")
  options = {"echo": True, "logprobs": 3, "max_tokens": 2, "ignore_eos": True}
  choice = ask(client, prompt, **options).json()["choices"][0]
  told = choice["logprobs"]
  assert {len(one) for one in told.values()} == {len(prompt) + 2}
  assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
  assert told["text_offset"][:5] == [0, 1, 1, 2, 3]
  assert choice["text"].startswith("Zürich is")
  request = Request(
    prompt, 2, Sampling(temperature=0), log_probs=3, scores_prompt=True, ignore_end=True
  )

  async def run():
    return await client.service.results([request])

  result = client.portal.call(run)[0].answer
  expected = [score.log_prob for score in [*result.prompt_scores, *result.scores]]
  assert told["token_logprobs"] == expected
  for score, top in zip(result.prompt_scores[1:], told["top_logprobs"][1:], strict=False):
    assert max(top.values()) == score.candidates[0][1]
    assert len(top) in (3, 4)


def test_a_prompt_alone_is_scored(serve, random_engine):
  client = serve(random_engine)
  (choice,) = ask(client, "abc", echo=True, logprobs=0, max_tokens=0).json()["choices"]
  assert choice["text"] == "abc"
  assert choice["logprobs"]["tokens"][-3:] == ["a", "b", "c"]
  assert choice["finish_reason"] == "length"
  (choice,) = ask(client, [65], echo=True, logprobs=0, max_tokens=0).json()["choices"]
  assert choice["logprobs"]["token_logprobs"] == [None]


def test_the_token_that_ends_a_completion_is_scored_too(client):
  told = ask(client, "abc", logprobs=1).json()["choices"][0]["logprobs"]
  assert told["tokens"][-2:] == [".", "<|im_end|>"]


def test_the_best_of_several_is_the_likeliest(serve, random_engine):
  client = serve(random_engine)
  options = {"temperature": 1, "seed": 5, "max_tokens": 4, "logprobs": 1, "ignore_eos": True}
  every = ask(client, "a", n=4, **options).json()["choices"]
  best = ask(client, "a", n=1, best_of=4, **options).json()
  sums = [sum(choice["logprobs"]["token_logprobs"]) for choice in every]
  assert best["choices"][0]["text"] == every[sums.index(max(sums))]["text"]
  assert best["usage"]["completion_tokens"] == 16


def test_the_seed_decides(serve, random_engine):
  client = serve(random_engine)
  options = {"temperature": 1, "max_tokens": 12}
  one, again, other = (texts(ask(client, "a", seed=seed, **options)) for seed in (1, 1, -2))
  assert one == again != other
  assert texts(ask(client, "a", **options)) != texts(ask(client, "a", **options))


def test_biases_and_penalties_change_a_completion(serve, random_engine):
  client = serve(random_engine)
  (letter,) = client.service.tokenizer.encode("A")
  assert texts(ask(client, "a", logit_bias={letter: 100}, max_tokens=4)) == ["AAAA"]
  tokens = {"max_tokens": 20, "ignore_eos": True}
  (free,), (bound,) = (texts(ask(client, "a", frequency_penalty=x, **tokens)) for x in (0, 2))
  assert free != bound


@pytest.mark.parametrize(
  ("fields", "param", "message"),
  [
    ({"prompt": []}, "prompt", "prompt has 0 items"),
    ({"prompt": ["a", 1]}, "prompt[1]", "prompt[1] is 1; it must be a string"),
    ({"prompt": [[]]}, "prompt[0]", "prompt[0] has 0 items"),
    ({"prompt": {"a": 1}}, "prompt", "prompt is an object; it must be a string or an array"),
    ({"prompt": [1, 9999]}, "prompt", "the tokens are below 262, not 9999"),
    ({"prompt": "x" * 300}, "prompt", "context has 256 tokens"),
    ({"suffix": "x"}, "suffix", "suffix is not supported"),
    ({"best_of": 1, "n": 2}, "best_of", "best_of=1 must be at least n=2"),
    ({"best_of": 2, "stream": True}, "best_of", "not with stream"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens=0 needs echo"),
    ({"stream": True, "echo": True, "logprobs": 1}, "stream", "cannot be streamed"),
    ({"logprobs": 21}, "logprobs", "logprobs is 21; it must be a whole number of at least 0"),
    ({"stop": ""}, "stop", "stop has 0 characters"),
    ({"top_p": 0}, "top_p", "above 0 and at most 1"),
    ({"seed": 2**64}, "seed", "it must be a whole number"),
    ({"model": None}, "model", "model is missing; it must be a string"),
  ],
)
def test_a_wrong_field_is_named(client, fields, param, message):
  response = ask(client, **fields)
  assert response.status_code == 400
  error = response.json()["error"]
  assert (error["param"], error["type"]) == (param, "invalid_request_error")
  assert message in error["message"]
