import itertools

import numpy as np
import pytest

from gptjax.data import tokenizer as tokenizers
from gptjax.data.denoising import (
  MaskedLanguageModel,
  PrefixLanguageModel,
  SpanCorruption,
  span_corruption_lengths,
)
from gptjax.data.packing import pack
from gptjax.data.words import word_ids
from gptjax.errors import UserError
from tests.data.conftest import DOCUMENTS

PLAIN = tokenizers.load("bytes")
MASK = tokenizers.load("bytes+mask")
SENTINELS = tokenizers.load("bytes+sentinels")
END = PLAIN.end_of_text


def window_of(length, documents=DOCUMENTS):
  stream = [token for text in documents for token in (END, *PLAIN.encode(text))]
  return np.array(stream[: length + 1], np.int32)


def assert_dtypes(row):
  for name, values in vars(row).items():
    assert values is None or values.dtype == ("float32" if name == "weights" else "int32"), name


class TestPrefixLanguageModel:
  make_row = PrefixLanguageModel(64, END)
  window = window_of(50, ["a first document", "a second one", "x"])

  def test_what_counts_begins_with_the_prefix_last_token(self):
    plain = pack(self.window, 64, END)
    for seed in range(20):
      row = self.make_row(self.window, np.random.default_rng(seed))
      assert_dtypes(row)
      for name in ("inputs", "targets", "segment_ids", "positions"):
        np.testing.assert_array_equal(getattr(row, name), getattr(plain, name))
      for segment in range(1, row.segment_ids.max() + 1):
        here = row.segment_ids == segment
        prefix, weights = row.prefix[here], row.weights[here]
        assert (np.diff(prefix) <= 0).all()
        cut = prefix.sum()
        assert cut >= 1
        assert weights.tolist() == [0] * (cut - 1) + [1] * (len(weights) - cut + 1)
      assert not row.prefix[row.segment_ids == 0].any()
      assert not row.weights[row.segment_ids == 0].any()

  def test_every_cut_is_as_likely(self):
    rng = np.random.default_rng(0)
    first = pack(self.window, 64, END).segment_ids == 1
    cuts = [self.make_row(self.window, rng).prefix[first].sum() for _ in range(3400)]
    counts = np.bincount(cuts, minlength=first.sum() + 1)
    assert counts[0] == 0
    assert counts[1:] == pytest.approx(200, abs=60)


class TestMaskedLanguageModel:
  def test_the_original_is_the_target_and_only_chosen_tokens_differ(self):
    window = window_of(512)
    for seed, whole_words in itertools.product(range(5), (False, True)):
      make_row = MaskedLanguageModel(MASK, 512, 0.15, whole_words)
      row = make_row(window, np.random.default_rng(seed))
      assert_dtypes(row)
      np.testing.assert_array_equal(row.targets, window[:-1])
      chosen = row.weights > 0
      np.testing.assert_array_equal(row.inputs[~chosen], window[:-1][~chosen])
      assert chosen.sum() == round(0.15 * (window[:-1] != END).sum())
      assert not (row.targets[chosen] == END).any()
      np.testing.assert_array_equal(row.segment_ids, pack(window, 512, END).segment_ids)

  def test_eight_in_ten_are_masked_one_is_random_and_one_is_kept(self):
    make_row = MaskedLanguageModel(MASK, 512, 0.4, False)
    rows = [make_row(window_of(512), np.random.default_rng(seed)) for seed in range(60)]
    chosen = np.concatenate([row.weights for row in rows]) > 0
    inputs = np.concatenate([row.inputs for row in rows])[chosen]
    targets = np.concatenate([row.targets for row in rows])[chosen]
    assert (inputs == MASK.mask).mean() == pytest.approx(0.8, abs=0.015)
    assert (inputs == targets).mean() == pytest.approx(0.1, abs=0.015)
    replaced = inputs[(inputs != MASK.mask) & (inputs != targets)]
    assert replaced.max() < 256  # Never a special token.
    assert len(np.unique(replaced)) > 200

  def test_words_are_chosen_whole(self):
    window = window_of(256, DOCUMENTS[3:5])
    ids = word_ids(window[:-1], MASK)
    make_row = MaskedLanguageModel(MASK, 256, 0.15, True)
    for seed in range(20):
      chosen = make_row(window, np.random.default_rng(seed)).weights > 0
      assert not set(ids[chosen]) & set(ids[~chosen])

  def test_every_token_is_as_likely(self):
    window = window_of(64, ["0123456789" * 10])
    make_row = MaskedLanguageModel(MASK, 64, 0.25, False)
    rows = [make_row(window, np.random.default_rng(seed)).weights for seed in range(1000)]
    assert np.mean(rows, axis=0)[1:] == pytest.approx(0.25, abs=0.07)

  def test_padding_and_separators_are_never_chosen(self):
    make_row = MaskedLanguageModel(MASK, 16, 0.9, False)
    row = make_row(np.array([END, 65, 66, END, 67, END]), np.random.default_rng(0))
    assert row.weights[[0, 3]].tolist() == [0, 0]
    assert row.weights.sum() == 3
    assert row.segment_ids.tolist() == [1, 1, 1, 2, 2] + [0] * 11
    assert not row.weights[5:].any()

  def test_a_tokenizer_without_a_mask_is_refused(self):
    with pytest.raises(UserError, match=r"'bytes' has no mask.*objective='masked'.*bytes\+mask"):
      MaskedLanguageModel(PLAIN, 8, 0.15, True)


