import itertools
import math

import jax
import numpy as np
import pytest
from flax import nnx

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.errors import UserError
from gptjax.evals.score import score
from gptjax.inference import beam as beam_lib
from gptjax.inference.beam import beam_search
from gptjax.inference.generate import generate
from gptjax.inference.reader import Reader
from gptjax.inference.sampling import Sampling
from gptjax.interop import huggingface
from gptjax.model.gpt import model_graph

BYTES = tokenizer_lib.load("bytes")


class Letters:
  """A tokenizer of a few tokens, a letter each, the last of which end a text."""

  def __init__(self, vocab_size, ends=1):
    self.vocab_size, self.end_of_text = vocab_size, vocab_size - 1
    self.stops = frozenset(range(vocab_size - ends, vocab_size))

  def decode(self, tokens):
    return self.decode_bytes(tokens).decode()

  def decode_bytes(self, tokens):
    return bytes(65 + token for token in tokens)

  def trim(self, text):
    return text


def make_model(tiny_config, random_params, **changes):
  config = tiny_config(**{"position.max_positions": 96, "head.tied": False} | changes)
  return nnx.merge(model_graph(config), random_params(config, seed=5))


@pytest.fixture(scope="module")
def few_model(tiny_config, random_params):
  return make_model(tiny_config, random_params, vocab_size=5, num_layers=1)


@pytest.fixture(scope="module")
def model(tiny_config, random_params):
  kind = {"position.kind": "rope", "norm.kind": "rmsnorm", "bias": False}
  return make_model(tiny_config, random_params, vocab_size=264, **kind)


def enumerate_all(model, prompt, length, penalty):
  """Each completion of at most `length` tokens, with its log-likelihood and score, best first."""
  texts = list(itertools.product(range(5), repeat=length))
  logits = model(np.array([[*prompt, *text] for text in texts]))
  scores = np.asarray(jax.nn.log_softmax(logits[:, len(prompt) - 1 : -1]), np.float64)
  found = {}
  for text, log_probs in zip(texts, scores, strict=True):
    size = text.index(4) + 1 if 4 in text else length
    found[text[:size]] = log_probs[np.arange(size), text[:size]].sum()
  ranked = [(total / len(text) ** penalty, total, text) for text, total in found.items()]
  return sorted(ranked, reverse=True)


@pytest.mark.parametrize(
  "penalty", [1.0, *(pytest.param(one, marks=pytest.mark.slow) for one in (0.0, 2.0, -0.5))]
)
def test_with_enough_beams_all_completions_are_found_in_order(few_model, penalty):
  prompt = [0, 3, 1]
  expected = enumerate_all(few_model, prompt, 3, penalty)
  (found,) = beam_search(
    few_model, Letters(5), [prompt], beams=5**3, length_penalty=penalty, max_tokens=3
  )
  assert len(found) == len(expected) == 1 + 4 + 16 + 64
  np.testing.assert_allclose([one.score for one in found], [s for s, *_ in expected], atol=1e-4)
  np.testing.assert_allclose(
    [h.log_likelihood for h in found], [t for _, t, _ in expected], atol=1e-4
  )
  for one, (_, _, text) in zip(found[:9], expected, strict=False):
    assert one.tokens == list(text[:-1] if text[-1] == 4 else text)
    assert one.finish_reason == ("stop" if text[-1] == 4 else "length")


# --- Beside transformers -------------------------------------------------------------------------

LENGTH = 24


@pytest.fixture(scope="module")
def reference():
  """(torch, transformers), which take seconds to import."""
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  return torch, transformers


@pytest.fixture(scope="module")
def gpt2(reference, tiny_config, random_params, tmp_path_factory):
  """A tiny GPT-2, here and in `transformers`, sixteen of whose tokens end a text."""
  _, transformers = reference
  config = tiny_config(vocab_size=50, **{"position.max_positions": 96})
  params = random_params(config, seed=5)
  folder = tmp_path_factory.mktemp("gpt2")
  huggingface.save(folder, config, params, huggingface.find_family(config), "float32", {})
  theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
  return nnx.merge(model_graph(config), params), theirs


