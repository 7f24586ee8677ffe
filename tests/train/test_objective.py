"""Losses read from text, and their sums over slots, in float64 numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.config import ConfigError, TrainConfig
from dflash_jax.networks import Confidence, Gru, Markov, Selector
from tests.testing import tiny_drafter_config, tiny_target_config
from train.drafts import Choice, Drafts
from train.objective import Objective, slot_sums
from train.sums import BINS, summarize

X, K, V, C = 7, 4, 11, 3  # blocks, drafts, columns, candidates
TOLERANCE = {"rtol": 5e-6, "atol": 5e-6}  # float32 against float64
DRAFTER = tiny_drafter_config(tiny_target_config())


def objective(loss: str = "ce", **settings) -> Objective:
  settings = {"slot_weights": "uniform"} | settings
  return Objective.of(TrainConfig(loss=loss, **settings))


@dataclasses.dataclass
class Data:
  """Everything that a drafter with all parts would say of seven blocks."""

  plain: np.ndarray
  corrected: np.ndarray
  teacher: np.ndarray
  odds: np.ndarray
  candidates: np.ndarray
  scores: np.ndarray
  label_score: np.ndarray
  columns: np.ndarray
  mask: np.ndarray

  def drafts(self, *parts: str) -> Drafts:
    choice = Choice(self.candidates, self.scores, self.label_score)
    return Drafts(
      plain=self.plain,
      corrected=self.corrected if "corrected" in parts else None,
      choice=choice if "choice" in parts else None,
      odds=self.odds if "odds" in parts else None,
    )


@pytest.fixture(scope="module")
def data() -> Data:
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32) * 2

  plain, corrected = normal(X, K, V), normal(X, K, V)
  columns = rng.integers(0, V, (X, K)).astype(np.int32)
  columns[0] = plain[0].argmax(-1)  # a block all right
  columns[1, :2] = plain[1, :2].argmax(-1)
  columns[4, :3] = corrected[4, :3].argmax(-1)
  columns[2] = plain[2].argmax(-1)
  columns[2, 1] = -1  # its run breaks where the head lacks the label
  columns[3, 0] = -1
  length = np.array([4, 4, 4, 3, 4, 2, 0])  # the last block is invalid
  candidates = np.argsort(-plain, axis=-1)[..., :C].astype(np.int32)
  return Data(
    plain=plain,
    corrected=corrected,
    teacher=normal(X, K, V),
    odds=normal(X, K),
    candidates=candidates,
    scores=normal(X, K, C),
    label_score=normal(X, K),
    columns=columns,
    mask=np.arange(K) < length[:, None],
  )


# --- The oracle ---------------------------------------------------------------


def law(logits: np.ndarray) -> np.ndarray:
  exp = np.exp(logits.astype(np.float64))
  return exp / exp.sum(-1, keepdims=True)


def slow_cost(name: str, data: Data, logits: np.ndarray, block: int, k: int):
  """One term of one slot."""
  p, q = law(data.teacher[block]), law(logits[block])
  label, length = data.columns[block, k], int(data.mask[block].sum())
  alphas = [np.minimum(p[i], q[i]).sum() for i in range(K)]
  kl = float((p[k] * np.log(p[k] / q[k])).sum())
  if name == "ce":
    return -math.log(q[k, label])
  if name == "kl":
    return kl
  if name == "tv":
    return np.abs(p[k] - q[k]).sum() / 2
  if name == "lk":
    share = math.exp(-3 * alphas[k])
    return share * kl + (1 - share) * (1 - alphas[k])
  if name == "e2e":
    return 1 - sum(math.prod(alphas[: j + 1]) for j in range(length)) / length
  if name == "confidence":
    c = 1 / (1 + math.exp(-data.odds[block, k]))
    return -alphas[k] * math.log(c) - (1 - alphas[k]) * math.log(1 - c)
  raise AssertionError(name)


def slow_weight(kind: str, logits: np.ndarray, data: Data, block: int, j: int):
  """How much a slot counts."""
  if kind == "uniform":
    return 1.0
  if kind == "decay":
    return math.exp(-j / 1.7)
  q = law(logits[block])
  length = int(data.mask[block].sum())
  chances = [
    0.5 + 0.5 * (q[i, c] if (c := data.columns[block, i]) >= 0 else 0.0)
    for i in range(length)
  ]
  return sum(math.prod(chances[: m + 1]) for m in range(j, length))


def counted(data: Data) -> list[tuple[int, int]]:
  """Slots that are supervised and whose label the head has."""
  return np.argwhere(data.mask & (data.columns >= 0)).tolist()


# --- Terms and weights --------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniform", "decay", "dpace"])
@pytest.mark.parametrize(
  "loss", ["ce", "kl", "tv", "lk", "e2e", "0.1*ce + 1.8*tv + confidence"]
)
def test_every_term_under_every_weight(data, loss, kind):
  goal = objective(loss, slot_weights=kind, decay=1.7)
  parts = ("corrected", "odds")
  sums = slot_sums(
    goal, data.drafts(*parts), data.columns, data.mask, data.teacher
  )
  total = weight = 0.0
  for block, k in counted(data):
    w = slow_weight(kind, data.corrected, data, block, k)
    cost = sum(
      share * slow_cost(name, data, data.corrected, block, k)
      for name, share in goal.terms
    )
    weight, total = weight + w, total + w * cost
  np.testing.assert_allclose(sums.weight, weight, **TOLERANCE)
  np.testing.assert_allclose(sums.loss, total, **TOLERANCE)
  parts = sum(share * sums.terms[name] for name, share in goal.terms)
  np.testing.assert_allclose(parts, sums.loss, **TOLERANCE)


def test_the_weights_of_a_blocks_loss_are_detached(data):
  """The gradient is that of the cost under fixed weights."""
  goal = objective(slot_weights="dpace")
  known = data.mask & (data.columns >= 0)

  def loss(plain):
    drafts = dataclasses.replace(data.drafts(), plain=plain)
    return slot_sums(goal, drafts, data.columns, data.mask).loss

  found = np.asarray(jax.grad(loss)(data.plain))
  for block, k in np.ndindex(X, K):
    expected = np.zeros(V)
    if known[block, k]:
      weight = slow_weight("dpace", data.plain, data, block, k)
      label = np.eye(V)[data.columns[block, k]]
      expected = weight * (law(data.plain[block, k]) - label)
    np.testing.assert_allclose(found[block, k], expected, **TOLERANCE)


def test_a_teacher_is_not_taught(data):
  goal = objective("kl + lk + e2e + confidence")

  def loss(teacher):
    drafts = data.drafts("odds")
    return slot_sums(goal, drafts, data.columns, data.mask, teacher).loss

  assert not jax.grad(loss)(jnp.asarray(data.teacher)).any()


def test_a_confidence_does_not_pull_at_the_law_it_is_held_against(data):
  def loss(corrected, loss):
    drafts = dataclasses.replace(data.drafts("odds"), corrected=corrected)
    arguments = (data.columns, data.mask, data.teacher)
    return slot_sums(objective(loss), drafts, *arguments).loss

  alone = jax.grad(loss)(data.corrected, "ce")
  both = jax.grad(loss)(data.corrected, "ce + confidence")
  np.testing.assert_array_equal(alone, both)


@pytest.mark.parametrize("misses", ["drop", "overwrite"])
def test_a_selector_learns_beside_the_logits_that_it_orders(data, misses):
  goal = objective(
    "ce + 0.5*selector", selector_misses=misses, slot_weights="decay", decay=1.7
  )
  sums = slot_sums(goal, data.drafts("choice"), data.columns, data.mask)
  selector = entropy = 0.0
  missed = 0
  for block, k in counted(data):
    weight, label = math.exp(-k / 1.7), data.columns[block, k]
    entropy += weight * slow_cost("ce", data, data.plain, block, k)
    rivals = data.scores[block, k].astype(np.float64)
    found = np.flatnonzero(data.candidates[block, k] == label)
    if not found.size:
      missed += 1
      if misses == "drop":
        continue
      rivals[-1], found = data.label_score[block, k], [C - 1]
    selector += weight * (math.log(np.exp(rivals).sum()) - rivals[found[0]])
  assert missed > 3
  np.testing.assert_allclose(sums.terms["selector"], selector, **TOLERANCE)
  np.testing.assert_allclose(sums.loss, entropy + selector / 2, **TOLERANCE)


def test_a_curriculum_moves_from_plain_logits_to_corrected_ones(data):
  goal = objective("0.3*ce + lk", curriculum=0.5)
  shares = [float(goal.plain_share(jnp.float32(x))) for x in (0, 0.2, 0.5, 0.9)]
  assert shares == pytest.approx([1, 0.6, 0, 0])
  assert objective().plain_share(jnp.float32(0.3)) == 0.0
  arguments = (data.columns, data.mask, data.teacher)
  drafts = data.drafts("corrected")
  ends = []
  for logits in (data.plain, data.corrected):
    ends.append(
      sum(
        0.3 * slow_cost("ce", data, logits, *slot)
        + slow_cost("lk", data, logits, *slot)
        for slot in counted(data)
      )
    )
  for share in (1.0, 0.6, 0.0):
    sums = slot_sums(goal, drafts, *arguments, plain_share=share)
    expected = share * ends[0] + (1 - share) * ends[1]
    np.testing.assert_allclose(sums.loss, expected, **TOLERANCE)


# --- Counts -------------------------------------------------------------------


def slow_counts(right: np.ndarray, mask: np.ndarray) -> dict:
  accepted = 0
  for row, counts in zip(right, mask, strict=True):
    for is_right, is_counted in zip(row, counts, strict=True):
      if not (is_right and is_counted):
        break
      accepted += 1
  return {
    "correct": (right & mask).sum(0),
    "supervised": mask.sum(0),
    "accepted": accepted,
    "blocks": mask.any(-1).sum(),
  }


@pytest.mark.parametrize("parts", [(), ("corrected",), ("choice",)])
def test_what_is_right_is_what_would_be_drafted(data, parts):
  goal = objective("ce + selector" if "choice" in parts else "ce")
  sums = slot_sums(goal, data.drafts(*parts), data.columns, data.mask)
  best = data.plain.argmax(-1)
  plain = slow_counts(best == data.columns, data.mask)
  if "corrected" in parts:
    best = data.corrected.argmax(-1)
  if "choice" in parts:
    picks = data.scores.argmax(-1)[..., None]
    best = np.take_along_axis(data.candidates, picks, -1)[..., 0]
  expected = slow_counts(best == data.columns, data.mask)
  np.testing.assert_array_equal(sums.right.correct, expected["correct"])
  assert float(sums.right.accepted) == expected["accepted"]
  np.testing.assert_array_equal(sums.supervised, expected["supervised"])
  assert float(sums.blocks) == expected["blocks"]
  if not parts:
    assert sums.plain is None
    return
  np.testing.assert_array_equal(sums.plain.correct, plain["correct"])
  assert float(sums.plain.accepted) == plain["accepted"]
  assert expected["accepted"] != plain["accepted"]


def test_a_label_outside_the_trimmed_head_costs_nothing_and_breaks_the_run(
  data,
):
  for kind in ("uniform", "dpace"):
    goal = objective(slot_weights=kind)
    rest = (data.columns[2:3], data.mask[2:3])
    sums = slot_sums(goal, Drafts(data.plain[2:3], None, None, None), *rest)
    assert sums.right.correct.tolist() == [1, 0, 1, 1]
    assert sums.supervised.tolist() == [1, 1, 1, 1]
    assert float(sums.right.accepted) == 1.0
    gradient = jax.grad(
      lambda x, goal=goal, rest=rest: (
        slot_sums(goal, Drafts(x, None, None, None), *rest).loss
      )
    )(data.plain[2:3])
    assert not np.asarray(gradient)[0, 1].any()
    assert np.asarray(gradient)[0, 2].any()


def everything(data: Data, part: slice):
  """Sums of some blocks, of a drafter that can tell everything."""
  goal = objective("ce + tv + confidence + selector", slot_weights="dpace")
  cut = jax.tree.map(
    lambda x: x[part], data.drafts("corrected", "choice", "odds")
  )
  rest = (data.columns, data.mask, data.teacher)
  return slot_sums(goal, cut, *(x[part] for x in rest))


def test_sums_over_pieces_add_up_to_the_whole(data):
  whole = everything(data, slice(0, X))
  cuts = (slice(0, 2), slice(2, 3), slice(3, 7))
  pieces = [everything(data, cut) for cut in cuts]
  total = jax.tree.map(lambda *parts: sum(parts), *pieces)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, **TOLERANCE), whole, total
  )
  assert len(jax.tree.leaves(whole)) == 6 + 4 + 6


def test_what_a_drafter_can_tell_and_no_more(data):
  few = summarize(
    slot_sums(objective(), data.drafts(), data.columns, data.mask)
  )
  assert set(few) == {"loss", "accuracy", "anchor_tau", "slots"}
  found = summarize(everything(data, slice(0, X)))
  assert set(found) == set(few) | {
    *(f"loss_{name}" for name in ("ce", "tv", "confidence", "selector")),
    *("plain_accuracy", "plain_tau", "tau_tv"),
    *("selector_recall", "selector_accuracy"),
    *("confidence_error", "confidence_ece"),
  }


def test_the_summary_by_loops(data):
  sums = everything(data, slice(0, X))
  found = summarize(sums)
  p = np.take_along_axis(law(data.teacher), data.candidates, -1)
  alpha = np.minimum(p, law(data.scores)).sum(-1)  # a selector draws from these
  expected = sum(
    math.prod(alpha[b, : j + 1]) for b, j in np.argwhere(data.mask).tolist()
  )
  assert float(found["tau_tv"]) == pytest.approx(1 + expected / 6, rel=1e-5)
  slots = np.argwhere(data.mask).tolist()
  chance = {tuple(s): alpha[tuple(s)] for s in slots}
  c = {slot: 1 / (1 + math.exp(-data.odds[slot])) for slot in chance}
  error = np.mean([abs(c[slot] - chance[slot]) for slot in chance])
  assert float(found["confidence_error"]) == pytest.approx(error, rel=1e-5)
  ece = 0.0
  for bin_ in range(BINS):
    inside = [s for s in chance if bin_ <= c[s] * BINS < bin_ + 1]
    if inside:
      gap = np.mean([c[s] for s in inside]) - np.mean(
        [chance[s] for s in inside]
      )
      ece += len(inside) / len(slots) * abs(gap)
  assert float(found["confidence_ece"]) == pytest.approx(ece, rel=1e-4)
  recalled = [
    s for s in map(tuple, slots) if data.columns[s] in data.candidates[s]
  ]
  share = len(recalled) / len(slots)
  assert float(found["selector_recall"]) == pytest.approx(share)
  chosen = [
    s
    for s in recalled
    if data.candidates[s][data.scores[s].argmax()] == data.columns[s]
  ]
  accuracy = len(chosen) / len(recalled)
  assert float(found["selector_accuracy"]) == pytest.approx(accuracy)


# --- Reading a loss -----------------------------------------------------------


@pytest.mark.parametrize(
  ("loss", "terms"),
  [
    ("ce", (("ce", 1.0),)),
    (
      "0.1*ce + 1.8 * tv+confidence",
      (("ce", 0.1), ("tv", 1.8), ("confidence", 1.0)),
    ),
    ("2e-3*e2e", (("e2e", 0.002),)),
  ],
)
def test_a_loss_is_a_weighted_sum_of_terms(loss, terms):
  assert objective(loss).terms == terms
  taught = any(name in ("tv", "e2e") for name, _ in terms)
  assert objective(loss).needs_teacher == taught


@pytest.mark.parametrize(
  ("loss", "message"),
  [
    ("mse", "'mse' is unknown; write a sum of terms .* ce, kl, tv, lk, e2e"),
    ("dpace", "'dpace' is unknown"),
    ("", "cannot read ''"),
    ("ce +", "cannot read ''"),
    ("ce - tv", "cannot read 'ce - tv'"),
    ("-1*ce", "cannot read '-1"),
    ("1.2.3*ce", "'1.2.3' is no number"),
    ("0*ce", "0 of 'ce' is not above 0"),
    ("ce + 2*ce", "'ce' is there twice"),
    ("confidence", "none of ce, kl, tv, lk, e2e trains the slots' logits"),
  ],
)
def test_what_is_no_loss_is_refused(loss, message):
  with pytest.raises(ConfigError, match=f"train.loss=.*{message}"):
    objective(loss)


@pytest.mark.parametrize(
  ("loss", "parts", "message"),
  [
    ("ce + selector", {}, "trains a selector, and the drafter has none"),
    ("ce + confidence", {"markov": Markov(3)}, "trains a confidence, and"),
    (
      "ce",
      {"selector": Selector(3, 2)},
      r"selector would never .*'\+ selector'",
    ),
    ("tv", {"confidence": Confidence(False)}, "confidence would never learn"),
  ],
)
def test_a_loss_fits_the_drafter_or_is_refused(loss, parts, message):
  drafter = dataclasses.replace(DRAFTER, **parts)
  with pytest.raises(ConfigError, match=message):
    objective(loss).check_drafter(drafter)


def test_a_curriculum_needs_logits_that_are_corrected():
  goal = objective(curriculum=1.0)
  goal.check_drafter(dataclasses.replace(DRAFTER, gru=Gru(3, 2)))
  goal.check_drafter(dataclasses.replace(DRAFTER, markov=Markov(3)))
  for parts in ({}, {"selector": Selector(3, 2)}):
    with pytest.raises(ConfigError, match="curriculum=1.0 moves from plain"):
      loss = "ce + selector" if parts else "ce"
      objective(loss, curriculum=1.0).check_drafter(
        dataclasses.replace(DRAFTER, **parts)
      )
