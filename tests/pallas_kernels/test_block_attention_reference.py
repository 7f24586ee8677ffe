"""block_attention: the reference against numpy, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax import layers
from dflash_jax.tree import ancestors
from pallas_kernels.block_attention import block_attention
from pallas_kernels.block_attention.reference import pack_mask
from tests.pallas_kernels.checks_block_attention import (
  random_ancestors,
  random_tree,
)


def operands(batch=2, tokens=5, heads=6, kv_heads=2, slots=13, width=8):
  """Queries, new keys and values, past ones, float32; and lengths."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  new = [normal(batch, kv_heads, tokens, width) for _ in range(2)]
  past = [normal(batch, kv_heads, slots, width) for _ in range(2)]
  lengths = np.array([slots - 2, 0], np.int32)[:batch]
  return [normal(batch, tokens, heads, width), *new, *past, lengths]


def by_hand(
  query,
  key,
  value,
  past_key,
  past_value,
  length,
  *,
  seen=None,
  prefix=None,
  window=None,
  scale=None,
  depths=None,
  sinks=None,
):
  """One row at a time, in float64; seen bool[B, P, P] for a tree."""
  B, P, N, H = query.shape
  out = np.zeros(query.shape)
  for b, i, n in np.ndindex(B, P, N):
    g = n // (N // key.shape[1])
    parts = [(past_key[b, g, : length[b]], past_value[b, g, : length[b]])]
    if prefix is not None:
      count = int(prefix[2])
      parts.insert(0, (prefix[0][g, :count], prefix[1][g, :count]))
    own = np.arange(i + 1) if seen is None else np.flatnonzero(seen[b, i])
    parts.append((key[b, g, own], value[b, g, own]))
    keys, values = (
      np.concatenate(arrays).astype(np.float64)
      for arrays in zip(*parts, strict=True)
    )
    if window is not None:
      # A path has no gaps, so its last keys are those that stand nearest.
      assert depths is None or depths[b, i] == len(own) - 1
      keys, values = keys[-window:], values[-window:]
    scores = keys @ query[b, i, n].astype(np.float64)
    weights = np.exp(scores * (scale or H**-0.5))
    sink = 0.0 if sinks is None else np.exp(np.float64(sinks[n]))
    out[b, i, n] = weights @ values / (weights.sum() + sink)
  return out


SINKS = np.array([0.5, -1.0, 3.0, 0.0, 1.5, 8.0], np.float32)


def shared_prefix(slots=9, length=7, kv_heads=2, width=8):
  rng = np.random.default_rng(1)
  shape = kv_heads, slots, width
  keys, values = rng.normal(size=(2, *shape)).astype(np.float32)
  return keys, values, np.int32(length)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 40])
@pytest.mark.parametrize("length", [None, 0, 7])
def test_the_reference_is_the_definition(length, window, scale):
  arrays = operands()
  prefix = None if length is None else shared_prefix(length=length)
  keywords = dict(prefix=prefix, window=window, scale=scale)
  found = block_attention(*arrays, **keywords)
  want = by_hand(*arrays, **keywords)
  np.testing.assert_allclose(found, want, 1e-5, 1e-5)