def restore(row):
  """Puts the decoder's spans back into the encoder's row."""
  targets = row.targets[row.weights > 0].tolist()
  at = [targets.index(token) for token in SENTINELS.sentinels if token in targets]
  spans = {targets[a]: targets[a + 1 : b] for a, b in itertools.pairwise(at)}
  tokens = []
  for token in row.encoder_inputs[row.encoder_segment_ids > 0].tolist():
    tokens += spans.pop(token) if token in spans else [token]
  assert not spans
  return tokens


class TestSpanCorruption:
  def test_spans_put_back_give_the_window(self):
    make_row = SpanCorruption(SENTINELS, 128, 0.15, 3.0, decoder_start=7)
    window = window_of(make_row.window_length, DOCUMENTS[:1])
    for seed in range(20):
      row = make_row(window, np.random.default_rng(seed))
      assert_dtypes(row)
      assert restore(row) == window[:-1].tolist()
      # Nothing is padded, and the decoder reads what it wrote.
      assert row.encoder_inputs.shape == (128,)
      assert row.targets.shape == (make_row.target_length,)
      assert row.weights.all()
      assert row.encoder_segment_ids.all()
      assert row.inputs[0] == 7
      np.testing.assert_array_equal(row.inputs[1:], row.targets[:-1])
      assert row.targets[0] == SENTINELS.sentinels[0]
      assert row.positions[-1] + 1 == make_row.target_length

  def test_sentinels_are_in_order_and_apart(self):
    make_row = SpanCorruption(SENTINELS, 64, 0.5, 2.0, 0)
    row = make_row(window_of(make_row.window_length), np.random.default_rng(0))
    places = np.flatnonzero(np.isin(row.encoder_inputs, SENTINELS.sentinels))
    used = row.encoder_inputs[places].tolist()
    assert used == list(SENTINELS.sentinels[: len(used)])
    assert (np.diff(places) > 1).all()
    assert row.targets[-1] == SENTINELS.sentinels[len(used)]

  def test_a_separator_is_never_corrupted(self):
    make_row = SpanCorruption(SENTINELS, 64, 0.3, 3.0, 0)
    window = window_of(make_row.window_length, ["abc", "de", "f"] * 40)
    for seed in range(20):
      row = make_row(window, np.random.default_rng(seed))
      assert END not in row.targets
      assert (row.encoder_inputs == END).sum() == (window[:-1] == END).sum()
      assert [t for t in restore(row) if t != END] == [t for t in window[:-1] if t != END]
      assert (row.weights.sum(), row.encoder_segment_ids.sum()) == (make_row.target_length, 64)

  def test_every_token_is_as_likely_but_for_the_ends(self):
    make_row = SpanCorruption(SENTINELS, 48, 0.2, 2.0, 0)
    window = np.arange(make_row.window_length + 1, dtype=np.int32)
    corrupted = np.zeros(len(window))
    for seed in range(1500):
      targets = make_row(window, np.random.default_rng(seed)).targets
      corrupted[targets[targets < 256]] += 1
    inner = corrupted[5 : make_row.window_length - 5] / 1500
    assert inner == pytest.approx(0.2, abs=0.07)

  def test_what_cannot_be_corrupted_leaves_the_rows_shorter(self):
    make_row = SpanCorruption(SENTINELS, 16, 0.9, 1.0, 0)
    window = window_of(make_row.window_length, ["a"] * 40)
    row = make_row(window, np.random.default_rng(0))
    corrupted = row.weights.sum() - 1 - np.isin(row.encoder_inputs, SENTINELS.sentinels).sum()
    assert corrupted == (window[:-1] != END).sum()
    assert row.targets.shape == (make_row.target_length,)

  @pytest.mark.parametrize("length", [1, 2, 3, 10])
  def test_a_short_window_is_padded(self, length):
    make_row = SpanCorruption(SENTINELS, 32, 0.15, 3.0, 0)
    window = np.arange(65, 65 + length + 1, dtype=np.int32)
    row = make_row(window, np.random.default_rng(0))
    assert restore(row) == window[:-1].tolist()
    assert row.encoder_segment_ids.sum() <= length
    assert row.weights[row.segment_ids == 0].sum() == 0

  @pytest.mark.parametrize(("mask_rate", "mean_span"), [(0.15, 3), (0.5, 3), (0.15, 1), (0.9, 32)])
  @pytest.mark.parametrize("sequence_length", [16, 127, 256])
  def test_rows_are_full_and_the_rates_are_as_asked(self, mask_rate, mean_span, sequence_length):
    make_row = SpanCorruption(SENTINELS, sequence_length, mask_rate, mean_span, 0)
    window = window_of(make_row.window_length, ["a" * 5000])
    row = make_row(window, np.random.default_rng(0))
    assert row.encoder_segment_ids.all()
    assert row.weights.all()
    spans = np.isin(row.encoder_inputs, SENTINELS.sentinels).sum()
    noise = make_row.target_length - 1 - spans
    assert noise == pytest.approx(make_row.window_length * mask_rate, abs=0.5)
    assert spans == pytest.approx(max(1, noise / mean_span), abs=0.5)

  def test_the_lengths_of_the_paper(self):
    # 512 and 114 tokens with an end of text each; the decoder's final sentinel takes its place.
    assert span_corruption_lengths(511, 0.15, 3.0) == (568, 114)

  def test_too_few_sentinels_are_refused(self):
    with pytest.raises(UserError, match=r"'bytes' has 0 sentinels.*needs 2 for sequence_length=8"):
      SpanCorruption(PLAIN, 8, 0.15, 3.0, 0)
    assert SpanCorruption(SENTINELS, 198, 0.5, 1.0, 0).target_length == 199
    with pytest.raises(UserError, match=r"has 100 sentinels, but .* needs 101 for .*length=200\."):
      SpanCorruption(SENTINELS, 200, 0.5, 1.0, 0)
