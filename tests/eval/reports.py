"""Records made by hand, whose sums are done by hand, for tests of reports."""

import json

from dflash_jax.compare import Comparison
from dflash_jax.config import (
  Config,
  DecodeConfig,
  DraftConfig,
  EvalConfig,
  TargetSource,
)
from dflash_jax.prompts import Prompt
from dflash_jax.session import Completion
from eval import records
from eval.prompt_sets import PromptSet

# Two prompts, the first of two turns: three replies.
PROMPTS = [Prompt(("a", "b")), Prompt(("c",))]
# Of each: accepted drafts in its rounds, seconds per token both ways.
THREE = (
  ([0, 2, 2], 0.02, 0.04),
  ([1, 2], 0.02, 0.06),
  ([0, 0, 0, 1], 0.05, 0.04),
)


def completion(accepted, seconds, first=7, most=2):
  """A reply whose rounds accepted so many drafts."""
  later = sum(accepted) + len(accepted)
  tokens = [first] * (later + 1)
  return Completion(
    text="",
    tokens=tokens,
    slots=[0] * len(tokens),
    prompt_tokens=3,
    rounds=len(accepted),
    tau=later / len(accepted) if accepted else 0.0,
    accepted=[accepted.count(n) for n in range(most + 1)],
    width=float(most),
    ttft_s=0.5,
    tpot_s=seconds if later else 0.0,
    tokens_per_s=1 / seconds if later else 0.0,
  )


def comparisons(rows=THREE, different=()):
  """A Comparison of each row; those at `different` say something else."""
  return [
    Comparison(
      completion(accepted, ours, first=8 if place in different else 7),
      completion([0] * (sum(accepted) + len(accepted)), plain, most=0),
    )
    for place, (accepted, ours, plain) in enumerate(rows)
  ]


def make(
  rows=THREE, *, prompts=PROMPTS, name="few", temperature=0.0, drafter="mine",
  different=(), **extra,
):  # fmt: skip
  """A record as eval.suite writes it, through JSON."""
  config = Config(
    name="made up",
    target=TargetSource(path="some/target"),
    drafter=DraftConfig(path=f"runs/{drafter}"),
    decode=DecodeConfig(temperature=temperature),
    eval=EvalConfig(max_new_tokens=9),
  )
  record = records.to_record(
    config,
    len(prompts),
    "greedy",
    comparisons(rows, different),
    3 * 2**20,
    PromptSet.of(name, prompts),
  )
  return json.loads(records.to_json({"drafter": drafter, **record, **extra}))


SPLIT = {
  "draft_ms": 2.0,
  "verify_ms": 12.5,
  "commit_ms": 1.5,
  "host_ms": 0.25,
  "whole_ms": 15.25,
  "parts_over_whole": 1.0656,
  "width": 3,
}
MEMORY = {
  "target_bytes": 600 * 2**20,
  "drafter_bytes": 48 * 2**20,
  "trimmed_head_bytes": 18 * 2**20,
  "target_cache_bytes": 14 * 2**20,
  "drafter_cache_bytes": 2**20,
  "peak_bytes": 1500 * 2**20,
  "peak_of": "the process",
}
LADDER = {
  "dtype": "float32",
  "guarantee": "tokens",
  "replies": 3,
  "identical": 2,
  "differences": [{"place": 1, "token": 4, "gap": 2e-5, "tie": True}],
  "median_gap": 2e-5,
  "rows": 4,
  "rescored_tokens": 1234,
  "agreed_tokens": 1234,
  "disagreements": [],
}


def curve(drafter="mine"):
  """Throughput of both ways at three numbers of requests in flight.

  Speculative decoding at one in flight is beyond what plain decoding reaches.
  """
  places = {
    "plain": [(1, 30.0, 30.0), (4, 20.0, 80.0), (16, 10.0, 160.0)],
    "speculative": [(1, 50.0, 50.0), (4, 25.0, 100.0), (16, 10.0, 80.0)],
  }
  base = make(drafter=drafter)
  return {
    "drafter": drafter,
    "measurements": [
      {
        "workflow": "requests",
        "mode": mode,
        "concurrency": count,
        "user_tokens_per_s": user,
        "device_tokens_per_s": device,
      }
      for mode, points in places.items()
      for count, user, device in points
    ],
    **{key: base[key] for key in ("config", "versions", "machine", "date")},
  }


def full(hostile=""):
  """Records of two drafters, two prompt sets, two temperatures; and a curve.

  Args:
    hostile: put into every name.
  """
  found = {}
  for temperature in (0.0, 1.0):
    for name in ("few", "a longer name of a prompt set than fits" + hostile):
      for drafter in ("ngram", "mine" + hostile):
        found[f"{name[:5]}.{drafter[:4]}.{temperature:g}"] = make(
          name=name,
          temperature=temperature,
          drafter=drafter,
          round_time=SPLIT,
          plain_round_time=SPLIT | {"draft_ms": 0.0, "width": 0},
          memory=MEMORY,
          ladder=LADDER,
        )
  found["curve"] = curve()
  return found


def save(found, directory):
  """Writes records as files of a directory; gives its name."""
  directory.mkdir(exist_ok=True)
  for name, record in found.items():
    (directory / f"{name}.json").write_text(json.dumps(record))
  return str(directory)
