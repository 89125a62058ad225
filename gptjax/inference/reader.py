"""A model in its inference form with a cache for several texts, which it reads piece by piece.

Axes: B rows, T positions, C scored positions, S positions of an encoder's text, I pages of a row, V
vocabulary.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptjax.inference.form import inference_form
from gptjax.inference.forward import copy_page, encode, forward, make_pools, put_row
from gptjax.inference.lengths import round_up
from gptjax.inference.pages import PAGE, Pages, check_cache, page_bytes
from gptjax.inference.tpu import joins_pages
from gptjax.model.attention import Attention
from gptjax.model.gpt import GPT
from gptjax.model.stack import Encoded


def page_options(model: GPT, cache: str | None) -> dict[str, Any]:
  """How the pages of a model's cache are kept, for `pages.page_bytes`; `cache` as for `Engine`."""
  if cache is not None:
    check_cache(model.config, cache)
  # The TPU's kernel reads pages of the compute dtype.
  return {"joined": cache is None and joins_pages(model), "cache": cache}


@dataclasses.dataclass
class Row:
  """A text's place in the cache.

  Attributes:
    pages: the pages that hold its keys and values, in order.
    read: how many of its tokens they hold.
    prefix: how many tokens are seen by all, in a model with visibility 'prefix'.
    adapter: the adapter that reads it, in a model that has several.
    slot: where its encoder's text is, in a model with an encoder.
  """

  pages: list[int] = dataclasses.field(default_factory=list)
  read: int = 0
  prefix: int = 0
  adapter: int | None = None
  slot: int = 0


