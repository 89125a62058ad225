import numpy as np
import pytest

from gptjax.data.cache import TokenCache
from gptjax.data.packing import Windows, pack
from gptjax.errors import UserError

END = 99


def cache_of(*lengths):
  """Returns a cache of documents of END and tokens that tell their place, from 101 on."""
  tokens, boundaries = [], []
  for length in lengths:
    boundaries.append(len(tokens))
    tokens += [END, *range(101 + len(tokens), 101 + len(tokens) + length)]
  return TokenCache(np.array([*tokens, END], np.uint16), np.array(boundaries), 0, 0)


@pytest.mark.parametrize("sequence_length", [1, 3, 4, 7, 100])
@pytest.mark.parametrize("lengths", [(5,), (3, 1, 4), (1, 1, 1, 20)])
def test_every_token_is_predicted_exactly_once(lengths, sequence_length):
  cache = cache_of(*lengths)
  windows = Windows(cache, sequence_length, drop_remainder=False)
  rows = [pack(window, sequence_length, END) for window in windows]
  counted = np.concatenate([row.weights for row in rows]) > 0
  targets = np.concatenate([row.targets for row in rows])[counted]
  inputs = np.concatenate([row.inputs for row in rows])[counted]
  np.testing.assert_array_equal(targets, cache.tokens[1:])
  np.testing.assert_array_equal(inputs, cache.tokens[:-1])
  assert {len(row.inputs) for row in rows} == {sequence_length}


def test_training_drops_the_remainder():
  cache = cache_of(9)  # 11 tokens: 10 to predict.
  assert len(Windows(cache, 4, drop_remainder=True)) == 2
  assert len(Windows(cache, 4, drop_remainder=False)) == 3
  assert len(Windows(cache, 5, drop_remainder=True)) == 2
  assert len(Windows(cache, 5, drop_remainder=False)) == 2


def test_segments_and_positions_at_document_boundaries():
  windows = Windows(cache_of(3, 2, 4), 6, drop_remainder=False)
  first, second = (pack(window, 6, END) for window in windows)
  assert first.inputs.tolist() == [END, 101, 102, 103, END, 105]
  assert first.segment_ids.tolist() == [1, 1, 1, 1, 2, 2]
  assert first.positions.tolist() == [0, 1, 2, 3, 0, 1]
  assert first.targets[3] == END  # The end of a document is learnt.
  assert first.weights.tolist() == [1] * 6
  # The second row begins amid a document, whose segment and positions start anew.
  assert second.inputs.tolist() == [106, END, 108, 109, 110, 111]
  assert second.segment_ids.tolist() == [1, 2, 2, 2, 2, 2]
  assert second.positions.tolist() == [0, 0, 1, 2, 3, 4]
  assert second.targets[-1] == END


def test_padding_counts_for_nothing():
  row = pack(np.array([END, 1, 2], np.int32), 5, END)
  assert row.weights.tolist() == [1, 1, 0, 0, 0]
  assert row.segment_ids.tolist() == [1, 1, 0, 0, 0]
  dtypes = {name: values.dtype for name, values in vars(row).items() if values is not None}
  assert dtypes.pop("weights") == np.float32
  assert set(dtypes.values()) == {np.dtype(np.int32)}


def test_a_corpus_shorter_than_a_row_says_what_would_fit():
  with pytest.raises(
    UserError, match=r"only 6 tokens to predict\. Set --config\.sequence_length=6"
  ):
    Windows(cache_of(5), 7, drop_remainder=True)
  assert len(Windows(cache_of(5), 6, drop_remainder=True)) == 1
