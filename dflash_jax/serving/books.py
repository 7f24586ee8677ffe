"""What an engine may hold, what it holds, and what it has done."""

import dataclasses

from dflash_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """What an engine may hold.

  Attributes:
    sizes: rows that a lane's batch may have, ascending; a program each.
    queue: most requests that wait, over all lanes.
    capacity: longest prompt + reply, in tokens; 0 takes decode.max_length of
      each lane's model.
    max_new_tokens: longest reply; 0 takes the capacity.
    page: tokens of a page of shared prefixes.
    prefix_bytes: for the shared prefixes of a lane; 0 shares none.
    trunk: longest prefix, in tokens, that attention reads once for all rows of
      a batch that begin with it; 0 for none, which is best on a CPU.
    memory_bytes: for rows and pages of all lanes; 0 is no limit. Parameters
      and what a pass needs in passing are not counted.
    max_stops: stop tokens of a request, at most.
  """

  sizes: tuple[int, ...] = (1, 2, 4, 8)
  queue: int = 256
  capacity: int = 0
  max_new_tokens: int = 0
  page: int = 32
  prefix_bytes: int = 256 * 2**20
  trunk: int = 0
  memory_bytes: int = 0
  max_stops: int = 8

  def __post_init__(self):
    if not self.sizes or list(self.sizes) != sorted({*self.sizes}):
      raise ConfigError(f"sizes={self.sizes} must be ascending numbers of rows")
    least = {"queue": 1, "page": 2, "max_stops": 1}
    least |= dict.fromkeys(("capacity", "max_new_tokens", "prefix_bytes"), 0)
    least |= {"memory_bytes": 0, "trunk": 0}
    for name, limit in least.items():
      if getattr(self, name) < limit:
        raise ConfigError(
          f"{name}={getattr(self, name)} is impossible; use at least {limit}"
        )
    if self.sizes[0] < 1:
      raise ConfigError(f"sizes={self.sizes} must begin with at least 1 row")


@dataclasses.dataclass
class Counters:
  """What an engine has done since it was made.

  Attributes:
    requests: that came to an end. prompt_tokens: of theirs that were begun.
    hit_tokens: of them, found in shared pages; read_tokens: read.
    tokens: emitted. dispatches: of R rounds.
    gaps_s: from the end of one dispatch until the host had queued more work,
      where there was more to do: the device's idle time, each.
    busy_s: in turns.
  """

  requests: int = 0
  prompt_tokens: int = 0
  hit_tokens: int = 0
  read_tokens: int = 0
  tokens: int = 0
  dispatches: int = 0
  gaps_s: list[float] = dataclasses.field(default_factory=list)
  busy_s: float = 0.0

  @property
  def hit_rate(self) -> float:
    """Share of prompt tokens that were not read."""
    return self.hit_tokens / max(self.prompt_tokens, 1)


@dataclasses.dataclass(frozen=True)
class Usage:
  """What an engine holds now.

  Attributes:
    waiting, rows: requests in the queue; being read or decoded.
    pages_used, pages_kept: of shared prefixes: referenced; all that hold
      something.
    bytes, peak_bytes: of rows and pages, now and at most; rows that change
      their batch's size count twice meanwhile.
  """

  waiting: int
  rows: int
  pages_used: int
  pages_kept: int
  bytes: int
  peak_bytes: int
