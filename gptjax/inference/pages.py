"""The key-value cache in pages, which sequences that begin alike share.

Kwon et al. 2023 (arXiv:2309.06180), section 4. Axes: B batch, T query positions, S positions of a
row, K key-value heads, H head width, P pages, Z positions of a page, I pages of a row.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from gptjax.devices.sharding import constrain
from gptjax.model.attention import KeysAndValues
from gptjax.model.config import ModelConfig

# Positions of a page.
PAGE = 16
# Keys and values of all pages in each layer, [P, Z, K, H] each.
Pools = list[KeysAndValues]


def empty_pools(config: ModelConfig, pages: int) -> Pools:
  """Pages without content, in the compute dtype."""
  shape = (pages, PAGE, config.num_kv_heads, config.head_dim)

  def zeros() -> jax.Array:
    return constrain(jnp.zeros(shape, config.dtype), None, None, "kv_heads", None)

  return [KeysAndValues(zeros(), zeros()) for _ in range(config.num_layers)]


def page_bytes(config: ModelConfig) -> int:
  """Bytes of one page in all layers."""
  values = PAGE * config.num_kv_heads * config.head_dim
  return 2 * config.num_layers * values * jnp.dtype(config.dtype).itemsize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
  """A layer's cache (`attention.LayerCache`) whose rows are spread over pages.

  Attributes:
    pool: the layer's keys and values, [P, Z, K, H] each.
    tables_BI: int32, the pages of each row, in order.
    prefix_B: int32, the length of the prefix that all of a row's tokens see; None is 0.
    length: positions that a row may have, at most I Z.
  """

  pool: KeysAndValues
  tables_BI: jax.Array
  prefix_B: jax.Array | None
  length: int = dataclasses.field(metadata={"static": True})

  def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array):
    """Writes at the positions that are not negative; returns the cache and rows [B, S, K, H]."""
    pages, size, K, H = self.pool.keys_BSKH.shape
    page_BT = jnp.take_along_axis(self.tables_BI, jnp.maximum(positions_BT, 0) // size, axis=1)
    place_BT = jnp.where(positions_BT < 0, pages * size, page_BT * size + positions_BT % size)
    cells = place_BT.reshape(-1)

    def put(pool_PZKH, x_BTKH):
      flat = pool_PZKH.reshape(-1, K, H)
      flat = flat.at[cells].set(x_BTKH.reshape(-1, K, H).astype(flat.dtype), mode="drop")
      flat = constrain(flat, None, "kv_heads", None)
      return flat.reshape(pool_PZKH.shape)

    pool = KeysAndValues(*map(put, self.pool, (k_BTKH, v_BTKH)))
    # All pages of a row's table, in the order of its positions.
    rows = (x[self.tables_BI].reshape(-1, self.tables_BI.shape[1] * size, K, H) for x in pool)
    rows = KeysAndValues(*(x[:, : self.length].astype(k_BTKH.dtype) for x in rows))
    return self.with_pool(pool), rows

  def with_pool(self, pool: KeysAndValues) -> "PagedCache":
    return dataclasses.replace(self, pool=pool)


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
