"""Batches made ahead of time: the same, in order, and errors where they are."""

import contextlib
import threading

import pytest

from train.prefetch import prefetch

LONG = 20.0  # seconds; none of these waits when all is well


def test_batches_come_in_order_each_made_once():
  made = []

  def make(step):
    made.append(step)
    return step * step

  assert list(prefetch(make, range(3, 20))) == [n * n for n in range(3, 20)]
  assert made == list(range(3, 20))
  assert list(prefetch(make, range(5, 5))) == []


def test_the_next_batch_is_made_while_this_one_is_used():
  made = {step: threading.Event() for step in range(4)}
  threads = set()

  def make(step):
    threads.add(threading.current_thread())
    made[step].set()
    return step

  with contextlib.closing(prefetch(make, range(4))) as batches:
    assert next(batches) == 0
    assert made[1].wait(LONG)
    assert not made[2].is_set()
    assert next(batches) == 1
    assert made[2].wait(LONG)
  assert len(threads) == 1 and threading.current_thread() not in threads


def test_an_error_comes_as_itself_and_in_its_place():
  error = ValueError("this shard is damaged")

  def make(step):
    if step == 2:
      raise error
    return step

  batches = prefetch(make, range(5))
  assert [next(batches), next(batches)] == [0, 1]
  with pytest.raises(ValueError, match="shard") as caught:
    next(batches)
  assert caught.value is error


def test_leaving_early_ends_the_thread():
  made = []

  def make(step):
    made.append((step, threading.current_thread()))
    return step

  with contextlib.closing(prefetch(make, range(1000))) as batches:
    next(batches)
  assert len(made) <= 2
  assert not any(thread.is_alive() for _, thread in made)
