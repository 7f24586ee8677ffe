"""block_attention: a block's queries over a long cache and the block itself."""

from pallas_kernels.block_attention.api import block_attention

__all__ = ["block_attention"]
