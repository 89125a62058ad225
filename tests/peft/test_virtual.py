import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax.errors import UserError
from gptjax.peft.config import PeftConfig
from gptjax.peft.surgery import adapt, merge
from tests.peft.conftest import TOKENS


@pytest.fixture(scope="module")
def learned(tiny_config):
  return tiny_config(**{"position.max_positions": 12})


@pytest.mark.parametrize(("method", "position"), [("prompt", "rope"), ("prefix", "learned")])
def test_every_segment_of_a_packed_row_sees_the_virtual_tokens(
  method, position, make_adapted, logits, model_config, learned
):
  config = model_config if position == "rope" else learned
  model = make_adapted(PeftConfig(method, virtual_tokens=3), config, by=0.5)
  packed = np.concatenate([TOKENS[:1, :4], TOKENS[1:, :5]], axis=1)
  together = logits(
    model,
    packed,
    segment_ids_BT=np.array([[1] * 4 + [2] * 5], np.int32),
    positions_BT=np.concatenate([np.arange(4), np.arange(5)])[None].astype(np.int32),
  )
  apart = logits(model)
  np.testing.assert_allclose(together[:, :4], apart[:1, :4], atol=2e-5)
  np.testing.assert_allclose(together[:, 4:], apart[1:, :5], atol=2e-5)


@pytest.mark.parametrize("window", [0, 4])
def test_token_by_token_is_the_same(window, make_adapted, model_config, logits):
  kinds = {"layer_pattern": ("local", "full"), "window": window} if window else {}
  config = model_config.replace(kinds)
  model = make_adapted(PeftConfig("prompt", virtual_tokens=3), config, by=0.5)
  graph, state = nnx.split(model)

  @jax.jit
  def decode(state):
    model = nnx.merge(graph, state)
    model.unstack()
    first, cache = model.hidden(TOKENS[:, :3], cache=model.empty_cache(2, 8))
    rest = [first]
    for i in range(3, 6):
      positions = jnp.full((2, 1), i)
      x, cache = model.hidden(TOKENS[:, i : i + 1], positions_BT=positions, cache=cache)
      rest.append(x)
    return model.logits(jnp.concatenate(rest, axis=1))

  np.testing.assert_allclose(decode(state), logits(model), atol=2e-5)


@pytest.mark.parametrize("method", ["prompt", "ptuning"])
def test_a_tuned_prompt_becomes_the_keys_and_values_that_it_makes(method, make_adapted, logits):
  model = make_adapted(PeftConfig(method, virtual_tokens=3), by=0.5)
  merged = merge(model)
  assert not {"prompt", "prompt_encoder"} & set(vars(merged))
  assert merged.blocks.attention.prefix_keys.shape == (2, 3, 2, 4)
  np.testing.assert_allclose(logits(merged), logits(model), atol=1e-5)


def test_a_prompt_starts_as_tokens_of_the_vocabulary(make_model):
  model = adapt(make_model(), PeftConfig("prompt", virtual_tokens=3), nnx.Rngs(0))
  table = np.asarray(model.embed.embedding[...])
  assert all((table == row).all(axis=1).any() for row in np.asarray(model.prompt[...]))


def test_the_network_of_a_prompt_is_its_formula(make_adapted):
  model = make_adapted(PeftConfig("ptuning", virtual_tokens=3))
  x, layers = np.asarray(model.prompt[...]), nnx.to_pure_dict(nnx.state(model.prompt_encoder))
  for name in ("first", "second", "last"):
    x = x @ layers[name]["kernel"] + layers[name]["bias"][None]
    x = x if name == "last" else np.maximum(x, 0)
  np.testing.assert_allclose(model.embeddings(), x, rtol=1e-4, atol=1e-5)


def test_virtual_tokens_take_learned_positions(make_adapted, learned, logits):
  model = make_adapted(PeftConfig("prefix", virtual_tokens=3), learned)
  logits(model, np.zeros((1, 9), np.int32))
  with pytest.raises(UserError, match="10 positions do not fit the 9 learned positions"):
    logits(model, np.zeros((1, 10), np.int32))


@pytest.mark.parametrize(
  "changes",
  [{"position.kind": "alibi"}, {"visibility": "bidirectional"}, {"attention.kernel": "splash"}],
  ids=str,
)
def test_a_model_that_cannot_see_them_is_refused(changes, tiny_config, make_model):
  with pytest.raises(UserError, match=f"not known with model.{next(iter(changes))}="):
    adapt(make_model(tiny_config(**changes)), PeftConfig("prefix"), nnx.Rngs(0))
