import pytest

from gptjax.inference.lengths import round_up


@pytest.mark.parametrize("length", [1, 31, 32, 33, 255, 256, 1000, 5000])
def test_lengths_are_few_and_little_longer(length):
  rounded = round_up(length, 32)
  assert rounded % 32 == 0
  assert length <= rounded < max(length + 32, 1.25 * length + 1)
  assert round_up(rounded, 32) == rounded


def test_the_most_is_never_exceeded():
  assert round_up(100, 32, 110) == 110
  assert len({round_up(length, 32) for length in range(1, 8193)}) < 60
