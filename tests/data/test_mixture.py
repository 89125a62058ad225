import collections

import numpy as np
import pytest

from gptjax.data import mixture
from gptjax.data.cache import TokenCache
from gptjax.data.packing import Windows, pack


def windows(name, rows):
  """Returns rows that tell their part by the hundreds and their index by the rest."""
  tokens = np.repeat(100 * name + np.arange(rows), 4)
  return Windows(TokenCache(np.append(tokens, 0), np.zeros(1), 0, 0), 4, drop_remainder=True)


def training_rows(parts, weights, seed=0):
  def make_row(window, rng):
    return pack(window, sequence_length=4, end_of_text=9999)

  return mixture.training_rows(parts, weights, seed=seed, make_row=make_row)


def values(rows, indices):
  return [int(rows[index].inputs[0]) for index in indices]


def test_proportions_hold_everywhere_in_the_run():
  parts = {"a": windows(1, 10), "b": windows(2, 50)}
  rows = training_rows(parts, {"a": 0.3, "b": 0.7})
  for start in (0, 1000, 123456):
    counts = collections.Counter(value // 100 for value in values(rows, range(start, start + 200)))
    assert counts[1] / 200 == pytest.approx(0.3, abs=0.01)


def test_each_part_sees_every_row_once_an_epoch_in_a_new_order():
  rows = training_rows({"a": windows(1, 10), "b": windows(2, 50)}, {"a": 1, "b": 1})
  a = [value for value in values(rows, range(200)) if value < 200]
  epochs = [a[start : start + 10] for start in range(0, 100, 10)]
  assert all(sorted(epoch) == list(range(100, 110)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 10


def test_rows_depend_on_the_index_alone():
  parts = {"a": windows(1, 10), "b": windows(2, 50)}
  rows = training_rows(parts, {"a": 1, "b": 2})
  forward = values(rows, range(300))
  assert values(training_rows(parts, {"a": 1, "b": 2}), reversed(range(300))) == forward[::-1]
  assert values(training_rows(parts, {"a": 1, "b": 2}, seed=1), range(300)) != forward


def test_seeds_do_not_share_epochs():
  # Grain's shuffle adds the epoch to the seed: seeds 0 and 1 must not follow each other's orders.
  parts = {"a": windows(1, 30)}
  zero = values(training_rows(parts, {"a": 1}, seed=0), range(30, 60))
  one = values(training_rows(parts, {"a": 1}, seed=1), range(30))
  assert zero != one


def test_equal_parts_are_shuffled_apart():
  rows = training_rows({"a": windows(1, 30), "b": windows(2, 30)}, {"a": 1, "b": 1})
  seen = values(rows, range(60))
  first, second = ([v % 100 for v in seen if v // 100 == part] for part in (1, 2))
  assert sorted(first) == sorted(second)
  assert first != second


def test_parts_epochs_and_seeds_draw_apart():
  def drawn(seed):
    rows = mixture.training_rows(
      {"a": windows(1, 5), "b": windows(2, 5)},
      {"a": 1, "b": 1},
      seed=seed,
      make_row=lambda window, rng: float(rng.random()),
    )
    return [rows[index] for index in range(20)]

  assert drawn(0) == drawn(0)
  assert len({*drawn(0), *drawn(1)}) == 40
