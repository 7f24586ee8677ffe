"""The tree of pages against books that are kept the plain way."""

import random

import pytest

from dflash_jax.serving.prefixes import Prefixes

SIZE = 3


class Books:
  """Which texts are kept, by whom, and when they were last left."""

  def __init__(self, count):
    self.count, self.clock = count, 0
    self.users: dict[tuple, int] = {}
    self.left: dict[tuple, int] = {}

  def begins(self, text, pages):
    return tuple(text[: pages * SIZE])

  def find(self, text):
    pages = 0
    while self.begins(text, pages + 1) in self.users and (
      len(text) >= (pages + 1) * SIZE
    ):
      pages += 1
      self.users[self.begins(text, pages)] += 1
    return pages

  def extend(self, text, pages):
    key = self.begins(text, pages + 1)
    if key in self.users:
      self.users[key] += 1
      return False
    if len(self.users) == self.count:
      free = [
        text
        for text, users in self.users.items()
        if not users
        and not any(k != text and k[: len(text)] == text for k in self.users)
      ]
      if not free:
        return None
      del self.users[min(free, key=self.left.__getitem__)]
    self.users[key] = 1
    return True

  def release(self, text, pages):
    for page in range(pages, 0, -1):
      self.clock += 1
      key = self.begins(text, page)
      self.users[key] -= 1
      self.left[key] = self.clock


def texts_of(prefixes):
  """Every text that is kept, and its users."""
  found, waiting = {}, [(prefixes._root, ())]
  while waiting:
    page, before = waiting.pop()
    for child in page.children.values():
      found[before + child.tokens] = child.users
      waiting.append((child, before + child.tokens))
  return found


def random_text(rng):
  """Few tokens, so that many texts begin alike."""
  return [rng.randrange(2) for _ in range(rng.randrange(1, 6 * SIZE))]


def run(seed, steps, tree=Prefixes):
  """A random schedule; raises where the tree and the books part."""
  rng = random.Random(seed)
  count = rng.randrange(1, 14)
  prefixes, books = tree(SIZE, count), Books(count)
  users = []
  for _ in range(steps):
    action = rng.random()
    if action < 0.4 or not users:
      text = random_text(rng)
      path = prefixes.find(text)
      assert len(path) == books.find(text)
      users.append((text, path))
    elif action < 0.75:
      text, path = rng.choice(users)
      if len(text) >= (len(path) + 1) * SIZE:
        wanted = books.extend(text, len(path))
        assert prefixes.extend(path, text) == wanted
    else:
      text, path = users.pop(rng.randrange(len(users)))
      books.release(text, len(path))
      prefixes.release(path)
    prefixes.check()
    assert texts_of(prefixes) == books.users
    numbers = [page.number for _, path in users for page in path]
    assert 0 not in numbers
    assert prefixes.num_used == len(set(numbers))
    assert prefixes.num_kept == len(books.users)
  for _, path in users:
    prefixes.release(path)
  prefixes.check()
  assert not prefixes.num_used


@pytest.mark.parametrize("seed", range(30))
def test_the_tree_keeps_what_plain_books_keep(seed):
  run(seed, 120)


@pytest.mark.slow
def test_the_tree_keeps_what_plain_books_keep_for_long():
  for seed in range(1000, 1300):
    run(seed, 400)


class EvictsUsed(Prefixes):
  """Frees a page that is referenced, if it is a leaf."""

  def _evict(self):
    if super()._evict():
      return True
    pages = [self._root]
    for page in pages:
      pages.extend(page.children.values())
    page = next(p for p in reversed(pages) if not p.children)
    del page.parent.children[page.tokens]
    self._free.append(page.number)
    return True


class ForgetsAReference(Prefixes):
  def find(self, tokens):
    path = super().find(tokens)
    if path:
      path[-1].users -= 1
    return path


class LeavesFromTheStart(Prefixes):
  """Parents would be freed before their continuations."""

  def release(self, path):
    path.reverse()
    super().release(path)


class EvictsTheNewest(Prefixes):
  def _evict(self):
    self._idle = dict(reversed(self._idle.items()))
    return super()._evict()


class ComparesHashes(Prefixes):
  """Of a hash so short that texts collide."""

  def _tokens_of(self, tokens, place):
    key = super()._tokens_of(tokens, place)
    return (sum(key), *key[1:]) if len(key) == self.size else key


@pytest.mark.parametrize(
  "tree",
  [
    EvictsUsed,
    ForgetsAReference,
    LeavesFromTheStart,
    EvictsTheNewest,
    ComparesHashes,
  ],
)
def test_planted_bugs_are_seen(tree):
  failures = 0
  for seed in range(12):
    try:
      run(seed, 120, tree)
    except (AssertionError, RuntimeError, KeyError, StopIteration):
      failures += 1
  assert failures, f"{tree.__name__} went unnoticed"