class Reader:
  """Reads tokens of several texts in one step of the model.

  Attributes:
    form, arrays: the model in its inference form.
    pages: which pages of the cache are in use.
    shares: whether texts that begin alike have the same keys and values. Those of a prefix depend
      on all of it, those behind an encoder on its text.
    joined: whether keys and values are joined in the pages (`pages.Pools`).
    adapters: how many adapters the model has to choose from.
  """

  def __init__(
    self,
    model: GPT,
    *,
    rows: int,
    length: int,
    pages: int | None,
    weights: str | None = None,
    cache: str | None = None,
  ):
    """Makes the inference form and an empty cache; arguments as for `Engine`."""
    self.config, self.rows, self.length = model.config, rows, length
    self.has_encoder = model.encoder is not None
    self.shares = self.config.visibility == "causal" and not self.has_encoder
    modules = [module for _, module in nnx.iter_modules(model)]
    self.adapters = max(getattr(module, "adapters", 0) for module in modules)
    self._page = page_options(model, cache)
    self.joined = self._page["joined"]
    options = {"weights": weights, "length": length, "joined": self.joined}
    self.form, self.arrays = inference_form(model, **options)
    # Whether all attention reads the pages where they lie, and only those in use.
    parts = nnx.iter_modules(self.form.model(self.arrays))
    readers = [m for path, m in parts if isinstance(m, Attention) and path[0] != "encoder"]
    in_place = [getattr(module, "in_place", False) for module in readers]
    self._in_place = cache != "int4" and all(in_place)
    self.pages = Pages(pages or self._default_pages())
    self._pools = make_pools(self.config, self.pages.count, **self._page)
    self._encoded: Encoded | None = None

  def _default_pages(self) -> int:
    """Pages for all rows at their longest, but at most an eighth of the memory."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
      memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
      memory = (device.memory_stats() or {}).get("bytes_limit", 2**34)
    most = max(memory // 8 // page_bytes(self.config, **self._page), 1)
    return min(self.rows * -(-self.length // PAGE), most)

  def clear(self) -> None:
    """Empties the cache, also where a step that failed has left none."""
    self.pages = Pages(self.pages.count)
    self._pools = make_pools(self.config, self.pages.count, **self._page)

  def make_room(self, row: Row, tokens: int) -> bool:
    """Takes the pages for the next tokens of a text; false, and none, if there are too few."""
    wanted = -(-(row.read + tokens) // PAGE) - len(row.pages)
    taken = self.pages.take(max(wanted, 0))
    row.pages += taken or []
    return taken is not None

  def find(self, row: Row, tokens: Sequence[int]) -> None:
    """Gives an empty row the pages that already hold the start of a text."""
    if self.shares:
      row.pages = self.pages.find(tokens, row.adapter)
      row.read = len(row.pages) * PAGE

  def advance(self, row: Row, tokens: Sequence[int]) -> None:
    """Notes that the first of a row's pages hold all of these tokens, so that others find them."""
    is_full = len(tokens) // PAGE > row.read // PAGE
    row.read = len(tokens)
    if is_full and self.shares:
      self.pages.remember(row.pages, tokens, row.adapter)

  def fork(self, row: Row) -> Row:
    """Another text that begins like this one: they share full pages, and the last one is copied.

    Raises:
      MemoryError: there is no page for the copy.
    """
    full = row.read // PAGE
    copied = row.pages[full:]
    pages = self.pages.take(len(copied))
    if pages is None:
      raise MemoryError("no page of the cache is left.")
    for source, target in zip(copied, pages, strict=True):
      self._pools = copy_page(self._pools, source, target)
    return dataclasses.replace(row, pages=[*self.pages.share(row.pages[:full]), *pages])

  def release(self, row: Row) -> None:
    """Gives up a row's pages."""
    self.pages.release(row.pages)
    row.pages, row.read = [], 0

  def width(self, pages: int) -> int:
    """Pages in the tables of a step whose longest row has so many: rounded up, so that few sizes
    are compiled, or the most, where a step takes no longer for pages that are not in use."""
    most = -(-self.length // PAGE)
    return most if self._in_place else min(most, max(8, 1 << (pages - 1).bit_length()))

  def read(
    self,
    rows: Sequence[Row],
    tokens: Sequence[Sequence[int]],
    *,
    least: int = 1,
    all_scored: bool = False,
  ) -> jax.Array:
    """Reads the next tokens of each text, for which there is room; `advance` then makes them count.

    Returns the logits after the last token of each row, [B, 1, V], or after each token, [B, T, V];
    B and T are rounded up, T to at least `least`, so that few shapes are compiled.
    """
    B, T = (1 << (size - 1).bit_length() for size in (len(rows), max(map(len, tokens))))
    T = max(T, least)
    tokens_BT, positions_BT = np.zeros((B, T), np.int32), np.full((B, T), -1, np.int32)
    I = self.width(max(len(row.pages) for row in rows))
    tables_BI = np.zeros((B, I), np.int32)
    scored_BC = np.zeros((B, T if all_scored else 1), np.int32)
    for i, (row, new) in enumerate(zip(rows, tokens, strict=True)):
      tokens_BT[i, : len(new)] = new
      positions_BT[i, : len(new)] = np.arange(row.read, row.read + len(new))
      tables_BI[i, : len(row.pages)] = row.pages
      scored_BC[i] = np.arange(T) if all_scored else len(new) - 1

    def column(values: Sequence[int], rest: int) -> np.ndarray:
      return np.array([*values, *[rest] * (B - len(rows))], np.int32)

    options: dict[str, Any] = {}
    if self.config.visibility == "prefix":
      options["prefix_B"] = column([row.prefix for row in rows], 0)
    if self.adapters:
      options["adapters_B"] = column([-1 if r.adapter is None else r.adapter for r in rows], -1)
    if self.has_encoder:
      options |= {"encoded": self._encoded, "encoded_B": column([row.slot for row in rows], 0)}
    logits_BCV, self._pools = forward(
      self.form,
      self.arrays,
      self._pools,
      tokens_BT,
      positions_BT,
      tables_BI,
      scored_BC,
      length=min(self.length, I * PAGE),
      **options,
    )
    return logits_BCV

  def encode(self, row: Row, text: Sequence[int]) -> None:
    """Has the encoder read the text of a row's slot."""
    length = round_up(len(text), 32)
    tokens_1S = np.zeros((1, length), np.int32)
    tokens_1S[0, : len(text)] = text
    one = encode(self.form, self.arrays, tokens_1S, np.array([len(text)], np.int32))
    old = self._encoded
    if old is None or old.hidden_BSD.shape[1] < length:

      def widen(x, old=None):
        zeros = jnp.zeros((self.rows, length, *x.shape[2:]), x.dtype)
        return zeros if old is None else zeros.at[:, : old.shape[1]].set(old)

      self._encoded = jax.tree.map(widen, one, *[] if old is None else [old])
    self._encoded = put_row(self._encoded, row.slot, one)
