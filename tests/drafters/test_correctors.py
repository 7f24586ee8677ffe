"""Selector, Markov, GRU and confidence heads against the released packages."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dflash_jax import weights
from dflash_jax.drafters import Borrowed, DFlash
from dflash_jax.drafters import correctors as correctors_lib
from dflash_jax.drafters import dflash as dflash_lib
from dflash_jax.drafters.convolution import DynamicConvolution
from dflash_jax.proposal import Drafting, Moment, from_marginals
from dflash_jax.sampling import Sampling
from tests.drafters.test_dflash import GOLDENS as DRAFTER_GOLDENS
from tests.drafters.test_dflash import TOLERANCE, Case
from tests.testing import VARIANTS, tiny_drafter_config, tiny_target_config

HEAD_GOLDENS = DRAFTER_GOLDENS.parent / "heads"
HEADS = sorted(path.name for path in HEAD_GOLDENS.iterdir())
ROUNDS = ("first", "second", "last")
WALK = Sampling(temperature=0.8)  # as tools/goldens/drafter.py walked


def at(position: int = 0, seed: int = 0) -> Moment:
  return Moment(jnp.array([seed], jnp.uint32), jnp.array([position]))


def follow(drafter, params, slots, logits, tokens, embedding) -> jax.Array:
  """f32[D, V]: the corrected logits of slots f32[D, width] along tokens.

  Args:
    drafter, params: with a corrector.
    slots, logits: of every depth, logits f32[D, V].
    tokens: i32[D], the token before each.
    embedding: the target's.
  """
  network = drafter._network(params)
  step = correctors_lib.Correction(
    network.corrector,
    jnp.asarray(embedding),
    drafter.config.input_embedding_scale,
    logits[None],
    slots[None],
  )
  memory, rows = network.corrector.start((1, 1)), []
  parents = jnp.zeros((1, 1), jnp.int32)
  for depth, token in enumerate(tokens):
    memory, row = step(memory, jnp.full((1, 1), token), parents, depth)
    rows.append(row[0, 0])
  return jnp.stack(rows)


# --- DFlash 2's selector ------------------------------------------------------


@pytest.fixture(params=["dflash2", "dflash2_causal"], scope="module")
def case(request):
  """Drafters of the released package with a selector."""
  return Case(request.param)


def selected(case, name, tokens):
  """f32[D, V] along tokens i32[D], from the golden's own hidden states."""
  slots = jnp.asarray(case.arrays[f"{name}.draft_hidden"][1:])
  logits = jnp.asarray(case.arrays[f"{name}.draft_logits"])
  embedding = case.params.borrowed.embedding
  return follow(
    case.drafter, case.params.drafter, slots, logits, tokens, embedding
  )


def selector_errors(case, name) -> tuple[float, float]:
  """How far scores of the greedy chain and laws of the walk are off."""
  arrays = case.arrays
  candidates = arrays[f"{name}.candidates"]
  block = arrays[f"{name}.block"]
  scores = np.asarray(selected(case, name, block[:-1]))
  error = np.abs(
    np.take_along_axis(scores, candidates, 1) - arrays[f"{name}.scores"]
  ).max()
  assert np.isfinite(scores).sum() == candidates.size  # and no other token
  walk = np.append(block[:1], arrays[f"{name}.walk"])
  scores = selected(case, name, walk[:-1])
  law = from_marginals(
    scores[None], None, Drafting(len(scores), sampling=WALK), at(), 53
  ).law
  probs = np.asarray(law.probs[0])
  ids, expected = (
    arrays[f"{name}.walk_{part}"] for part in ("candidates", "probs")
  )
  given = np.take_along_axis(probs, ids, 1)
  np.testing.assert_allclose(given.sum(1), 1, atol=1e-6)
  return error, np.abs(given - expected).max()


@pytest.mark.parametrize("name", ROUNDS)
def test_selector_scores_and_conditional_laws_are_the_packages(case, name):
  scores, laws = selector_errors(case, name)
  assert scores < TOLERANCE and laws < TOLERANCE


def test_a_selector_that_reads_the_wrong_token_is_caught(case):
  """Shifted by one: the slot's own token in place of the one before."""
  block = case.arrays["first.block"]
  right = selected(case, "first", block[:-1])
  shifted = selected(case, "first", block[1:])
  both = np.isfinite(right) & np.isfinite(shifted)
  assert np.abs(np.where(both, right - shifted, 0)).max() > 100 * TOLERANCE


