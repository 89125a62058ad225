"""Lengths of rows: few distinct ones are few compilations."""


def round_up(length: int, multiple: int, most: int | None = None) -> int:
  """Rounds up to a multiple, of long ones to an eighth to a quarter more, and to `most` at most."""
  multiple = max(multiple, (1 << length.bit_length()) >> 3)
  rounded = -(-length // multiple) * multiple
  return rounded if most is None else min(rounded, most)
