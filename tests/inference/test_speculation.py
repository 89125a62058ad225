import collections

import jax
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.errors import UserError
from gptjax.inference import speculation
from gptjax.inference.engine import Engine
from gptjax.inference.pages import PAGE
from gptjax.inference.request import Request
from gptjax.inference.sampling import Sampling, Settings, filter_logits
from gptjax.inference.speculation import MOST, DraftModel, PromptLookup, Speculation, skip_layers
from gptjax.model.gpt import model_graph

BYTES = tokenizer_lib.load("bytes")
LENGTH = 128
SAMPLINGS = [Sampling(temperature=0), Sampling(0.8, top_p=0.9), Sampling(frequency_penalty=0.5)]


@pytest.fixture(scope="module")
def model(tiny_config, random_params):
  kind = {"position.kind": "rope", "norm.kind": "rmsnorm", "bias": False}
  config = tiny_config(vocab_size=264, num_layers=4, **kind)
  return nnx.merge(model_graph(config), random_params(config, seed=3))


class Oracle:
  """Guesses from answers that are known, with some guesses wrong."""

  def __init__(self, known, wrong_every=5):
    self.known, self.wrong_every = known, wrong_every

  def propose(self, answers, most):
    drafts = []
    for answer in answers:
      rest = next(tokens for tokens in self.known if tokens[:3] == answer.tokens[:3])
      draft = rest[len(answer.tokens) :][:most]
      drafts.append(
        [
          (token + 1) % 256 if (len(answer.tokens) + i) % self.wrong_every == 0 else token
          for i, token in enumerate(draft)
        ]
      )
    return drafts

  def forget(self, answer):
    pass

  def clear(self):
    pass


@pytest.fixture
def always(monkeypatch):
  """Guesses are asked for whether or not that is faster."""

  def propose(self, answers):
    return self.drafter.propose(answers, MOST)

  monkeypatch.setattr(Speculation, "propose", propose)
  monkeypatch.setattr(Speculation, "learn", lambda *_: None)


def requests(**options):
  texts = ["one two one two one two ", "abc abc abc", "A longer text of three pages. " * 2]
  options = {"max_tokens": 40, "ignore_end": True, "log_probs": 1} | options
  return [
    Request(BYTES.encode(text), seed=i, sampling=SAMPLINGS[i], **options)
    for i, text in enumerate(texts)
  ]


def told(answer):
  return answer.tokens, answer.text, answer.scores, answer.finish_reason


@pytest.fixture(scope="module")
def plain(model):
  return Engine(model, BYTES, rows=4, length=LENGTH).run(requests())


def make_drafter(kind, model, plain):
  match kind:
    case "known":
      return Oracle([answer.tokens for answer in plain])
    case "lookup":
      return PromptLookup()
    case "same":
      return DraftModel(model, BYTES, rows=4, length=LENGTH)
    case "fewer layers":
      return DraftModel(skip_layers(model, 2), BYTES, rows=4, length=LENGTH)


@pytest.mark.parametrize(
  "kind",
  [
    "lookup",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("known", "same", "fewer layers")),
  ],
)
@pytest.mark.usefixtures("always")
def test_guesses_change_no_answer(model, plain, kind):
  engine = Engine(model, BYTES, rows=4, length=LENGTH, draft=make_drafter(kind, model, plain))
  answers = engine.run(requests())
  assert [told(answer) for answer in answers] == [told(answer) for answer in plain]
  counts = engine.counts
  assert counts.drafted_tokens > 0
  if kind == "same":
    # It draws with the same randomness; only what penalties change differs.
    assert counts.accepted_tokens > 0.6 * counts.drafted_tokens
  if kind == "known":
    assert counts.steps < 0.5 * counts.written_tokens / len(answers) + 6
  assert engine.reader.pages.used == 0