@pytest.mark.parametrize("bug", ["token alone", "swapped", "sign"])
def test_planted_selector_bugs_are_caught(case, monkeypatch, bug):
  head = correctors_lib.SelectorHead
  real = head.pair

  def pair(self, clue, hidden, columns):
    match bug:
      case "token alone":
        rows = self.successors[...][columns]
        return jnp.einsum("...r,...kr->...k", clue, rows)
      case "swapped":  # codebooks exchanged
        rows = self.predecessors[...][columns]
        asked = clue * self.projection(hidden)
        return jnp.einsum("...r,...kr->...k", asked, rows)
    return -real(self, clue, hidden, columns)

  monkeypatch.setattr(head, "pair", pair)
  scores, _ = selector_errors(case, "first")
  assert scores > 100 * TOLERANCE


@pytest.mark.parametrize("bug", ["ahead", "sides", "wraps"])
def test_planted_convolution_bugs_are_caught(case, monkeypatch, bug):
  real = DynamicConvolution.convolve

  def convolve(x, kernel):
    if bug == "ahead":  # anti-causal: slots see what follows them
      return real(x[:, ::-1], kernel[:, ::-1])[:, ::-1]
    if bug == "wraps":  # the block's last slot before its first
      taps = kernel.shape[2]
      rolled = [jnp.roll(x, tap, axis=1) for tap in range(taps)]
      return sum(kernel[:, :, tap] * rows for tap, rows in enumerate(rolled))
    return real(x, kernel)

  if bug == "sides":
    kernels = DynamicConvolution.kernels
    monkeypatch.setattr(
      DynamicConvolution, "kernels", lambda self, x: kernels(self, x)[::-1]
    )
  monkeypatch.setattr(DynamicConvolution, "convolve", staticmethod(convolve))
  arrays, drafter = case.arrays, case.drafter
  taps = jnp.asarray(arrays["first.target_hidden"])[None]
  state = drafter.init_state(1, 97, "float32")
  state = drafter.absorb(
    case.params.drafter,
    state,
    taps,
    jnp.zeros(taps.shape[:2], jnp.int32),
    jnp.array([taps.shape[1]]),
  )
  block = arrays["first.block"]
  hidden = drafter.draft(
    case.params.drafter,
    state,
    jnp.array([block[0]]),
    case.params.borrowed.embedding,
    size=jnp.array([len(block)]),
  )
  error = np.abs(hidden[0] - arrays["first.draft_hidden"]).max()
  assert error > 100 * TOLERANCE


def test_a_new_drafters_convolutions_and_selector_change_nothing():
  """They start as the identity, so that a DFlash drafter can grow them."""
  config = tiny_drafter_config(tiny_target_config(67), **VARIANTS["dflash2"])
  convolution = DynamicConvolution(config.convolution, config.width)
  x = jax.random.normal(jax.random.key(0), (2, 5, 24))
  before, after = convolution.kernels(x)
  np.testing.assert_array_equal(convolution.convolve(x, before), x)
  np.testing.assert_array_equal(convolution.convolve(x, after), x)
  drafter = DFlash(config)
  params = drafter.init(jax.random.key(1))
  logits = jax.random.normal(jax.random.key(2), (3, 67))
  scores = follow(
    drafter, params, x[0, :3], logits, [4, 5, 6], jnp.zeros((67, 24))
  )
  finite = np.isfinite(scores)
  np.testing.assert_array_equal(finite.sum(axis=1), 7)
  np.testing.assert_array_equal(scores[finite], logits[finite])


# --- DSpark's and Domino's heads ----------------------------------------------


