"""The loops of `kernels`, compiled by numba; a kind of each is a handler of XLA's.

Axes as in `kernels`; R rows and C columns of a tile of dot products.
"""

import numba
import numpy as np

from gptjax.cpu import vectors
from gptjax.cpu.handlers import (
  allocate,
  argument,
  argument_size,
  attribute,
  compiled,
  free,
  register,
  result,
  word_function,
)
from gptjax.cpu.vectors import LANES, SIZES, get, put

# Products below which threads do not share a job: they would be done before a second one is awake.
SMALL = 2**17
# Rows of x in a part of a product; columns of weights, or bytes if there are few rows.
PART_ROWS = 64
PART_BYTES, PART_COLUMNS = 2**17, 48
# Rows of x that share a look at a weight, at most, and numbers of a block of long ones.
ROWS, BLOCK = 8, 1024
# How far ahead weights are asked for.
AHEAD = 4096
# Columns of a tile, by its rows; 0 is for many rows, where arithmetic takes longer than memory.
COLUMNS = {1: 2, 4: 4, 8: 2, 0: 3}
# Queries that share a look at a key.
QUERIES = 4


@compiled(numba.types.Array(numba.float32, 1, "C")(numba.int64, numba.int64))
def floats(address, count):
  """So many float32 at an address, as an array."""
  return numba.carray(vectors.pointer(address, numba.float32), count)


@word_function(2)
def get_int32(address, i):
  return numba.carray(vectors.pointer(address, numba.int32), i + 1)[i]


