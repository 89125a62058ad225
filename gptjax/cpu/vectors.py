"""Vector arithmetic for compiled loops, in one fixed order whatever the processor.

Each function is written into the loop that calls it as LLVM instructions. A sum is kept in `LANES`
partial sums that are added as a tree, products are fused with additions, and the compiler may
reorder nothing; so the bits of a result depend on the numbers alone. Addresses and distances are
int64, in bytes.

Axes: R rows of one operand, C rows of the other.
"""

import functools
import math

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Partial sums of a dot product; also, numbers of a vector.
LANES = 16
# Bytes of one number.
SIZES = {"float32": 4, "bfloat16": 2, "int8": 1}

_i32, _i64, _f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_i8_pointer = ir.IntType(8).as_pointer()
_vector = ir.VectorType(_f32, LANES)
_int, _float = types.int64, types.float32


def emitted(returns, *takes):
  """Makes a function that compiled loops can call of one that emits its instructions."""

  def decorate(emit):
    # numba reads the arguments of `emit` from the wrapper.
    @functools.wraps(emit)
    def function(_, *given):
      def generate(context, builder, signature, arguments):
        result = emit(builder, *arguments)
        return _i64(0) if result is None else result

      return returns(*takes), generate

    return intrinsic(function)

  return decorate


@intrinsic
def pointer(_, address, like):
  """The address as a pointer to numbers of the type `like`, for `numba.carray`."""
  kind = types.CPointer(like.dtype)
  return kind(_int, like), lambda context, builder, signature, arguments: builder.inttoptr(
    arguments[0], context.get_value_type(kind)
  )


@emitted(_int, _int, _int)
def get(b, address, i):
  """The i-th word of those at an address."""
  return b.load(_word(b, address, i))


@emitted(_int, _int, _int, _int)
def put(b, address, i, value):
  """Makes a value the i-th word of those at an address."""
  b.store(value, _word(b, address, i))


@emitted(_int, _int, _int, _int)
def fetch_add(b, address, i, amount):
  """Adds to a word that threads share, and returns what it was."""
  return b.atomic_rmw("add", _word(b, address, i), amount, "acq_rel")


@emitted(_int, _int, _int, _int, _int)
def replace(b, address, i, old, new):
  """Whether a word that threads share was `old`; if so, it is `new` now."""
  result = b.cmpxchg(_word(b, address, i), old, new, "acq_rel", "acquire")
  return b.zext(b.extract_value(result, 1), _i64)


@emitted(_int, _int, _int)
def get_shared(b, address, i):
  """A word that threads share."""
  return b.load_atomic(_word(b, address, i), "acquire", 8)


@emitted(_int, _int, _int)
def call(b, function, argument):
  """Calls a function of C, by its address, that takes one word and returns one."""
  kind = ir.FunctionType(_i64, [_i64])
  return b.call(b.inttoptr(function, kind.as_pointer()), [argument])


def stack(words):
  """Makes a function that returns the address of so many words of the caller's own."""

  @emitted(_int)
  def address(b):
    with b.goto_entry_block():
      room = b.alloca(ir.ArrayType(_i64, words))
    return b.ptrtoint(room, _i64)

  return address


@emitted(_int, _int, _int, _int, _int)
def fetch(b, address, step, rows, size):
  """Asks for rows of so many bytes, a distance apart, that will be read soon."""

  def fetch_row(i, _):
    row = b.add(address, b.mul(i, step))

    def fetch_line(at, _):
      _prefetch(b, b.add(row, at))
      return []

    _loop(b, _i64(0), size, 64, [], fetch_line)
    return []

  _loop(b, _i64(0), rows, 1, [], fetch_row)