class Head:
  """A golden drafter of package specforge, and one block of its drafts."""

  def __init__(self, name: str):
    self.name = name
    directory = HEAD_GOLDENS / name
    self.arrays = load_file(directory / "golden.safetensors")
    config, self.params, _ = weights.load_drafter(directory)
    self.drafter = DFlash(config)
    self.borrowed = Borrowed(
      jnp.asarray(self.arrays["embedding"]),
      jnp.asarray(self.arrays["head"].T),
      None,
    )

  @property
  def slots(self) -> jax.Array:
    """The package's hidden states of the slots that predict."""
    return self.drafter.predictions(jnp.asarray(self.arrays["draft_hidden"]))

  def follow(self, tokens) -> jax.Array:
    """Corrected logits along tokens i32[D]."""
    logits = self.drafter.logits(self.slots, self.borrowed.head)
    return follow(
      self.drafter,
      self.params,
      self.slots,
      logits,
      tokens[: len(self.slots)],
      self.borrowed.embedding,
    )

  def propose(self, drafting: Drafting, seed: int = 0):
    """The drafter's own block, from the target's taps on."""
    taps = jnp.asarray(self.arrays["target_hidden"])[None]
    T = taps.shape[1]
    state = self.drafter.init_state(1, 31, "float32")
    state = self.drafter.absorb(
      self.params, state, taps, jnp.zeros((1, T), jnp.int32), jnp.array([T])
    )
    return self.drafter.propose(
      self.params,
      state,
      jnp.asarray(self.arrays["tokens"][:1]),
      self.borrowed,
      drafting,
      at(T, seed),
      jnp.array([100]),
    )

  def error(self) -> float:
    """Of the logits along the golden's tokens."""
    logits = self.follow(self.arrays["tokens"])
    return float(np.abs(logits - self.arrays["logits"]).max())


@pytest.fixture(params=HEADS, scope="module")
def head(request):
  """Each golden head in turn."""
  return Head(request.param)


def test_base_logits_are_the_packages(head):
  arrays = head.arrays
  base = head.drafter.logits(
    jnp.asarray(arrays["draft_hidden"]), head.borrowed.head
  )
  np.testing.assert_allclose(base, arrays["base_logits"], atol=TOLERANCE)


def test_logits_along_given_tokens_are_the_packages(head):
  assert head.error() < TOLERANCE


def test_greedy_drafts_are_the_packages(head):
  """Whole blocks: taps to context to slots to corrected drafts."""
  depths = head.drafter.max_drafts
  assert depths == len(head.arrays["greedy"])
  proposal = head.propose(Drafting(depths))
  np.testing.assert_array_equal(proposal.tokens[0], head.arrays["greedy"])
  ranked = np.sort(head.arrays["greedy_logits"], axis=1)
  np.testing.assert_allclose(
    proposal.margins[0], ranked[:, -1] - ranked[:, -2], atol=TOLERANCE
  )
  shorter = head.propose(Drafting(2))
  np.testing.assert_array_equal(shorter.tokens, proposal.tokens[:, :2])


@pytest.mark.parametrize("name", ["dspark_rnn", "domino_shifted"])
def test_a_tree_corrects_every_node_by_its_own_path(name):
  """Its margins are those of the logits along the path from the anchor."""
  head = Head(name)
  proposal = head.propose(Drafting(17, is_tree=True))
  tokens = proposal.tokens[0].tolist()
  paths = [head.arrays["tokens"][:1].tolist()]
  seen: dict[int, np.ndarray] = {}
  for node, parent in enumerate(proposal.tree.parents[0].tolist()):
    path = paths[parent]
    if parent not in seen:
      seen[parent] = np.array(head.follow(np.array(path))[len(path) - 1])
    logits, token = seen[parent], tokens[node]
    margin = logits[token] - np.delete(logits, token).max()
    stated = float(proposal.margins[0, node])
    assert stated == pytest.approx(margin, abs=TOLERANCE)
    paths.append([*path, token])
  assert len(seen) > 3


def stated_confidence(head, before, slots) -> np.ndarray:
  """f64[N]: sigmoid(w [h; W1[x]] + b), from the file itself."""
  file = load_file(pathlib.Path(HEAD_GOLDENS, head.name) / "model.safetensors")
  weight = file["confidence_head.proj.weight"][0].astype(np.float64)
  features = np.asarray(slots, np.float64)
  if weight.size > features.shape[1]:
    rows = file["markov_head.markov_w1.weight"][before].astype(np.float64)
    features = np.concatenate([features, rows], axis=1)
  odds = features @ weight + file["confidence_head.proj.bias"]
  return 1 / (1 + np.exp(-odds))


@pytest.fixture(
  params=[name for name in HEADS if name.startswith("dspark")], scope="module"
)
def spark(request):
  """Goldens with a confidence head."""
  return Head(request.param)