@pytest.mark.usefixtures("always")
def test_a_stop_among_right_guesses_ends_the_answer(model, plain):
  tokens = plain[0].tokens
  text = BYTES.decode(tokens[plain[0].prompt_length :])
  stop = text[10:12]
  wanted = [Request(tokens[: plain[0].prompt_length], 40, SAMPLINGS[0], 0, [stop])]
  expected = Engine(model, BYTES, length=LENGTH).run(wanted)[0]
  oracle = Oracle([tokens], wrong_every=1000)
  actual = Engine(model, BYTES, length=LENGTH, draft=oracle).run(wanted)[0]
  assert told(actual) == told(expected)
  assert len(actual.text) <= 10


@pytest.mark.slow
@pytest.mark.usefixtures("always")
def test_what_is_drawn_with_guesses_is_distributed_as_the_model_says(model):
  draws, sampling = 100_000, Sampling(1.5, top_k=5)
  prompt = BYTES.encode("A prompt of a page and a bit")[: PAGE + 1]
  forward = jax.jit(lambda tokens: model(tokens)[:, PAGE:, : BYTES.vocab_size])
  settings = jax.tree.map(lambda column: column[0], Settings.of([sampling], [0], [0]))

  def probabilities(logits):
    return np.asarray(jax.nn.softmax(filter_logits(logits, settings)))

  first = probabilities(forward(np.array([prompt]))[0, 0])
  expected = {}
  for one in np.flatnonzero(first):
    second = probabilities(forward(np.array([[*prompt, one]]))[0, 1])
    expected |= {(one, two): first[one] * second[two] for two in np.flatnonzero(second)}
  likeliest = max(expected, key=expected.get)

  class Constant:
    """Guesses the same after every prompt, so that many guesses are wrong."""

    def propose(self, answers, most):
      return [list(likeliest[len(answer.completion) :]) for answer in answers]

    def forget(self, answer):
      pass

  engine = Engine(model, BYTES, rows=64, length=LENGTH, draft=Constant())
  engine.run([Request(prompt, 3, sampling)])
  options = {"ignore_end": True}
  answers = engine.run([Request(prompt, 3, sampling, seed, **options) for seed in range(draws)])
  assert 0.1 < engine.counts.accepted_tokens / engine.counts.drafted_tokens < 0.9
  found = collections.Counter(tuple(answer.tokens[PAGE + 1 :][:2]) for answer in answers)
  assert set(found) <= set(expected)
  pairs = list(expected)
  counts = [found[pair] for pair in pairs]
  wanted = np.array([expected[pair] for pair in pairs], np.float64)
  assert scipy.stats.chisquare(counts, draws * wanted / wanted.sum()).pvalue > 1e-3
  # The test would see a hundredth of the draws go elsewhere.
  counts[0], counts[-1] = counts[0] + draws // 100, counts[-1] - min(draws // 100, counts[-1])
  total = sum(counts)
  assert scipy.stats.chisquare(counts, total * wanted / wanted.sum()).pvalue < 1e-3


class EvenBytes:
  """A language of even bytes, each less than 40 more than the one before."""

  def __init__(self):
    self.taken = [0]

  def allowed(self):
    allowed = np.zeros(BYTES.vocab_size, bool)
    allowed[self.taken[-1] : min(self.taken[-1] + 40, 256) : 2] = True
    return allowed

  def accept(self, token):
    self.taken.append(token)

  def take_back(self, count):
    del self.taken[len(self.taken) - count :]


@pytest.mark.usefixtures("always")
def test_a_constraint_holds_whatever_is_guessed(model):
  def wanted():
    return [Request(BYTES.encode("one two one two"), 30, SAMPLINGS[1], 1, constraint=EvenBytes())]

  expected = Engine(model, BYTES, length=LENGTH).run(wanted())[0]
  for drafter in (Oracle([expected.tokens], 3), PromptLookup(shortest=1)):
    actual = Engine(model, BYTES, length=LENGTH, draft=drafter).run(wanted())[0]
    assert told(actual) == told(expected)
  assert all(token % 2 == 0 for token in expected.completion)


