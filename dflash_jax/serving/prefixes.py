"""Which texts' beginnings are kept: a tree of pages, on the host.

A page stands for `size` tokens and for all that comes before them: its place in
the tree is the whole text up to its end. Tokens themselves are compared, not
hashes of them, so two texts never share a page by accident. What a page holds
lies on the device, under its number (pages.py).

Whoever uses a text's pages holds a reference to each page of its path. Pages
that nobody uses stay for the next request, until their numbers are needed; the
one that was used the longest ago goes first, and its continuations before it.
"""

import dataclasses
from collections.abc import Sequence

VOID = 0  # the number of a page that holds nothing: where padding is written


@dataclasses.dataclass(eq=False)
class Page:
  """A text that ends at a page's end.

  Attributes:
    number: of the page on the device.
    parent: the text without the last page; None of the empty text.
    tokens: the last page's.
    children: its continuations, by their tokens.
    users: references held.
  """

  number: int
  parent: "Page | None"
  tokens: tuple[int, ...]
  children: dict[tuple[int, ...], "Page"] = dataclasses.field(
    default_factory=dict, repr=False
  )
  users: int = 0


class Prefixes:
  """The tree, with room for a number of pages.

  A path is the list of pages from a text's start, all of them referenced.

  Attributes:
    size: tokens of a page.
    count: pages that fit, numbered from 1.
  """

  def __init__(self, size: int, count: int):
    self.size, self.count = size, count
    self._root = Page(VOID, None, ())
    self._free = list(range(count, 0, -1))
    # Pages without users, the one to go first at the front. A path is left
    # from its end, so that none comes before its own continuations.
    self._idle: dict[Page, None] = {}

  @property
  def num_kept(self) -> int:
    """Pages that hold something."""
    return self.count - len(self._free)

  @property
  def num_used(self) -> int:
    """Pages that somebody holds a reference to."""
    return self.num_kept - len(self._idle)

  def find(self, tokens: Sequence[int]) -> list[Page]:
    """The longest path that a text begins with; takes a reference to it."""
    path: list[Page] = []
    page: Page | None = self._root
    while page is not None:
      page = page.children.get(self._tokens_of(tokens, len(path)))
      if page is not None:
        self._hold(page)
        path.append(page)
    return path

  def extend(self, path: list[Page], tokens: Sequence[int]) -> bool | None:
    """Appends the next page of a text to its path.

    Args:
      path: of the text's beginning; extended in place.
      tokens: the text, which has a whole page more.

    Returns:
      Whether the page is new, so that its number's contents are yet to be
      written; None if there is no room, as all pages are in use.
    """
    parent = path[-1] if path else self._root
    key = self._tokens_of(tokens, len(path))
    page = parent.children.get(key)
    is_new = page is None
    if page is None:
      if not self._free and not self._evict():
        return None
      page = Page(self._free.pop(), parent, key)
      parent.children[key] = page
      page.users = 1
    else:
      self._hold(page)
    path.append(page)
    return is_new

  def count_common(self, path: list[Page], tokens: Sequence[int]) -> int:
    """How many of a path's pages another text begins with."""
    for place, page in enumerate(path):
      if page.tokens != self._tokens_of(tokens, place):
        return place
    return len(path)

  def release(self, path: list[Page]) -> None:
    """Gives a path's references back; empties it."""
    while path:
      page = path.pop()
      page.users -= 1
      if not page.users:
        self._idle[page] = None

  def check(self) -> None:
    """Raises RuntimeError unless the tree and its books agree."""
    numbers, idle, pages = set(self._free), 0, [self._root]
    while pages:
      page = pages.pop()
      pages.extend(page.children.values())
      if page is self._root:
        continue
      idle += page.users == 0
      used_below = any(child.users for child in page.children.values())
      if page.number in numbers or (used_below and not page.users):
        raise RuntimeError(f"page {page.number} is lost to its users")
      numbers.add(page.number)
    if numbers != set(range(1, self.count + 1)) or idle != len(self._idle):
      raise RuntimeError(
        f"{self.count - len(numbers)} of {self.count} pages are lost"
      )

  def _tokens_of(self, tokens: Sequence[int], place: int) -> tuple[int, ...]:
    """A page's tokens; fewer at the end of a text, where no page begins."""
    return tuple(tokens[place * self.size : (place + 1) * self.size])

  def _hold(self, page: Page) -> None:
    if not page.users:
      del self._idle[page]
    page.users += 1

  def _evict(self) -> bool:
    """Frees the number of the page to go first; False if all are in use."""
    page = next(iter(self._idle), None)
    if page is None:
      return False
    del self._idle[page]
    assert page.parent is not None and not page.children
    del page.parent.children[page.tokens]
    self._free.append(page.number)
    return True
