"""Every program is run once before a clock starts.

What an engine compiles depends on prompts' lengths, on the laws in a batch, on
how its size changes, on pages that are found: on what happens to meet. Here all
of it happens.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from dflash_jax.engine import EngineConfig, Request
from dflash_jax.model import Model
from dflash_jax.sampling import GREEDY, Sampling
from dflash_jax.serving.requests import Handle
from dflash_jax.session import MIN_CHUNK
from eval.closed_loop import Mode, Server

_REPLY = 16  # tokens: more than a round emits on devices that pick a width


def rehearse(
  model: Model, mode: Mode, config: EngineConfig, laws: Sequence[Sampling]
) -> None:
  """Runs each program once that a Server may come to run, of any fewer sizes.

  Those that read prompts, at each law and length of a piece; those that decode,
  at each law and size of a batch, drafting and not; those that move rows and
  pages. What drafts were worth meanwhile is forgotten.

  Args:
    model, mode, config: of the Server.
    laws: of all requests to come.
  """
  kept = dict(model.beliefs)
  actor = _Actor(Server(model, mode, config))
  actor.read(laws)
  actor.decode(laws)
  actor.resize()
  actor.leave()
  model.beliefs.clear()
  model.beliefs.update(kept)


class _Actor:
  """Sends requests of random tokens, for what they make an engine compile."""

  def __init__(self, server: Server):
    self.engine = server.engine
    (self.lane,) = server.engine.lanes.values()
    shape = self.lane.shape
    self.sizes = [n for n in shape.sizes if n <= self.lane.max_rows]
    self.longest = shape.max_new_tokens
    self.page = shape.page
    self._vocab = server.model.target.config.vocab_size
    self._rng = np.random.default_rng(0)

  def read(self, laws: Sequence[Sampling]) -> None:
    """Prompts of each length of piece, each twice: the second finds pages."""
    lengths, piece = [self.page + 1], MIN_CHUNK  # at least one fills a page
    while piece <= self.lane.chunk:
      lengths.append(piece)
      piece *= 2
    for law, length in itertools.product(laws, lengths):
      prompt = self._prompt(length)
      for _ in range(2):
        self._send(prompt, 1, law)
        self.engine.run()

  def decode(self, laws: Sequence[Sampling]) -> None:
    """Batches of each size, drafting or not, whose replies fill a page.

    What dispatches do is imposed on the lane until all rows decode: what its
    policy would choose depends on costs and drafts, and so on the day.
    """
    budget = min(_REPLY, self.longest)
    ways = (True, False) if self.lane.decoder.policy.rests else (True,)
    for law, size, drafts in itertools.product(laws, self.sizes, ways):
      for _ in range(size):
        self._send(self._prompt(self.page - 1), budget, law)
      while True:
        is_last = not self.engine.usage().waiting and not self.lane.reading
        self.lane.wants_drafts = drafts
        self.engine.step()
        if is_last:
          break
      self.engine.run()

  def resize(self) -> None:
    """Batches that grow from each size to each, and shrink back."""
    for few, many in itertools.combinations(self.sizes, 2):
      groups = []
      for count in (few, many - few):
        groups.append(
          [self._send(self._prompt(1), self.longest) for _ in range(count)]
        )
        while self.engine.usage().waiting:
          self.engine.step()
      for handles in reversed(groups):
        for handle in handles:
          handle.cancel()
        self.engine.step()
      self.engine.run()

  def leave(self) -> None:
    """Gives everything back."""
    self.engine.close()

  def _prompt(self, length: int) -> list[int]:
    most = self.lane.shape.capacity - self.longest
    length = max(min(length, most), 1)
    return self._rng.integers(0, self._vocab, length).tolist()

  def _send(
    self, prompt: list[int], budget: int, law: Sampling = GREEDY
  ) -> Handle:
    return self.engine.submit(
      Request(prompt, max_new_tokens=budget, sampling=law, stop_ids=())
    )
