"""A lane: one model's requests, decoded together in the rows of one batch.

A prompt is read at the desk, a state of one row, apart from the batch: in
pieces, each up to a multiple of the chunk, so that the same tokens are read in
the same shapes by every request. What it has read takes a seat in the batch,
which is as large as there are requests, in a few sizes: a program each.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from dflash_jax.costs import measure_costs
from dflash_jax.decode_state import DecodeState, ModelParams
from dflash_jax.laws import Laws
from dflash_jax.model import Model
from dflash_jax.sampling import GREEDY, Sampling
from dflash_jax.serving import memory, pages, rows
from dflash_jax.serving.prefixes import Page
from dflash_jax.serving.requests import Job
from dflash_jax.serving.shelf import Shelf
from dflash_jax.session import bucket


@dataclasses.dataclass(frozen=True)
class LaneShape:
  """What a lane allocates by.

  Attributes:
    sizes: rows that a batch may have, ascending.
    capacity: longest prompt + reply, in tokens.
    max_new_tokens: longest reply.
    max_stops: W, stop tokens of a request.
    page: tokens of a page.
    prefix_bytes: for shared prefixes, at most.
    trunk: longest prefix that a batch reads once, in tokens; 0 for none.
  """

  sizes: tuple[int, ...]
  capacity: int
  max_new_tokens: int
  max_stops: int
  page: int
  prefix_bytes: int
  trunk: int = 0


@dataclasses.dataclass(frozen=True)
class Report:
  """What the host sees of a batch after a dispatch; as in DecodeState."""

  done: np.ndarray
  count: np.ndarray
  tokens: np.ndarray
  slots: np.ndarray
  rounds: np.ndarray
  verified: np.ndarray
  accepted: np.ndarray
  drafts: np.ndarray


class Lane:
  """The device side of one model in an engine.

  All calls but `collect` and `wait` only queue work on the device.

  Attributes:
    name: in the engine.
    model, decoder: what decodes, and how: by the coupled rule, each row by its
      own law, so that every request gets the tokens of plain decoding.
    shape: of all that is allocated.
    max_rows: a size of the shape that is not to be exceeded.
    on_launch: called before work is queued.
    seats: the batch's rows; None where nobody sits.
    reading: whose prompt is at the desk.
    wants_drafts: whether the next dispatch drafts; each report says it anew.
    shelf: of shared prefixes.
    peak_bytes: most that was allocated, as the batch changed its size.
  """

  def __init__(
    self,
    name: str,
    model: Model,
    shape: LaneShape,
    on_launch: Callable[[], None],
  ):
    self.name, self.model, self.shape = name, model, shape
    self.on_launch = on_launch
    # The coupled rule, whose drafts share the target's noise; laws and stop
    # tokens are each row's own.
    self.decoder = dataclasses.replace(
      model.decoder(Sampling(temperature=1.0)), sampling=GREEDY, stop_ids=()
    )
    self.max_rows = 0
    self._bytes: dict[int, int] = {}  # of a batch, by size
    self.chunk = bucket(shape.capacity, model.config.decode.prefill_chunk)
    held = shape.capacity + self.decoder.slack(self.chunk)
    unit = shape.page * pages.AT_ONCE  # a call moves whole ones
    self.slots = -(-held // unit) * unit
    self.trunk_pages = shape.trunk // unit * pages.AT_ONCE
    self.shelf = Shelf(
      self.decoder.drafter, self._shapes(1), shape.page, shape.prefix_bytes
    )
    self.reading: Job | None = None
    self.seats: list[Job | None] = []
    self.peak_bytes = 0
    self._desk: DecodeState | None = None
    self._batch: DecodeState | None = None
    self._trunk: list[Page] = []
    self._members: set[Job] = set()
    self.wants_drafts = True
    self._moved = False  # whether seats have changed since the last dispatch

  # --- Memory -----------------------------------------------------------------

  def row_bytes(self, size: int) -> int:
    """Of a batch of a size."""
    if size not in self._bytes:
      self._bytes[size] = memory.bytes_of(self._shapes(size))
    return self._bytes[size]

  def most_bytes(self, size: int) -> int:
    """Of the lane with batches up to a size, while it changes them."""
    batches = [n for n in self.shape.sizes if n <= size][-2:]
    # Of a page, a trunk takes the target's part alone.
    trunk = self.trunk_pages * self.shelf.page_bytes
    fixed = self.row_bytes(1) + self.shelf.most_bytes + trunk
    return fixed + sum(map(self.row_bytes, batches))

  @property
  def bytes_held(self) -> int:
    """Allocated now."""
    states = [s for s in (self._desk, self._batch) if s is not None]
    return memory.bytes_of(states) + self.shelf.bytes_held

  def _shapes(self, size: int) -> DecodeState:
    return jax.eval_shape(lambda: self._new_state(size))

  def _new_state(self, size: int) -> DecodeState:
    state = self.decoder.init_state(size, self.slots, self.shape.max_new_tokens)
    return self._tell(state, [None] * size)

  # --- A prompt at the desk ---------------------------------------------------

  @property
  def num_live(self) -> int:
    """Rows that decode."""
    return sum(job is not None for job in self.seats)

  @property
  def is_full(self) -> bool:
    """Whether nobody could take a seat."""
    return self.num_live >= self.max_rows

  def begin(self, job: Job) -> None:
    """Opens the desk for a prompt, with the longest prefix that is kept."""
    self.on_launch()
    self.shelf.open()
    if self._desk is None:
      self._desk = self._new_state(1)
    if job.request.shares_prefix:
      job.path = self.shelf.prefixes.find(job.prompt)
    found = len(job.path) * self.shelf.size
    # A row chooses its first token by reading the prompt's last.
    job.hit = min(found - self.decoder.drafter.rereads, len(job.prompt) - 1)
    job.hit = job.read = max(job.hit, 0)
    self._desk = rows.reopen(
      self.decoder,
      rows.bare(self._desk),
      np.array([job.hit], np.int32),
      np.array([job.request.max_new_tokens], np.int32),
      np.array([job.request.seed], np.uint32),
    )
    self._desk = self.shelf.give(self._desk, job.path)
    self._desk = self._tell(self._desk, [job])
    self.reading = job

  def read(self) -> int:
    """Reads a piece of the prompt at the desk; how many tokens, padded."""
    job = self.reading
    assert job is not None and self._desk is not None
    self.on_launch()
    first = job.read
    last = min(len(job.prompt), (first // self.chunk + 1) * self.chunk)
    size = bucket(last - first, self.chunk)
    tokens = np.zeros((1, size), np.int32)
    tokens[0, : last - first] = job.prompt[first:last]
    self._desk = self.decoder.prefill(
      self.model.params,
      self._desk,
      tokens,
      np.array([last - first], np.int32),
      np.array([last == len(job.prompt)]),
    )
    job.read = last
    self._keep(self._desk, 0, job, job.prompt[:last])
    return size

  def leave_desk(self, waiting: Sequence[Job]) -> jax.Array:
    """Seats the row whose prompt is read; its first token i32[].

    Args:
      waiting: who would soon sit down too.
    """
    job = self.reading
    assert job is not None and self._desk is not None
    if None not in self.seats:
      self._arrange(self.num_live + 1 + len(waiting))
    if not self._members:
      self._choose_trunk(job, waiting)
    pages_of_trunk = len(self._trunk)
    is_member = pages_of_trunk > 0 and (
      job.path[:pages_of_trunk] == self._trunk
    )
    if is_member:
      self._members.add(job)
    place = self.seats.index(None)
    assert self._batch is not None
    self._batch, token = rows.seat(
      rows.bare(self._batch), rows.bare(self._desk), place, is_member
    )
    self.seats[place], self.reading = job, None
    self._moved = True
    return token

  def _choose_trunk(self, job: Job, waiting: Sequence[Job]) -> None:
    """Takes the longest prefix that a job and one that waits have in common.

    Nobody is on the trunk, so it may be another, or none.
    """
    most = 0
    for other in waiting if self.trunk_pages else ():
      common = self.shelf.prefixes.count_common(job.path, other.prompt)
      most = max(most, common // pages.AT_ONCE * pages.AT_ONCE)
    path = job.path[: min(most, self.trunk_pages)]
    if path == self._trunk:
      return
    trunk = self.shelf.join(path, self.trunk_pages) if path else None
    assert self._batch is not None
    self._trunk, self._batch = path, rows.lean(self._batch, trunk)
    self.peak_bytes = max(self.peak_bytes, self.bytes_held)

  def drop_reading(self) -> None:
    """Clears the desk; the pages that were read stay."""
    assert self.reading is not None
    self.shelf.prefixes.release(self.reading.path)
    self.reading = None

  # --- Rows of the batch ------------------------------------------------------

  def dispatch(self) -> None:
    """Queues R rounds of the batch."""
    self.on_launch()
    if self._moved:
      assert self._batch is not None
      self._batch = self._tell(self._batch, self.seats)
      self._moved = False
    run = self.decoder.run_plain
    if self.wants_drafts:
      run = self.decoder.run_rounds
    self._batch = run(self._params(len(self.seats)), self._batch)

  def collect(self) -> Report:
    """Waits for the batch."""
    state = self._batch
    assert state is not None
    names = [field.name for field in dataclasses.fields(Report)]
    report = Report(*jax.device_get([getattr(state, name) for name in names]))
    self.wants_drafts = bool(report.drafts)
    for place, job in enumerate(self.seats):
      if job is None and not report.done[place]:
        raise RuntimeError(f"row {place} of lane {self.name} is nobody's")
    return report

  def wait(self) -> None:
    """Returns once the device has done all that is queued."""
    jax.block_until_ready((self._desk, self._batch))
    self.shelf.wait()

  def leave_seat(self, place: int) -> None:
    """Frees a row; of one that came to its end, the reply's pages are kept."""
    job, state = self.seats[place], self._batch
    assert job is not None and state is not None
    if job.finish in ("stop", "budget", "string"):
      self._keep(state, place, job, [*job.prompt, *job.tokens[:-1]])
    self.shelf.prefixes.release(job.path)
    self.seats[place] = None
    self._members.discard(job)
    self._moved = True
    others = np.arange(len(self.seats)) != place
    self._batch = dataclasses.replace(state, done=state.done | ~others)

  def shrink(self) -> None:
    """Gives rows back that nobody needs now; one size is always kept."""
    if self._batch is not None and self.num_live < len(self.seats):
      self._arrange(self.num_live)

  def close(self) -> None:
    """Gives everything back; what drafts were worth stays with the model."""
    assert not self.num_live and self.reading is None
    if self._batch is not None:
      belief = jax.device_get(self._batch.width)
      self.model.beliefs[self.decoder] = belief
    self._desk = self._batch = None
    self.seats, self._trunk = [], []
    self.shelf.close()

  def _arrange(self, wanted: int) -> None:
    """Makes the batch the smallest that holds so many rows, if it can."""
    sizes = [size for size in self.shape.sizes if size <= self.max_rows]
    size = min((n for n in sizes if n >= wanted), default=sizes[-1])
    if size == len(self.seats):
      return
    taken = [i for i, job in enumerate(self.seats) if job is not None]
    free = size - len(taken)
    both = self.bytes_held + self.row_bytes(size)
    self.peak_bytes = max(self.peak_bytes, both)
    self._params(size)  # costs are measured while there is room for that
    if self._batch is None:
      self._batch, self._trunk = self._new_state(size), []
      belief = self.model.beliefs.get(self.decoder, self._batch.width)
      self._batch = dataclasses.replace(self._batch, width=belief)
    else:
      order = np.array(taken + [-1] * free, np.int32)
      self._batch = rows.arrange(rows.bare(self._batch), order)
    self.seats = [self.seats[i] for i in taken] + [None] * free
    self._moved = True

  # --- What the calls are made of ---------------------------------------------

  def _params(self, size: int) -> ModelParams:
    """The model's, with the costs of a batch of a size where they are read."""
    params = self.model.params
    if not self.decoder.policy.needs_costs:
      return params
    tables, key = self.model.cost_tables, (self.decoder, size)
    if key not in tables:
      tables[key] = measure_costs(
        self.decoder, params, lambda: self._new_state(size)
      )
    return dataclasses.replace(params, costs=tables[key])

  def _tell(self, state: DecodeState, jobs: list[Job | None]) -> DecodeState:
    """Gives rows the laws and stop tokens of those who sit there."""
    laws = [job.request.sampling if job else GREEDY for job in jobs]
    stops = np.full((len(jobs), self.shape.max_stops), -1, np.int32)
    for row, job in enumerate(jobs):
      if job is not None:
        stops[row, : len(job.stops)] = job.stops
    return dataclasses.replace(state, laws=Laws.of(laws), stops=stops)

  def _keep(
    self, state: DecodeState, row: int, job: Job, held: list[int]
  ) -> None:
    """Keeps the pages of a text that a row holds."""
    if job.request.shares_prefix:
      self.shelf.keep(rows.bare(state), row, job.path, held)
