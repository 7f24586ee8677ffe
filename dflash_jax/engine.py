"""Many requests on one device: admission, shared prefixes, streaming.

    engine = Engine(dflash_jax.load("configs/smollm2_135m.py"))
    handles = [engine.submit(Request(text)) for text in texts]
    engine.run()
    print(handles[0].result().text)

A turn belongs to one lane. It queues work on the device: a piece of a prompt,
rows that sit down, R rounds for all rows. While the device is at it, the host
calls back with the tokens of the turn before. Then it waits for the rounds, and
sees who is done. Every request gets, token for token, what plain decoding with
its law and seed gives, whatever else is in the engine. docs/serving.md has the
flow and the guarantees.
"""

import dataclasses
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Mapping

import jax

from dflash_jax.config import ConfigError
from dflash_jax.model import Model
from dflash_jax.serving import memory
from dflash_jax.serving.books import Counters, EngineConfig, Usage
from dflash_jax.serving.lane import Lane, LaneShape, Report
from dflash_jax.serving.requests import (
  Handle,
  Job,
  Refused,
  Request,
  Result,
)
from dflash_jax.session import check_fits

__all__ = ["Counters", "Engine", "EngineConfig", "Request", "Result", "Usage"]


class Engine:
  """Answers requests; one thread runs it, any may submit and cancel.

  Attributes:
    config: what it may hold.
    lanes: its models, by name.
    counters: what it has done.
  """

  def __init__(
    self,
    models: Model | Mapping[str, Model],
    config: EngineConfig | None = None,
    clock: Callable[[], float] = time.perf_counter,
  ):
    """Allocates nothing; the first request of a lane does.

    Args:
      models: that answer, by name; the first is the default. Those that share
        a target share its parameters if one is made from the other, as
        Model.without_drafter and with_drafter do.
      config: limits.
      clock: seconds. Who pauses an engine between turns, and wants no time of
        its requests to pass, gives it one that stands still meanwhile.
    """
    self.config = config or EngineConfig()
    self._clock = clock
    self.counters = Counters()
    named = {"": models} if isinstance(models, Model) else dict(models)
    if not named:
      raise ConfigError("an engine needs at least one model")
    self.lanes = {
      name: Lane(name, model, self._shape(model), self._end_gap)
      for name, model in named.items()
    }
    sizes = self.config.sizes
    bytes_by_size = {
      name: {size: lane.most_bytes(size) for size in sizes}
      for name, lane in self.lanes.items()
    }
    limit = self.config.memory_bytes or None
    for name, size in memory.plan_rows(bytes_by_size, limit).items():
      self.lanes[name].max_rows = size
    self._lock = threading.Lock()
    self._order = itertools.count()
    self._queues: dict[str, list[Job]] = {name: [] for name in self.lanes}
    self._turns = itertools.cycle(self.lanes.values())
    self._is_closed = False
    self._news: dict[Job, None] = {}  # who has tokens to be told of
    self._ended: list[Job] = []  # who is to be told the result
    self._idle_since: float | None = None

  def _shape(self, model: Model) -> LaneShape:
    config = self.config
    capacity = config.capacity or model.config.decode.max_length
    return LaneShape(
      sizes=config.sizes,
      capacity=capacity,
      max_new_tokens=config.max_new_tokens or capacity,
      max_stops=config.max_stops,
      page=config.page,
      prefix_bytes=config.prefix_bytes,
      trunk=config.trunk,
    )

  # --- For everyone -----------------------------------------------------------

  def submit(self, request: Request) -> Handle:
    """Puts a request into the queue.

    Raises:
      Refused: an unknown lane, a request that it could never hold, a setting
        that is impossible, or a full queue.
      TokenizerError: a prompt in words for a model without a chat template.
    """
    if self._is_closed:
      raise Refused("the engine is closed; make another")
    job = self._make_job(request)
    with self._lock:
      waiting = sum(map(len, self._queues.values()))
      if waiting >= self.config.queue:
        raise Refused(
          f"the queue is full: {waiting} requests wait, of at most "
          f"{self.config.queue}; submit again later, or raise queue"
        )
      heapq.heappush(self._queues[job.request.lane], job)
    return job.handle

  def usage(self) -> Usage:
    """What is held now."""
    lanes = self.lanes.values()
    return Usage(
      waiting=sum(map(len, self._queues.values())),
      rows=sum(lane.num_live + (lane.reading is not None) for lane in lanes),
      pages_used=sum(lane.shelf.prefixes.num_used for lane in lanes),
      pages_kept=sum(lane.shelf.prefixes.num_kept for lane in lanes),
      bytes=sum(lane.bytes_held for lane in lanes),
      peak_bytes=sum(lane.peak_bytes for lane in lanes),
    )

  # --- For the thread that runs it --------------------------------------------

  def run(self) -> None:
    """Turns until there is nothing left to do."""
    while self.step():
      pass

  def step(self) -> bool:
    """One turn; whether there may be more to do."""
    start = self._clock()
    self._drop()
    lane = self._next_lane()
    if lane is None:
      self._idle_since = None
      self._tell_news()  # which may submit again
      return any(self._queues.values())
    seated = self._admit(lane)
    if lane.num_live:
      lane.dispatch()
      self.counters.dispatches += 1
    self._tell_news()
    if seated:
      self._take_first_tokens(seated)
      self._tell_news()
    if lane.num_live:
      report = lane.collect()
      self._idle_since = self._clock()
      self._settle(lane, report)
    if not self._queues[lane.name] and lane.reading is None:
      lane.shrink()
    self.counters.busy_s += self._clock() - start
    return True

  def wait(self) -> None:
    """Returns once the device has done all that is queued."""
    for lane in self.lanes.values():
      lane.wait()

  def close(self) -> None:
    """Ends what is left as cancelled, and gives all memory back."""
    self._is_closed = True
    for lane in self.lanes.values():
      with self._lock:
        jobs = [*self._queues[lane.name], lane.reading, *lane.seats]
      for job in jobs:
        if job is not None:
          job.handle.cancel()
    self._drop()
    self._tell_news()
    for lane in self.lanes.values():
      lane.close()

  # --- A request's way --------------------------------------------------------

  def _make_job(self, request: Request) -> Job:
    """A request, checked; raises as `submit` says."""
    name = request.lane or next(iter(self.lanes))
    lane = self.lanes.get(name)
    if lane is None:
      known = ", ".join(repr(name) for name in self.lanes)
      raise Refused(f"lane {name!r} is unknown; this engine has {known}")
    model, shape = lane.model, lane.shape
    prompt = request.prompt
    if isinstance(prompt, str):
      if model.tokenizer is None:
        raise Refused("this model has no tokenizer; give the prompt as ids")
      message = {"role": "user", "content": prompt}
      prompt = model.tokenizer.encode_chat([message])
    if request.stop_strings and model.tokenizer is None:
      raise Refused("this model has no tokenizer; use stop_ids instead")
    own = request.stop_ids
    job = Job(
      request=dataclasses.replace(request, lane=name),
      handle=Handle(),
      order=next(self._order),
      prompt=[int(token) for token in prompt],
      stops=model.stop_ids if own is None else tuple(own),
      tokenizer=model.tokenizer,
      clock=self._clock,
    )
    _check(job, shape, model.target.config.vocab_size)
    if not lane.max_rows:
      needed = lane.most_bytes(shape.sizes[0])
      raise Refused(
        f"lane {name!r} has no room for a single request: it needs "
        f"{memory.say(needed)} ({memory.say(lane.row_bytes(1))} per row, "
        f"{memory.say(lane.shelf.most_bytes)} of shared prefixes), of "
        f"memory_bytes={memory.say(self.config.memory_bytes)} for all lanes; "
        "lower capacity or prefix_bytes, or raise memory_bytes"
      )
    return job

  def _next_lane(self) -> Lane | None:
    """The lane whose turn it is, of those with work."""
    for lane in itertools.islice(self._turns, len(self.lanes)):
      if lane.num_live or lane.reading or self._queues[lane.name]:
        return lane
    return None

  def _admit(self, lane: Lane) -> list[tuple[Job, jax.Array]]:
    """Reads prompts, a chunk's worth of tokens per turn.

    Returns:
      Those who sat down, with their first tokens.
    """
    left, seated = lane.chunk, []
    while left > 0:
      if lane.reading is None:
        job = self._pop(lane)
        if job is None:
          break
        job.started = self._clock()
        lane.begin(job)
        self.counters.prompt_tokens += len(job.prompt)
        self.counters.hit_tokens += job.hit
      job = lane.reading
      assert job is not None
      first = job.read
      left -= lane.read()
      self.counters.read_tokens += job.read - first
      if job.read == len(job.prompt):
        with self._lock:
          waiting = list(self._queues[lane.name])
        seated.append((job, lane.leave_desk(waiting)))
    return seated

  def _pop(self, lane: Lane) -> Job | None:
    """Who is to be read next."""
    if lane.is_full:
      return None
    with self._lock:
      queue = self._queues[lane.name]
      return heapq.heappop(queue) if queue else None

  def _take_first_tokens(self, seated: list[tuple[Job, jax.Array]]) -> None:
    """Waits for prompts to be read, which is before the rounds begin."""
    for job, token in seated:
      first = jax.device_get(token)[None]
      job.take(first, first * 0, is_over=False)
      self._news[job] = None

  def _settle(self, lane: Lane, report: Report) -> None:
    """Hands a dispatch's tokens to their requests, and ends those done."""
    for place, job in enumerate(list(lane.seats)):
      if job is None:
        continue
      new = slice(len(job.tokens), int(report.count[place]))
      is_over = bool(report.done[place])
      if not job.finish:
        tokens, slots = report.tokens[place, new], report.slots[place, new]
        job.take(tokens, slots, is_over)
      job.statistics = (
        int(report.rounds[place]),
        int(report.verified[place]),
        report.accepted[place].tolist(),
      )
      self._news[job] = None
      if job.finish:
        lane.leave_seat(place)
        self._end(job)

  def _drop(self) -> None:
    """Ends what was cancelled, or whose callback failed, in any phase."""
    for lane in self.lanes.values():
      with self._lock:
        queue = self._queues[lane.name]
        gone = [job for job in queue if job.must_end]
        if gone:
          queue[:] = [job for job in queue if job not in gone]
          heapq.heapify(queue)
      if lane.reading is not None and lane.reading.must_end:
        gone.append(lane.reading)
        lane.drop_reading()
      for place, job in enumerate(lane.seats):
        if job is not None and job.must_end:
          gone.append(job)
          lane.leave_seat(place)
      for job in gone:
        job.end("cancelled")
        self._end(job)

  def _end(self, job: Job) -> None:
    """Notes that a request has left; it is told at the next occasion."""
    self._ended.append(job)
    self.counters.requests += 1
    self.counters.tokens += len(job.tokens)

  def _tell_news(self) -> None:
    """Calls back whoever has new tokens or has come to the end."""
    news, self._news = self._news, {}
    ended, self._ended = self._ended, []
    for job in news:
      job.send()
    for job in ended:
      job.complete()

  # --- Counting ---------------------------------------------------------------

  def _end_gap(self) -> None:
    """The device has work again."""
    if self._idle_since is not None:
      gap = self._clock() - self._idle_since
      self.counters.gaps_s.append(gap)
      self._idle_since = None


def _check(job: Job, shape: LaneShape, vocab: int) -> None:
  """Raises Refused for a request that could never be answered."""
  request, prompt = job.request, job.prompt
  if not prompt:
    raise Refused("the prompt is empty; it needs at least one token")
  wrong = next((token for token in prompt if not 0 <= token < vocab), None)
  if wrong is not None:
    raise Refused(f"token {wrong} is none of the target's {vocab}")
  if not 1 <= request.max_new_tokens <= shape.max_new_tokens:
    raise Refused(
      f"max_new_tokens={request.max_new_tokens} is not between 1 and the "
      f"engine's {shape.max_new_tokens}"
    )
  if not 0 <= request.seed < 2**32:
    raise Refused(f"seed={request.seed} is impossible; use 0 to 2^32 - 1")
  if len(job.stops) > shape.max_stops:
    raise Refused(
      f"{len(job.stops)} stop tokens exceed the engine's max_stops="
      f"{shape.max_stops}; raise it, or use stop_strings"
    )
  try:
    check_fits(len(prompt), request.max_new_tokens, shape.capacity)
  except ConfigError as error:
    raise Refused(str(error)) from error
