"""An ensemble answers by the mean of its members' logits, wherever a model is used."""

import numpy as np
import pytest

from gptjax.compression.ensemble import put_together
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from gptjax.evals.score import score
from gptjax.inference.engine import Engine
from gptjax.inference.generate import generate
from gptjax.inference.request import Request
from gptjax.inference.sampling import Sampling
from gptjax.training.pretrained import Labels, load_model, load_run
from tests.compression.saved import LLAMA, TEXT, VOCAB_SIZE, merge, save


@pytest.fixture
def members(tmp_path, tiny_config, random_params):
  """Two models, and the ensemble's checkpoint."""
  config = tiny_config(vocab_size=VOCAB_SIZE, **LLAMA, **{"position.max_positions": 64})
  params = [random_params(config, seed=seed) for seed in (0, 1)]
  names = [save(tmp_path / str(number), config, one) for number, one in enumerate(params)]
  put_together(names, tmp_path / "both", progress=False)
  return [merge(config, one) for one in params], str(tmp_path / "both")


def tokens_of(text):
  return tokenizers.load("bytes").encode(text)


def test_the_logits_are_the_mean_of_the_members(members):
  models, folder = members
  whole, _ = load_model(folder)
  tokens_BT = np.array([tokens_of(TEXT[:20]), tokens_of(TEXT[20:40])])
  expected = np.mean([model(tokens_BT) for model in models], 0)
  np.testing.assert_allclose(whole(tokens_BT), expected, atol=1e-5)
  assert np.abs(expected - models[0](tokens_BT)).max() > 0.1


def test_the_engine_scores_text_as_the_whole_forward_pass_does(members):
  _, folder = members
  whole, tokenizer = load_model(folder)
  text = tokens_of(TEXT[:40])
  engine = Engine(whole, tokenizer, rows=2, length=64)
  (answer,) = engine.run([Request(text, max_tokens=0, log_probs=0, scores_prompt=True)])
  found = sum(one.log_prob for one in answer.prompt_scores[1:])
  (expected,) = score(whole, [(text[:1], text[1:])])
  assert found == pytest.approx(expected.log_likelihood, rel=1e-4)


@pytest.mark.parametrize(
  "options",
  [
    {},
    *(
      pytest.param(one, marks=pytest.mark.slow)
      for one in ({"weights": "int8"}, {"draft": "lookup"})
    ),
  ],
  ids=str,
)
def test_it_writes_the_likeliest_by_the_mean(members, options):
  models, folder = members
  whole, tokenizer = load_model(folder)
  options = {"sampling": Sampling(temperature=0), **options}
  (one,) = generate(whole, tokenizer, ["the quick"], max_tokens=8, **options)
  text = tokenizer.encode_prompt("the quick")
  assert len(one.tokens) == 8
  for token in one.tokens:
    logits_V = np.mean([model(np.array([text]))[0, -1] for model in models], 0)
    # In int8 the likeliest may be another one that is about as likely.
    assert logits_V[token] >= logits_V.max() - (0.2 if "weights" in options else 1e-4)
    text = [*text, token]


def test_classifiers_answer_together(tmp_path, tiny_config, random_params):
  config = tiny_config(
    vocab_size=VOCAB_SIZE,
    visibility="bidirectional",
    **{"label_head.num_labels": 3, "position.max_positions": 64},
  )
  params = [random_params(config, seed=seed) for seed in (0, 1)]
  labels = Labels("classification", ("a", "b", "c"))
  names = [save(tmp_path / str(i), config, one, labels) for i, one in enumerate(params)]
  put_together(names, tmp_path / "both", progress=False)
  whole, _ = load_model(tmp_path / "both")
  tokens_BT = np.array([tokens_of(TEXT[:20])])

  def scores(model):
    return model.label_logits(model.hidden(tokens_BT)[0])

  expected = np.mean([scores(merge(config, one)) for one in params], 0)
  np.testing.assert_allclose(scores(whole), expected, atol=1e-5)


def test_what_an_ensemble_cannot_do_is_said(members, tmp_path):
  _, folder = members
  whole, tokenizer = load_model(folder)
  with pytest.raises(UserError, match=r"is an ensemble of 2 models and no single one"):
    load_run(folder, plain=True)
  with pytest.raises(UserError, match=r"draft='layers:N' is not of a model .* of several"):
    Engine(whole, tokenizer, length=64, draft="layers:1")
  with pytest.raises(UserError, match="is no single model: it has adapters"):
    put_together([folder, folder], tmp_path / "four", progress=False)
  with pytest.raises(UserError, match="needs at least 2 models"):
    put_together([folder], tmp_path / "one", progress=False)
