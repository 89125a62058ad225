"""A cache in few bits: what it holds, what it costs, and that it changes nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from gptjax.inference import pages
from gptjax.inference.engine import Engine
from gptjax.inference.pages import page_bytes
from gptjax.inference.request import Request
from gptjax.inference.sampling import Sampling
from gptjax.model.gpt import model_graph
from gptjax.quantization.formats import Format, Grid, from_codes, unpack

BYTES = tokenizers.load("bytes")
LENGTH = 64
LLAMA = {
  **{"position.kind": "rope", "norm.kind": "rmsnorm", "bias": False, "mlp.activation": "swiglu"},
  **{"num_kv_heads": 2, "vocab_size": 264, "embed_dim": 64},
}
TEXTS = ["a", "def main(x):", "A prompt of several pages, " * 2, "And one more."]


@pytest.fixture(scope="module")
def make(tiny_config, random_params):
  def make(**changes):
    config = tiny_config(**(LLAMA | changes))
    return nnx.merge(model_graph(config), random_params(config, seed=5))

  return make


def requests():
  options = {"max_tokens": 9, "ignore_end": True, "log_probs": 1, "sampling": Sampling(0)}
  return [Request(BYTES.encode(text)[:40], **options) for text in TEXTS]


def log_probs(answers):
  return [np.array([score.log_prob for score in answer.scores]) for answer in answers]


@pytest.mark.parametrize(
  ("cache", "most"), [("int8", 0.05), pytest.param("int4", 0.6, marks=pytest.mark.slow)]
)
def test_answers_are_near_those_of_a_whole_cache(make, cache, most):
  model = make()
  expected = log_probs(Engine(model, BYTES, rows=4, length=LENGTH).run(requests()))
  engine = Engine(model, BYTES, rows=4, length=LENGTH, cache=cache, chunk=16)
  found = log_probs(engine.run(requests()))
  # The first token is written before the ways can part.
  errors = [abs(own[0] - theirs[0]) for own, theirs in zip(found, expected, strict=True)]
  assert max(errors) < most
  assert max(errors) > 0


def test_answers_do_not_depend_on_the_batch_or_on_shared_pages(make):
  model = make()
  together = Engine(model, BYTES, rows=4, length=LENGTH, cache="int8").run(requests())
  alone = Engine(model, BYTES, rows=1, length=LENGTH, cache="int8", chunk=8)
  for request, expected in zip(requests() + requests(), together * 2, strict=True):
    (answer,) = alone.run([request])
    assert answer.tokens == expected.tokens
    for own, theirs in zip(answer.scores, expected.scores, strict=True):
      assert own.log_prob == theirs.log_prob
  assert alone.counts.cached_tokens > 0


def test_a_page_takes_fewer_bytes(make):
  config = make().config
  whole = page_bytes(config, joined=False)
  H = config.head_dim
  assert page_bytes(config, joined=False, cache="int8") == whole * (H + 4) // (4 * H)
  assert page_bytes(config, joined=False, cache="int4") == whole * (H // 2 + 4) // (4 * H)


def test_turning_keeps_heads_with_outliers_nearer():
  x = np.random.default_rng(0).normal(size=(50, 4, 64)).astype(np.float32)
  x[..., 3] *= 30
  form = Format("int4", 32)
  stored = pages._encode(x, form)
  turned = np.asarray(pages._decode(stored, form))
  grid = pages.make_grid(jnp.asarray(x), form)
  codes = pages.to_codes(jnp.asarray(x), grid, form)
  plain = np.asarray(from_codes(codes, grid, form))
  assert np.square(turned - x).mean() < 0.5 * np.square(plain - x).mean()
  assert unpack(stored.values, form).shape == x.shape
  assert isinstance(grid, Grid)


def test_heads_that_cannot_be_turned_are_refused(make):
  model = make(head_dim=12, **{"rope.dim": 12})
  with pytest.raises(UserError, match="power of 2, not 12: take int8"):
    Engine(model, BYTES, rows=1, length=LENGTH, cache="int4")
