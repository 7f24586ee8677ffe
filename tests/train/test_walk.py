"""The walk against a replay in pure Python, and against real decoding."""

import jax
import numpy as np
import pytest

from dflash_jax.decode import Decoder
from dflash_jax.decode_state import ModelParams
from dflash_jax.proposal import Drafting
from tests.testing import BLOCK_SIZE, VARIANTS
from tests.train.conftest import (
  ANSWER_TOKENS,
  make_baseline,
  make_setup,
  train_steps,
)
from train.loop import evaluate
from train.setup import Setup
from train.walk import walk

K = BLOCK_SIZE


def replay(right, mask):
  """Rounds of one answer: (anchor, drafts accepted) of each."""
  answer = [position for position, is_in in enumerate(mask) if is_in]
  anchor, rounds = answer[0], []
  while anchor < answer[-1]:
    accepted = 0
    while accepted < len(right[anchor]) and right[anchor][accepted]:
      accepted += 1
    rounds.append((anchor, accepted))
    anchor += accepted + 1  # the target adds one of its own
  return rounds


def test_a_walk_written_by_hand():
  #        prompt | answer of six tokens, positions 2 to 7
  mask = np.array([[0, 0, 1, 1, 1, 1, 1, 1]], bool)
  right = np.zeros((1, 8, 3), bool)
  right[0, 2] = [True, False, True]  # one accepted: 3 drafted, 4 the bonus
  right[0, 4] = [False, True, True]  # none accepted: 5 the correction
  right[0, 5] = [True, True, False]  # both: 6 and 7, the end
  right[0, 3] = [True, True, True]  # never an anchor
  result = walk(right, mask)
  assert result.rounds == 3
  assert result.tau == pytest.approx(5 / 3)  # the first token is prefill's
  assert result.acceptance.tolist() == pytest.approx([2 / 3, 1 / 3, 0])


def test_a_walk_equals_a_replay_of_random_matches():
  rng = np.random.default_rng(0)
  N, S = 40, 23
  right = rng.random((N, S, K - 1)) < 0.6
  mask = np.zeros((N, S), bool)
  for row in range(N):
    start = rng.integers(0, S - 2)
    mask[row, start : rng.integers(start + 2, S + 1)] = True
  mask[7] = False  # an empty row
  mask[8] = np.arange(S) == 4  # one token, which prefill emits
  # Slots past the answer are never right, as `matches` says.
  for row in range(N):
    last = np.flatnonzero(mask[row])[-1] if mask[row].any() else -1
    for anchor in range(S):
      right[row, anchor, max(last - anchor, 0) :] = False
  rounds = [
    replay(right[row].tolist(), mask[row].tolist())
    for row in range(N)
    if mask[row].any()
  ]
  rounds = [row for row in rounds if row]
  emitted = [
    int(mask[row].sum()) - 1 for row in range(N) if mask[row].sum() > 1
  ]
  accepted = [count for row in rounds for _, count in row]
  result = walk(right, mask)
  assert result.rounds == len(accepted)
  assert result.tau == pytest.approx(sum(emitted) / len(accepted))
  assert result.tau_per_answer == pytest.approx(
    np.mean([e / len(r) for e, r in zip(emitted, rounds, strict=True)])
  )
  assert result.acceptance == pytest.approx(
    [np.mean([count >= k for count in accepted]) for k in range(1, K)]
  )


# --- Against decoding ---------------------------------------------------------


def decode_rounds(setup: Setup, params, index: int) -> tuple[list, list]:
  """Real speculative decoding of one prompt of the corpus.

  Returns:
    The reply, and (anchor position, tokens emitted) of each round.
  """
  tokens, mask = setup.corpus.example(index)
  prompt = tokens[~mask][None]
  decoder = Decoder(
    target=setup.trainer.target,
    drafter=setup.trainer.drafter,
    drafting=Drafting(setup.trainer.drafter.max_drafts),
    stop_ids=setup.trainer.target.config.eos_ids,
    rounds_per_dispatch=1,
  )
  # A budget past the answer: the last blocks of a budget are cut short, which
  # an answer that was itself cut at ANSWER_TOKENS does not show.
  budget = ANSWER_TOKENS + K
  padded = np.zeros((1, 16), np.int32)
  padded[0, : prompt.size] = prompt
  state = decoder.init_state(1, 16 + budget + decoder.slack(16), budget)
  state = decoder.begin(state, np.array([budget]), np.zeros(1))
  known = setup.trainer.learner.bind(params, setup.borrowed)
  everything = ModelParams(setup.target_params, known, setup.borrowed)
  state = decoder.prefill(
    everything, state, padded, np.array([prompt.size]), np.array([True])
  )
  rounds = []
  while not bool(state.done.all()) and int(state.count[0]) < mask.sum():
    before = int(state.count[0])
    state = decoder.run_rounds(everything, state)
    emitted = int(state.count[0]) - before
    rounds.append((prompt.size + before - 1, emitted))
  return state.tokens[0, : int(mask.sum())].tolist(), rounds


