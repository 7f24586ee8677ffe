"""Suites: what a line means, what is decoded, what is not decoded again."""

import dataclasses
import os

import pytest

from configs.tiny import get_config
from dflash_jax.config import ConfigError, DecodeConfig, EvalConfig, SuiteConfig
from eval import compare, contest, runs
from eval.contest import Contest
from eval.contestants import parse
from tests.commands import TINY, run_each
from tests.eval import reports

DRAFTERS = (
  "ngram: ngram block_size=4 width=fixed:3",
  "short: ngram block_size=2",
)


def settle(directory, **suite):
  """A config of two drafters that need no training, on two equal prompts."""
  few = directory / "few.jsonl"
  few.write_text('{"turns": ["abab", "xyx"]}\n{"prompt": "cdcd"}\n')
  return dataclasses.replace(
    get_config(),
    eval=EvalConfig(limit=2, max_new_tokens=17),
    suite=SuiteConfig(
      **{
        "drafters": DRAFTERS,
        "prompts": (str(few),),
        "temperatures": (1.0,),
      }
      | suite
    ),
  )


# --- Lines --------------------------------------------------------------------


def test_line_is_a_name_a_path_and_settings():
  one, two = parse(("a-1: some/where width=goodput block_size=5", "b: 'x y'"))
  assert (one.name, one.path) == ("a-1", "some/where")
  assert one.settings == {"width": "goodput", "block_size": 5}
  assert (two.path, two.settings) == ("x y", {})
  decode = one.decode(DecodeConfig(seed=3), 0.5)
  assert (decode.temperature, decode.seed, decode.width) == (0.5, 3, "goodput")


@pytest.mark.parametrize(
  "line, complaint",
  [
    ("ngram", "needs a name of letters"),
    ("a b: ngram", "needs a name of letters"),
    ("../x: ngram", "needs a name of letters"),
    ("plain: ngram", "other than plain"),
    ("a:", "names no drafter"),
    ("a: none", "plain decoding is measured anyway"),
    ("a: 'ngram", "No closing quotation"),
    ("a: ngram temperature=1", "'temperature' cannot differ"),
    ("a: ngram breadth=1", "'breadth' cannot differ"),
    ("a: ngram tree_nodes=x", "tree_nodes takes values of type int"),
  ],
)
def test_bad_line_is_named_with_a_remedy(line, complaint):
  with pytest.raises(ConfigError) as caught:
    parse(("fine: ngram", line))
  assert repr(line) in str(caught.value) and complaint in str(caught.value)


@pytest.mark.parametrize(
  "change, complaint",
  [
    ({"drafters": ()}, "suite.drafters is empty"),
    ({"drafters": ("a: ngram", "a: x")}, "has 'a' twice"),
    ({"drafters": ("a: ngram width=4",)}, "width '4' is unknown"),
    ({"prompts": ()}, "must each name something"),
    ({"temperatures": (1.0, 1.0)}, "temperatures has '1' twice"),
    ({"temperatures": (-1.0,)}, "temperature=-1.0 is impossible"),
    ({"concurrency": (0,)}, "needs numbers, each at least 1"),
    ({"prompts": ("gsm8k",), "concurrency": (1,)}, "agents.tasks is empty"),
  ],
)
def test_plan_names_what_makes_no_sense(change, complaint, tmp_path):
  change = {"data_dir": str(tmp_path), **change}
  (tmp_path / "gsm8k").mkdir()
  row = '{"question": "ab?", "answer": "#### 7"}\n'
  (tmp_path / "gsm8k" / "test.jsonl").write_text(row)
  with pytest.raises(ConfigError, match=complaint):
    Contest.plan(settle(tmp_path, **change), tmp_path / "out")


# --- Measuring ----------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """A suite that has run, and whose turns it was."""
  directory = tmp_path_factory.mktemp("suite")
  turns, real = [], contest.take_turns
  with pytest.MonkeyPatch.context() as patch:

    def take_turns(models, batch, *, first, **rest):
      names = [type(model.drafter).__name__ for model in models]
      turns.append(names[first:] + names[:first])
      return real(models, batch, first=first, **rest)

    patch.setattr(contest, "take_turns", take_turns)
    patch.setattr(contest, "split_round", lambda *_: reports.SPLIT)
    plan = Contest.plan(settle(directory), directory / "out")
    plan.run(has_ladder=True)
  return plan, turns


def test_suite_writes_a_record_for_each_drafter(measured):
  plan, turns = measured
  names = sorted(os.listdir(plan.output))
  assert names == ["few.ngram.t1.json", "few.short.t1.json"]
  found, _ = runs.read([str(plan.output)])
  assert [run.key for run in found] == [
    ("few", "ngram", 1.0),
    ("few", "short", 1.0),
  ]
  for run in found:
    assert run.replies.prompt.tolist() == [0, 0, 1]
    assert run.record["identical_fraction"] == 1
    assert run.record["rule"] == "coupled"
    assert run.record["ladder"]["agreed_tokens"] == run.replies.tokens.sum()
    assert run.record["memory"]["target_bytes"] > 2**19
    assert run.record["round_time"] == reports.SPLIT
  assert [len(run.record["histogram"]) for run in found] == [4, 2]
  # Both are compared with the same plain decoding, moments apart.
  ours, theirs = (run.replies.plain_seconds.tolist() for run in found)
  assert ours == theirs
  assert "Decoded in turns" in compare.describe(*found)
  # Everybody is once the first.
  assert [each[0] for each in turns] == ["NoDrafter", "NGram"]


