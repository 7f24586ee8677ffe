"""block_verify: the token and the block rule over whole vocabularies."""

from pallas_kernels.block_verify.api import block_verify
from pallas_kernels.block_verify.rule import Streams

__all__ = ["Streams", "block_verify"]
