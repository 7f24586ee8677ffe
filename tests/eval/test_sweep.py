"""Sweeps: which points a line means, how they are decoded, what is refused."""

import dataclasses

import pytest

from dflash_jax import decode_flags
from dflash_jax.config import (
  Config,
  ConfigError,
  DecodeConfig,
  DraftConfig,
  EvalConfig,
)
from dflash_jax.prompts import Prompt
from eval import sweep
from tests.testing import tiny_model

# Two batches of one shape, so that nothing is compiled twice.
PROMPTS = [Prompt(("c", "d")), Prompt(("a", "b")), Prompt(("unused",))]
SETTINGS = EvalConfig(limit=2, max_new_tokens=7, batch_size=1)


def settings_of(*lines, **base):
  """What the points of these lines set."""
  points = sweep.parse(lines, DecodeConfig(**base))
  return [point.settings for point in points]


# --- Lines --------------------------------------------------------------------


def test_axes_are_the_fields_that_flags_know():
  assert set(sweep.AXES) == set(decode_flags._HELP)


def test_line_is_a_product_of_typed_values():
  assert settings_of(
    "temperature=1 rule=token,block draft_temperature=0,.5"
  ) == [
    {"temperature": 1.0, "rule": rule, "draft_temperature": value}
    for rule in ("token", "block")
    for value in (0.0, 0.5)
  ]
  (tree,) = settings_of("tree_nodes=8")
  assert type(tree["tree_nodes"]) is int
  (hot,) = settings_of("temperature=1")
  assert type(hot["temperature"]) is float


def test_point_is_the_base_with_its_settings():
  base = DecodeConfig(max_new_tokens=5, top_p=0.9)
  (point,) = sweep.parse(["width=goodput  seed=3"], base)
  assert point.decode == dataclasses.replace(base, width="goodput", seed=3)
  assert base.seed == 0


def test_sweep_is_the_union_of_its_lines_in_order():
  lines = (
    "width=fixed:3,fixed:1",
    "width=fixed:1,goodput,goodput",
    "temperature=0 width=fixed:3",
  )
  points = sweep.parse(lines, DecodeConfig())
  assert [p.decode.width for p in points] == ["fixed:3", "fixed:1", "goodput"]
  assert [p.line for p in points] == [lines[0], lines[0], lines[1]]


def test_default_sweep_covers_every_kind_of_setting():
  points = sweep.parse(EvalConfig().sweep, DecodeConfig())
  named = {name for point in points for name in point.settings}
  assert named >= {
    "rule",
    "draft_temperature",
    "block_size",
    "tree_nodes",
    "width",
  }
  assert 12 <= len(points) <= 20


@pytest.mark.parametrize(
  "line, complaint",
  [
    ("", "no axis; write one like"),
    ("nodes=3", "'nodes' is no axis; choose from temperature"),
    ("max_new_tokens=3", "'max_new_tokens' is no axis"),
    ("width", "width takes values of type str, not ''"),
    ("width=fixed:1,", "width takes values of type str, not ''"),
    ("tree_nodes=8.5", "tree_nodes takes values of type int, not '8.5'"),
    ("temperature=hot", "temperature takes values of type float, not 'hot'"),
    ("seed=1 seed=2", "seed stands there twice"),
    ("rule=blok", "rule='blok' is unknown; choose one of greedy"),
    ("width=4", "width '4' is unknown; use fixed:N"),
    ("temperature=-1", "temperature=-1.0 is impossible; use 0 or more"),
    ("temperature=nan", "temperature=nan is impossible"),
    ("draft_temperature=-1", "draft_temperature=-1.0 is impossible"),
    ("draft_top_k=-1", "draft_top_k=-1 is impossible"),
    ("top_p=0", "top_p=0.0 is impossible"),
    ("block_size=-4", "block_size=-4 is impossible; use 0 or more"),
    ("tree_nodes=-1", "tree_nodes=-1 is impossible; use 0 or more"),
    ("seed=-1", "seed=-1 is impossible; use 0 or more"),
  ],
)
def test_bad_line_is_named_with_a_remedy(line, complaint):
  with pytest.raises(ConfigError) as caught:
    sweep.parse(["width=fixed:1", line], DecodeConfig())
  message = str(caught.value)
  assert message.startswith(f"eval.sweep, line {line!r}: ")
  assert complaint in message


def test_sweep_without_lines_is_refused():
  with pytest.raises(ConfigError, match="eval.sweep is empty; give lines like"):
    sweep.parse([], DecodeConfig())


def test_plan_needs_a_drafter_and_a_pass():
  config = Config(drafter=DraftConfig(path="somewhere"))
  assert len(sweep.plan(config)) >= 12
  config.eval.repeats = 0
  with pytest.raises(ConfigError, match="eval.repeats=0 .*at least 1"):
    sweep.plan(config)
  with pytest.raises(ConfigError, match="no drafter to sweep; name its"):
    sweep.plan(Config())


def test_points_of_one_law_form_a_group():
  points = sweep.parse(
    ("width=fixed:1", "temperature=1 rule=token,block", "tree_nodes=8"),
    DecodeConfig(),
  )
  greedy, sampled = sweep.group(points)
  assert greedy == [points[0], points[3]]
  assert sampled == points[1:3]
  seeds = sweep.parse(["seed=1,2 top_k=3,4"], DecodeConfig())
  assert [len(members) for members in sweep.group(seeds)] == [1, 1, 1, 1]


