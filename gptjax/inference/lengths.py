"""Shapes of batches: few, to compile rarely, and small, to waste little work."""


def round_up(length: int, multiple: int, most: int | None = None) -> int:
  """Rounds up to a multiple, large lengths by up to a quarter, but not beyond `most`."""
  multiple = max(multiple, (1 << length.bit_length()) >> 3)
  rounded = -(-length // multiple) * multiple
  return rounded if most is None else min(rounded, most)


def rows_of_batch(count: int, most: int) -> int:
  """Rows per batch if `count` rows are spread over the fewest batches of at most `most` rows; the
  padding is then less than a row per batch."""
  batches = max(-(-count // most), 1)
  return max(-(-count // batches), 1)
