"""The token and the block rule over drawn drafts, from laws to tokens."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.block_verify import reference
from pallas_kernels.block_verify import rule as rules
from pallas_kernels.block_verify.config import (
  CHUNK_STEP,
  VECTOR,
  Config,
  choose_config,
)
from pallas_kernels.block_verify.kernel import KernelPasses
from pallas_kernels.block_verify.rule import Rule, Streams

NAME = "block_verify"


def block_verify(
  target: jax.Array,
  draft: jax.Array,
  drafts: jax.Array,
  seeds: jax.Array,
  moments: jax.Array,
  *,
  rule: str,
  temperature: float | None,
  draft_temperature: float | None,
  streams: Streams,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """How many drafts are accepted, and the token that ends the round.

  The tokens emitted, the accepted drafts and the last, follow the target's law
  (see rule.py). Either law comes as logits, of plain sampling at a temperature,
  or as the probabilities that any other sampling gives. The kernels read logits
  once to normalise them, two rows again to draw, and the block rule most of
  them a second time in between; they write no probabilities.

  Args:
    target: f[B, P + 1, V], after the anchor and after each draft. A logit may
      be -inf, but not all of a row.
    draft: f[B, P, V], what each draft was drawn from, likewise.
    drafts: i32[B, P].
    seeds: u32[B], moments: i32[B], addresses of the round's noise.
    rule: "token" or "block".
    temperature: > 0, of the target's logits; None for probabilities.
    draft_temperature: > 0, of the drafter's logits; None for probabilities.
    streams: of the noise.
    implementation: None for the fastest, or a name in dispatch.IMPLEMENTATIONS.

  Returns:
    accepted i32[B], 0..P, and last i32[B]: what replaces the first rejected
    draft, or a bonus if there is none.

  Raises:
    ValueError: arguments that no implementation takes.
    NotImplementedError: an implementation that cannot run here, or not on them.
  """
  _check(target, draft, drafts, seeds, moments)
  settings = Rule(rule, temperature, draft_temperature, streams)
  _check_rule(settings)
  limit = _kernel_limit(target, draft)
  chosen, _ = dispatch.choose(NAME, implementation, limit)
  arguments = (
    target.astype(jnp.float32),
    draft.astype(jnp.float32),
    drafts,
    seeds,
    moments,
  )
  if chosen != "xla":
    with jax.named_scope(NAME):
      return run_kernel(settings, *arguments)
  return reference.block_verify(settings, *arguments)


def run_kernel(
  rule: Rule,
  target: jax.Array,
  draft: jax.Array,
  drafts: jax.Array,
  seeds: jax.Array,
  moments: jax.Array,
  *,
  config: Config | None = None,
  interpret: object = None,
) -> tuple[jax.Array, jax.Array]:
  """Runs the kernels, which are one and the same on every architecture."""
  config = config or choose_config(target.shape[-1])
  passes = KernelPasses(rule, config, target, draft, seeds, moments, interpret)
  return rules.verify(rule, passes, target, draft, drafts, seeds, moments)


def _refuse(what: str) -> None:
  raise ValueError(f"{NAME}: {what}")


def _check(target, draft, drafts, seeds, moments) -> None:
  """Raises ValueError for arrays that nobody could verify."""
  if target.ndim != 3 or draft.ndim != 3:
    _refuse(f"target {target.shape} and draft {draft.shape} must have 3 axes")
  B, P, V = draft.shape
  if not draft.size:
    _refuse(f"draft {draft.shape} is empty; draft something")
  if target.shape != (B, P + 1, V):
    _refuse(
      f"target {target.shape} must be {(B, P + 1, V)}: a row "
      f"more than draft {draft.shape}"
    )
  for name, array in (("target", target), ("draft", draft)):
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
    if value is not None and not 0 < value < float("inf"):
      _refuse(f"{name}={value}; use more than 0, or None for probabilities")
  streams = rule.streams
  if len({streams.accept, streams.recovery, streams.bonus}) < 3:
    _refuse(f"streams {streams} share noise, which biases the output")


def _kernel_limit(target: jax.Array, draft: jax.Array) -> str | None:
  """Why kernels cannot take these laws, if so."""
  for array in (target, draft):
    if array.dtype != jnp.float32:
      return f"kernels take float32, not {array.dtype}"
  V = target.shape[-1]
  if V % VECTOR or V < CHUNK_STEP:
    return (
      f"kernels need a vocabulary of at least {CHUNK_STEP} in whole {VECTOR}s, "
      f"not {V}"
    )
  if target.size >= 2**31:
    return f"kernels count fewer than 2^31 numbers, not {target.shape}"
  return None
