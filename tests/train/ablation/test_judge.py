"""Drafters side by side: what is decoded, what is not decoded again."""

import dataclasses

import pytest

from configs.tiny import get_config
from dflash_jax import compare
from dflash_jax.config import AblationConfig, EvalConfig
from eval import acceptance
from train.ablation.grid import Grid
from train.ablation.judge import judge
from train.ablation.prepare import load_base
from train.ablation.results import Results

# The first is not trained yet and cannot be judged.
ARMS = (
  "untrained:",
  "ngram: drafter.path=ngram drafter.block_size=5",
  "short: drafter.path=ngram drafter.block_size=3",
)


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Grid:
  """Two drafters that need no training, one way that works, one that cannot.

  All prompts are equally long: everything compiles once.
  """
  directory = tmp_path_factory.mktemp("grid")
  prompts = directory / "few.jsonl"
  prompts.write_text('{"turns": ["abab", "xyx"]}\n{"turns": ["cdcd", "zvz"]}\n')
  config = dataclasses.replace(
    get_config(),
    eval=EvalConfig(
      limit=2,
      max_new_tokens=17,
      repeats=2,
      sweep=("width=fixed:2", "block_size=1"),
    ),
    ablation=AblationConfig(arms=ARMS, prompts=(str(prompts),)),
  )
  return Grid.plan(config, directory)


@pytest.fixture(scope="module")
def results(grid, tmp_path_factory) -> Results:
  """What a judge finds."""
  found = Results(tmp_path_factory.mktemp("results"))
  judge(grid, found)
  return found


def test_every_drafter_answers_every_prompt_in_every_way(grid, results):
  keys = [(r["arm"], r["point"], r["place"]) for r in results.of_kind("reply")]
  assert len(set(keys)) == len(keys)
  assert set(keys) == {
    (arm, "width=fixed:2", place)
    for arm in ("ngram", "short")
    for place in range(4)
  }
  refused = {(r["arm"], r["point"]) for r in results.of_kind("refusal")}
  assert refused == {("ngram", "block_size=1"), ("short", "block_size=1")}


def test_replies_are_those_of_an_ordinary_evaluation(grid, results):
  base = load_base(grid)
  arm = grid.arms[2]
  config = dataclasses.replace(arm.config.decode, width="fixed:2")
  model = base.with_drafter(arm.config.drafter)
  model = dataclasses.replace(
    model, config=dataclasses.replace(model.config, decode=config)
  )
  (prompt_set,) = grid.prompt_sets
  found = acceptance.evaluate(model, prompt_set.prompts, grid.config.eval)
  mine = [
    r
    for r in results.of_kind("reply")
    if (r["arm"], r["point"]) == ("short", "width=fixed:2")
  ]
  assert len(mine) == found.requests == 4
  assert sum(r["rounds"] for r in mine) == found.rounds
  taus = [r["tau"] for r in mine if r["rounds"]]
  assert sum(taus) / len(taus) == pytest.approx(found.tau_per_request)
  assert all(r["identical"] and r["guarantee"] == "tokens" for r in mine)
  assert all(r["seconds"] > 0 and r["plain_seconds"] > 0 for r in mine)


def test_what_has_been_decoded_is_not_decoded_again(grid, results, monkeypatch):
  before = len(results.records)
  judge(grid, results)
  assert len(results.records) == before

  lost = results.of_kind("reply")[-1]
  results.records.remove(lost)
  decoded = []

  def note(model, batch, **options):
    decoded.append((model.drafter, batch.places))
    return real(model, batch, **options)

  real = compare.answer
  monkeypatch.setattr(compare, "answer", note)
  judge(grid, results)
  assert len(decoded) == 2 * 2  # plainly and with the drafter, in two passes
  assert all(lost["place"] - places[0] in (0, 1) for _, places in decoded)
  again = results.records[-1]
  unmeasured = ("seconds", "plain_seconds")
  for name in lost.keys() - {*unmeasured}:
    assert again[name] == lost[name]