def test_a_benchmark_is_a_prompt_set_and_judged_by_its_answers(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(contest, "split_round", lambda *_: reports.SPLIT)
  (tmp_path / "gsm8k").mkdir()
  (tmp_path / "gsm8k" / "test.jsonl").write_text(
    '{"question": "ab?", "answer": "#### 7"}\n'
    '{"question": "cd?", "answer": "#### 8"}\n'
  )
  plan = Contest.plan(
    settle(
      tmp_path,
      drafters=DRAFTERS[1:],
      prompts=("gsm8k",),
      data_dir=str(tmp_path),
      temperatures=(0.0,),
    ),
    tmp_path / "out",
  )
  plan.run()
  (run,), _ = runs.read([str(plan.output)])
  assert run.key == ("gsm8k", "short", 0.0)
  assert run.record["prompt_set"]["count"] == 2
  assert run.record["benchmark"]["of"] == 2
  assert run.record["accuracy"]["n"] == 2


def test_what_is_there_is_not_measured_again(measured, monkeypatch):
  plan, _ = measured

  def load(config):
    raise AssertionError("nothing is missing")

  monkeypatch.setattr(contest, "load", load)
  plan.run()


def test_missing_drafter_is_measured_and_others_left(measured, monkeypatch):
  plan, _ = measured
  kept = plan.output / "few.short.t1.json"
  before = kept.read_bytes()
  (plan.output / "few.ngram.t1.json").unlink()
  monkeypatch.setattr(contest, "split_round", lambda *_: reports.SPLIT)
  plan.run()
  assert kept.read_bytes() == before
  assert (plan.output / "few.ngram.t1.json").exists()


@pytest.mark.parametrize(
  "change, complaint",
  [
    ({"eval": EvalConfig(limit=2, max_new_tokens=9)}, "eval.max_new_tokens 17"),
    ({"eval": EvalConfig(limit=1, max_new_tokens=17)}, "prompt_set.count 2"),
  ],
)
def test_records_measured_otherwise_are_not_mixed(change, complaint, measured):
  plan, _ = measured
  other = dataclasses.replace(plan.config, **change)
  with pytest.raises(ConfigError, match=complaint) as caught:
    Contest.plan(other, plan.output).run()
  assert "choose another --output" in str(caught.value)


def test_damaged_record_is_named(measured, tmp_path):
  plan, _ = measured
  (tmp_path / "few.ngram.t1.json").write_text("{")
  with pytest.raises(ConfigError, match="is not a record of eval.suite"):
    dataclasses.replace(plan, output=tmp_path).run()


def test_drafter_that_cannot_decode_so_is_named(measured, tmp_path):
  plan, _ = measured
  suite = dataclasses.replace(
    plan.config.suite, drafters=("one: ngram block_size=1",)
  )
  config = dataclasses.replace(plan.config, suite=suite)
  with pytest.raises(ConfigError, match="drafter 'one': block_size=1"):
    Contest.plan(config, tmp_path).run()


@pytest.mark.slow
def test_curve_is_of_independent_requests(tmp_path, monkeypatch):
  config = settle(tmp_path, drafters=DRAFTERS[:1], concurrency=(1, 2))
  config.agents.rows, config.agents.chains = (1, 2), 1
  tasks = tmp_path / "few.jsonl"
  tasks.write_text("".join(f'{{"prompt": "Task {n}"}}\n' for n in range(4)))
  monkeypatch.setattr(contest, "split_round", lambda *_: reports.SPLIT)
  Contest.plan(config, tmp_path / "out").run()
  _, (curve,) = runs.read([str(tmp_path / "out")])
  assert [(p["mode"], p["concurrency"]) for p in curve.points] == [
    (mode, count) for count in (1, 2) for mode in ("plain", "speculative")
  ]
  assert all(p["identical_replies"] == 1 for p in curve.points)
  assert all(p["hit_rate"] == 0 for p in curve.points)


def test_program_names_mistakes_before_anything_is_measured(tmp_path):
  given = [f"--config={TINY}", f"--output={tmp_path}/out"]
  mistakes = {
    "--output=DIR is missing": given[:1],
    "suite.drafters is empty": given,
    "x.pdf must end in .html": [*given, f"--report={tmp_path}/x.pdf"],
    "not 'two'": [*given, "--concurrency=1,two"],
  }
  for complaint, done in zip(
    mistakes, run_each("eval.suite", list(mistakes.values())), strict=True
  ):
    assert done.returncode == 2
    assert complaint in done.stderr and done.stderr.count("\n") == 1
