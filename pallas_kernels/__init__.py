"""Fast paths of block verification for GPUs; imports jax only."""
