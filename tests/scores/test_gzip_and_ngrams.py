import gzip
import random

import numpy as np
import pytest

from gptjax.scores import baselines as compression
from gptjax.scores.baselines import gzip_bits_per_byte, ngram_bits_per_byte

TEXT = "the cat sat on the mat. the dog sat on the log. 世界\n" * 5


def test_gzip_is_gzip_of_the_documents_one_after_another():
  documents = ["Müller ", TEXT, "end"]
  text = "".join(documents).encode()
  assert gzip_bits_per_byte(iter(documents)) == 8 * len(gzip.compress(text, 9)) / len(text)


@pytest.fixture
def as_bytes(monkeypatch):
  """Lets documents be bytes, of which not all are text."""
  monkeypatch.setattr(
    compression, "_as_bytes", lambda documents: np.frombuffer(b"".join(documents), np.uint8)
  )


@pytest.mark.parametrize("order", [1, 2, 5, 7])
@pytest.mark.parametrize("context", [b"the cat", b"on the ", b"\xff\x00zzzzz", b"e catxx"])
@pytest.mark.usefixtures("as_bytes")
def test_the_probabilities_of_all_bytes_sum_to_one(order, context):
  def bits(text):
    return ngram_bits_per_byte([TEXT.encode()], [text], order) * len(text)

  before = bits(context)
  total = sum(2 ** (before - bits(context + bytes([byte]))) for byte in range(256))
  assert total == pytest.approx(1, abs=1e-6)


def test_what_repeats_costs_nothing():
  assert ngram_bits_per_byte(["abcdefgh" * 500], ["abcdefgh" * 500]) < 0.02


@pytest.mark.usefixtures("as_bytes")
@pytest.mark.parametrize(("order", "regret"), [(1, 0.01), (5, 0.5)])
def test_random_bytes_cost_8_bits(order, regret):
  rng = random.Random(0)
  training, validation = rng.randbytes(100_000), rng.randbytes(20_000)
  assert 8 <= ngram_bits_per_byte([training], [validation], order) < 8 + regret


@pytest.mark.parametrize("order", [1, 2, 5])
def test_what_was_never_seen_is_unlikely_but_not_impossible(order):
  # Nothing in this text is counted just once.
  bits = ngram_bits_per_byte(["ab" * 100], ["aXbYab"], order)
  assert 8 / 6 < bits < 20


def test_a_longer_context_helps_where_there_is_structure():
  words = random.Random(0).choices(["alpha ", "beta ", "gamma ", "delta "], k=4000)
  training, validation = words[:3000], words[3000:]
  by_order = [ngram_bits_per_byte(training, validation, order) for order in (1, 2, 5)]
  assert by_order[0] > by_order[1] > by_order[2]
  # Nothing beats the entropy of the choice: 2 bits a word.
  assert by_order[2] > 2 / (sum(map(len, validation)) / 1000)


def test_validation_text_is_not_trained_on():
  assert 8 < ngram_bits_per_byte(["a" * 1000], ["b" * 1000]) < 50


@pytest.mark.parametrize("order", [0, 8])
def test_an_order_that_does_not_fit_is_refused(order):
  with pytest.raises(ValueError, match="order"):
    ngram_bits_per_byte(["a"], ["a"], order)
