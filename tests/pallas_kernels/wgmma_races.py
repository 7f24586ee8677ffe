"""Race detection for wgmma: the interpreter runs it, but looks for no races.

A read of an operand must come after the copy or the committed store that wrote
it, and before the one that overwrites it.
"""

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

OPERANDS = ("a", "b")


def watch() -> None:
  """From here on, wgmma's reads of shared memory are checked."""
  plain = gpu_callbacks.wgmma
  if getattr(plain, "watched", False):
    return

  def wgmma(*, thread, source_info=None, **arguments):
    memory = gpu_callbacks._get_shared_memory()
    if memory.detect_races:
      clock = memory.get_clock(thread).async_smem_clock
      clock.inc(memory.get_next_tma_thread_id())  # later than what it follows
      for name in OPERANDS:
        key = gpu_callbacks.HostAllocationKey.from_array(
          arguments[f"{name}_allocation_key_as_array"]
        )
        transforms = gpu_callbacks._remove_noop_transforms(
          arguments[f"{name}_transforms"]
        )
        access = memory.access(key, jax.tree.map(int, transforms))
        gpu_callbacks.get_races().check_read(
          thread, clock.copy(), key, access, source_info=source_info
        )
      with memory.lock:  # and the thread goes on after that
        memory.clocks[thread].generic_clock.update(clock)
        memory.clocks[thread].async_smem_clock.update(clock)
    return plain(thread=thread, source_info=source_info, **arguments)

  wgmma.watched = True
  gpu_callbacks.wgmma = wgmma