def dots(kind, R, C, ahead=0):
  """Makes a function that writes the dot products of rows of x with rows of w, of a kind.

  It takes x, the distance of two rows, how many of the R rows there are; the same of w; how many
  numbers are in a row; where the products go and the distance of two rows there. Rows that are not
  there are done as the last one again. `ahead` is how far ahead w is asked for; 0 is not at all.
  """

  @emitted(_int, *[_int] * 9)
  def products(b, x, x_step, rows, w, w_step, columns, count, out, out_step):
    xs, ws = _rows(b, x, x_step, rows, R), _rows(b, w, w_step, columns, C)
    whole = b.and_(count, _i64(-LANES))
    sums = [_constant(0.0)] * (R * C)
    sums = _add_products(b, kind, xs, ws, _i64(0), whole, LANES, sums, ahead)
    _finish(b, kind, xs, ws, whole, count, sums, _outs(b, out, out_step, rows, columns, R, C))

  return products


def partial_dots(kind, R, C):
  """Makes two functions that do the work of `dots` in several steps, with the same bits.

  They take x and w as there. The first adds the products of `count` numbers, a multiple of `LANES`,
  to the partial sums at an address, R C vectors. The second adds those and the products of `count`
  last numbers, fewer than `LANES`, up.
  """

  @emitted(_int, *[_int] * 8)
  def add(b, x, x_step, rows, w, w_step, columns, count, partial):
    xs, ws = _rows(b, x, x_step, rows, R), _rows(b, w, w_step, columns, C)
    places = [b.add(partial, _i64(4 * LANES * i)) for i in range(R * C)]
    sums = [_load(b, "float32", place, LANES) for place in places]
    sums = _add_products(b, kind, xs, ws, _i64(0), count, LANES, sums)
    for total, place in zip(sums, places, strict=True):
      _store(b, total, place)

  @emitted(_int, *[_int] * 10)
  def finish(b, x, x_step, rows, w, w_step, columns, count, partial, out, out_step):
    xs, ws = _rows(b, x, x_step, rows, R), _rows(b, w, w_step, columns, C)
    places = [b.add(partial, _i64(4 * LANES * i)) for i in range(R * C)]
    sums = [_load(b, "float32", place, LANES) for place in places]
    outs = _outs(b, out, out_step, rows, columns, R, C)
    _finish(b, kind, xs, ws, _i64(0), count, sums, outs)

  return add, finish


def grouped_dots(kind, R, C, group, has_zeros, ahead):
  """Makes a function like that of `dots`, for whole numbers in groups with a scale each.

  w is int8, or int4 as `gptjax.quantization.formats` packs it. A weight is (number - zero) * scale.
  The function also takes, after how many numbers are in a row, the scales (float32) of row 0 of w
  and the distance to those of the next, and the same of zeros (int8). `group` is how many numbers
  share a scale, a multiple of those that are read at once; 0 is all of a row.
  """
  parts = 2 if kind == "int4" else 1

  @emitted(_int, *[_int] * 13)
  def products(
    b, x, x_step, rows, w, w_step, columns, count, scales, scales_step, zeros, zeros_step, out,
    out_step,
  ):  # fmt: skip
    xs, ws = _rows(b, x, x_step, rows, R), _rows(b, w, w_step, columns, C)
    scale_rows = _rows(b, scales, scales_step, columns, C)
    zero_rows = _rows(b, zeros, zeros_step, columns, C)

    def body(i, sums):
      total, tile = list(sums), []
      at = b.sdiv(i, _i64(group)) if group else _i64(0)
      byte = b.sdiv(i, _i64(2)) if kind == "int4" else i
      for row, scale_row, zero_row in zip(ws, scale_rows, zero_rows, strict=True):
        place = b.add(row, byte)
        if ahead:
          _prefetch(b, b.add(place, _i64(ahead)))
        scale = _load(b, "float32", b.add(scale_row, b.mul(at, _i64(4))), 1)
        zero = _whole(8 if kind == "int4" else 0)
        if has_zeros:
          own = b.load(b.inttoptr(b.add(zero_row, at), _i8_pointer), align=1)
          zero = b.add(zero, _spread(b, b.sext(own, _i32)))
        numbers = _load_whole(b, kind, place)
        scale = _spread(b, scale)
        tile.append([b.fmul(b.sitofp(b.sub(n, zero), _vector), scale) for n in numbers])
      for r, row in enumerate(xs):
        start = b.add(row, b.mul(i, _i64(4)))
        values = [
          _load(b, "float32", b.add(start, _i64(4 * LANES * n)), LANES) for n in range(parts)
        ]
        for c, weights in enumerate(tile, r * C):
          for value, weight in zip(values, weights, strict=True):
            total[c] = _fma(b, value, weight, total[c])
      return total

    sums = _loop(b, _i64(0), count, parts * LANES, [_constant(0.0)] * (R * C), body)
    outs = _outs(b, out, out_step, rows, columns, R, C)
    for total, place in zip(_add_lanes(b, sums), outs, strict=True):
      _store(b, total, place)

  return products


