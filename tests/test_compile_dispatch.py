"""The whole dispatch, for devices that are not here."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tools.compile_dispatch import (
  KERNELS,
  ROUNDS,
  Dispatch,
  Setting,
  dispatch_of,
  examine,
  memory_of,
)


@pytest.mark.parametrize("platform", ["rocm", "tpu"])
@pytest.mark.parametrize(
  "setting",
  [
    Setting(2, tree_nodes=8),
    Setting(2, "coupled", 1.0),
    Setting(2, "block", 1.0),
  ],
  ids=["greedy tree", "coupled", "block"],
)
def test_the_dispatch_lowers_for_other_makers_devices(platform, setting):
  """As XLA alone, so an AMD GPU or a TPU is a flag away."""
  decoder, params, state = dispatch_of("smollm2_135m", setting)
  exported = jax.export.export(
    jax.jit(lambda params, state: decoder.run_rounds(params, state)),
    platforms=[platform],
  )(params, state)
  assert exported.platforms == (platform,)
  text = exported.mlir_module()
  assert "mosaic" not in text and "stablehlo.while" in text


PROGRAM = """
  %while.1 = (s32[]) while(%t), backend_config={"known_trip_count":{"n":"8"}}
  %f.1 = f32[8] fusion(%p), kind=kLoop
  %c.1 = f32[8] custom-call(%p), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(run_rounds)/while/body/lm_head_verify/mpmd_map"}
"""


def test_a_program_is_read_for_what_it_is_made_of():
  assert examine(PROGRAM) == ({"lm_head_verify": 1}, 1, [8], [])
  waiting = PROGRAM.replace("known_trip_count", "unknown")
  assert examine(waiting)[2] == [0]
  sending = PROGRAM + "  %s = f32[8] send(%p)\n"
  assert examine(sending)[3] == ["send"]
  branching = PROGRAM + "  %b = (f32[8]) conditional(%i, %p, %p)\n"
  assert examine(branching)[3] == ["conditional"]
  calling = PROGRAM.replace("mosaic_gpu_v2", "xla_ffi_python_gpu_callback")
  assert examine(calling)[3] == ["xla_ffi_python_gpu_callback"]


def test_every_fault_of_a_program_is_named():
  sound = Dispatch(
    model="m",
    target="b200",
    setting=Setting(),
    kernels=dict.fromkeys(KERNELS, 2),
    fusions=1,
    loops=[ROUNDS],
    host=[],
    argument_bytes=7,
    temporary_bytes=3,
  )
  assert sound.faults(10) == []
  for change, message in [
    (dict(kernels={}), "no lm_head_verify kernel"),
    (dict(setting=Setting(rule="block"), kernels={}), "no block_verify"),
    (dict(setting=Setting(fp8=True), kernels={}), "no fp8_matmul"),
    (dict(host=["send"]), "send needs the host"),
    (dict(loops=[8, 0]), "a loop of unknown length"),
    (dict(argument_bytes=8), "do not fit"),
  ]:
    faults = dataclasses.replace(sound, **change).faults(10)
    assert any(message in fault for fault in faults)


def test_descriptions_say_how_much_memory_there_is():
  assert memory_of("b200") > memory_of("h100") > 79e9


def test_abstract_operands_are_the_models_own_sizes():
  _, params, state = dispatch_of("qwen3_8b", Setting())
  count = sum(x.size for x in jax.tree.leaves(params.target))
  assert count == 8_190_735_360
  drafter = sum(x.size for x in jax.tree.leaves(params.drafter))
  assert drafter == 1_048_626_432
  _, params, _ = dispatch_of("qwen3_8b", Setting(fp8=True))
  sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(params.drafter)]
  assert 0.5 < sum(sizes) / (2 * drafter) < 0.501
  assert state.cache.dtype == jnp.bfloat16
