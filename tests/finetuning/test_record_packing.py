import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from gptjax.data.batch import Batch
from gptjax.data.cache import TokenCache
from gptjax.errors import UserError
from gptjax.finetuning.record_packing import PackedConversations, first_fit_decreasing
from gptjax.model.gpt import model_graph
from gptjax.objectives.forward import token_loss

SEPARATOR = 0


def cache_of(*conversations):
  """A cache of conversations, each a string of a token a letter; capitals are to be learnt."""
  stored, boundaries = [], []
  for text in conversations:
    boundaries.append(len(stored))
    tokens = [1 + ord(letter.lower()) - ord("a") for letter in text]
    flags = [letter.isupper() for letter in text]
    stored += [SEPARATOR, *(2 * t + f for t, f in zip(tokens, flags, strict=True))]
  return TokenCache(np.array([*stored, SEPARATOR], np.uint16), np.array(boundaries), 0, 0)


def letters(tokens):
  return "".join(chr(ord("a") + token - 1) for token in tokens)


def conversations_of(row):
  """The conversations of a row, as `cache_of` takes them; a first letter is never a target."""
  for segment in range(1, row.segment_ids.max() + 1):
    inside = row.segment_ids == segment
    targets = letters(row.targets[inside])
    learnt = row.weights[inside]
    yield letters(row.inputs[inside][:1]) + "".join(
      letter.upper() if weight else letter for letter, weight in zip(targets, learnt, strict=True)
    )


@pytest.mark.parametrize("seed", range(5))
def test_first_fit_decreasing_is_what_its_name_says(seed):
  rng = np.random.default_rng(seed)
  sizes = rng.integers(0, 30, 200).tolist()
  bins = []
  for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
    room = (b for b in bins if sum(sizes[i] for i in b) + sizes[item] <= 32)
    chosen = next(room, None)
    if chosen is None:
      bins.append([item])
    else:
      chosen.append(item)
  assert [b.tolist() for b in first_fit_decreasing(sizes, 32)] == [sorted(b) for b in bins]


def test_a_row_has_whole_conversations_that_know_their_place_and_what_is_learnt():
  rows = PackedConversations(cache_of("abCD", "efG", "hiJKlM"), 5, "drop")
  assert len(rows) == 2
  first, second = rows[0], rows[1]
  assert letters(first.inputs) == "hijkl"
  assert second.inputs.tolist() == [1, 2, 3, 5, 6]
  assert second.targets.tolist() == [2, 3, 4, 6, 7]
  assert second.segment_ids.tolist() == [1, 1, 1, 2, 2]
  assert second.positions.tolist() == [0, 1, 2, 0, 1]
  assert second.weights.tolist() == [0, 1, 1, 0, 1]
  dtypes = {name: values.dtype for name, values in vars(second).items() if values is not None}
  assert dtypes.pop("weights") == np.float32
  assert set(dtypes.values()) == {np.dtype(np.int32)}
  with pytest.raises(IndexError):
    rows[2]


@pytest.mark.parametrize("sequence_length", [8, 16, 50])
def test_every_conversation_is_in_exactly_one_row(sequence_length):
  rng = np.random.default_rng(0)
  texts = ["".join(rng.choice(list("abcXYZ"), rng.integers(2, 10))) for _ in range(100)]
  texts = [text[0].lower() + text[1:] for text in texts]
  rows = PackedConversations(cache_of(*texts), sequence_length, "drop")
  assert sorted(c for row in rows for c in conversations_of(row)) == sorted(texts)
  assert (rows.truncated, rows.dropped) == (0, 0)
  assert all(len(row.inputs) == sequence_length for row in rows)


@pytest.mark.parametrize(
  ("overlong", "kept", "truncated", "dropped"),
  [("truncate", ["aB", "cdEFg", "hijkL"], 2, 1), ("drop", ["aB"], 0, 3)],
)
def test_what_is_longer_than_a_row_is_cut_if_an_answer_is_left(overlong, kept, truncated, dropped):
  # The third has its answer beyond the row.
  cache = cache_of("aB", "cdEFgH", "mnopqR", "hijkLM")
  rows = PackedConversations(cache, 4, overlong)
  assert sorted(c for row in rows for c in conversations_of(row)) == kept
  assert (rows.truncated, rows.dropped) == (truncated, dropped)


def test_rows_that_nothing_fits_are_an_error():
  with pytest.raises(UserError, match=r"none of 2 documents fits a row of 2 tokens .* takes 3"):
    PackedConversations(cache_of("abCD", "abCDE"), 2, "drop")


@pytest.fixture(scope="module")
def loss_and_gradient(tiny_config, random_params):
  """Returns jit(batch) -> (loss sum, its gradient by the parameters) of a tiny GPT."""
  config = tiny_config(**{"position.kind": "rope"})
  graph, params = model_graph(config), random_params(config)

  def loss(params, batch):
    return token_loss(nnx.merge(graph, params), batch).total

  with_gradient = jax.jit(jax.value_and_grad(loss))
  return lambda rows: with_gradient(params, Batch.stack(rows))


TEXTS = ("abCDe", "fgHIjkLM", "noPq", "rsTU")


def test_packed_rows_have_the_loss_and_the_gradient_of_the_conversations_alone(loss_and_gradient):
  packed = [*PackedConversations(cache_of(*TEXTS), 12, "drop")]
  assert len(packed) == 2
  alone = [PackedConversations(cache_of(text), 12, "drop")[0] for text in TEXTS]
  loss, gradient = loss_and_gradient([*packed, *[jax.tree.map(np.zeros_like, packed[0])] * 2])
  expected, expected_gradient = loss_and_gradient(alone)
  assert float(loss) == pytest.approx(float(expected), rel=1e-5)
  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5),
    gradient,
    expected_gradient,
  )


def test_what_the_user_says_is_no_target_of_the_gradient(loss_and_gradient):
  rows = [*PackedConversations(cache_of(*TEXTS), 12, "drop")] * 2

  def with_other_targets(row, change):
    return dataclasses.replace(
      row, targets=np.where(change(row), row.targets % 26 + 1, row.targets)
    )

  loss, gradient = loss_and_gradient(rows)
  others = [with_other_targets(row, lambda row: row.weights == 0) for row in rows]
  same_loss, same_gradient = loss_and_gradient(others)
  assert loss == same_loss
  jax.tree.map(np.testing.assert_array_equal, gradient, same_gradient)
  learnt = [with_other_targets(row, lambda row: row.weights == 1) for row in rows]
  assert loss_and_gradient(learnt)[0] != loss