def weighted_sum(kind, R):
  """Makes a function that adds rows of v, of a kind, to R sums, each row times its weight.

  It takes the weights of the first sum, the distance to those of the next and how many of the R
  sums there are; v, the distance of two rows and how many there are; how many numbers are in a row;
  and the sums, one after another. The rows are added in their order.
  """

  @emitted(_int, *[_int] * 8)
  def add_rows(b, weights, weights_step, there, v, v_step, rows, count, out):
    sums_at = _rows(b, out, b.mul(_i64(4), count), there, R)
    weights_at = _rows(b, weights, weights_step, there, R)

    def add_columns(width, vectors):
      def body(h, _):
        starts = [b.add(h, _i64(width * n)) for n in range(vectors)]
        places = [b.add(row, b.mul(h, _i64(4))) for row in sums_at for h in starts]
        starts = [b.add(v, b.mul(h, _i64(SIZES[kind]))) for h in starts]

        def add_row(s, sums):
          total, at = list(sums), b.mul(s, v_step)
          values = [_load(b, kind, b.add(start, at), width) for start in starts]
          for r, row in enumerate(weights_at):
            weight = _load(b, "float32", b.add(row, b.mul(s, _i64(4))), 1)
            weight = weight if width == 1 else _spread(b, weight)
            for n, value in enumerate(values):
              total[r * vectors + n] = _fma(b, weight, value, total[r * vectors + n])
          return total

        sums = [_load(b, "float32", place, width) for place in places]
        for total, place in zip(_loop(b, _i64(0), rows, 1, sums, add_row), places, strict=True):
          _store(b, total, place)
        return []

      return body

    first, second = b.and_(count, _i64(-4 * LANES)), b.and_(count, _i64(-LANES))
    _loop(b, _i64(0), first, 4 * LANES, [], add_columns(LANES, 4))
    _loop(b, first, second, LANES, [], add_columns(LANES, 1))
    _loop(b, second, count, 1, [], add_columns(1, 1))

  return add_rows


@emitted(_float, _int, _int)
def largest(b, values, count):
  """The largest of so many numbers, a multiple of `LANES` above 0."""

  def body(i, best):
    value = _load(b, "float32", b.add(values, b.mul(i, _i64(4))), LANES)
    return [b.select(b.fcmp_ordered(">", value, best[0]), value, best[0])]

  lowest = _constant(-math.inf)
  (best,) = _loop(b, _i64(0), count, LANES, [lowest], body)
  for half in (8, 4, 2, 1):
    other = b.shuffle_vector(best, best, _places((i + half) % LANES for i in range(LANES)))
    best = b.select(b.fcmp_ordered(">", other, best), other, best)
  return b.extract_element(best, _i32(0))


@emitted(_float, _int, _int, _float)
def exponentials(b, values, count, shift):
  """Replaces each number by exp(number - shift), not above 1, and returns their sum.

  The count is a multiple of `LANES`.
  """

  def body(i, total):
    place = b.add(values, b.mul(i, _i64(4)))
    power = _exp(b, b.fsub(_load(b, "float32", place, LANES), _spread(b, shift)))
    _store(b, power, place)
    return [b.fadd(total[0], power)]

  zero = _constant(0.0)
  return _add_lanes(b, _loop(b, _i64(0), count, LANES, [zero], body))[0]