def product(name, kind, R):
  """Compiles `kernels.product` for weights of a kind and R rows at most; 0 is any number."""
  X, W, SCALES, Y, M, D, F, WIDTH, ROW_PARTS = range(9)
  many, C, size = R == 0, COLUMNS[R], SIZES[kind]
  R = R or ROWS
  dots, (add, finish) = vectors.dots(kind, R, C, AHEAD), vectors.partial_dots(kind, R, C)

  @word_function(2)
  def begin(frame, job):
    m, d, f = argument_size(frame, 0, 0), argument_size(frame, 0, 1), argument_size(frame, 1, 0)
    put(job, X, argument(frame, 0))
    put(job, W, argument(frame, 1))
    put(job, SCALES, argument(frame, 2) if argument_size(frame, 2, 0) else 0)
    put(job, Y, result(frame, 0))
    put(job, M, m)
    put(job, D, d)
    put(job, F, f)
    width = PART_BYTES // max(1, d * size) if not many else PART_COLUMNS
    width = max(C, min(width, f // 16) // C * C)
    put(job, WIDTH, width)
    put(job, ROW_PARTS, (m + PART_ROWS - 1) // PART_ROWS)
    parts = (f + width - 1) // width * get(job, ROW_PARTS)
    return parts if m * d * f >= SMALL else -parts

  @word_function(2)
  def part(job, i):
    d, f, row_parts = get(job, D), get(job, F), get(job, ROW_PARTS)
    first_row, first = i % row_parts * PART_ROWS, i // row_parts * get(job, WIDTH)
    last_row, last = min(first_row + PART_ROWS, get(job, M)), min(first + get(job, WIDTH), f)
    x_step, w_step, y_step = 4 * d, size * d, 4 * f
    w_first = get(job, W) + first * w_step
    # Long rows of many are done in blocks that stay in the nearest cache.
    blocks = d // BLOCK if many and d >= 2 * BLOCK else 0
    size_of_sums = (last - first + C) * R * LANES if blocks else 0
    partial = allocate(4 * size_of_sums)
    for row in range(first_row, last_row, R):
      rows = min(R, last_row - row)
      x, y = get(job, X) + row * x_step, get(job, Y) + row * y_step
      floats(partial, size_of_sums)[:] = 0
      for block in range(blocks):
        count = BLOCK if block < blocks - 1 else (d - block * BLOCK) // LANES * LANES
        for f0 in range(0, last - first, C):
          w = w_first + f0 * w_step + block * BLOCK * size
          sums = partial + f0 * 4 * R * LANES
          add(
            x + 4 * block * BLOCK, x_step, rows, w, w_step, min(C, last - first - f0), count, sums
          )
      for f0 in range(0, last - first, C):
        w, out = w_first + f0 * w_step, y + 4 * (first + f0)
        columns = min(C, last - first - f0)
        if blocks:
          whole = d // LANES * LANES
          sums = partial + f0 * 4 * R * LANES
          finish(
            x + 4 * whole, x_step, rows, w + size * whole, w_step, columns, d - whole, sums, out,
            y_step,
          )  # fmt: skip
        else:
          dots(x, x_step, rows, w, w_step, columns, d, out, y_step)
      if get(job, SCALES):
        scales, out = floats(get(job, SCALES), f), floats(y, rows * f)
        for r in range(rows):
          for column in range(first, last):
            out[r * f + column] *= scales[column]
    free(partial)
    return 0

  return register(name, begin, part)


def grouped_product(name, kind, R, group, has_zeros):
  """Compiles `kernels.grouped_product` for weights of a kind and R rows at most; 0 is any."""
  X, W, SCALES, ZEROS, Y, M, D, F, G, ROW, WIDTH, ROW_PARTS = range(12)
  C = COLUMNS[R]
  R = R or ROWS
  dots = vectors.grouped_dots(kind, R, C, group, has_zeros, AHEAD)

  @word_function(2)
  def begin(frame, job):
    m, d, f = argument_size(frame, 0, 0), argument_size(frame, 0, 1), argument_size(frame, 1, 0)
    row = argument_size(frame, 1, 1)
    for word, i in ((X, 0), (W, 1), (SCALES, 2), (ZEROS, 3)):
      put(job, word, argument(frame, i))
    put(job, Y, result(frame, 0))
    put(job, M, m)
    put(job, D, d)
    put(job, F, f)
    put(job, G, argument_size(frame, 2, 1))
    put(job, ROW, row)
    width = PART_BYTES // max(1, row) if m <= ROWS else PART_COLUMNS
    width = max(C, min(width, f // 16) // C * C)
    put(job, WIDTH, width)
    put(job, ROW_PARTS, (m + PART_ROWS - 1) // PART_ROWS)
    parts = (f + width - 1) // width * get(job, ROW_PARTS)
    return parts if m * d * f >= SMALL else -parts

  @word_function(2)
  def part(job, i):
    d, f, groups, row_parts = get(job, D), get(job, F), get(job, G), get(job, ROW_PARTS)
    first_row, first = i % row_parts * PART_ROWS, i // row_parts * get(job, WIDTH)
    last_row, last = min(first_row + PART_ROWS, get(job, M)), min(first + get(job, WIDTH), f)
    x_step, w_step, y_step = 4 * d, get(job, ROW), 4 * f
    for row in range(first_row, last_row, R):
      rows = min(R, last_row - row)
      x, y = get(job, X) + row * x_step, get(job, Y) + row * y_step
      for column in range(first, last, C):
        columns = min(C, last - column)
        w, scales = get(job, W) + column * w_step, get(job, SCALES) + 4 * groups * column
        zeros, out = get(job, ZEROS) + groups * column, y + 4 * column
        dots(
          x, x_step, rows, w, w_step, columns, d, scales, 4 * groups, zeros, groups, out, y_step
        )  # fmt: skip
    return 0

  return register(name, begin, part)


def attention(name, kind):
  """Compiles `kernels.attend` for pools of a kind.

  A part is `QUERIES` queries of one key-value head of a row, whose heads come before its positions.
  """
  Q, KEYS, VALUES, TABLES, POSITIONS, SINKS, BIAS, PREFIX, OUT = range(9)
  T, N, K, H, P, Z, S, X = range(9, 17)
  SCALE, CAP, WINDOW, BLOCKS, KEY_SCALES, VALUE_SCALES = range(17, 23)
  size, R, C = SIZES[kind], QUERIES, COLUMNS[QUERIES]
  dots_of_all, sums_of_all = vectors.dots(kind, R, C), vectors.weighted_sum(kind, R)
  dots_of_one, sum_of_one = vectors.dots(kind, 1, C), vectors.weighted_sum(kind, 1)
  own_words = vectors.stack(2 * R)
  write = {"float32": _write_float32, "bfloat16": _write_bfloat16, "int8": _write_int8}[kind]
  is_scaled = kind == "int8"

  @word_function(3)
  def place_of(job, b, position):
    """Where a position of a row is, in places of the pool; -1 if the tables do not say."""
    page, i = get(job, Z), position // get(job, Z)
    number = get_int32(get(job, TABLES), b * get(job, S) + i) if i < get(job, S) else -1
    return number * page + position % page if 0 <= number < get(job, P) else -1

  @word_function(2)
  def begin(frame, job):
    for word, i in ((Q, 0), (TABLES, 5), (POSITIONS, 6)):
      put(job, word, argument(frame, i))
    for word, i in ((SINKS, 7), (BIAS, 8), (PREFIX, 9)):
      put(job, word, argument(frame, i) if argument_size(frame, i, 0) else 0)
    for word, i in ((OUT, 0), (KEYS, 1), (VALUES, 2)):
      put(job, word, result(frame, i))
    for word, i in ((T, 1), (N, 2), (H, 3)):
      put(job, word, argument_size(frame, 0, i))
    for word, i in ((P, 0), (Z, 1), (K, 2)):
      put(job, word, argument_size(frame, 3, i))
    put(job, S, argument_size(frame, 5, 1))
    put(job, X, argument_size(frame, 8, 1))
    if is_scaled:
      put(job, KEY_SCALES, result(frame, 3))
      put(job, VALUE_SCALES, result(frame, 4))
    put(job, CAP, attribute(frame, 0))
    put(job, SCALE, attribute(frame, 1))
    put(job, WINDOW, get(attribute(frame, 2), 0))
    length, kv_heads = get(job, T), get(job, K)
    rows, width = argument_size(frame, 0, 0), kv_heads * get(job, H)
    seen = 0
    for i in range(rows * length):
      position = get_int32(get(job, POSITIONS), i)
      place = -1 if position < 0 else place_of(job, i // length, position)
      if place >= 0:
        for word, scale_word, given in ((KEYS, KEY_SCALES, 1), (VALUES, VALUE_SCALES, 2)):
          source, target = argument(frame, given) + 4 * width * i, get(job, word)
          scales = get(job, scale_word) + 4 * kv_heads * place if is_scaled else 0
          write(source, target + size * width * place, width, scales, kv_heads)
      seen += position + 1
    put(job, BLOCKS, (length * (get(job, N) // kv_heads) + R - 1) // R)
    parts = rows * kv_heads * get(job, BLOCKS)
    return parts if 2 * seen * get(job, N) * get(job, H) >= SMALL else -parts

  @word_function(2)
  def part(job, i):
    blocks, length, heads, kv_heads = get(job, BLOCKS), get(job, T), get(job, N), get(job, K)
    page, width = get(job, Z), get(job, H)
    first, k, b = i % blocks * R, i // blocks % kv_heads, i // blocks // kv_heads
    group = heads // kv_heads
    queries = min(R, length * group - first)
    positions = get(job, POSITIONS) + 4 * b * length
    # Where the keys of each query start and end; where those of any do, and those of all.
    bounds = own_words()
    low, high, all_low, all_high = 2**62, 0, 0, 2**62
    for r in range(queries):
      position = get_int32(positions, (first + r) // group)
      start, end = 0, position + 1
      if position >= 0:
        if get(job, PREFIX):
          end = max(end, get_int32(get(job, PREFIX), b))
        if get(job, WINDOW):
          start = max(0, position - get(job, WINDOW) + 1)
        low, high = min(low, start), max(high, end)
      all_low, all_high = max(all_low, start), min(all_high, end)
      put(bounds, 2 * r, start)
      put(bounds, 2 * r + 1, end)
    # Logits have room for a sink more, and for being a whole number of vectors.
    row = (max(high - low, 0) + 2 * LANES - 1) // LANES * LANES
    room = queries * (row + 2 * width + 1)
    logits = allocate(4 * room)
    floats(logits, room)[:] = 0
    q = logits + 4 * queries * row
    sums = q + 4 * queries * width
    totals = floats(sums + 4 * queries * width, queries)
    for r in range(queries):
      t, n = (first + r) // group, k * group + (first + r) % group
      given = get(job, Q) + 4 * width * ((b * length + t) * heads + n)
      _write_float32(given, q + 4 * width * r, width, 0, 1)
    step = size * width * kv_heads

    for s in range(low // page * page, high, page):
      keys = get(job, KEYS) + max(place_of(job, b, s), 0) * step + size * width * k
      if s + page < high:
        place = max(place_of(job, b, s + page), 0)
        vectors.fetch(get(job, KEYS) + place * step + size * width * k, step, page, size * width)
      start, end = max(s, low), min(s + page, high)
      if queries > 1 and all_low <= start and end <= all_high:
        for c in range(start, end, C):
          at, out = keys + (c - s) * step, logits + 4 * (c - low)
          dots_of_all(q, 4 * width, queries, at, step, min(C, end - c), width, out, 4 * row)
      else:
        for r in range(queries):
          start, end = max(s, get(bounds, 2 * r)), min(s + page, get(bounds, 2 * r + 1))
          for c in range(start, end, C):
            at, out = keys + (c - s) * step, logits + 4 * (r * row + c - low)
            dots_of_one(q + 4 * width * r, 0, 1, at, step, min(C, end - c), width, out, 0)
      if is_scaled:
        place = max(place_of(job, b, s), 0)
        first_scale = get(job, KEY_SCALES) + 4 * (place * kv_heads + k)
        at = logits + 4 * (max(s, low) - low)
        skipped = max(s, low) - s
        count = min(s + page, high) - max(s, low)
        _scale(at, row, queries, first_scale + 4 * kv_heads * skipped, kv_heads, count)

    for r in range(queries):
      start, end = get(bounds, 2 * r), get(bounds, 2 * r + 1)
      if start < end:
        n = k * group + (first + r) % group
        bias = get(job, BIAS) + 4 * n * get(job, X) if get(job, BIAS) else 0
        sink = get(job, SINKS) + 4 * n if get(job, SINKS) else 0
        behind = get_int32(positions, (first + r) // group) - start
        at, scale, cap = logits + 4 * (r * row + start - low), get(job, SCALE), get(job, CAP)
        totals[r] = _softmax(at, end - start, scale, cap, bias, get(job, X), behind, sink)

    for s in range(low // page * page, high, page):
      values = get(job, VALUES) + max(place_of(job, b, s), 0) * step + size * width * k
      if s + page < high:
        place = max(place_of(job, b, s + page), 0)
        vectors.fetch(get(job, VALUES) + place * step + size * width * k, step, page, size * width)
      start, end = max(s, low), min(s + page, high)
      if is_scaled:
        first_scale = get(job, VALUE_SCALES) + 4 * (max(place_of(job, b, s), 0) * kv_heads + k)
        first_scale += 4 * kv_heads * (start - s)
        _scale(logits + 4 * (start - low), row, queries, first_scale, kv_heads, end - start)
      if queries > 1 and all_low <= start and end <= all_high:
        at, first_value = logits + 4 * (start - low), values + (start - s) * step
        sums_of_all(at, 4 * row, queries, first_value, step, end - start, width, sums)
        continue
      for r in range(queries):
        start, end = max(s, get(bounds, 2 * r)), min(s + page, get(bounds, 2 * r + 1))
        at, first_value = logits + 4 * (r * row + start - low), values + (start - s) * step
        sum_of_one(at, 0, 1, first_value, step, end - start, width, sums + 4 * width * r)

    for r in range(queries):
      t, n = (first + r) // group, k * group + (first + r) % group
      out = floats(get(job, OUT) + 4 * width * ((b * length + t) * heads + n), width)
      total, own = totals[r], floats(sums + 4 * width * r, width)
      for h in range(width):
        out[h] = own[h] / total if total else np.float32(0)
    free(logits)
    return 0

  return register(name, begin, part)


@compiled(numba.float32(*[numba.int64] * 8))
def _softmax(address, count, scale, cap, bias, distances, behind, sink):
  """Makes exponentials of the products of a query with its keys, and returns their sum.

  Args:
    scale, cap: addresses of these.
    bias, distances: address of the biases by distance, or 0, and how many there are.
    behind: how far the query is behind the first key.
    sink: address of the logit of one more key, or 0.
  """
  logits = floats(address, count + LANES)
  scale, cap = floats(scale, 1)[0], floats(cap, 1)[0]
  for i in range(count):
    logits[i] *= scale
  if cap != 0:
    vectors.soft_caps(address, (count + LANES - 1) // LANES * LANES, cap)
  if bias:
    biases = floats(bias, distances)
    for i in range(count):
      logits[i] += biases[min(max(behind - i, 0), distances - 1)]
  if sink:
    logits[count] = floats(sink, 1)[0]
    count += 1
  whole = (count + LANES - 1) // LANES * LANES
  for i in range(count, whole):
    logits[i] = -np.inf
  return vectors.exponentials(address, whole, vectors.largest(address, whole))


@word_function(6)
def _scale(address, row, rows, scales, step, count):
  """Multiplies numbers of each of some rows by scales that are `step` numbers apart."""
  numbers, factors = floats(address, rows * row), floats(scales, step * count)
  for r in range(rows):
    for i in range(count):
      numbers[r * row + i] *= factors[step * i]
  return 0


@word_function(5)
def _write_float32(source, target, count, scales, heads):
  x, y = floats(source, count), floats(target, count)
  for i in range(count):
    y[i] = x[i]
  return 0


@word_function(5)
def _write_int8(source, target, count, scales, heads):
  """Rounds each head by its largest number, as `gptjax.quantization.formats` does."""
  x, y = floats(source, count), numba.carray(vectors.pointer(target, numba.int8), count)
  width = count // heads
  for k in range(heads):
    largest = np.float32(0)
    for h in range(k * width, (k + 1) * width):
      largest = max(largest, abs(x[h]))
    scale = (largest if largest != 0 else np.float32(1)) / np.float32(127)
    floats(scales, heads)[k] = scale
    for h in range(k * width, (k + 1) * width):
      y[h] = np.int8(min(max(np.rint(x[h] / scale), np.float32(-127)), np.float32(127)))
  return 0


@word_function(5)
def _write_bfloat16(source, target, count, scales, heads):
  """Rounds to the nearest, and to the even one of two."""
  x = numba.carray(vectors.pointer(source, numba.uint32), count)
  y = numba.carray(vectors.pointer(target, numba.uint16), count)
  for i in range(count):
    rounded = (x[i] + np.uint32(0x7FFF) + ((x[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (x[i] & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    y[i] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)
  return 0