@pytest.mark.parametrize("window", [None, 3, 8])
def test_who_is_no_member_has_no_prefix(window):
  arrays = operands()
  prefix = shared_prefix()
  with_it = by_hand(*arrays, prefix=prefix, window=window)
  without = by_hand(*arrays, window=window)
  for member in ([True, False], [False, True], [True, True]):
    member = np.array(member)
    found = block_attention(
      *arrays, prefix=prefix, member=member, window=window
    )
    want = np.where(member[:, None, None, None], with_it, without)
    np.testing.assert_allclose(found, want, 1e-5, 1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_a_sink_takes_its_share_once(window):
  """Also of rows without a prefix, and of one that sees nothing but itself."""
  arrays = operands()
  keywords = dict(window=window, scale=0.7, sinks=SINKS)
  with_it = by_hand(*arrays, prefix=shared_prefix(), **keywords)
  without = by_hand(*arrays, **keywords)
  member = np.array([True, False])
  found = block_attention(
    *arrays, prefix=shared_prefix(), member=member, **keywords
  )
  want = np.where(member[:, None, None, None], with_it, without)
  np.testing.assert_allclose(found, want, 1e-5, 1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_a_sink_is_what_two_attentions_merged_leave_of_it(window):
  query, key, value, *past, length = operands()
  slots, tokens = np.arange(13), np.arange(5)
  age = length[:, None, None] + tokens[:, None] - slots
  visible = (slots < length[:, None, None]) & (age < (window or 99))
  behind = tokens[:, None] - tokens
  seen = ((behind >= 0) & (behind < (window or 99)))[None].repeat(2, axis=0)
  first = layers.attend_with_lse(query, *past, visible)
  second = layers.attend_with_lse(query, key, value, seen)
  merged = layers.merge_attention(first, second)
  total = jnp.logaddexp(first[1], second[1])
  want = layers.apply_sinks(merged, total, jnp.asarray(SINKS))
  found = block_attention(
    query, key, value, *past, length, window=window, sinks=SINKS
  )
  np.testing.assert_allclose(found, want, 1e-5, 1e-5)


@pytest.mark.parametrize("window", [1, 3, 6, 40])
@pytest.mark.parametrize("tokens", [7, 37])
def test_a_window_in_a_tree_counts_depths(window, tokens):
  arrays = operands(tokens=tokens)
  tree = random_tree(np.random.default_rng(5), 2, tokens)
  depths = np.pad(tree.depths, ((0, 0), (1, 0)))
  found = block_attention(
    *arrays,
    ancestors(tree, window),
    depths=depths,
    prefix=shared_prefix(),
    window=window,
  )
  want = by_hand(
    *arrays,
    seen=unpacked(ancestors(tree)),
    depths=depths,
    prefix=shared_prefix(),
    window=window,
  )
  np.testing.assert_allclose(found, want, 1e-5, 1e-5)


def unpacked(packed):
  words = np.asarray(packed)[..., None] >> np.arange(32, dtype=np.uint32)
  bits = (words & 1).astype(bool).reshape(*words.shape[:2], -1)
  return bits[..., : words.shape[1]]


@pytest.mark.parametrize("tokens", [1, 7, 32, 37])
def test_a_tree_sees_its_ancestors(tokens):
  arrays = operands(tokens=tokens)
  packed = random_ancestors(np.random.default_rng(0), 2, tokens)
  found = block_attention(*arrays, packed, prefix=shared_prefix())
  want = by_hand(*arrays, seen=unpacked(packed), prefix=shared_prefix())
  np.testing.assert_allclose(found, want, 1e-5, 1e-5)


def test_a_node_gets_what_the_last_token_of_its_path_gets():
  query, key, value, *past = operands(tokens=9)
  packed = random_ancestors(np.random.default_rng(3), 2, 9)
  found = block_attention(query, key, value, *past, packed)
  for node in range(9):
    for row in range(2):
      path = np.flatnonzero(unpacked(packed)[row, node])
      own = slice(row, row + 1)
      chain = block_attention(
        query[own, path],
        key[own][:, :, path],
        value[own][:, :, path],
        *(x[own] for x in past),
      )
      np.testing.assert_allclose(chain[0, -1], found[row, node], 1e-5, 1e-5)


@pytest.mark.parametrize("window", [None, 2, 7, 40])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [5, 37])
def test_a_drafters_block_gets_what_two_attentions_merged_get(
  window, causal, tokens
):
  """As DFlash attends: context, in its window, and slots that exist."""
  length = jnp.array([13, 4], jnp.int32)
  query, key, value, *past, _ = operands(tokens=tokens)
  slots = jnp.arange(tokens)
  ahead = slots[None, :] - slots[:, None]
  near = abs(ahead) < (window or tokens)
  mask = (near & (ahead <= 0) if causal else near)[None]
  exists = slots < jnp.array([tokens, 3])[:, None]
  seen = mask & exists[:, None]
  age = length[:, None, None] + slots[:, None] - jnp.arange(13)
  visible = (jnp.arange(13) < length[:, None, None]) & (age < (window or 99))
  want = layers.merge_attention(
    layers.attend_with_lse(query, *past, visible),
    layers.attend_with_lse(query, key, value, seen),
  )
  found = block_attention(
    query,
    key,
    value,
    *past,
    length,
    pack_mask(seen | jnp.eye(tokens, dtype=bool)),
    window=window,
  )
  np.testing.assert_allclose(
    np.asarray(found)[exists], np.asarray(want)[exists], 2e-5, 2e-6
  )


def test_bits_past_the_last_token_mean_nothing():
  arrays = operands(tokens=3)
  packed = np.array([[[1], [3], [7]]] * 2, np.uint32)
  found = block_attention(*arrays, packed | np.uint32(0xFFFFFFF8))
  np.testing.assert_array_equal(found, block_attention(*arrays, packed))


# --- What is refused, and where it runs ---------------------------------------


def given(**changed):
  names = "query", "key", "value", "past_key", "past_value", "length"
  return dict(zip(names, operands(), strict=True)) | changed


@pytest.mark.parametrize(
  "changed, message",
  [
    (dict(query=np.zeros((2, 5, 8), np.float32)), r"must be \[B, P, N, H\]"),
    (dict(query=np.zeros((2, 0, 6, 8), np.float32)), r"must be \[B, P, N, H\]"),
    (dict(query=np.zeros((2, 5, 7, 8), np.float32)), "7 query heads are not"),
    (dict(query=np.zeros((2, 4, 6, 8), np.float32)), "key has shape"),
    (dict(value=np.zeros((2, 2, 4, 8), np.float32)), "value has shape"),
    (dict(past_value=np.zeros((2, 2, 12, 8), np.float32)), "past_value has"),
    (dict(length=np.zeros(3, np.int32)), "length has shape"),
    (dict(length=np.zeros(2, np.float32)), "length is float32"),
    (dict(query=np.zeros((2, 5, 6, 8), np.int32)), "query is int32"),
    (dict(key=np.zeros((2, 2, 5, 8), jnp.bfloat16)), "but key is bfloat16"),
    (dict(ancestors=np.zeros((2, 5, 2), np.uint32)), "ancestors has shape"),
    (dict(ancestors=np.zeros((2, 5, 1), np.int32)), "ancestors is int32"),
    (dict(depths=np.zeros((2, 4), np.int32)), "depths has shape"),
    (dict(depths=np.zeros((2, 5), np.float32)), "depths is float32"),
    (dict(sinks=np.zeros(5, np.float32)), "sinks has shape"),
    (dict(sinks=np.zeros(6, np.int32)), "sinks is int32"),
    (dict(window=0), "window=0"),
    (dict(scale=0.0), "scale=0.0"),
    (dict(prefix=shared_prefix(kv_heads=1)), "prefix key has shape"),
    (dict(prefix=(*shared_prefix()[:2], np.zeros(2, np.int32))), "length has"),
    (dict(prefix=(*shared_prefix()[:2], 1.0)), "prefix length is float"),
    (dict(member=np.ones(2, bool)), "and there is none"),
    (dict(prefix=shared_prefix(), member=np.ones(2, int)), "member is int64"),
    (dict(prefix=shared_prefix(), member=np.ones(3, bool)), "member has shape"),
    (dict(implementation="fast"), "'fast' is unknown"),
  ],
)
def test_what_nobody_could_compute_is_refused(changed, message):
  with pytest.raises(ValueError, match=message):
    block_attention(**given(**changed))


def on_hopper(monkeypatch):
  from pallas_kernels import dispatch
  from pallas_kernels.devices import Device

  device = Device(kind="H100", architecture="sm90", num_cores=132)
  monkeypatch.setattr(dispatch.Device, "current", lambda: device)


def halves(**sizes):
  *arrays, length = operands(**sizes)
  arrays = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
  return [*arrays, length]


@pytest.mark.parametrize(
  "arrays, keywords, message",
  [
    (operands(), {}, "bfloat16 keys and values, not float32"),
    (halves(width=80, slots=16), {}, "width"),
    (halves(width=64, slots=16, tokens=257), {}, "up to 256"),
    (halves(width=64, slots=13), {}, "not past_key"),
  ],
)
def test_what_kernels_cannot_take_runs_in_xla(
  arrays, keywords, message, monkeypatch
):
  on_hopper(monkeypatch)
  with pytest.raises(NotImplementedError, match=message):
    block_attention(*arrays, **keywords, implementation="sm90")
  plain = block_attention(*arrays, **keywords, implementation="xla")
  np.testing.assert_array_equal(block_attention(*arrays, **keywords), plain)


def test_a_prefix_that_kernels_cannot_take_is_named(monkeypatch):
  on_hopper(monkeypatch)
  prefix = [jnp.asarray(x, jnp.bfloat16) for x in shared_prefix(width=64)[:2]]
  with pytest.raises(NotImplementedError, match="not prefix key"):
    block_attention(
      *halves(width=64, slots=16), prefix=(*prefix, 7), implementation="sm90"
    )


def test_a_kernel_is_not_run_on_another_device():
  with pytest.raises(NotImplementedError, match="cannot run on"):
    block_attention(**given(implementation="sm100"))
