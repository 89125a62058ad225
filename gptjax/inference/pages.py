"""The key-value cache in pages, which sequences that begin alike share.

Kwon et al. 2023 (arXiv:2309.06180), section 4. Axes: B batch, T query positions, S positions of a
row, K key-value heads, H head width, P pages, Z positions of a page, I pages of a row.
"""

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from gptjax.devices.sharding import constrain, per_shard
from gptjax.model.attention import KeysAndValues
from gptjax.model.config import ModelConfig
from gptjax.model.kernels import LANES

# Positions of a page.
PAGE = 16
# Keys and values of all pages in each layer, [P, Z, K, H] each; or joined, [P, Z, 2K, W], the key
# of each head before its value, and W the head width rounded up to whole registers of a TPU.
Pools = list[KeysAndValues] | list[jax.Array]


def empty_pools(config: ModelConfig, pages: int, *, joined: bool) -> Pools:
  """Pages without content, in the compute dtype; `joined` is `tpu.joins_pages` of the model."""

  def zeros() -> jax.Array:
    shape = _page_shape(config, joined)
    return constrain(jnp.zeros((pages, *shape), config.dtype), None, None, "kv_heads", None)

  layers = range(config.num_layers)
  return [zeros() if joined else KeysAndValues(zeros(), zeros()) for _ in layers]


def page_bytes(config: ModelConfig, *, joined: bool) -> int:
  """Bytes of one page in all layers."""
  values = math.prod(_page_shape(config, joined)) * (1 if joined else 2)
  return config.num_layers * values * jnp.dtype(config.dtype).itemsize


def _page_shape(config: ModelConfig, joined: bool) -> tuple[int, int, int]:
  """Shape of a page, or of the keys of one."""
  K, H = config.num_kv_heads, config.head_dim
  return (PAGE, 2 * K, -(-H // LANES) * LANES) if joined else (PAGE, K, H)


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
    keys, values, *row = per_shard(
      lambda *arrays: _write(*arrays, length=self.length),
      [heads] * 4 + [rows] * 2,
      [heads] * 4,
    )(*self.pool, k_BTKH, v_BTKH, self.tables_BI, positions_BT)
    return self.with_pool(KeysAndValues(keys, values)), KeysAndValues(*row)

  def with_pool(self, pool: KeysAndValues | jax.Array) -> "PagedCache":
    return dataclasses.replace(self, pool=pool)


def _write(keys_PZKH, values_PZKH, k_BTKH, v_BTKH, tables_BI, positions_BT, *, length: int):
  """Writes keys and values; returns both pools and all of the rows, each [B, S, K, H]."""
  _, Z, K, H = keys_PZKH.shape
  cells = cells_of(tables_BI, positions_BT, keys_PZKH.shape)

  def put(pool_PZKH, x_BTKH):
    flat = pool_PZKH.reshape(-1, K, H)
    flat = flat.at[cells].set(x_BTKH.reshape(-1, K, H).astype(flat.dtype), mode="drop")
    return flat.reshape(pool_PZKH.shape)

  def read(pool_PZKH):
    # All pages of a row's table, in the order of its positions.
    rows = pool_PZKH[tables_BI].reshape(-1, tables_BI.shape[1] * Z, K, H)
    return rows[:, :length].astype(k_BTKH.dtype)

  pools = put(keys_PZKH, k_BTKH), put(values_PZKH, v_BTKH)
  return *pools, *map(read, pools)


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