def test_the_last_words_are_looked_up_where_they_came_last():
  lookup = PromptLookup(longest=3, shortest=2)
  assert lookup._look_up(np.array([1, 2, 3, 4, 9, 1, 2, 3, 5, 6, 1, 2, 3]), 2) == [5, 6]
  assert lookup._look_up(np.array([7, 2, 3, 4, 1, 2, 3]), 9) == [4, 1, 2, 3]
  assert lookup._look_up(np.array([1, 2, 3]), 5) == []
  assert lookup._look_up(np.array([1]), 5) == []


def test_a_part_of_the_layers_is_a_model(model):
  part = skip_layers(model, 2)
  for mine, of_layer in zip(part.layers(), (0, 3), strict=True):
    ours, theirs = nnx.state(mine), nnx.state(model.layers()[of_layer])
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  with pytest.raises(UserError, match="4 of the model's 4 layers cannot be kept"):
    skip_layers(model, 4)


class Timed:
  """Takes time for each guess and, as a draft model does, to read a text that it did not follow."""

  def __init__(self, clock, reading, guessing):
    self.clock, self.reading, self.guessing = clock, reading, guessing
    self.last, self.missed = None, 0

  def propose(self, answers, most):
    follows = self.last is answers[0] and self.missed < 3
    self.clock[0] += self.guessing * most + (0 if follows else self.reading)
    self.last, self.missed = answers[0], 0
    return [[1] * most for _ in answers]


@pytest.fixture
def decode(monkeypatch):
  """Returns a function: seconds in which texts are written, in steps of a second and a quarter more
  for guesses, of which a share is right; and the steps with guesses."""
  clock = [0.0]
  monkeypatch.setattr(speculation.time, "perf_counter", lambda: clock[0])

  def decode(chance, *, texts=10, tokens=200, reading=0.0, guessing=0.0):
    rng = np.random.default_rng(0)
    drafter = Timed(clock, reading, guessing)
    chooser, steps, begin = Speculation(drafter), 0, clock[0]
    for answer in [object() for _ in range(texts)]:
      left = tokens
      while left > 0:
        (draft,) = chooser.propose([answer])
        drafter.missed += not draft
        right = 0
        while right < len(draft) and rng.random() < chance:
          right += 1
        seconds = 1.25 if draft else 1.0
        clock[0] += seconds
        chooser.learn(1, len(draft), right + 1, seconds)
        left, steps = left - right - 1, steps + bool(draft)
    return clock[0] - begin, steps

  return decode


@pytest.mark.parametrize(("reading", "guessing"), [(0.0, 0.0), (0.0, 0.8), (15.0, 0.5)])
def test_guesses_that_are_wrong_cost_next_to_nothing(decode, reading, guessing):
  seconds, steps = decode(0.0, reading=reading, guessing=guessing)
  assert steps > 0
  assert seconds < 2000 / 0.98


def test_guesses_that_are_right_are_made_as_long_as_they_are(decode):
  seconds, _ = decode(0.9)
  assert seconds < 2000 / 2.5
  # What reading a text costs is won back.
  seconds, _ = decode(0.9, reading=15.0, guessing=0.2)
  assert seconds < 2000 / 1.4
  # Not in texts that are short.
  seconds, _ = decode(0.9, texts=200, tokens=10, reading=15.0, guessing=0.2)
  assert seconds < 2000 / 0.98


def test_after_wrong_guesses_few_are_made():
  class Lucky:
    def propose(self, answers, most):
      return [[1] * most for _ in answers]

  chooser, answer = Speculation(Lucky()), object()

  def count(right):
    (draft,) = chooser.propose([answer])
    chooser.learn(1, len(draft), 1 + (len(draft) if right else 0), seconds=1.0)
    return len(draft)

  assert [count(True) for _ in range(7)] == [0, 0, 0, 1, 3, 7, 7]
  assert [count(False) for _ in range(3)] == [7, 3, 1]
  # At times a step without them is measured.
  assert 0 in [count(True) for _ in range(40)]