def test_confidence_along_given_tokens_is_the_packages(spark):
  tokens = spark.arrays["tokens"][: len(spark.slots)]
  network = spark.drafter._network(spark.params)
  seen = None
  if network.confidence.sees_token:
    seen = network.corrector.row(jnp.asarray(tokens))
  odds = network.confidence(spark.slots, seen)
  golden = spark.arrays["confidence_logits"]
  np.testing.assert_allclose(odds, golden, atol=TOLERANCE)
  np.testing.assert_allclose(
    stated_confidence(spark, tokens, spark.slots),
    1 / (1 + np.exp(-golden)),
    atol=TOLERANCE,
  )


@pytest.mark.parametrize(
  "drafting",
  [
    Drafting(5),
    Drafting(5, sampling=Sampling(1.0)),
    Drafting(5, sampling=Sampling(1.0), is_coupled=True),
    Drafting(9, is_tree=True),
  ],
  ids=["greedy", "drawn", "coupled", "tree"],
)
def test_a_proposal_states_the_heads_confidence_in_every_node(spark, drafting):
  proposal = spark.propose(drafting)
  nodes = proposal.tree or dflash_lib.chain(*proposal.tokens.shape)
  rows = np.append(spark.arrays["tokens"][:1], proposal.tokens[0])
  before = rows[np.asarray(nodes.parents[0])]
  slots = np.asarray(spark.slots)[np.asarray(nodes.depths[0]) - 1]
  np.testing.assert_allclose(
    proposal.confidence[0],
    stated_confidence(spark, before, slots),
    atol=TOLERANCE,
  )


def test_drawn_drafts_have_no_say_in_their_own_confidence(spark):
  """Or a width that follows it would bias the output (DSpark, appendix A)."""
  drafting = Drafting(5, sampling=Sampling(3.0))
  one, other = (spark.propose(drafting, seed) for seed in (0, 1))
  same = np.cumprod(np.asarray(one.tokens == other.tokens)[0])
  first = int(same.sum())
  assert first < 5  # they part
  np.testing.assert_allclose(
    one.confidence[0, : first + 1], other.confidence[0, : first + 1], rtol=1e-6
  )


# --- Known bugs, planted ------------------------------------------------------


def test_heads_that_read_the_wrong_token_are_caught(head):
  tokens = head.arrays["tokens"]
  assert head.error() < TOLERANCE
  logits = head.follow(tokens[1:])
  assert np.abs(logits - head.arrays["logits"]).max() > 100 * TOLERANCE


@pytest.mark.parametrize(
  ("name", "bug"),
  [
    ("dspark_gated", "bias"),
    ("dspark_gated", "order"),
    ("dspark_rnn", "bias"),
    ("dspark_rnn", "order"),
    ("dspark_rnn", "memory"),
    ("domino", "memory"),
    ("domino", "plain"),
    ("domino_shifted_none_plain", "plain"),
    ("domino", "gates"),
  ],
)
def test_planted_head_bugs_are_caught(name, bug, monkeypatch):
  head = Head(name)
  corrector = head.params["corrector"]
  domino = name.startswith("domino")
  kind = correctors_lib.GruHead if domino else correctors_lib.MarkovHead
  if bug == "bias":
    part = corrector["gate" if "gated" in name else "joint"]
    part["bias"] = jnp.zeros_like(part["bias"])
  elif bug == "order":  # [e; h] in place of [h; e]
    part = corrector["gate" if "gated" in name else "joint"]
    part["kernel"] = jnp.roll(part["kernel"], 6, axis=0)
  elif bug == "memory":  # every slot as if it were the first
    real = kind.read
    monkeypatch.setattr(
      kind,
      "read",
      lambda self, memory, *rest: real(self, memory * 0, *rest),
    )
  elif bug == "plain":  # one plain slot more
    init = kind.__init__

    def more(self, config, *rest, **keywords):
      init(self, config, *rest, **keywords)
      self.plain_slots += 1

    monkeypatch.setattr(kind, "__init__", more)
    dflash_lib.definition.cache_clear()
  else:  # reset and update gates exchanged
    kernel = corrector["input_kernel"]
    reset, update, new = jnp.split(kernel, 3, axis=1)
    corrector["input_kernel"] = jnp.concatenate([update, reset, new], axis=1)
  assert head.error() > 100 * TOLERANCE
  dflash_lib.definition.cache_clear()
