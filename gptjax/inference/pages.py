"""The key-value cache in pages, which sequences that begin alike share.

Kwon et al. 2023 (arXiv:2309.06180), section 4. Axes: B batch, T query positions, S positions of a
row, K key-value heads, H head width, P pages, Z positions of a page, I pages of a row, X stored
numbers of a head, G groups of a head that share a scale.
"""

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from gptjax.devices.sharding import constrain, per_shard
from gptjax.errors import UserError
from gptjax.model.attention import KeysAndValues
from gptjax.model.config import ModelConfig
from gptjax.model.kernels import LANES
from gptjax.quantization.formats import Format, Grid, from_codes, make_grid, pack, to_codes, unpack

# Positions of a page.
PAGE = 16
# Formats of a cache in few bits. int4 is of keys and values that a Hadamard matrix has turned: it
# spreads what stands out in a head over all of it (Ashkboos et al. 2024, arXiv:2404.00456).
CACHES = ("int8", "int4")


class FewBits(NamedTuple):
  """Keys or values of all pages of a layer in few bits: numbers times the scale of their group.

  values: [P, Z, K, X], int8, or uint8 with two numbers of 4 bits. scales: float32 [P, Z, K, G].
  """

  values: jax.Array
  scales: jax.Array


# Keys and values of all pages in each layer, [P, Z, K, H] each, or `FewBits`; or joined,
# [P, Z, 2K, W], the key of each head before its value, and W the head width rounded up to whole
# registers of a TPU.
Pools = list[KeysAndValues] | list[jax.Array]


def empty_pools(
  config: ModelConfig, pages: int, *, joined: bool, cache: str | None = None
) -> Pools:
  """Pages without content.

  Args:
    config: the model.
    pages: how many.
    joined: `tpu.joins_pages` of the model.
    cache: one of `CACHES`; None is the compute dtype.
  """

  def zeros(shape: Sequence[int], dtype: str) -> jax.Array:
    return constrain(jnp.zeros((pages, PAGE, *shape), dtype), None, None, "kv_heads", None)

  def one() -> jax.Array | FewBits:
    if cache is None:
      return zeros(_head_shape(config, joined), config.dtype)
    kept = _encode(jnp.zeros(_head_shape(config, joined)), _format(config.head_dim, cache))
    return FewBits(*(zeros(x.shape, x.dtype) for x in kept))

  return [one() if joined else KeysAndValues(one(), one()) for _ in range(config.num_layers)]


def page_bytes(config: ModelConfig, *, joined: bool, cache: str | None = None) -> int:
  """Bytes of one page in all layers; arguments as for `empty_pools`."""
  abstract = jax.eval_shape(lambda: empty_pools(config, 1, joined=joined, cache=cache))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))


def check_cache(config: ModelConfig, cache: str) -> None:
  """Raises UserError if a model's heads cannot be turned for a cache of 4 bits."""
  if cache == "int4" and config.head_dim & (config.head_dim - 1):
    raise UserError(
      f"cache='int4' is of heads whose width is a power of 2, not {config.head_dim}: take int8."
    )


