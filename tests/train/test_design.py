"""From a config's names and sizes to an architecture."""

import dataclasses

import pytest

from configs.tiny import get_config
from dflash_jax.config import Config, ConfigError, DrafterConfig, to_json
from dflash_jax.config_json import from_json
from dflash_jax.networks import Confidence, Convolution, Gru, Markov, Selector
from train.design import design_drafter

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


@pytest.mark.parametrize("name", ["dflash", "dflash2", "dspark", "domino"])
def test_a_design_is_read_back_from_its_record(name):
  drafter = design(name=name, markov_kind="gated")
  assert from_json(DrafterConfig, to_json(drafter), "record") == drafter


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
  ],
)
def test_what_cannot_be_built_is_refused(draft, message):
  with pytest.raises(ConfigError, match=message):
    design(**draft)
