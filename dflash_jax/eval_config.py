"""What evaluations can be told: sections of a run, as in config.py."""

import dataclasses


@dataclasses.dataclass
class EvalConfig:
  """How a drafter is judged.

  Attributes:
    limit: prompts used. max_new_tokens, batch_size: of each decode.
    repeats: timed passes; the median is reported.
    sweep: what --sweep decodes. Each line is a product of axes, fields of
      DecodeConfig with values; fields it does not name are the run's.
  """

  limit: int = 20
  max_new_tokens: int = 128
  batch_size: int = 1
  repeats: int = 1
  sweep: tuple[str, ...] = (
    "width=fixed:1,fixed:3,fixed:7,goodput",
    "block_size=4,8,16 width=fixed:15",
    "tree_nodes=8,16,32",
    "temperature=1 rule=coupled draft_temperature=0,0.5,1",
    "temperature=1 rule=token,block draft_temperature=0.5,1",
  )


@dataclasses.dataclass
class SuiteConfig:
  """Which drafters eval.suite sets side by side, and on what.

  Attributes:
    drafters: a line each, "NAME: PATH field=value ...": what drafter.path would
      say, and the fields of the decode section in which it differs. Plain
      decoding is always there.
    prompts: JSONL files, or benchmarks by name, each measured on its own.
    data_dir: of benchmarks, see docs/benchmarks.md; "" asks the hub.
    temperatures: of the target; each is a measurement of its own.
    concurrency: requests in flight, a point each of the throughput curve; none
      leaves the curve out.
  """

  drafters: tuple[str, ...] = ()
  prompts: tuple[str, ...] = ()
  data_dir: str = ""
  temperatures: tuple[float, ...] = (0.0, 1.0)
  concurrency: tuple[int, ...] = ()


@dataclasses.dataclass
class AblationConfig:
  """Which drafters train.ablate trains, and how it sets them side by side.

  Attributes:
    arms: a drafter each, "NAME: field=value ...": the fields of drafter and
      train in which it differs from this config. The first is the base. One
      with a drafter.path is judged as it is.
    seeds: each arm is trained with each; all arms with the first seed first.
    prompts: JSONL files that all are judged on, as config.eval says.
    compare: arms to compare, "A vs B: note"; none compares all with the base.
      The note goes into the report, such as what others have published.
  """

  arms: tuple[str, ...] = ()
  seeds: tuple[int, ...] = (0,)
  prompts: tuple[str, ...] = ()
  compare: tuple[str, ...] = ()


@dataclasses.dataclass
class AgentsConfig:
  """Chains of dependent requests, and how eval.agents measures them.

  Attributes:
    calls: of all workflows, a line each, "WORKFLOW/CALL after CALL: TEXT"; see
      eval/workflows.py.
    workflows: those that are measured; none for all.
    modes: ways to serve them, "plain", "plain+shared", "speculative" and
      "speculative+shared"; others are compared with the first.
    concurrency: chains in flight, a measurement each.
    chains: of a measurement; no fewer than are in flight.
    system: text file of the system prompt of all conversations; "" for none.
    tasks: JSONL files; a prompt's first turn is a chain's task.
    max_new_tokens: of a reply, unless its call says otherwise.
    rows: sizes of batches. prefix_bytes: for shared prefixes. memory_bytes: for
      both; 0 is no limit. All as in EngineConfig.
    seed: of what is sampled.
  """

  calls: tuple[str, ...] = ()
  workflows: tuple[str, ...] = ()
  modes: tuple[str, ...] = (
    "plain",
    "plain+shared",
    "speculative",
    "speculative+shared",
  )
  concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
  chains: int = 8
  system: str = ""
  tasks: tuple[str, ...] = ()
  max_new_tokens: int = 48
  rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
  prefix_bytes: int = 2**30
  memory_bytes: int = 0
  seed: int = 0
