"""Languages of answers, in the tokens of several tokenizers."""

import json
import re

import numpy as np
import pytest
from flax import nnx

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.errors import UserError
from gptjax.inference.constraints import Languages
from gptjax.inference.engine import Engine
from gptjax.inference.request import Request
from gptjax.model.gpt import model_graph

BYTES = tokenizer_lib.load("bytes")
WORDS = tokenizer_lib.train("bpe:400", ['{"name": "value", "count": 12, "é": true}'] * 9)
SCHEMA = {
  "type": "object",
  "properties": {"name": {"enum": ["a", "é世"]}, "count": {"type": "integer", "maximum": 99}},
  "required": ["name", "count"],
  "additionalProperties": False,
}


@pytest.fixture(
  scope="module",
  params=[BYTES, pytest.param(WORDS, marks=pytest.mark.slow)],
  ids=["bytes", "bpe"],
)
def tokenizer(request):
  return request.param


@pytest.fixture(scope="module")
def languages(tokenizer):
  return Languages(tokenizer)


@pytest.fixture(scope="module")
def engine(tiny_config, random_params, tokenizer):
  kind = {"position.kind": "rope", "position.max_positions": 256, "head.tied": False}
  config = tiny_config(vocab_size=400, **kind)
  return Engine(nnx.merge(model_graph(config), random_params(config)), tokenizer, rows=4)


def write(engine, constraint, count=4):
  answers = engine.run(
    [Request([1], 200, seed=i, constraint=constraint.copy()) for i in range(count)]
  )
  assert {answer.finish_reason for answer in answers} == {"stop"}
  return [answer.text for answer in answers]


def test_json_is_that_of_a_schema(engine, languages):
  for text in write(engine, languages.json_schema(SCHEMA)):
    value = json.loads(text)
    assert list(value) == ["name", "count"]
    assert value["name"] in ("a", "é世")
    assert value["count"] <= 99
    assert "\n" not in text


def test_text_is_that_of_an_expression_or_a_grammar(engine, languages):
  pattern = r"[A-C]{2}-[0-9]{3}(é|世)"
  assert all(re.fullmatch(pattern, text) for text in write(engine, languages.regex(pattern)))
  grammar = 'start: "a" | "(" start ")"'
  assert all(re.fullmatch(r"\(*a\)*", text) for text in write(engine, languages.lark(grammar)))


def test_a_copy_goes_its_own_way(tokenizer, languages):
  one = languages.regex("ab|cd")
  (a,), (c,) = tokenizer.encode("a"), tokenizer.encode("c")
  other = one.copy()
  one.accept(a)
  other.accept(c)
  for constraint, letter in ((one, "b"), (other, "d")):
    assert np.flatnonzero(constraint.allowed()).tolist() == tokenizer.encode(letter)
    constraint.accept(tokenizer.encode(letter)[0])
    assert set(np.flatnonzero(constraint.allowed())) == set(tokenizer.stops)
    constraint.accept(tokenizer.end_of_text)
    assert constraint.error == ""


def test_special_tokens_are_no_text(tokenizer, languages):
  allowed = languages.regex(".*").allowed()
  specials = set(tokenizer.specials.values())
  assert set(np.flatnonzero(allowed)) & specials == set(tokenizer.stops)
  name, token = "<|fim_prefix|>", tokenizer.specials["<|fim_prefix|>"]
  assert np.flatnonzero(languages.lark(f"start: <[{token}]>").allowed()).tolist() == [token]
  assert not languages.lark(f'start: "{name}"').allowed()[token]


def test_what_became_too_complex_ends(tokenizer, languages):
  constraint = languages.regex("ab")
  constraint.accept(tokenizer.encode("x")[0])  # As after an error of the library.
  assert set(np.flatnonzero(constraint.allowed())) == set(tokenizer.stops)
  assert constraint.error


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda one: one.json_schema({"type": "wat"}, "a.b"), "a.b cannot be enforced: .*wat"),
    (lambda one: one.json_schema({"not": {}, "type": "object"}), 'schema cannot .*"not"'),
    (lambda one: one.json_schema({"const": float("nan")}), "schema is no JSON Schema"),
    (lambda one: one.regex("(a"), "regex cannot be enforced: .*unclosed group"),
    (lambda one: one.lark("start: missing"), "grammar cannot be enforced: .*missing"),
  ],
)  # fmt: skip
def test_what_is_no_language_is_refused_by_its_name(languages, make, message):
  with pytest.raises(UserError, match=re.compile(message, re.DOTALL)):
    make(languages)