@pytest.mark.slow
@pytest.mark.parametrize("beams", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
  "penalty", [1.0, *(pytest.param(penalty, marks=pytest.mark.slow) for penalty in (0.0, 2.0, -1.0))]
)
def test_completions_and_scores_are_those_of_transformers(reference, gpt2, beams, penalty):
  torch, _ = reference
  model, theirs = gpt2
  prompts = np.random.default_rng(0).integers(0, 34, (4, 20)).tolist()
  expected = theirs.generate(
    torch.tensor(prompts), attention_mask=torch.ones(4, 20, dtype=torch.long),
    num_beams=beams, num_return_sequences=beams, length_penalty=penalty, do_sample=False,
    max_new_tokens=LENGTH, eos_token_id=list(range(34, 50)), pad_token_id=49,
    return_dict_in_generate=True, output_scores=True,
  )  # fmt: skip
  found = beam_search(
    model, Letters(50, ends=16), prompts, beams=beams, length_penalty=penalty, max_tokens=LENGTH
  )
  texts = [text[20:] for text in expected.sequences.tolist()]
  ours = [one for ones in found for one in ones]
  assert [one.tokens for one in ours] == [[t for t in text if t < 34] for text in texts]
  scores = [one.score for one in ours]
  np.testing.assert_allclose(scores, expected.sequences_scores.numpy(), rtol=1e-4)
  # Long ones are so much favoured at last that none ends early.
  assert penalty > 1 or len({len(one.tokens) for one in ours}) > 1


# --- Here ----------------------------------------------------------------------------------------


def test_one_beam_takes_the_likeliest_token_each_time(model):
  prompts = ["one two one two", "abc"]
  greedy = generate(model, BYTES, prompts, max_tokens=40, sampling=Sampling(temperature=0))
  found = beam_search(model, BYTES, prompts, beams=1, max_tokens=40)
  assert [(one.completion, one.tokens, one.finish_reason) for (one,) in found] == [
    (one.completion, one.tokens, one.finish_reason) for one in greedy
  ]


@pytest.mark.slow
def test_prompts_change_no_other_and_scores_are_of_their_texts(model, monkeypatch):
  readers = []

  class Noted(Reader):
    def __init__(self, *arguments, **options):
      super().__init__(*arguments, **options)
      readers.append(self)

  monkeypatch.setattr(beam_lib, "Reader", Noted)
  prompts = ["a long prompt of more than a page, and more", "abc", "one two one two"]
  options = {"beams": 3, "max_tokens": 24}
  alone = [beam_search(model, BYTES, [prompt], **options)[0] for prompt in prompts]
  assert beam_search(model, BYTES, prompts, rows=6, **options) == alone
  assert [reader.pages.used for reader in readers] == [0] * 4
  hypotheses = [(prompt, one) for prompt, ones in zip(prompts, alone, strict=True) for one in ones]
  assert {one.finish_reason for _, one in hypotheses} == {"length"}
  # Keys and values of another beam would give other scores.
  scored = score(model, [(BYTES.encode_prompt(prompt), one.tokens) for prompt, one in hypotheses])
  expected = [one.log_likelihood for one in scored]
  found = [one.log_likelihood for _, one in hypotheses]
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  np.testing.assert_allclose([24 * one.score for _, one in hypotheses], found, rtol=1e-6)


def test_a_stop_string_ends_a_completion(few_model):
  options = {"beams": 4, "max_tokens": 5}
  (free,) = beam_search(few_model, Letters(5), [[0, 3]], **options)
  stop = free[0].completion[:2]
  (found,) = beam_search(few_model, Letters(5), [[0, 3]], stop=[stop], **options)
  assert all(stop not in one.completion for one in found)
  stopped = [one for one in found if one.finish_reason == "stop"]
  assert "" in {one.completion for one in stopped}


@pytest.mark.slow
def test_a_translation_is_searched_behind_its_encoder(tiny_config, random_params):
  config = tiny_config(
    vocab_size=264, **{"encoder_layers": 1, "position.kind": "t5", "decoder_start": 7}
  )
  model = nnx.merge(model_graph(config), random_params(config, seed=5))
  options = {"beams": 3, "max_tokens": 20}
  texts = ["A first text.", "Another, which is longer than that."]
  alone = [beam_search(model, BYTES, [text], **options)[0] for text in texts]
  assert beam_search(model, BYTES, texts, rows=6, **options) == alone
  greedy = generate(model, BYTES, texts, max_tokens=20, sampling=Sampling(temperature=0))
  found = beam_search(model, BYTES, texts, beams=1, max_tokens=20)
  assert [one.tokens for (one,) in found] == [one.tokens for one in greedy]


def test_what_cannot_be_searched_is_refused(few_model):
  with pytest.raises(UserError, match="beams"):
    beam_search(few_model, Letters(5), [[0]], beams=0)
  with pytest.raises(UserError, match="length_penalty"):
    beam_search(few_model, Letters(5), [[0]], beams=2, length_penalty=math.inf)
  with pytest.raises(UserError, match="exceed the model's 96 learned positions"):
    beam_search(few_model, Letters(5), [[0]], beams=2, max_tokens=200)
