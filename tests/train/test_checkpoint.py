"""Checkpoints: exact, complete or absent, and the right ones kept."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.drafters import DFlash
from tests.testing import tiny_drafter_config, tiny_target_config
from train.checkpoint import (
  CheckpointError,
  Checkpoints,
  _checksums,
  quieten_orbax,
)
from train.state import TrainState, fold_tap_scale


@pytest.fixture(scope="module")
def drafter() -> DFlash:
  """A drafter of tiny sizes."""
  return DFlash(tiny_drafter_config(tiny_target_config()))


@pytest.fixture(scope="module")
def state(drafter) -> TrainState:
  """A state of odd numbers."""
  params = drafter.init(jax.random.key(0))
  return TrainState(
    step=jnp.int32(0),
    params=params,
    optimizer=({"mu": params, "count": jnp.int32(7)}, ()),
    tap_scale=jnp.linspace(0.1, 3.0, 48),
  )


def at(state: TrainState, step: int) -> TrainState:
  """The state at a step, its parameters marked by it."""
  params = jax.tree.map(lambda leaf: leaf + step, state.params)
  return dataclasses.replace(state, step=jnp.int32(step), params=params)


def equal(first, second) -> bool:
  return jax.tree.all(jax.tree.map(np.array_equal, first, second))


def test_a_state_is_restored_bit_for_bit(tmp_path, state):
  checkpoints = Checkpoints(tmp_path, keep=2)
  assert checkpoints.latest_step is None and checkpoints.best_step is None
  checkpoints.save(at(state, 3), tau=1.5)
  checkpoints.close()
  again = Checkpoints(tmp_path, keep=2)
  assert again.taus == {3: 1.5}
  restored = again.restore(state)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert equal(restored, at(state, 3))


def test_the_newest_and_the_best_are_kept(tmp_path, state):
  checkpoints = Checkpoints(tmp_path, keep=2)
  taus = {1: 1.2, 2: 2.5, 3: 1.9, 4: 2.5, 5: 2.0, 6: 1.1}
  for step, tau in taus.items():
    checkpoints.save(at(state, step), tau)
  checkpoints.close()
  again = Checkpoints(tmp_path, keep=2)
  assert again.latest_step == 6
  assert taus[again.best_step] == 2.5
  assert {5, 6, again.best_step} == set(again.taus)
  assert equal(again.restore(state), at(state, 6))


def test_a_drafter_is_read_without_its_optimizer(tmp_path, state, drafter):
  checkpoints = Checkpoints(tmp_path, keep=2)
  checkpoints.save(at(state, 2), 1.0)
  expected = fold_tap_scale(at(state, 2).params, state.tap_scale)
  assert equal(checkpoints.restore_drafter(drafter, 2), expected)
  with pytest.raises(CheckpointError, match=r"no checkpoint of step 9.*\[2\]"):
    checkpoints.restore_drafter(drafter, 9)


def test_another_drafters_checkpoint_is_refused(tmp_path, state, drafter):
  checkpoints = Checkpoints(tmp_path, keep=2)
  checkpoints.save(at(state, 2), 1.0)
  wider = DFlash(dataclasses.replace(drafter.config, mlp_width=41))
  with pytest.raises(CheckpointError, match="cannot read checkpoint 2"):
    checkpoints.restore_drafter(wider, 2)


def test_an_empty_workdir_has_nothing_to_restore(tmp_path, state):
  with pytest.raises(CheckpointError, match="start without --resume"):
    Checkpoints(tmp_path, keep=2).restore(state)


def test_a_workdir_that_cannot_be_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(CheckpointError, match=r"cannot open .*file.*--workdir"):
    Checkpoints(tmp_path / "file", keep=2)


def test_an_unfinished_save_is_never_read(tmp_path, state):
  checkpoints = Checkpoints(tmp_path, keep=2)
  checkpoints.save(at(state, 2), 1.0)
  checkpoints.close()
  directory = tmp_path / "checkpoints"
  partial = directory / "4.orbax-checkpoint-tmp"
  (partial / "state").mkdir(parents=True)
  (partial / "state" / "_METADATA").write_text("{}")
  reader = Checkpoints(tmp_path, keep=2, read_only=True)
  assert reader.latest_step == 2 and partial.exists()
  writer = Checkpoints(tmp_path, keep=2)
  assert equal(writer.restore(state), at(state, 2))
  writer.save(at(state, 4), 1.0)
  assert equal(writer.restore(state), at(state, 4))


def test_a_full_disk_leaves_the_last_good_checkpoint(
  tmp_path, state, small_files
):
  checkpoints = Checkpoints(tmp_path, keep=2)
  checkpoints.save(at(state, 2), 1.0)
  with (
    small_files(4096),
    pytest.raises(CheckpointError, match=r"write checkpoint 4.*--resume"),
  ):
    checkpoints.save(at(state, 4), 1.0)
  again = Checkpoints(tmp_path, keep=2)
  assert equal(again.restore(state), at(state, 2))
  again.save(at(state, 4), 1.0)
  assert equal(again.restore(state), at(state, 4))


def test_a_damaged_checkpoint_is_named(tmp_path, state):
  checkpoints = Checkpoints(tmp_path, keep=2)
  checkpoints.save(at(state, 2), 1.0)
  files = [p for p in tmp_path.rglob("*") if p.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  data = largest.read_bytes()
  middle = len(data) // 2
  flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
  for damaged in (data[:middle], flipped, b""):
    largest.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"checkpoint 2.*delete it"):
      Checkpoints(tmp_path, keep=2).restore(state)


def mix(x: int) -> int:
  """MurmurHash3's finaliser, in Python's integers."""
  x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
  x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
  return x ^ (x >> 16)


def test_a_checksum_is_a_sum_over_elements_and_their_places():
  rng = np.random.default_rng(0)
  leaves = {
    "a": rng.normal(size=(3, 5, 2)).astype(np.float32),
    "b": np.int32(7),
    "c": np.asarray(jnp.asarray(rng.normal(size=11), jnp.bfloat16)),
  }
  expected = 0
  for number, leaf in enumerate(leaves.values()):
    bits = leaf.reshape(-1).view(f"uint{8 * leaf.dtype.itemsize}").tolist()
    for place, word in enumerate(bits):
      where = (mix(number) + place) % 2**32
      expected += mix(word ^ mix(where))
  assert _checksums({"x": leaves, "y": ()}) == {"x": expected % 2**32, "y": 0}


def test_a_checksum_sees_every_change():
  x = np.arange(35, dtype=np.float32).reshape(5, 7)
  swapped, flipped, moved = x.copy(), x.copy(), np.roll(x, 1, axis=0)
  swapped[1, 2], swapped[2, 1] = x[2, 1], x[1, 2]
  flipped.view(np.uint32)[4, 6] ^= 1 << 31
  seen = [
    _checksums({"x": tree})["x"]
    for tree in (x, swapped, flipped, moved, x.T, [x, x], [x, -x])
  ]
  assert len(set(seen)) == len(seen)


def test_orbax_is_quiet_but_warns(tmp_path, state, caplog):
  logger = logging.getLogger("absl")
  filters = list(logger.filters)
  try:
    quieten_orbax()
    with caplog.at_level(logging.DEBUG):
      checkpoints = Checkpoints(tmp_path, keep=2)
      checkpoints.save(at(state, 2), 1.0)
      logger.info("from elsewhere")
    records = [record for record in caplog.records if record.name == "absl"]
    assert [record.getMessage() for record in records] == ["from elsewhere"]
  finally:
    logger.filters[:] = filters
