import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax.inference.decode import decode, prefill
from gptjax.inference.sampling import Sampling
from gptjax.model.gpt import model_graph

PROMPTS = np.array([[3, 1, 4, 1, 5], [9, 2, 0, 0, 0]])
LENGTHS = np.array([5, 2])
T = 16
GREEDY = Sampling(temperature=0)
NEVER = -1


@pytest.fixture(scope="module")
def model(tiny_config, random_params):
  kind = {"position.kind": "rope", "norm.kind": "rmsnorm", "bias": False, "head.tied": False}
  config = tiny_config(num_kv_heads=2, layer_pattern=("local", "full"), window=4, **kind)
  return nnx.merge(model_graph(config), random_params(config, seed=3))


@pytest.fixture(scope="module")
def run(model):
  graph, params = nnx.split(model)

  def run(limits, stops=NEVER, steps=8, calls=1):
    tokens = np.zeros((2, T), np.int32)
    tokens[:, :5] = PROMPTS
    keys = jax.random.split(jax.random.key(0), 2)
    state = prefill(graph, params, tokens, LENGTHS, keys, prompt_length=5)
    first = np.asarray(state.logits)
    for _ in range(calls):
      state = decode(graph, params, state, np.array(limits), stops, steps=steps, sampling=GREEDY)
    return first, state

  return run


@pytest.fixture(scope="module")
def expected(model):
  """Each prompt continued to 13 tokens by running the whole model again for every token."""
  forward = jax.jit(lambda model, tokens: model(tokens))
  rows = []
  for prompt, length in zip(PROMPTS, LENGTHS, strict=True):
    row = np.zeros(T, int)
    row[:length] = prompt[:length]
    for end in range(length, 13):
      row[end] = forward(model, row[None])[0, end - 1].argmax()
    rows.append(row)
  return np.stack(rows)


def test_prefill_gives_the_logits_of_each_last_token(model, run):
  first, _ = run(LENGTHS)
  logits = jax.jit(lambda model: model(jnp.asarray(PROMPTS)))(model)
  np.testing.assert_allclose(first, logits[[0, 1], LENGTHS - 1], atol=1e-5)


@pytest.mark.parametrize(("steps", "calls"), [(8, 1), (4, 2)])
def test_greedy_decoding_is_the_model_run_again_for_every_token(run, expected, steps, calls):
  _, state = run(LENGTHS + 8, steps=steps, calls=calls)
  np.testing.assert_array_equal(state.lengths, LENGTHS + 8)
  for row in range(2):
    end = LENGTHS[row] + 8
    np.testing.assert_array_equal(state.tokens[row, :end], expected[row, :end])
  assert state.finished.all()


def test_a_row_ends_at_its_own_limit(run, expected):
  _, state = run(LENGTHS + np.array([2, 7]))
  np.testing.assert_array_equal(state.lengths, LENGTHS + np.array([2, 7]))
  np.testing.assert_array_equal(state.tokens[1, :9], expected[1, :9])
  np.testing.assert_array_equal(state.tokens[0, :7], expected[0, :7])


def test_a_row_ends_with_any_of_the_stops_and_keeps_it(run, expected):
  # A token that comes in one row only, some way in, is declared to be the end.
  end, row, at = next(
    (int(expected[row, at]), row, at)
    for row in range(2)
    for at in range(LENGTHS[row] + 1, LENGTHS[row] + 7)
    if expected[row, at] not in expected[row, LENGTHS[row] : at]
    and expected[row, at] not in expected[1 - row, LENGTHS[1 - row] : LENGTHS[1 - row] + 8]
  )
  _, state = run(LENGTHS + 8, stops=np.array([NEVER, end, NEVER]))
  assert int(state.lengths[row]) == at + 1
  assert int(state.tokens[row, at]) == end
  assert int(state.lengths[1 - row]) == LENGTHS[1 - row] + 8
  np.testing.assert_array_equal(
    state.tokens[1 - row, : LENGTHS[1 - row] + 8], expected[1 - row, : LENGTHS[1 - row] + 8]
  )


def test_decoding_stops_when_every_row_has_finished(run):
  _, state = run(LENGTHS + 1, steps=8)
  _, again = run(LENGTHS + 1, steps=8, calls=2)
  np.testing.assert_array_equal(state.tokens, again.tokens)
  np.testing.assert_array_equal(again.lengths, LENGTHS + 1)