@emitted(_int, _int, _int, _float)
def soft_caps(b, values, count, cap):
  """Replaces each number by cap * tanh(number / cap). The count is a multiple of `LANES`."""

  def body(i, _):
    place = b.add(values, b.mul(i, _i64(4)))
    x = _load(b, "float32", place, LANES)
    # tanh |x| = (1 - e) / (1 + e) with e = exp(-2 |x|).
    size = _math(b, "fabs", b.fdiv(x, _spread(b, cap)))
    e = _exp(b, b.fmul(size, _constant(-2.0)))
    capped = b.fdiv(b.fsub(_constant(1.0), e), b.fadd(_constant(1.0), e))
    capped = b.fmul(_spread(b, cap), capped)
    _store(b, _math(b, "copysign", capped, x), place)
    return []

  _loop(b, _i64(0), count, LANES, [], body)


def _word(b, address, i):
  return b.inttoptr(b.add(address, b.mul(i, _i64(8))), _i64.as_pointer())


def _exp(b, x):
  """exp(x) of a vector of numbers not above 0, to 2 units in the last place; 0 below -87.

  With n = round(x / log 2) and r = x - n log 2: the Taylor series of exp(r) to r^7, times 2^n.
  """
  lowest = _constant(-87.0)
  bounded = b.select(b.fcmp_ordered(">", x, lowest), x, lowest)
  n = _math(b, "nearbyint", b.fmul(bounded, _constant(1 / math.log(2))))
  # log 2 in two parts, of which the first is exact in products with n.
  high = 0.693359375
  r = _fma(b, n, _constant(-high), x)
  r = _fma(b, n, _constant(high - math.log(2)), r)
  power = _constant(1 / math.factorial(7))
  for k in range(6, -1, -1):
    power = _fma(b, power, r, _constant(1 / math.factorial(k)))
  exponent = b.add(b.fptosi(n, ir.VectorType(_i32, LANES)), _whole(127))
  scale = b.bitcast(b.shl(exponent, _whole(23)), _vector)
  return b.select(b.fcmp_ordered("<", x, lowest), _constant(0.0), b.fmul(power, scale))


def _rows(b, address, step, there, count):
  """Addresses of rows; of those that are not there, that of the last one."""
  last = b.sub(there, _i64(1))
  return [b.add(address, b.mul(_smaller(b, _i64(i), last), step)) for i in range(count)]


def _outs(b, out, out_step, rows, columns, R, C):
  """Addresses of the results of a tile, row by row."""
  return [
    place
    for row in _rows(b, out, out_step, rows, R)
    for place in _rows(b, row, _i64(4), columns, C)
  ]


def _add_products(b, kind, xs, ws, start, stop, width, sums, ahead=0):
  """Adds the products of numbers from start to stop, `width` at a time, to the sums of a tile."""

  def body(i, sums):
    total, w_values = list(sums), []
    for row in ws:
      place = b.add(row, b.mul(i, _i64(SIZES[kind])))
      if ahead:
        _prefetch(b, b.add(place, _i64(ahead)))
      w_values.append(_load(b, kind, place, width))
    for r, row in enumerate(xs):
      x_value = _load(b, "float32", b.add(row, b.mul(i, _i64(4))), width)
      for c, w_value in enumerate(w_values, r * len(ws)):
        total[c] = _fma(b, x_value, w_value, total[c])
    return total

  return _loop(b, start, stop, width, sums, body)


def _finish(b, kind, xs, ws, start, stop, sums, outs):
  """Adds the lanes of a tile's sums up, and then the last products one by one."""
  sums = _add_products(b, kind, xs, ws, start, stop, 1, _add_lanes(b, sums))
  for total, place in zip(sums, outs, strict=True):
    _store(b, total, place)


def _loop(b, start, stop, step, state, body):
  """Emits `for i in range(start, stop, step): state = body(i, state)`; returns the last state."""
  before = b.block
  head, inside, after = (b.append_basic_block(name) for name in ("head", "inside", "after"))
  b.branch(head)
  b.position_at_end(head)
  i, phis = b.phi(_i64), [b.phi(value.type) for value in state]
  b.cbranch(b.icmp_signed("<", i, stop), inside, after)
  b.position_at_end(inside)
  results = body(i, phis)
  following = b.add(i, _i64(step))
  for phi, first, later in zip([i, *phis], [start, *state], [following, *results], strict=True):
    phi.add_incoming(first, before)
    phi.add_incoming(later, b.block)
  b.branch(head)
  b.position_at_end(after)
  return phis


