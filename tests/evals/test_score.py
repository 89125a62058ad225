import numpy as np
import pytest
from flax import nnx

from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from gptjax.evals import score as scoring
from gptjax.evals.score import encode_pair, rolling_windows, score, score_documents
from gptjax.model.gpt import model_graph

BYTES = tokenizers.load("bytes")
ROOM = 40


@pytest.fixture(scope="module")
def make_model(tiny_config, random_params):
  def make(**changes):
    shape = {"vocab_size": 264, "num_layers": 1, "position.max_positions": ROOM}
    config = tiny_config(**shape | {"position.kind": "rope"} | changes)
    return nnx.merge(model_graph(config), random_params(config))

  return make


@pytest.fixture(scope="module")
def model(make_model):
  return make_model()


@nnx.jit
def forward(model, tokens, **kwargs):
  return model(tokens, **kwargs)


def by_hand(model, context, continuation, **kwargs):
  """log p of each token of a continuation, and of the likeliest token at its place."""
  row = [*context, *continuation]
  # What comes later changes nothing, and one shape is one compilation.
  tokens = np.pad(np.array([row[:-1]]), ((0, 0), (0, ROOM + 1 - len(row))))
  logits = np.asarray(forward(model, tokens, **kwargs), np.float64)[0]
  log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
  log_p = log_p[len(context) - 1 : len(row) - 1]
  return log_p[np.arange(len(continuation)), continuation], log_p.max(axis=1)


@pytest.fixture(scope="module")
def pairs(model):
  rng = np.random.default_rng(0)
  sizes = [(1, 1), (3, 4), (20, 4), (5, 1), (2, 31), (11, 3)]
  made = [tuple(rng.integers(264, size=size).tolist() for size in pair) for pair in sizes]
  context = made[2][0]
  best = int(forward(model, np.pad([context], ((0, 0), (0, ROOM - 20))))[0, 19].argmax())
  # One context and continuations that share all but their last token.
  return [*made, (context, [best]), (context, [best + 1]), (context, [best - 1]), (context, [best])]


def test_scores_are_those_of_the_logits(model, pairs):
  for one, (context, continuation) in zip(score(model, pairs, batch_size=3), pairs, strict=True):
    log_p, best = by_hand(model, context, continuation)
    assert one.log_likelihood == pytest.approx(log_p.sum(), abs=1e-3)
    assert one.tokens == len(continuation)
    assert one.greedy == bool((log_p == best).all())


def test_the_likeliest_continuation_is_greedy_and_no_other(model, pairs):
  assert [one.greedy for one in score(model, pairs[-4:])] == [True, False, False, True]


def test_a_score_does_not_depend_on_its_batch(model, pairs):
  together = score(model, pairs, batch_size=3)
  # Always with the four of one context: their number is part of the compiled shape.
  alone = [score(model, [pair, *pairs[-4:]], batch_size=3)[0] for pair in pairs]
  backwards = score(model, pairs[::-1], batch_size=3)[::-1]
  for other in (alone, backwards):
    assert [one.greedy for one in other] == [one.greedy for one in together]
    np.testing.assert_allclose(
      [one.log_likelihood for one in other], [one.log_likelihood for one in together], rtol=1e-6
    )


def test_similar_lengths_share_a_compilation_and_a_row(model, monkeypatch):
  shapes = []
  original = scoring._score
  monkeypatch.setattr(
    scoring, "_score", lambda *args: shapes.append([x.shape for x in args[2:]]) or original(*args)
  )
  contexts = [[1, 2, 3], [4] * 7, [5] * 30]
  score(model, [(context, [last]) for context in contexts for last in (6, 7)], batch_size=4)
  assert shapes == [[(3, 32), (3,), (3,), (3, 2, 1)]]  # six pairs, three rows, one batch


@pytest.mark.parametrize(
  ("sizes", "batch_size", "expected"),
  [
    ([(1, 30)], 8, [(1, 32, 32)]),  # not a row more than there are
    ([(1, 30)] * 9, 8, [(5, 32, 32)] * 2),  # one shape, and one row in vain
    ([(1, 30)] * 8, 4, [(4, 32, 32)] * 2),
    ([(150, 130)], 8, [(1, 300, 160)]),  # not a power of two
  ],
)
def test_little_is_computed_in_vain(sizes, batch_size, expected, make_model, monkeypatch):
  shapes = []
  monkeypatch.setattr(
    scoring,
    "_score",
    lambda *args: (
      shapes.append((*args[2].shape, args[5].shape[-1])) or np.zeros((2, *args[5].shape))
    ),
  )
  pairs = [
    ([number] * context, [1] * continuation) for number, (context, continuation) in enumerate(sizes)
  ]
  score(make_model(**{"position.max_positions": 300}), pairs, batch_size=batch_size)
  assert shapes == expected


