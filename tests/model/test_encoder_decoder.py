import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax.errors import UserError
from gptjax.model.gpt import GPT, model_graph
from gptjax.model.stats import ActivationStats

S, T = 6, 5
SOURCE = np.random.default_rng(0).integers(0, 32, (2, S))
TARGET = np.random.default_rng(1).integers(0, 32, (2, T))


@pytest.fixture(scope="module")
def model(tiny_config, random_params):
  config = tiny_config(
    encoder_layers=3, bias=False, **{"position.kind": "t5", "norm.kind": "rmsnorm"}
  )
  return nnx.merge(model_graph(config), random_params(config))


@jax.jit
def run(model, source, target, source_segments=None, target_segments=None):
  encoded = model.encode(source, segment_ids_BS=source_segments)
  return model(target, encoded=encoded, segment_ids_BT=target_segments)


def test_every_source_token_and_the_past_of_the_target_are_seen(model):
  before = np.asarray(run(model, SOURCE, TARGET))
  for s in range(S):
    changed = SOURCE.copy()
    changed[:, s] ^= 1
    assert (np.abs(run(model, changed, TARGET) - before).max(-1) > 1e-5).all()
  for t in range(T):
    changed = TARGET.copy()
    changed[:, t] ^= 1
    moved = np.abs(run(model, SOURCE, changed) - before).max(-1) > 1e-5
    np.testing.assert_array_equal(moved, np.broadcast_to(np.arange(T) >= t, (2, T)))


def test_a_segment_of_the_decoder_sees_that_of_the_encoder_alone(model):
  source, target = np.array([[1, 1, 1, 2, 2, 0]]), np.array([[1, 1, 2, 2, 0]])
  before = np.asarray(run(model, SOURCE[:1], TARGET[:1], source, target))
  changed = SOURCE[:1].copy()
  changed[:, [3, 5]] ^= 1  # the second document, and padding
  moved = np.abs(run(model, changed, TARGET[:1], source, target) - before).max(-1)[0] > 1e-5
  np.testing.assert_array_equal(moved[:4], [False, False, True, True])


def test_writing_token_by_token_gives_what_a_whole_pass_gives(model):
  whole = run(model, SOURCE, TARGET)

  @jax.jit
  def write(model):
    encoded = model.encode(SOURCE, for_decoding=True)
    cache, logits = model.empty_cache(2, T), []
    for t in range(T):
      x_BTD, cache = model.hidden(
        TARGET[:, t : t + 1],
        positions_BT=jnp.full((2, 1), t),
        encoded=encoded,
        cache=cache,
      )
      logits.append(model.logits(x_BTD)[:, 0])
    return jnp.stack(logits, axis=1)

  np.testing.assert_allclose(write(model), whole, atol=1e-5)


@pytest.mark.slow
def test_what_cross_attention_adds_is_told(model):
  stats = ActivationStats()
  model.hidden(TARGET, encoded=model.encode(SOURCE), stats=stats)
  assert stats["cross_attention_rms"].shape == (2,)
  assert (stats["cross_attention_rms"] > 0).all()


def test_a_model_with_an_encoder_needs_what_it_made_and_others_refuse_it(model, tiny_config):
  with pytest.raises(UserError, match="the model reads what `encode` returns"):
    model(TARGET)
  alone = GPT(tiny_config(**{"position.kind": "rope"}), nnx.Rngs(0))
  with pytest.raises(UserError, match="the model has no encoder"):
    alone(TARGET, encoded=model.encode(SOURCE))
