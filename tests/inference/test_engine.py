import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.errors import UserError
from gptjax.inference.engine import Engine
from gptjax.inference.pages import PAGE
from gptjax.inference.request import Request
from gptjax.inference.sampling import Sampling, compilations
from gptjax.model.gpt import model_graph

BYTES = tokenizer_lib.load("bytes")
LENGTH = 128
GREEDY, WARM = Sampling(temperature=0), Sampling(temperature=0.9, top_p=0.9)
PROMPTS = [BYTES.encode(text) for text in ("a", "def main(x):", "A prompt of several pages. " * 2)]


@pytest.fixture(scope="module")
def model(tiny_config, random_params):
  kind = {"position.kind": "rope", "norm.kind": "rmsnorm", "bias": False, "head.tied": False}
  config = tiny_config(vocab_size=264, layer_pattern=("local", "full"), window=20, **kind)
  return nnx.merge(model_graph(config), random_params(config, seed=3))


@pytest.fixture(scope="module")
def logits_of(model):
  """Returns a function from tokens to the model's logits [T, V], without a cache."""
  forward = jax.jit(lambda model, tokens: model(tokens))

  def logits_of(tokens):
    row = np.zeros((1, LENGTH), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(forward(model, row)[0, : len(tokens)])

  return logits_of


@pytest.fixture
def make(model):
  def make(**options):
    return Engine(model, BYTES, **({"rows": 4, "length": LENGTH, "chunk": 32} | options))

  return make


def requests(count=3, **options):
  options = {"max_tokens": 20, "sampling": WARM, "ignore_end": True, "log_probs": 2} | options
  return [Request(PROMPTS[i % 3], seed=i, **options) for i in range(count)]


def told(answer):
  """All that an answer says, in its bits."""
  return answer.tokens, answer.text, answer.scores, answer.finish_reason


def test_greedy_decoding_is_the_model_run_again_for_every_token(make, logits_of):
  for answer in make().run(requests(sampling=GREEDY)):
    logits = logits_of(answer.tokens)
    new = answer.tokens[answer.prompt_length :]
    assert logits[:, : BYTES.vocab_size].argmax(-1)[answer.prompt_length - 1 : -1].tolist() == new
    log_probs = np.asarray(jax.nn.log_softmax(logits))[:, : BYTES.vocab_size]
    for at, score in enumerate(answer.scores, answer.prompt_length - 1):
      assert score.token == score.candidates[0][0]
      np.testing.assert_allclose(score.log_prob, log_probs[at, score.token], atol=1e-4)
      expected = np.sort(log_probs[at])[:-3:-1]
      np.testing.assert_allclose(
        [log_prob for _, log_prob in score.candidates], expected, atol=1e-4
      )


def test_a_prompt_is_scored_in_chunks_too(make, logits_of):
  prompt = PROMPTS[2]
  (answer,) = make().run([Request(prompt, 0, log_probs=1, scores_prompt=True)])
  assert (answer.finish_reason, answer.tokens, answer.scores) == ("length", prompt, [])
  assert [score.token for score in answer.prompt_scores] == prompt
  assert answer.prompt_scores[0].log_prob is None
  log_probs = np.asarray(jax.nn.log_softmax(logits_of(prompt)))[:, : BYTES.vocab_size]
  expected = log_probs[np.arange(len(prompt) - 1), prompt[1:]]
  actual = [score.log_prob for score in answer.prompt_scores[1:]]
  np.testing.assert_allclose(actual, expected, atol=1e-4)
  best = [score.candidates[0][1] for score in answer.prompt_scores[1:]]
  np.testing.assert_allclose(best, log_probs.max(-1)[:-1], atol=1e-4)


def test_a_prompt_of_one_token_is_scored_and_nothing_is_added(make):
  (answer,) = make().run([Request([65], 0, log_probs=1, scores_prompt=True)])
  assert (answer.tokens, [score.log_prob for score in answer.prompt_scores]) == ([65], [None])


def test_requests_join_and_leave_between_steps(make):
  engine = make()
  alone = [told(make().run([request])[0]) for request in requests(6)]
  answers = []
  for request in requests(6):
    answers.append(engine.submit(request))
    for _ in range(3):
      engine.step()
  while not engine.idle:
    engine.step()
  assert [told(answer) for answer in answers] == alone
  assert engine.reader.pages.used == 0


def test_a_start_that_was_read_before_is_not_read_again(make):
  engine, request = make(), requests()[2]
  (cold,) = engine.run([request])
  read = engine.counts.prompt_tokens
  (cached,) = engine.run([request])
  assert (cold.cached_tokens, cached.cached_tokens) == (0, (len(PROMPTS[2]) - 1) // PAGE * PAGE)
  assert engine.counts.prompt_tokens - read == len(PROMPTS[2]) - cached.cached_tokens
  assert told(cached) == told(cold)
  # A conversation goes on: the answer is known as well.
  (next_turn,) = engine.run([dataclasses.replace(request, tokens=cold.tokens)])
  assert next_turn.cached_tokens == (len(cold.tokens) - 1) // PAGE * PAGE


def test_who_came_last_gives_up_pages_and_reads_again(make):
  wanted = requests(4, max_tokens=60)
  expected = [told(answer) for answer in make().run(wanted)]
  engine = make(pages=16)
  assert [told(answer) for answer in engine.run(wanted)] == expected
  assert engine.counts.preemptions > 0
  assert engine.reader.pages.used == 0


def test_a_cancelled_answer_frees_its_place(make):
  engine = make(rows=1)
  first, second = (engine.submit(request) for request in requests(2))
  engine.step()
  engine.cancel(second)
  engine.cancel(first)
  assert (first.finish_reason, second.finish_reason) == ("cancelled", "cancelled")
  assert engine.idle
  assert engine.reader.pages.used == 0
  assert engine.run(requests(1))[0].finish_reason == "length"


def test_after_a_step_that_failed_all_go_on(make, monkeypatch):
  expected = [told(answer) for answer in make().run(requests())]
  engine = make()
  answers = [engine.submit(request) for request in requests()]
  for _ in range(5):
    engine.step()

  def fail(*_, **__):
    raise MemoryError

  with monkeypatch.context() as patch:
    patch.setattr("gptjax.inference.engine.choose", fail)
    with pytest.raises(MemoryError):
      engine.step()
  while not engine.idle:
    engine.step()
  assert [told(answer) for answer in answers] == expected


def test_nothing_is_compiled_for_a_request_like_one_before(make):
  engine = make()
  engine.run(requests(7, max_tokens=40))
  before = dict(compilations)
  other = [Sampling(0.3, 7), Sampling(1.2, min_p=0.1), GREEDY]
  engine.run(
    [dataclasses.replace(request, sampling=other[i % 3]) for i, request in enumerate(requests(7))]
  )
  make().run(requests())  # Nor for another engine, such as that of a run's next samples.
  assert dict(compilations) == before


def test_penalties_count_what_the_answer_has(make):
  options = {"max_tokens": 30, "ignore_end": True}

  def distinct(**sampling):
    (answer,) = make().run([Request(PROMPTS[0], sampling=Sampling(0, **sampling), **options)])
    return len(set(answer.completion))

  free = distinct()
  assert free < 30
  assert distinct(frequency_penalty=1e4) == distinct(presence_penalty=1e4) == 30
  assert distinct(repetition_penalty=1e4) > free


def test_a_bias_bans_and_forces_tokens(make):
  (free,) = make().run([Request(PROMPTS[1], 5, GREEDY)])
  (other,) = make().run([Request(PROMPTS[1], 5, GREEDY, logit_bias={free.completion[0]: -100})])
  assert other.completion[0] != free.completion[0]
  (forced,) = make().run([Request(PROMPTS[1], 5, WARM, logit_bias={65: 1000.0})])
  assert forced.text == "AAAAA"


class Digits:
  """A language of two digits and then only the end."""

  def __init__(self):
    self.taken = []

  def allowed(self):
    allowed = np.zeros(BYTES.vocab_size, bool)
    allowed[list(b"0123456789") if len(self.taken) < 2 else BYTES.end_of_text] = True
    return allowed

  def accept(self, token):
    self.taken.append(token)

  def take_back(self, count):
    del self.taken[len(self.taken) - count :]


def test_a_constraint_is_kept_beside_free_answers(make):
  engine = make()
  free, bound = (
    engine.submit(Request(PROMPTS[1], 9, WARM, constraint=constraint))
    for constraint in (None, Digits())
  )
  while not engine.idle:
    engine.step()
  assert (bound.finish_reason, len(bound.text), bound.text.isdigit()) == ("stop", 2, True)
  assert told(free) == told(make().run([Request(PROMPTS[1], 9, WARM)])[0])


@pytest.mark.parametrize(
  ("request_", "message"),
  [
    (Request([]), "a prompt given as ids needs at least one"),
    (Request([1], 0), "max_tokens=0 must be at least 1"),
    (Request([1], 1, seed=-1), "seed=-1 must be from 0"),
    (Request([1], 1, log_probs=21), "log_probs=21 must be from 0 to 20"),
    (Request([1, 999], 1), "token 999 is none of the tokenizer's, which are below 260"),
    (Request([1], 1, logit_bias={-1: 1.0}), "token -1 is none"),
    (Request([1], 1, adapter=0), "no adapter 0; the model has 0"),
    (Request([1] * 100, 29), "100 tokens and max_tokens=29 exceed the 128"),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_request_is_refused_by_its_name(make, request_, message):
  with pytest.raises(UserError, match=message):
    make().submit(request_)


def test_a_model_that_cannot_write_is_refused(tiny_config, random_params):
  for changes, message in (
    ({"visibility": "bidirectional"}, "model.visibility='bidirectional'"),
    ({"label_head.num_labels": 3}, "scores 3 labels"),
    ({}, "length=99 exceeds the model's 16 learned positions"),
  ):
    config = tiny_config(vocab_size=264, **changes)
    model = nnx.merge(model_graph(config), random_params(config))
    with pytest.raises(UserError, match=message):
      Engine(model, BYTES, length=99)