def test_the_start_of_a_long_context_is_left_out(model, pairs):
  context, continuation = list(range(3 * ROOM)), [7, 8]
  (long,) = score(model, [(context, continuation)])
  (short,) = score(model, [(context[-(ROOM - 1) :], continuation)])
  assert long.log_likelihood == pytest.approx(short.log_likelihood, rel=1e-6)


def test_of_a_prefix_model_the_context_is_the_prefix(make_model):
  model = make_model(visibility="prefix", num_layers=2)
  context, continuation = [1, 2, 3, 4, 5], [6, 7]
  (one,) = score(model, [(context, continuation)])
  prefix = (np.arange(ROOM) < 5).astype(int)[None]
  log_p, _ = by_hand(model, context, continuation, prefix_BS=prefix)
  without, _ = by_hand(model, context, continuation)
  assert one.log_likelihood == pytest.approx(log_p.sum(), abs=1e-4)
  assert abs(log_p.sum() - without.sum()) > 1e-2


def test_what_cannot_be_scored_is_refused(make_model):
  model = make_model(**{"position.kind": "learned", "position.max_positions": 8})
  with pytest.raises(UserError, match="no tokens; each needs at least 1"):
    score(model, [([1], [])])
  with pytest.raises(UserError, match="a continuation of 9 tokens does not fit the 8"):
    score(model, [([1], [2] * 9)])
  with pytest.raises(UserError, match="max_length=9 exceeds the model's 8 learned positions"):
    score(model, [([1], [2])], max_length=9)
  with pytest.raises(UserError, match="reads from left to right"):
    score(make_model(visibility="bidirectional"), [([1], [2])])


# --- Windows -----------------------------------------------------------------------------------


def test_the_last_window_reaches_back_until_it_is_full():
  # The example in the documentation of lm-eval's loglikelihood_rolling.
  assert list(rolling_windows(["BOS"], list(range(10)), 4)) == [
    (["BOS"], [0, 1, 2, 3]),
    ([3], [4, 5, 6, 7]),
    ([5, 6, 7], [8, 9]),
  ]


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 9, 13])
def test_windows_predict_every_token_once_and_are_full(length):
  tokens = list(range(length))
  windows = list(rolling_windows([-1], tokens, 4))
  assert [token for _, predicted in windows for token in predicted] == tokens
  for context, predicted in windows:
    assert len(context) + len(predicted) - 1 == min(4, length)


def test_a_document_is_the_sum_of_its_windows(model):
  text = "A text of more than forty bytes, that is more than one window."
  found = score_documents(model, BYTES, [text, "", "short"])
  pairs = list(rolling_windows([BYTES.end_of_text], BYTES.encode(text), ROOM))
  assert len(pairs) == 2
  expected = sum(by_hand(model, *pair)[0].sum() for pair in pairs)
  assert found[0].log_likelihood == pytest.approx(expected, rel=1e-5)
  assert [one.tokens for one in found] == [len(text), 0, 5]
  assert found[1].log_likelihood == 0


# --- Texts to tokens ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merging():
  return tokenizers.train("bpe:300", ["the good the bad the goodness"] * 5)


@pytest.mark.parametrize(
  ("context", "continuation"), [("the", " good"), ("the ", "good"), ("the go", "odness"), ("", "a")]
)
def test_a_pair_is_the_text_as_the_model_reads_it(merging, context, continuation):
  before, after = encode_pair(merging, context, continuation)
  start = list(merging.start)
  assert [*before, *after] == [*start, *merging.encode(context + continuation)]
  assert before[: len(start)] == start
  assert merging.decode(after).endswith(continuation)
  assert "good" not in merging.decode(before)


def test_a_space_before_a_continuation_belongs_to_it(merging):
  for tokenizer in (merging, BYTES):
    assert encode_pair(tokenizer, "the ", "good") == encode_pair(tokenizer, "the", " good")


def test_a_context_of_ids_is_kept(merging):
  assert encode_pair(merging, [1, 2], "good") == ([1, 2], merging.encode("good"))
  with pytest.raises(UserError, match="continuation to score is empty"):
    encode_pair(merging, "the", "")


def test_scoring_is_compiled_once_a_shape(model):
  score(model, [([1] * size, [3]) for size in range(2, 9)], batch_size=5)
  before = scoring._score._cache_size()
  score(model, [([1] * size, [3]) for size in range(3, 11)], batch_size=5)
  assert scoring._score._cache_size() == before