def _add_lanes(b, vectors):
  """The sums of the lanes of each vector: halves are added until one lane is left.

  Two vectors, or groups of lanes in them, are halved into one, one after another.
  """
  if len(vectors) > LANES:
    return _add_lanes(b, vectors[:LANES]) + _add_lanes(b, vectors[LANES:])
  left, group = vectors, LANES
  while group > 1:
    half = group // 2
    low = [start + i for start in range(0, 2 * LANES, group) for i in range(half)]
    low, high = _places(low), _places(i + half for i in low)
    seconds = left[1::2] + [left[-1]] * (len(left) % 2)
    left = [
      b.fadd(b.shuffle_vector(first, second, low), b.shuffle_vector(first, second, high))
      for first, second in zip(left[::2], seconds, strict=True)
    ]
    group = half
  return [b.extract_element(left[0], _i32(i)) for i in range(len(vectors))]


def _load(b, kind, address, width):
  """Loads a number of a kind, or a vector of them, as float32."""
  stored = {"float32": _f32, "bfloat16": ir.IntType(16), "int8": ir.IntType(8)}[kind]
  read, whole, real = (_wide(scalar, width) for scalar in (stored, _i32, _f32))
  value = b.load(b.inttoptr(address, read.as_pointer()), align=SIZES[kind])
  match kind:
    case "float32":
      return value
    case "bfloat16":
      bits = b.shl(b.zext(value, whole), _i32(16) if width == 1 else _whole(16))
      return b.bitcast(bits, real)
    case "int8":
      return b.sitofp(value, real)


def _load_whole(b, kind, address):
  """Loads `LANES` bytes: vectors of int32, one of int8, or two of int4 from 0 to 15."""
  read = _wide(ir.IntType(8), LANES)
  value = b.load(b.inttoptr(address, read.as_pointer()), align=1)
  if kind == "int8":
    return [b.sext(value, _wide(_i32, LANES))]
  four, mask = (ir.Constant(read, [number] * LANES) for number in (4, 15))
  return [b.zext(part, _wide(_i32, LANES)) for part in (b.and_(value, mask), b.lshr(value, four))]


def _store(b, value, address):
  b.store(value, b.inttoptr(address, value.type.as_pointer()), align=4)


def _prefetch(b, address):
  kind = ir.FunctionType(ir.VoidType(), [_i8_pointer, _i32, _i32, _i32])
  function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
  read, keep, data = _i32(0), _i32(3), _i32(1)
  b.call(function, [b.inttoptr(address, _i8_pointer), read, keep, data])


def _fma(b, x, y, z):
  return _math(b, "fma", x, y, z)


def _math(b, name, *arguments):
  """Calls an operation that LLVM has for numbers and vectors alike."""
  kind = arguments[0].type
  suffix = "f32" if kind == _f32 else f"v{LANES}f32"
  function = ir.FunctionType(kind, [kind] * len(arguments))
  function = cgutils.get_or_insert_function(b.module, function, f"llvm.{name}.{suffix}")
  return b.call(function, arguments)


def _spread(b, value):
  """A vector of one number."""
  kind = _wide(value.type, LANES)
  first = b.insert_element(ir.Constant(kind, ir.Undefined), value, _i32(0))
  return b.shuffle_vector(first, first, _places([0] * LANES))


def _constant(value):
  return ir.Constant(_vector, [value] * LANES)


def _whole(value):
  return ir.Constant(_wide(_i32, LANES), [value] * LANES)


def _places(places):
  return ir.Constant(_wide(_i32, LANES), list(places))


def _wide(scalar, width):
  return scalar if width == 1 else ir.VectorType(scalar, width)


def _smaller(b, x, y):
  return b.select(b.icmp_signed("<", x, y), x, y)