# --- Decoding -----------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
  """Results over every guarantee and refusal, with the models that ran."""
  lines = (
    "width=fixed:1,fixed:4",
    "block_size=3,6",
    "tree_nodes=6 width=fixed:6",
    "temperature=1 rule=coupled,token,block draft_temperature=1",
    "temperature=1 rule=block draft_temperature=1 tree_nodes=6",
    "rule=typical",
  )
  runs, real = [], sweep.answer
  with pytest.MonkeyPatch.context() as patch:

    def answer(model, batch):
      runs.append((model.drafter.max_drafts, model.config.decode, batch))
      return real(model, batch)

    patch.setattr(sweep, "answer", answer)
    model = tiny_model()
    points = sweep.parse(lines, model.config.decode)
    results = sweep.evaluate(model, PROMPTS, points, SETTINGS)
  assert [result.point for result in results] == points
  return results, runs


def by(results, **settings):
  """The one result with these settings and no others."""
  (result,) = [r for r in results if r.point.settings == settings]
  return result


def test_every_reply_of_every_point_is_compared(found):
  results, _ = found
  for result in results:
    if not result.refusal:
      assert len(result.comparisons) == 4
      assert all(len(c.plain.tokens) == 7 for c in result.comparisons)
      assert all(c.speedup > 0 for c in result.comparisons)
      assert all(set(c.plain.slots) == {0} for c in result.comparisons)


def test_points_that_promise_the_tokens_give_them(found):
  results, _ = found
  promised = [
    r
    for r in results
    if r.comparisons and r.comparisons[0].guarantee == "tokens"
  ]
  assert {r.rule for r in promised} == {"greedy", "coupled"}
  assert len(promised) == 5
  assert all(c.is_identical for r in promised for c in r.comparisons)


def test_rule_and_guarantee_are_the_decoders(found):
  results, _ = found
  sampled = {"temperature": 1.0, "draft_temperature": 1.0}
  assert by(results, width="fixed:1").rule == "greedy"
  token = by(results, rule="token", **sampled)
  assert {c.guarantee for c in token.comparisons} == {"law"}
  typical = by(results, rule="typical")
  assert {c.guarantee for c in typical.comparisons} == {"none"}


def test_points_decode_as_their_settings_say(found):
  results, _ = found

  def bins(**settings):
    return {
      len(c.speculative.accepted) for c in by(results, **settings).comparisons
    }

  assert bins(width="fixed:1") == {2}
  assert bins(width="fixed:4") == {5}
  assert bins(block_size=3) == {3}
  tree = by(results, tree_nodes=6, width="fixed:6")
  assert {c.speculative.width for c in tree.comparisons} == {6}


def test_refused_points_say_why(found):
  results, _ = found
  refused = [r for r in results if r.refusal]
  assert [r.point.settings.get("block_size") for r in refused] == [6, None]
  assert "trained for 5" in refused[0].refusal
  assert "no lossless form for trees" in refused[1].refusal
  assert all(r.rule == "" and not r.comparisons for r in refused)


def test_plain_decoding_runs_once_per_law_and_batch(found):
  results, runs = found
  batches = {id(batch) for _, _, batch in runs}
  plain = [decode for drafts, decode, _ in runs if not drafts]
  assert len(plain) == 2 * len(batches)
  assert {decode.temperature for decode in plain} == {0.0, 1.0}
  ready = [r for r in results if not r.refusal]
  assert len(runs) == (len(ready) + 2) * len(batches)


def test_each_batch_is_decoded_plainly_and_then_by_its_points(found):
  _, runs = found
  first = [index for index, (drafts, _, _) in enumerate(runs) if not drafts]
  for start, end in zip(first, [*first[1:], len(runs)], strict=True):
    members = runs[start:end]
    assert len({id(batch) for _, _, batch in members}) == 1
    assert len({decode.temperature for _, decode, _ in members}) == 1
    assert len(members) > 1


def test_everything_is_compiled_before_the_clock_starts(monkeypatch):
  order = []

  def note(kind, real):
    def noted(model, batches):
      order.append(kind)
      return real(model, batches)

    return noted

  for kind in ("warm_up", "answer"):
    monkeypatch.setattr(sweep, kind, note(kind, getattr(sweep, kind)))
  model = tiny_model()
  points = sweep.parse(["width=fixed:1,fixed:4"], model.config.decode)
  settings = dataclasses.replace(SETTINGS, limit=1, repeats=2)
  (one, four) = sweep.evaluate(model, PROMPTS, points, settings)
  assert order == ["warm_up"] * 3 + ["answer"] * 6
  assert len(one.comparisons) == len(four.comparisons) == 4


def test_sweep_of_refused_points_alone_decodes_nothing(monkeypatch):
  monkeypatch.setattr(sweep, "answer", None)
  model = tiny_model()
  points = sweep.parse(["block_size=7,9"], model.config.decode)
  results = sweep.evaluate(model, PROMPTS, points, SETTINGS)
  assert [bool(result.refusal) for result in results] == [True, True]
