"""Which implementation runs: what is chosen, refused, and said."""

import logging

import jax
import pytest
from jax.extend import backend

from pallas_kernels import devices, dispatch
from pallas_kernels.devices import Device

HOPPER = Device("NVIDIA H100 80GB HBM3", "sm90", 132)
BLACKWELL = Device("NVIDIA B200", "sm100", 148)
CPU = Device("cpu", None, 1)


@pytest.fixture
def on(monkeypatch):
  """Pretends that a device is the default one; nothing was said of it yet."""

  def pretend(device):
    monkeypatch.setattr(Device, "current", lambda: device)

  dispatch._log_once.cache_clear()
  return pretend


@pytest.mark.parametrize(
  ("device", "asked", "limit", "chosen"),
  [
    (CPU, None, None, "xla"),
    (CPU, "xla", None, "xla"),
    (HOPPER, None, None, "sm90"),
    (HOPPER, "sm90", None, "sm90"),
    (HOPPER, None, "too wide", "xla"),
    (HOPPER, "xla", "too wide", "xla"),
    (BLACKWELL, None, None, "sm100"),
    (BLACKWELL, "sm100", None, "sm100"),
  ],
)
def test_chosen(on, device, asked, limit, chosen):
  on(device)
  assert dispatch.choose("op", asked, limit) == (chosen, device)


@pytest.mark.parametrize(
  ("device", "asked", "limit", "message"),
  [
    (CPU, "sm90", None, "'sm90' cannot run on cpu; use 'xla'"),
    (HOPPER, "sm100", None, "cannot run on NVIDIA H100.*; use 'sm90'"),
    (BLACKWELL, "sm90", None, "cannot run on NVIDIA B200; use 'sm100'"),
    (HOPPER, "sm90", "too wide", "op: .*'sm90': too wide; use 'xla'"),
    # What cannot run here needs no further reason.
    (CPU, "sm90", "too wide", "cannot run on cpu"),
  ],
)
def test_refused_here(on, device, asked, limit, message):
  on(device)
  with pytest.raises(NotImplementedError, match=message):
    dispatch.choose("op", asked, limit)


@pytest.mark.parametrize("device", [CPU, HOPPER])
@pytest.mark.parametrize("name", ["triton", "", "SM90"])
def test_unknown_everywhere(on, device, name):
  on(device)
  with pytest.raises(ValueError, match="choose one of xla, sm90, sm100, or"):
    dispatch.choose("op", name, None)


def test_what_was_chosen_is_said_once(on, caplog):
  caplog.set_level(logging.DEBUG, dispatch.__name__)
  for device, limit in [(HOPPER, None), (HOPPER, "too wide"), (CPU, None)]:
    on(device)
    dispatch.choose("op", None, limit)
    dispatch.choose("op", None, limit)
  assert caplog.messages == [
    "op on NVIDIA H100 80GB HBM3: sm90",
    "op on NVIDIA H100 80GB HBM3: xla (too wide)",
    "op on cpu: xla (no kernel for it)",
  ]
  levels = [record.levelno for record in caplog.records]
  assert levels == [logging.INFO, logging.INFO, logging.DEBUG]


def test_what_was_asked_for_is_not_said(on, caplog):
  caplog.set_level(logging.INFO, dispatch.__name__)
  on(HOPPER)
  dispatch.choose("op", "sm90", None)
  dispatch.choose("op", "xla", None)
  assert not caplog.messages


def test_this_machine_has_no_kernel():
  with jax.default_device(jax.devices("cpu")[0]):
    assert Device.current() == CPU


@pytest.mark.parametrize(
  ("capability", "architecture"),
  [("9.0", "sm90"), ("10.0", "sm100"), ("10.3", "sm100"), ("8.0", None)],
)
def test_device_by_its_capability(monkeypatch, capability, architecture):
  class Gpu:
    device_kind = "a GPU"
    core_count = 100
    compute_capability = capability

  monkeypatch.setattr(backend, "get_default_device", Gpu)
  assert Device.current() == Device("a GPU", architecture, 100)


@pytest.mark.parametrize(
  ("kind", "mebibytes"),
  [
    ("NVIDIA H100 80GB HBM3", 50),
    ("NVIDIA B200", 126.5),
    ("one that nobody described", 126.5),
  ],
)
def test_cache_of_a_device(kind, mebibytes):
  assert devices.cache_bytes(kind) == mebibytes * 2**20


def test_no_cache_is_claimed_for_a_gpu_that_nobody_described():
  assert devices.known_cache_bytes("NVIDIA H200") is None
  assert devices.known_cache_bytes("cpu") is None
  largest = max(devices.cache_sizes().values())
  assert devices.cache_bytes("NVIDIA H200") == largest
