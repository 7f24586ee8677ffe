"""The token and the block rule over drawn drafts, from logits to tokens."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.block_verify import rule as rules
from pallas_kernels.block_verify.config import (
  CHUNK_STEP,
  VECTOR,
  Config,
  choose_config,
)
from pallas_kernels.block_verify.kernel import KernelPasses
from pallas_kernels.block_verify.reference import XlaPasses
from pallas_kernels.block_verify.rule import Rule, Streams

NAME = "block_verify"


def block_verify(
  target_logits: jax.Array,
  draft_logits: jax.Array,
  drafts: jax.Array,
  seeds: jax.Array,
  moments: jax.Array,
  *,
  rule: str,
  temperature: float,
  draft_temperature: float,
  streams: Streams,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """How many drafts are accepted, and the token that ends the round.

  Plain temperature sampling over the whole vocabulary, of the target and of the
  drafter. The tokens emitted, the accepted drafts and the last, follow the
  target's law (see rule.py). The kernels read all logits once to normalise
  them, those of two rows again to draw, and the block rule most of them a
  second time in between; they write no probabilities.

  Args:
    target_logits: f[B, P + 1, V], after the anchor and after each draft.
    draft_logits: f[B, P, V], what each draft was drawn from.
    drafts: i32[B, P].
    seeds: u32[B], moments: i32[B], addresses of the round's noise.
    rule: "token" or "block".
    temperature: of the target, > 0.
    draft_temperature: of the drafter, > 0.
    streams: of the noise.
    implementation: None for the fastest, or a name in dispatch.IMPLEMENTATIONS.

  Returns:
    accepted i32[B], 0..P, and last i32[B]: what replaces the first rejected
    draft, or a bonus if there is none.

  Raises:
    ValueError: arguments that no implementation takes.
    NotImplementedError: an implementation that cannot run here, or not on them.
  """
  _check(target_logits, draft_logits, drafts, seeds, moments)
  settings = Rule(rule, temperature, draft_temperature, streams)
  _check_rule(settings)
  limit = _kernel_limit(target_logits, draft_logits)
  chosen, _ = dispatch.choose(NAME, implementation, limit)
  target_logits = target_logits.astype(jnp.float32)
  draft_logits = draft_logits.astype(jnp.float32)
  if chosen != "xla":
    return run_kernel(
      settings, target_logits, draft_logits, drafts, seeds, moments
    )
  passes = XlaPasses(settings, target_logits, draft_logits, seeds, moments)
  return rules.verify(
    settings, passes, target_logits, draft_logits, drafts, seeds, moments
  )


def run_kernel(
  rule: Rule,
  target_logits: jax.Array,
  draft_logits: jax.Array,
  drafts: jax.Array,
  seeds: jax.Array,
  moments: jax.Array,
  *,
  config: Config | None = None,
  interpret: object = None,
) -> tuple[jax.Array, jax.Array]:
  """Runs the kernels, which are one and the same on every architecture."""
  passes = KernelPasses(
    rule,
    config or choose_config(target_logits.shape[-1]),
    target_logits,
    draft_logits,
    seeds,
    moments,
    interpret,
  )
  return rules.verify(
    rule, passes, target_logits, draft_logits, drafts, seeds, moments
  )


def _refuse(what: str) -> None:
  raise ValueError(f"{NAME}: {what}")


def _check(target_logits, draft_logits, drafts, seeds, moments) -> None:
  """Raises ValueError for arrays that nobody could verify."""
  if target_logits.ndim != 3 or draft_logits.ndim != 3:
    _refuse(
      f"target_logits {target_logits.shape} and draft_logits "
      f"{draft_logits.shape} must have 3 axes"
    )
  B, P, V = draft_logits.shape
  if not draft_logits.size:
    _refuse(f"draft_logits {draft_logits.shape} is empty; draft something")
  if target_logits.shape != (B, P + 1, V):
    _refuse(
      f"target_logits {target_logits.shape} must be {(B, P + 1, V)}: a row "
      f"more than draft_logits {draft_logits.shape}"
    )
  logits = {"target_logits": target_logits, "draft_logits": draft_logits}
  for name, array in logits.items():
    if not jnp.issubdtype(array.dtype, jnp.floating):
      _refuse(f"{name} is {array.dtype}; use a floating-point type")
  rows = {
    "drafts": (drafts, (B, P), jnp.int32),
    "seeds": (seeds, (B,), jnp.uint32),
    "moments": (moments, (B,), jnp.int32),
  }
  for name, (array, shape, dtype) in rows.items():
    if array.shape != shape or array.dtype != dtype:
      _refuse(
        f"{name} is {array.dtype}{list(array.shape)}; use "
        f"{jnp.dtype(dtype)}{list(shape)}"
      )


def _check_rule(rule: Rule) -> None:
  """Raises ValueError for settings that mean nothing."""
  if rule.name not in rules.RULES:
    _refuse(f"rule={rule.name!r} is unknown; use one of {rules.RULES}")
  for name in ("temperature", "draft_temperature"):
    value = getattr(rule, name)
    if not 0 < value < float("inf"):
      _refuse(f"{name}={value}; use more than 0")
  streams = rule.streams
  if len({streams.accept, streams.recovery, streams.bonus}) < 3:
    _refuse(f"streams {streams} share noise, which biases the output")


def _kernel_limit(
  target_logits: jax.Array, draft_logits: jax.Array
) -> str | None:
  """Why kernels cannot take these logits, if so."""
  for array in (target_logits, draft_logits):
    if array.dtype != jnp.float32:
      return f"kernels take float32 logits, not {array.dtype}"
  V = target_logits.shape[-1]
  if V % VECTOR or V < CHUNK_STEP:
    return (
      f"kernels need a vocabulary of at least {CHUNK_STEP} in whole {VECTOR}s, "
      f"not {V}"
    )
  if target_logits.size >= 2**31:
    return f"kernels count fewer than 2^31 logits, not {target_logits.shape}"
  return None