def check_walk(setup: Setup, params) -> float:
  """Same answers, same anchors, same rounds; returns the tau of both."""
  decoded_rounds = decoded_tokens = 0
  matches, masks = [], []
  for index in range(len(setup.corpus)):
    answer, mask = setup.corpus.example(index)
    reply, decoded = decode_rounds(setup, params, index)
    assert reply == answer[mask].tolist()
    decoded_rounds += len(decoded)
    decoded_tokens += int(mask.sum()) - 1
    batch = setup.batch(np.array([index]), rows=4)
    right, _ = setup.trainer.matches(
      params, setup.target_params, setup.borrowed, batch
    )
    matches.append(right[:1])
    masks.append(batch.loss_mask[:1])
    walked = replay(right[0].tolist(), masks[-1][0].tolist())
    assert [anchor for anchor, _ in walked] == [a for a, _ in decoded]
    # The last round may go on past an answer that was cut.
    assert [n + 1 for _, n in walked[:-1]] == [n for _, n in decoded[:-1]]
  result = walk(np.concatenate(matches), np.concatenate(masks))
  assert result.rounds == decoded_rounds
  assert result.tau == pytest.approx(decoded_tokens / decoded_rounds)
  return result.tau


@pytest.mark.parametrize("kind", ["trained", "untrained"])
def test_the_walk_is_what_decoding_does(kind, setup, trained):
  state, _ = trained
  if kind == "untrained":
    state = setup.trainer.init_state(jax.random.key(3), setup.tap_scale())
  assert (check_walk(setup, state.drafter) > 1.6) == (kind == "trained")


RECIPES = {
  "dflash2": {"loss": "ce + selector", "selector_misses": "overwrite"},
  "dspark": {"loss": "0.1*ce + 1.8*tv + confidence", "slot_weights": "decay"},
  "domino shifted": {"curriculum": 0.5},
  "eagle3": {"loss": "kl", "slot_weights": "decay", "unroll_steps": 3},
  "lm": {"loss": "ce + kl", "slot_weights": "uniform"},
}


@pytest.mark.parametrize(
  "name",
  [
    *("dflash2", "dspark", "eagle3"),
    pytest.param("domino shifted", marks=pytest.mark.slow),
    pytest.param("lm", marks=pytest.mark.slow),
  ],
)
def test_every_variant_learns_and_decodes_as_it_was_walked(model, corpus, name):
  """Decoding corrects by its own drafts, the walk by the answer's tokens."""
  one_layer = {"num_layers": 1, "layer_windows": (), "layer_causal": ()}
  kind = {"parts": VARIANTS.get(name, {}) | one_layer}
  if name in ("eagle3", "lm"):
    kind = {"drafter": make_baseline(name, model.target.config)}
  setup = make_setup(model, corpus, steps=120, **kind, **RECIPES[name])
  state, history = train_steps(setup, 120)
  first, last = history[0], history[-1]
  assert last["loss"] < 0.75 * first["loss"]
  assert last["anchor_tau"] > first["anchor_tau"] + 0.3
  if name == "dspark":
    assert last["confidence_error"] < first["confidence_error"]
  assert check_walk(setup, state.drafter) > 1.4


def test_evaluation_walks_the_held_out_answers_alone(setup, trained):
  state, _ = trained
  decoded = [
    decode_rounds(setup, state.drafter, i)[1] for i in setup.corpus.held_out
  ]
  result, record = evaluate(setup, state)
  assert result.rounds == record["rounds"] == sum(map(len, decoded))
  assert np.isfinite(record["loss"])
