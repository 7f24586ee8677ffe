"""lm_head_verify: what verification asks of the head, without its logits."""
