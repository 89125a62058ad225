"""Shapes of batches: few distinct ones are few compilations, small ones little work."""


def round_up(length: int, multiple: int, most: int | None = None) -> int:
  """Rounds up to a multiple, of long ones to an eighth to a quarter more, and to `most` at most."""
  multiple = max(multiple, (1 << length.bit_length()) >> 3)
  rounded = -(-length // multiple) * multiple
  return rounded if most is None else min(rounded, most)


def rows_of_batch(count: int, most: int) -> int:
  """How many of `count` rows each batch has, if there are as few batches as `most` rows allow: no
  batch, of one shape, is then filled up by more rows than there are batches."""
  batches = max(-(-count // most), 1)
  return max(-(-count // batches), 1)
