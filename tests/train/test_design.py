"""From a config's names and sizes to an architecture."""

import dataclasses

import pytest

from configs.tiny import get_config
from dflash_jax.config import (
  Config,
  ConfigError,
  DraftConfig,
  DrafterConfig,
  to_json,
)
from dflash_jax.config_json import from_json
from dflash_jax.drafters import Eagle3
from dflash_jax.networks import Confidence, Convolution, Gru, Markov, Selector
from dflash_jax.target_network import Experts
from train.design import design_drafter, make_drafter
from train.record import Run

PARTS = ("convolution", "selector", "markov", "gru", "confidence")


def design(**draft) -> DrafterConfig:
  config: Config = get_config()
  config.drafter = dataclasses.replace(config.drafter, **draft)
  return design_drafter(config, config.target.random)


def parts(drafter: DrafterConfig) -> dict:
  found = {name: getattr(drafter, name) for name in PARTS}
  return {name: part for name, part in found.items() if part is not None}


@pytest.mark.parametrize(
  ("name", "expected", "drafts"),
  [
    ("dflash", {}, 3),
    (
      "dflash2",
      {"convolution": Convolution(2, 16), "selector": Selector(256, 16)},
      3,
    ),
    (
      "dspark",
      {"markov": Markov(256, "vanilla"), "confidence": Confidence(True)},
      4,
    ),
    ("domino", {"gru": Gru(1024, 256, 1)}, 4),
  ],
)
def test_a_name_brings_the_parts_of_its_paper(name, expected, drafts):
  drafter = design(name=name)
  assert parts(drafter) == expected
  assert drafter.num_drafts == drafts  # of a block of four


@pytest.mark.parametrize(
  ("draft", "expected"),
  [
    ({"name": "dflash2", "selector_rank": 0}, {"convolution"}),
    ({"name": "dflash2", "convolution_kernel": 0}, {"selector"}),
    ({"name": "dspark", "confidence": False}, {"markov"}),
    ({"name": "dspark", "markov_rank": 0}, {"confidence"}),
    ({"name": "domino", "gru_width": 0}, set()),
  ],
)
def test_a_size_of_0_leaves_a_part_out(draft, expected):
  drafter = design(**draft)
  assert set(parts(drafter)) == expected
  if expected == {"confidence"}:
    assert not drafter.confidence.sees_token  # there is no table to read


BASELINES = {
  "eagle3": {"num_layers": 1, "taps": (0, 2, 4)},
  "lm": {"num_layers": 1, "lm_width": 16},
}


@pytest.mark.parametrize(
  "name", ["dflash", "dflash2", "dspark", "domino", *BASELINES]
)
def test_a_design_is_read_back_from_its_record(name):
  drafter = design(name=name, markov_kind="gated", **BASELINES.get(name, {}))
  run = Run("sum", drafter, (3, 5))
  assert from_json(Run, to_json(run), "record") == run


def test_eagle3_is_one_layer_on_the_published_taps():
  draft = {"name": "eagle3", "num_layers": 1, "mlp_width": 38}
  deep = dataclasses.replace(get_config().target.random, num_layers=11)
  config = dataclasses.replace(
    get_config(), drafter=DraftConfig(**draft, draft_vocabulary=77)
  )
  network = design_drafter(config, deep)
  assert network.target_layer_ids == (1, 4, 7)
  assert network.draft_vocab_size == 77 and network.mlp_width == 38
  drafter = make_drafter(config.drafter, network)
  assert drafter == Eagle3(network, 15) and not network.own_embedding
  D, heads = 64, 6 * 16
  parts = {
    "taps": 3 * D * D,
    "attention": 2 * D * (heads + 2 * 2 * 16) + heads * D,
    "mlp": 3 * D * 38,
    "norms": 4 * D,
    "head": D * 77,
  }
  assert drafter.count_parameters() == sum(parts.values())


