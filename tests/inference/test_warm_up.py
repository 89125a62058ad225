"""What is compiled ahead is all that usual answers need."""

import numpy as np
import pytest
from flax import nnx

from gptjax.data import tokenizer as tokenizers
from gptjax.inference import form
from gptjax.inference.engine import Engine
from gptjax.inference.request import Request
from gptjax.inference.sampling import Sampling, compilations
from gptjax.inference.warm_up import warm_up
from gptjax.model.gpt import model_graph

BYTES = tokenizers.load("bytes")


@pytest.mark.parametrize(
  "own", [pytest.param(True, marks=pytest.mark.slow), False], ids=["kernels", "xla"]
)
def test_no_usual_answer_compiles_anything(own, tiny_config, random_params, monkeypatch):
  if own and not (form.kernels and form.kernels.available()):
    pytest.skip("needs numba")
  if not own:
    monkeypatch.setattr(form, "kernels", None)
  kind = {"position.kind": "rope", "position.max_positions": 500, "num_layers": 1}
  config = tiny_config(vocab_size=BYTES.vocab_size, **kind)
  model = nnx.merge(model_graph(config), random_params(config))
  # None of these sizes is a power of two.
  engine = Engine(model, BYTES, rows=3, chunk=48)
  told = list(warm_up(engine))
  assert [done for done, _ in told] == list(range(1, len(told) + 1))
  assert {total for _, total in told} == {len(told)}
  assert engine.idle
  assert engine.reader.pages.used == 0
  before = compilations.copy()
  rng = np.random.default_rng(0)

  def request(length, tokens=2, **options):
    ids = rng.integers(0, 256, length).tolist()
    return Request(ids, tokens, ignore_end=True, **options)

  engine.run([request(length) for length in (1, 2, 17, 47, 48, 49, 100, 250)])
  engine.run([request(400, 100, sampling=Sampling(top_p=0.5)), request(480, 20), request(499, 1)])
  engine.run([request(5, log_probs=2), request(300, logit_bias={1: -1.0})])
  engine.run([request(5, log_probs=2), request(5), request(5, logit_bias={1: -1.0})])
  engine.run([request(5, sampling=Sampling(presence_penalty=1.0)), request(9), request(9)])
  engine.run([request(9, log_probs=0), request(9, log_probs=20)])
  assert compilations - before == {}


def test_the_answers_are_those_without(tiny_config, random_params):
  config = tiny_config(vocab_size=BYTES.vocab_size, **{"position.max_positions": 64})
  model = nnx.merge(model_graph(config), random_params(config))
  cold, warm = (Engine(model, BYTES, rows=2) for _ in range(2))
  for _ in warm_up(warm):
    pass
  requests = [Request([0] * length, 8, ignore_end=True) for length in (20, 2, 40)]
  tokens = [[answer.tokens for answer in engine.run(requests)] for engine in (cold, warm)]
  assert tokens[0] == tokens[1]
