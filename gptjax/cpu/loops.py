"""The loops of `kernels`, compiled by numba; a kind of each is a handler of XLA's.

Axes as in `kernels`; R rows and C columns of a tile of dot products, G query heads of one key-value
head.
"""

import numba
import numpy as np

from gptjax.cpu import vectors
from gptjax.cpu.handlers import (
  argument,
  attribute,
  compiled,
  floats,
  inlined,
  register,
  result,
  words,
)
from gptjax.cpu.vectors import LANES, SIZES

# Products below which threads do not share a job: they would be done before a second one is awake.
SMALL = 2**17
# Rows of x and bytes of weights in a part of a product.
PART_ROWS = 64
PART_BYTES = 2**17
# How far ahead weights are asked for.
AHEAD = 2048
# Columns of a tile, by its rows: as many sums as there are registers.
COLUMNS = {1: 8, 2: 8, 3: 4, 4: 4, 5: 2, 6: 2, 7: 2, 8: 2}
# Queries that share a look at a key.
QUERIES = 4


def product(name, kind, R):
  """Compiles `kernels.product` for weights of a kind and tiles of R rows."""
  X, W, SCALES, Y, M, D, F, COLUMNS_OF_PART, ROW_PARTS = range(9)
  C, size = COLUMNS[R], SIZES[kind]
  dots = vectors.dots(kind, R, C, AHEAD)

  @compiled
  def begin(frame, job):
    job[X], x_sizes = argument(frame, 0)
    job[W], w_sizes = argument(frame, 1)
    job[SCALES], scales_sizes = argument(frame, 2)
    job[Y], _ = result(frame, 0)
    rows, width, columns = x_sizes[0], x_sizes[1], w_sizes[0]
    if scales_sizes[0] == 0:
      job[SCALES] = 0
    job[M], job[D], job[F] = rows, width, columns
    wanted = min(PART_BYTES // max(1, width * size), columns // 16)
    job[COLUMNS_OF_PART] = max(C, wanted // C * C)
    job[ROW_PARTS] = (rows + PART_ROWS - 1) // PART_ROWS
    column_parts = (columns + job[COLUMNS_OF_PART] - 1) // job[COLUMNS_OF_PART]
    return column_parts * job[ROW_PARTS], rows * width * columns >= SMALL

  @compiled
  def part(job, i):
    width, columns = job[D], job[F]
    first_row = i % job[ROW_PARTS] * PART_ROWS
    first = i // job[ROW_PARTS] * job[COLUMNS_OF_PART]
    last_row = min(first_row + PART_ROWS, job[M])
    last = min(first + job[COLUMNS_OF_PART], columns)
    x_step, w_step, y_step = 4 * width, size * width, 4 * columns
    for row in range(first_row, last_row, R):
      there = min(R, last_row - row)
      x, y = job[X] + row * x_step, job[Y] + row * y_step
      for column in range(first, last, C):
        w = job[W] + column * w_step
        wide = min(C, last - column)
        dots(x, x_step, there, w, w_step, wide, width, y + 4 * column, y_step)
      if job[SCALES]:
        scales, out = floats(job[SCALES], columns), floats(y, there * columns)
        for r in range(there):
          for column in range(first, last):
            out[r * columns + column] *= scales[column]

  return register(name, begin, part)


def attention(name, kind):
  """Compiles `kernels.attend` for pools of a kind."""
  Q, KEYS, VALUES, TABLES, POSITIONS, SINKS, BIAS, PREFIX, OUT = range(9)
  T, N, K, H, P, Z, S, X = range(9, 17)
  SCALE, CAP, WINDOW, BLOCKS = range(17, 21)
  size, R = SIZES[kind], QUERIES
  C, CS = COLUMNS[R], COLUMNS[1]
  dots_of_some, dots_of_one = vectors.dots(kind, R, C), vectors.dots(kind, 1, CS)
  sum_of_some, sum_of_one = vectors.weighted_sum(kind, R), vectors.weighted_sum(kind, 1)
  own_words = vectors.stack(2 * R)
  write = _write_float32 if kind == "float32" else _write_bfloat16

  @compiled
  def begin(frame, job):
    job[Q], q_sizes = argument(frame, 0)
    k, _ = argument(frame, 1)
    v, _ = argument(frame, 2)
    job[TABLES], tables_sizes = argument(frame, 5)
    job[POSITIONS], _ = argument(frame, 6)
    job[SINKS], sinks_sizes = argument(frame, 7)
    job[BIAS], bias_sizes = argument(frame, 8)
    job[PREFIX], prefix_sizes = argument(frame, 9)
    job[OUT], _ = result(frame, 0)
    job[KEYS], pool_sizes = result(frame, 1)
    job[VALUES], _ = result(frame, 2)
    job[CAP], job[SCALE] = attribute(frame, 0), attribute(frame, 1)
    job[WINDOW] = numba.carray(vectors.pointer(attribute(frame, 2), numba.int64), 1)[0]
    B, job[T], job[N], job[H] = q_sizes[0], q_sizes[1], q_sizes[2], q_sizes[3]
    job[P], job[Z], job[K] = pool_sizes[0], pool_sizes[1], pool_sizes[2]
    job[S], job[X] = tables_sizes[1], bias_sizes[1]
    if sinks_sizes[0] == 0:
      job[SINKS] = 0
    if prefix_sizes[0] == 0:
      job[PREFIX] = 0
    work, width = 0, job[K] * job[H]
    positions = ints(job[POSITIONS], B * job[T])
    for b in range(B):
      for t in range(job[T]):
        p = np.int64(positions[b * job[T] + t])
        if p >= 0:
          work += p + 1
          page = page_of(job, b, p // job[Z])
          if page >= 0:
            cell, new = (page * job[Z] + p % job[Z]) * width, (b * job[T] + t) * width
            write(k + 4 * new, job[KEYS] + size * cell, width)
            write(v + 4 * new, job[VALUES] + size * cell, width)
    if job[K] == 0:
      return 0, False
    job[BLOCKS] = (job[T] * (job[N] // job[K]) + R - 1) // R
    return B * job[K] * job[BLOCKS], 2 * work * job[N] * job[H] >= SMALL

  @compiled
  def page_of(job, b, i):
    """The i-th page of a row; -1 if the tables have none."""
    if i >= job[S]:
      return np.int64(-1)
    page = np.int64(ints(job[TABLES] + 4 * b * job[S], job[S])[i])
    return page if page < job[P] else np.int64(-1)

  @compiled
  def part(job, i):
    block, k, b = i % job[BLOCKS], i // job[BLOCKS] % job[K], i // job[BLOCKS] // job[K]
    G, width = job[N] // job[K], job[H]
    first = block * R
    there = min(R, job[T] * G - first)
    # Where the keys of each query start and end, together and those that all see.
    bounds = words(own_words(), 2 * R)
    low, high, shared_low, shared_high = 2**62, 0, 0, 2**62
    for r in range(there):
      p = np.int64(ints(job[POSITIONS] + 4 * b * job[T], job[T])[(first + r) // G])
      start, end = np.int64(0), p + 1
      if p >= 0:
        if job[PREFIX]:
          end = max(end, np.int64(ints(job[PREFIX], b + 1)[b]))
        if job[WINDOW]:
          start = max(start, p - job[WINDOW] + 1)
        low, high = min(low, start), max(high, end)
      shared_low, shared_high = max(shared_low, start), min(shared_high, end)
      bounds[2 * r], bounds[2 * r + 1] = start, end
    count = max(high - low, 0)
    # The logits of each query have room for a sink and for being a whole number of vectors.
    step = (count + 2 * LANES - 1) // LANES * LANES
    room = np.zeros(there * (step + 2 * width), np.float32)
    logits = room.ctypes.data
    queries = logits + 4 * there * step
    sums = queries + 4 * there * width
    for r in range(there):
      t, n = (first + r) // G, k * G + (first + r) % G
      q = floats(job[Q] + 4 * ((b * job[T] + t) * job[N] + n) * width, width)
      row = floats(queries + 4 * r * width, width)
      for h in range(width):
        row[h] = q[h]
    key_step = size * job[K] * width
    s = low
    while s < high:
      stop = min(high, (s // job[Z] + 1) * job[Z])
      cell = (max(page_of(job, b, s // job[Z]), 0) * job[Z] + s % job[Z]) * job[K] + k
      keys = job[KEYS] + size * width * cell
      if there > 1 and shared_low <= s and stop <= shared_high:
        for c in range(s, stop, C):
          dots_of_some(
            queries,
            4 * width,
            there,
            keys + (c - s) * key_step,
            key_step,
            min(C, stop - c),
            width,
            logits + 4 * (c - low),
            4 * step,
          )
      else:
        for r in range(there):
          start, end = max(s, bounds[2 * r]), min(stop, bounds[2 * r + 1])
          for c in range(start, end, CS):
            dots_of_one(
              queries + 4 * r * width,
              0,
              1,
              keys + (c - s) * key_step,
              key_step,
              min(CS, end - c),
              width,
              logits + 4 * (r * step + c - low),
              0,
            )
      s = stop
    for r in range(there):
      start, end = bounds[2 * r], bounds[2 * r + 1]
      if start < end:
        p = np.int64(ints(job[POSITIONS] + 4 * b * job[T], job[T])[(first + r) // G])
        n = k * G + (first + r) % G
        total = softmax(job, logits + 4 * (r * step + start - low), start, end, p, n)
        floats(queries, there)[r] = total
    s = low
    while s < high:
      stop = min(high, (s // job[Z] + 1) * job[Z])
      cell = (max(page_of(job, b, s // job[Z]), 0) * job[Z] + s % job[Z]) * job[K] + k
      values = job[VALUES] + size * width * cell
      if there > 1 and shared_low <= s and stop <= shared_high:
        sum_of_some(
          logits + 4 * (s - low), 4 * step, there, values, key_step, stop - s, width, sums
        )
      else:
        for r in range(there):
          start, end = max(s, bounds[2 * r]), min(stop, bounds[2 * r + 1])
          if start < end:
            sum_of_one(
              logits + 4 * (r * step + start - low),
              0,
              1,
              values + (start - s) * key_step,
              key_step,
              end - start,
              width,
              sums + 4 * r * width,
            )
      s = stop
    for r in range(there):
      t, n = (first + r) // G, k * G + (first + r) % G
      out = floats(job[OUT] + 4 * ((b * job[T] + t) * job[N] + n) * width, width)
      row, total = floats(sums + 4 * r * width, width), floats(queries, there)[r]
      for h in range(width):
        out[h] = row[h] / total if bounds[2 * r] < bounds[2 * r + 1] else np.float32(0)

  @compiled
  def softmax(job, address, start, end, p, n):
    """Makes exponentials of the products of a query with its keys, and returns their sum."""
    count = end - start
    row = floats(address, count + LANES)
    scale, cap = floats(job[SCALE], 1)[0], floats(job[CAP], 1)[0]
    for i in range(count):
      row[i] *= scale
    padded = (count + LANES - 1) // LANES * LANES
    if cap != 0:
      vectors.soft_caps(address, padded, cap)
    if job[X]:
      bias = floats(job[BIAS] + 4 * n * job[X], job[X])
      for i in range(count):
        row[i] += bias[min(max(p - start - i, 0), job[X] - 1)]
    if job[SINKS]:
      row[count] = floats(job[SINKS], job[N])[n]
      count += 1
      padded = (count + LANES - 1) // LANES * LANES
    for i in range(count, padded):
      row[i] = -np.inf
    return vectors.exponentials(address, padded, vectors.largest(address, padded))

  return register(name, begin, part)


@inlined
def ints(address, count):
  """So many int32 at an address, as an array."""
  return numba.carray(vectors.pointer(address, numba.int32), count)


@compiled
def _write_float32(source, target, count):
  x, y = floats(source, count), floats(target, count)
  for i in range(count):
    y[i] = x[i]


@compiled
def _write_bfloat16(source, target, count):
  """Rounds to the nearest, and to the even one of two."""
  x = numba.carray(vectors.pointer(source, numba.uint32), count)
  y = numba.carray(vectors.pointer(target, numba.uint16), count)
  for i in range(count):
    rounded = (x[i] + np.uint32(0x7FFF) + ((x[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (x[i] & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    y[i] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)
