"""A lane's shared prefixes: the tree on the host, its pages on the device."""

from collections.abc import Sequence

import jax
import numpy as np

from dflash_jax.cache import Trunk
from dflash_jax.decode_state import DecodeState
from dflash_jax.drafters.base import Drafter
from dflash_jax.serving import memory, pages
from dflash_jax.serving.prefixes import VOID, Page, Prefixes


class Shelf:
  """Where rows leave what they have read, and find what others have.

  Attributes:
    size: tokens of a page.
    prefixes: which pages are kept.
  """

  def __init__(
    self, drafter: Drafter, row: DecodeState, size: int, max_bytes: int
  ):
    """Allocates nothing.

    Args:
      drafter: whose context is kept beside the target's.
      row: shapes of a state of one row.
      size: tokens of a page.
      max_bytes: of all pages.
    """
    self.size = size
    self._drafter, self._row = drafter, row
    page = pages.shapes_of(drafter, row, size)
    self.page_bytes = max(memory.bytes_of(page), 1)
    self.prefixes = Prefixes(size, max(max_bytes // self.page_bytes - 1, 0))
    self._store: pages.Store = None

  @property
  def is_none(self) -> bool:
    """Whether there is no room for a single page."""
    return not self.prefixes.count

  @property
  def most_bytes(self) -> int:
    """Of all pages, the void one included."""
    return 0 if self.is_none else (self.prefixes.count + 1) * self.page_bytes

  @property
  def bytes_held(self) -> int:
    """Allocated now."""
    return 0 if self._store is None else memory.bytes_of(self._store)

  def open(self) -> None:
    """Allocates the pages."""
    if self._store is None and not self.is_none:
      self._store = pages.create(
        self._drafter, self._row, self.size, self.prefixes.count
      )

  def close(self) -> None:
    """Gives them back."""
    self._store = None
    self.prefixes = Prefixes(self.size, self.prefixes.count)

  def wait(self) -> None:
    """Returns once the device has done all that is queued."""
    jax.block_until_ready(self._store)

  def give(self, state: DecodeState, path: list[Page]) -> DecodeState:
    """Copies a path's pages into the only row of a state."""
    numbers = {place: page.number for place, page in enumerate(path)}
    for call in pages.batches(numbers):
      state = pages.give(self._drafter, self._store, state, call, self.size)
    return state

  def keep(
    self, state: DecodeState, row: int, path: list[Page], held: Sequence[int]
  ) -> None:
    """Copies the pages of a text out of a row, as far as there is room.

    Args:
      state: which holds the text.
      row: of the state.
      path: of the text, as far as it is kept; extended in place.
      held: the text.
    """
    new = {}
    while len(path) < len(held) // self.size:
      place = len(path)
      is_new = self.prefixes.extend(path, held)
      if is_new is None:
        break
      if is_new:
        new[place] = path[-1].number
    for call in pages.batches(new):
      self._store = pages.keep(
        self._drafter, self._store, state, row, call, self.size
      )

  def join(self, path: list[Page], most: int) -> Trunk:
    """A path's pages as a trunk with room for `most`."""
    numbers = np.full((most,), VOID, np.int32)
    numbers[: len(path)] = [page.number for page in path]
    length = np.int32(len(path) * self.size)
    return pages.join(self._store, numbers, length)