def _head_shape(config: ModelConfig, joined: bool) -> tuple[int, int]:
  """Shape of a position in a page, or of its keys."""
  K, H = config.num_kv_heads, config.head_dim
  return (2 * K, -(-H // LANES) * LANES) if joined else (K, H)


def _format(width: int, cache: str) -> Format:
  """How a head is stored: int8 with one scale, int4 in groups of 32."""
  return Format(cache, 32 if cache == "int4" and width % 32 == 0 else 0)


def _encode(x: jax.Array, form: Format) -> FewBits:
  """Heads [..., K, H] in few bits."""
  x = x.astype(jnp.float32)
  if form.name == "int4":
    x = x @ _hadamard(x.shape[-1])
  grid = make_grid(x, form)
  return FewBits(pack(to_codes(x, grid, form), form), grid.scales)


def _decode(stored: FewBits, form: Format) -> jax.Array:
  """The heads that few bits stand for, float32 [..., K, H]."""
  x = from_codes(unpack(stored.values, form), Grid(stored.scales, None), form)
  # The matrix is symmetric and its own inverse.
  return x @ _hadamard(x.shape[-1]) if form.name == "int4" else x


def _hadamard(width: int) -> np.ndarray:
  return (scipy.linalg.hadamard(width) / math.sqrt(width)).astype(np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
  """A layer's cache (`attention.LayerCache`) whose rows are spread over pages.

  Attributes:
    pool: the layer's keys and values, one of `Pools`.
    tables_BI: int32, the pages of each row, in order.
    prefix_B: int32, the length of the prefix that all of a row's tokens see; None is 0.
    length: positions that a row may have, at most I Z.
    rows_axis: the logical axis that splits the rows over a mesh, and the pages with them: a table
      counts the pages of its own part. None has all rows and pages on every device.
  """

  pool: KeysAndValues | jax.Array
  tables_BI: jax.Array
  prefix_B: jax.Array | None
  length: int = dataclasses.field(metadata={"static": True})
  rows_axis: str | None = dataclasses.field(default=None, metadata={"static": True})

  def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array):
    """Writes at the positions that are not negative; returns the cache and rows [B, S, K, H].

    Keys and values are not joined: what reads those writes them itself.
    """
    heads, rows = (self.rows_axis, None, "kv_heads", None), (self.rows_axis, None)
    arrays, structure = jax.tree.flatten(self.pool)

    def write(*given):
      pool = structure.unflatten(given[: len(arrays)])
      pairs = zip(pool, given[len(arrays) : -2], strict=True)
      written = [_write(*pair, *given[-2:], length=self.length) for pair in pairs]
      pool, row = zip(*written, strict=True)
      return *jax.tree.leaves(pool), *row

    in_axes = [heads] * (len(arrays) + 2)
    *arrays, keys, values = per_shard(write, [*in_axes, rows, rows], in_axes)(
      *arrays, k_BTKH, v_BTKH, self.tables_BI, positions_BT
    )
    return self.with_pool(structure.unflatten(arrays)), KeysAndValues(keys, values)

  def with_pool(self, pool: KeysAndValues | jax.Array) -> "PagedCache":
    return dataclasses.replace(self, pool=pool)


def _write(pool, x_BTKH, tables_BI, positions_BT, *, length: int):
  """Writes keys, or values; returns the pool and all of the rows, [B, S, K, H]."""
  is_small = isinstance(pool, FewBits)
  if is_small:
    cache = "int4" if pool.values.dtype == jnp.uint8 else "int8"
    form = _format(x_BTKH.shape[-1], cache)

  def put(pool_PZKX, x_BTKX):
    cells = cells_of(tables_BI, positions_BT, pool_PZKX.shape)
    flat = pool_PZKX.reshape(-1, *pool_PZKX.shape[2:])
    x = x_BTKX.reshape(-1, *flat.shape[1:]).astype(flat.dtype)
    return flat.at[cells].set(x, mode="drop").reshape(pool_PZKX.shape)

  def read(pool_PZKX):
    # All pages of a row's table, in the order of its positions.
    pages = pool_PZKX[tables_BI]
    return pages.reshape(len(pages), -1, *pages.shape[3:])[:, :length]

  pool = jax.tree.map(put, pool, _encode(x_BTKH, form) if is_small else x_BTKH)
  rows = jax.tree.map(read, pool)
  return pool, (_decode(rows, form) if is_small else rows).astype(x_BTKH.dtype)


def cells_of(tables_BI: jax.Array, positions_BT: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Where in a pool of a shape [P, Z, ...] positions are, in row-major order of P Z: int32 [B T].
  Negative ones are nowhere, P Z."""
  pages, size = shape[:2]
  page_BT = jnp.take_along_axis(tables_BI, jnp.maximum(positions_BT, 0) // size, axis=1)
  return jnp.where(positions_BT < 0, pages * size, page_BT * size + positions_BT % size).reshape(-1)


class Pages:
  """Which pages are in use, by how many sequences, and what the others still hold.

  A full page is found again by its tokens and the page before it, so a chain of pages stands for a
  text from its start. Pages that nothing uses keep their content until another needs the room, the
  least recently used first.
  """

  def __init__(self, count: int):
    self.count = count
    self._free = list(range(count - 1, -1, -1))
    self._users = [0] * count
    # A page's content: the serial number of the content before it, and its tokens. Serial numbers
    # are never used twice, so a page whose predecessor is gone is not found by mistake.
    self._names: dict[int, tuple[int, tuple[int, ...]]] = {}
    self._serials: dict[int, int] = {}
    self._found: dict[tuple[int, tuple[int, ...]], int] = {}
    self._unused: OrderedDict[int, None] = OrderedDict()
    self._roots: dict[object, int] = {}
    self._last_serial = 0

  @property
  def available(self) -> int:
    """Pages that nothing uses, with content or without."""
    return len(self._free) + len(self._unused)

  @property
  def used(self) -> int:
    return self.count - self.available

  def take(self, count: int) -> list[int] | None:
    """Takes pages for one user, their content forgotten; None if there are not as many."""
    if count > self.available:
      return None
    taken = []
    for _ in range(count):
      page = self._free.pop() if self._free else self._unused.popitem(last=False)[0]
      self._forget(page)
      self._users[page] = 1
      taken.append(page)
    return taken

  def find(self, tokens: Sequence[int], namespace: object = None) -> list[int]:
    """Adds a user to the pages that hold the start of a text, as many as are known, and returns
    them. Texts of different namespaces (adapters) share nothing."""
    pages, before = [], self._root(namespace)
    for start in range(0, len(tokens) - PAGE + 1, PAGE):
      page = self._found.get((before, tuple(tokens[start : start + PAGE])))
      if page is None:
        break
      self._unused.pop(page, None)
      self._users[page] += 1
      pages.append(page)
      before = self._serials[page]
    return pages

  def share(self, pages: list[int]) -> list[int]:
    """Adds a user to pages that are in use, and returns them."""
    for page in pages:
      self._users[page] += 1
    return pages

  def remember(self, pages: Sequence[int], tokens: Sequence[int], namespace: object = None) -> None:
    """Says what the pages of a text hold, so that `find` finds the full ones."""
    before = self._root(namespace)
    for i in range(min(len(pages), len(tokens) // PAGE)):
      name = (before, tuple(tokens[i * PAGE : (i + 1) * PAGE]))
      # Of two sequences that computed the same content at the same time, one is remembered.
      page = self._found.get(name)
      if page is None:
        page = pages[i]
        self._forget(page)
        self._names[page], self._found[name] = name, page
        self._last_serial += 1
        self._serials[page] = self._last_serial
      before = self._serials[page]

  def release(self, pages: Iterable[int]) -> None:
    """Takes a user from each page; the last ones of a text are given up first."""
    for page in reversed(list(pages)):
      self._users[page] -= 1
      if not self._users[page]:
        if page in self._names:
          self._unused[page] = None
        else:
          self._free.append(page)

  def _root(self, namespace: object) -> int:
    if namespace not in self._roots:
      self._last_serial += 1
      self._roots[namespace] = self._last_serial
    return self._roots[namespace]

  def _forget(self, page: int) -> None:
    if page in self._names:
      del self._found[self._names.pop(page)], self._serials[page]