def test_a_language_model_is_a_shorter_target():
  """On the target's tables, or, of another width, on its own."""
  target = get_config().target.random
  short = design(name="lm", num_layers=2, mlp_width=38)
  assert short == dataclasses.replace(target, num_layers=2, mlp_width=38)
  own = design(name="lm", num_layers=2, lm_width=24)
  assert own == dataclasses.replace(
    target, num_layers=2, width=24, tied_head=True
  )
  for width, borrows in ((0, True), (24, False)):
    draft = DraftConfig(name="lm", lm_width=width, block_size=4)
    made = make_drafter(draft, own if width else short)
    assert made.borrows == borrows and made.max_drafts == 3


def test_sizes_go_where_they_belong():
  drafter = design(
    name="dspark", markov_rank=7, markov_kind="rnn", anchor_predicts=False
  )
  assert drafter.markov == Markov(7, "rnn") and drafter.num_drafts == 3
  drafter = design(name="domino", gru_width=11, gru_rank=5, plain_slots=2)
  assert drafter.gru == Gru(state_width=11, width=5, plain_slots=2)
  drafter = design(
    name="dflash2",
    convolution_kernel=3,
    convolution_group=8,
    selector_rank=5,
    selector_top_k=13,
  )
  assert drafter.convolution == Convolution(3, 8)
  assert drafter.selector == Selector(5, 13)


@pytest.mark.parametrize(
  ("draft", "message"),
  [
    (
      {"name": "medusa"},
      "'medusa' cannot be trained; choose 'dflash', 'dflash2'",
    ),
    (
      {"name": "dspark", "markov_kind": "lstm"},
      "markov_kind='lstm' is unknown",
    ),
    ({"name": "dspark", "markov_rank": -1}, "markov_rank=-1 .* 0 to leave"),
    (
      {"name": "dflash2", "convolution_group": 7},
      "group_size=7 does not divide",
    ),
    ({"name": "dflash2", "convolution_group": 0}, "convolution_group=0"),
    ({"name": "dflash2", "selector_top_k": 999}, "top_k=999"),
    ({"name": "domino", "gru_rank": 0}, "gru_rank=0"),
    ({"name": "domino", "plain_slots": -1}, "plain_slots=-1"),
    ({"name": "eagle3"}, "num_layers=2, and eagle3 has one layer; use 1"),
    ({"name": "eagle3", "num_layers": 1}, "5 layers is too shallow .* drafter"),
    (
      {"name": "eagle3", "num_layers": 1, "taps": (1, 2, 5)},
      r"tap 5 is outside the target's layers 0\.\.\.4",
    ),
    (BASELINES["eagle3"] | {"name": "eagle3", "block_size": 1}, "block_size=1"),
    (
      BASELINES["eagle3"] | {"name": "eagle3", "draft_vocabulary": 300},
      "draft_vocab_size=300 is impossible",
    ),
    ({"name": "lm", "draft_vocabulary": 9}, "would trim the head .* use 0"),
    ({"name": "lm", "num_layers": 0}, "num_layers=0 .* at least 1 layer"),
    ({"name": "lm", "lm_width": -1}, "lm_width=-1"),
    ({"name": "lm", "block_size": 1}, "block_size=1 drafts nothing"),
  ],
)
def test_what_cannot_be_built_is_refused(draft, message):
  with pytest.raises(ConfigError, match=message):
    design(**draft)


def test_a_small_model_with_experts_is_not_drawn_up():
  config: Config = get_config()
  config.drafter = dataclasses.replace(config.drafter, name="lm")
  target = config.target.random
  assert target is not None
  design_drafter(config, target)
  experts = Experts(count=3, top_k=1, width=5)
  for change in (
    {"experts": experts},
    {"attention_sinks": True},
    {"layer_windows": (7,) * target.num_layers},
  ):
    with pytest.raises(ConfigError, match="drafter.name=lm"):
      design_drafter(config, dataclasses.replace(target, **change))
