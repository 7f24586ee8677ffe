"""lm_head_verify: what verification asks of the head, without its logits."""

from pallas_kernels.lm_head_verify.api import lm_head_verify
from pallas_kernels.lm_head_verify.row_stats import Draws, RowStats

__all__ = ["Draws", "RowStats", "lm_head_verify"]
