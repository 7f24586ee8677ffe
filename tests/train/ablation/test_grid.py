"""Which runs a grid means, what it refuses, and what it costs."""

import dataclasses
import functools
import pathlib
import sys

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from configs import ablation as shipped
from configs.tiny import get_config
from dflash_jax import config_file
from dflash_jax.config import (
  AblationConfig,
  Config,
  ConfigError,
  TargetConfig,
  to_json,
)
from dflash_jax.target import Target
from train.ablation.grid import Grid, Pair, override, parse_arms, parse_pairs
from train.ablation.jobs import differences, train_command
from train.ablation.prepare import check_arms, claim, load_base
from train.design import design_drafter, make_drafter
from train.files import FileError
from train.learners import make_learner
from train.record import CONFIG, read_config

ROOT = pathlib.Path(__file__).parents[3]
ARMS = (
  "base:",
  "wide: drafter.mlp_width=96 train.learning_rate=1e-3",
  "ngram: drafter.path=ngram",
  "odd: drafter.layer_causal=(True,False) 'train.loss=0.5*ce + 0.5*kl'",
)


def tiny(tmp_path: pathlib.Path, **ablation) -> Config:
  """configs/tiny.py with an ablation of ARMS on one file of prompts."""
  prompts = tmp_path / "few.jsonl"
  prompts.write_text('{"prompt": "ab"}\n{"turns": ["c", "d"]}\n')
  fields = {"arms": ARMS, "seeds": (3, 5), "prompts": (str(prompts),)}
  return dataclasses.replace(
    get_config(), ablation=AblationConfig(**fields | ablation)
  )


# --- Arms ---------------------------------------------------------------------


def test_an_arm_is_the_config_with_its_typed_settings():
  base = get_config()
  first, wide, ngram, odd = parse_arms(ARMS, base)
  assert first.config == base and first.config is not base
  assert differences(base, wide.config) == {
    "drafter.mlp_width": 96,
    "train.learning_rate": 1e-3,
  }
  assert odd.config.train.loss == "0.5*ce + 0.5*kl"
  assert odd.config.drafter.layer_causal == (True, False)
  assert [arm.is_trained for arm in (first, wide, ngram, odd)] == [1, 1, 0, 1]


def test_an_arm_does_not_change_the_config_it_differs_from():
  base = get_config()
  override(base, {"drafter.mlp_width": "96", "train.steps": "3"})
  assert base == get_config()


def test_whole_numbers_serve_where_fractions_are_asked_for():
  config = override(get_config(), {"train.curriculum": "1"})
  assert type(config.train.curriculum) is float


@pytest.mark.parametrize(
  "line, complaint",
  [
    ("no colon", "'no colon' has no name"),
    ("a b: ", "'a b: ' has no name of letters"),
    ("../up: ", "has no name"),
    ("x: drafter.nonsense=1", "arm 'x': .*no field 'nonsense'; known: path"),
    ("x: train.steps=few", "arm 'x': train.steps takes .* int, not 'few'"),
    ("x: train.steps=1.5", "arm 'x': train.steps takes values of type int"),
    ("x: train.steps=1 train.steps=2", "arm 'x': train.steps stands there"),
    ("x: train.steps", "arm 'x': 'train.steps' is no field=value"),
    ("x: train.loss='ce", "arm 'x': cannot read"),
    ("x: train.seed=1", "arm 'x': train.seed is for ablation.seeds"),
    ("x: decode.seed=1", "arm 'x': 'decode.seed' cannot differ"),
    ("x: drafter=1", "arm 'x': 'drafter' cannot differ between arms"),
    ("x: drafter.taps=3", "arm 'x': drafter.taps takes values of type tuple"),
    ("x: \"drafter.taps=('a',)\"", "arm 'x': .*taps: 'a' is not of type int"),
    ("base: train.steps=1", "arm 'base' is there twice"),
  ],
)
def test_an_arm_that_makes_no_sense_is_refused_by_its_name(line, complaint):
  with pytest.raises(ConfigError, match=complaint):
    parse_arms(("base:", line), get_config())


# --- Trials, pairs ------------------------------------------------------------


def test_all_arms_come_once_before_any_comes_twice(tmp_path):
  grid = Grid.plan(tiny(tmp_path), tmp_path)
  assert [(t.arm.name, t.seed) for t in grid.trials] == [
    ("base", 3),
    ("wide", 3),
    ("ngram", None),
    ("odd", 3),
    ("base", 5),
    ("wide", 5),
    ("odd", 5),
  ]
  trained = [trial for trial in grid.trials if trial.seed is not None]
  assert len({trial.workdir for trial in trained}) == len(trained)
  assert all(t.config.train.seed == t.seed for t in trained)
  assert all(t.is_complete == (t.seed is None) for t in grid.trials)


def test_without_lines_every_arm_is_compared_with_the_first():
  assert parse_pairs((), ["a", "b", "c"]) == [Pair("b", "a"), Pair("c", "a")]
  lines = ("c vs a: +5%: once", "b vs c")
  assert parse_pairs(lines, ["a", "b", "c"]) == [
    Pair("c", "a", "+5%: once"),
    Pair("b", "c"),
  ]


@pytest.mark.parametrize(
  "changes, complaint",
  [
    ({"arms": ()}, "ablation.arms is empty; give lines like"),
    ({"arms": ("n: drafter.path=ngram",)}, "nothing to train"),
    ({"seeds": ()}, r"ablation.seeds=\(\) must name at least one"),
    ({"seeds": (1, 1)}, "each once"),
    ({"prompts": ()}, "ablation.prompts is empty"),
    ({"compare": ("base against wide",)}, "cannot read 'base against wide'"),
    ({"compare": ("base vs wider",)}, "no arm 'wider'; choose from base"),
  ],
)
def test_a_grid_that_makes_no_sense_is_refused(tmp_path, changes, complaint):
  with pytest.raises(ConfigError, match=complaint):
    Grid.plan(tiny(tmp_path, **changes), tmp_path)


def test_two_files_of_one_name_would_be_taken_for_one(tmp_path):
  (tmp_path / "other").mkdir()
  config = tiny(tmp_path)
  twin = tmp_path / "other" / "few.jsonl"
  twin.write_text('{"prompt": "x"}\n')
  config.ablation.prompts += (str(twin),)
  with pytest.raises(ConfigError, match="two files called 'few'"):
    Grid.plan(config, tmp_path)


# --- Before any training ------------------------------------------------------


@pytest.fixture(scope="module")
def base():
  """The target of configs/tiny.py."""
  config = dataclasses.replace(
    get_config(), ablation=AblationConfig(arms=("a:",), prompts=("-",))
  )
  arms = parse_arms(config.ablation.arms, config)
  return load_base(Grid(config, arms, [], [], [], []))


def planned(tmp_path, corpus_directory, *arms: str) -> Grid:
  """A grid on a corpus that is there."""
  config = tiny(tmp_path, arms=("base:", *arms))
  config.train.corpus = (corpus_directory,)
  config.train.sequence_length = 48
  return Grid.plan(config, tmp_path)


def test_parameters_are_those_that_are_trained(
  tmp_path, corpus_directory, base
):
  trimmed = (
    "drafter.draft_vocabulary=50 drafter.name=dspark drafter.markov_rank=8"
  )
  grid = planned(
    tmp_path,
    corpus_directory,
    "ngram: drafter.path=ngram",
    "wide: drafter.mlp_width=161",
    f"dspark: {trimmed} drafter.confidence=False",
  )
  found = check_arms(grid, base)
  layers, width = 2, 64
  assert found["ngram"] == 0
  assert found["wide"] - found["base"] == layers * 3 * width
  vocabulary = base.target.config.vocab_size
  assert found["dspark"] - found["base"] == 8 * (vocabulary + 50)


@pytest.mark.parametrize(
  "line, complaint",
  [
    ("x: train.loss=nonsense", "arm 'x': train.loss='nonsense'"),
    ("x: 'train.loss=ce + selector'", "arm 'x': train.loss trains a selector"),
    ("x: drafter.name=medusa", "arm 'x': drafter.name='medusa' cannot be"),
    ("x: drafter.block_size=1", "arm 'x': block_size=1 drafts nothing"),
    ("x: drafter.taps=(9,)", "arm 'x': tap 9 is outside"),
    ("x: train.steps=0", "arm 'x': train.steps=0 is impossible"),
    ("x: drafter.draft_vocabulary=999999", "arm 'x': .*exceeds the target's"),
    ("x: train.num_anchors=4000", "arm 'x': .*num_anchors=4000"),
    ("x: \"train.corpus=('nowhere',)\"", "arm 'x': nowhere holds no corpus"),
    ("x: drafter.path=nowhere", "arm 'x': .*nowhere"),
  ],
)
def test_an_arm_that_cannot_be_built_is_refused_before_any_is_trained(
  tmp_path, corpus_directory, base, line, complaint
):
  with pytest.raises(ConfigError, match=complaint):
    check_arms(planned(tmp_path, corpus_directory, line), base)


def test_a_run_begun_otherwise_is_refused_by_arm_and_field(
  tmp_path, corpus_directory, base
):
  grid = planned(tmp_path, corpus_directory, "wide: drafter.mlp_width=96")
  trial = grid.trials[1]
  trial.workdir.mkdir(parents=True)
  earlier = planned(tmp_path, corpus_directory, "wide: drafter.mlp_width=97")
  text = to_json(earlier.trials[1].config)
  (trial.workdir / CONFIG).write_text(text)
  with pytest.raises(ConfigError, match="arm 'wide': .*mlp_width=97, not 96"):
    check_arms(grid, base)


def test_a_workdir_of_another_grid_is_refused_by_field(tmp_path):
  grid = Grid.plan(tiny(tmp_path), tmp_path)
  claim(grid, tmp_path)
  more = tiny(tmp_path, arms=(*ARMS, "new:"), seeds=(3, 5, 7))
  claim(Grid.plan(more, tmp_path), tmp_path)  # arms and seeds may come
  assert read_config(tmp_path).ablation.seeds == (3, 5, 7)
  other = tiny(tmp_path)
  other.train.steps = 41
  with pytest.raises(FileError, match="begun with train.steps=40, not 41"):
    claim(Grid.plan(other, tmp_path), tmp_path)


# --- The command of a run -----------------------------------------------------


def test_flags_of_a_run_make_its_config(tmp_path, monkeypatch):
  path = str(ROOT / "configs" / "tiny.py")
  config = tiny(tmp_path)
  config.train.steps = 41  # as if it had been overridden
  config.train.corpus = ("here", "there's")
  wanted = Grid.plan(config, tmp_path).trials[-1].config
  line = train_command(path, get_config(), wanted, tmp_path, resume=True)
  _, _, module, *arguments = line
  assert module == "train.main"
  assert arguments[-2:] == [f"--workdir={tmp_path}", "--resume"]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  monkeypatch.setattr(sys, "argv", ["train.main", *arguments[:-2]])
  values(sys.argv)
  assert values.config.drafter == wanted.drafter
  assert values.config.train == wanted.train
  assert values.config.name == "tiny/odd"


# --- The shipped grid ---------------------------------------------------------

SMOLLM2 = TargetConfig(
  family="llama",
  num_layers=30,
  width=576,
  mlp_width=1536,
  num_heads=9,
  num_kv_heads=3,
  head_width=64,
  vocab_size=49152,
)


def count(config: Config) -> int:
  """Trained parameters, by drawing up the network."""
  network = design_drafter(config, SMOLLM2)
  drafter = make_drafter(config.drafter, network)
  learner = make_learner(Target(SMOLLM2), drafter, config.train)
  columns = config.drafter.draft_vocabulary or None
  init = functools.partial(learner.init, columns=columns)
  tree = jax.eval_shape(init, jax.random.key(0))
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_shipped_arms_have_equal_budgets_and_share_one_cache():
  config = shipped.get_config()
  arms = parse_arms(config.ablation.arms, config)
  budget = count(arms[0].config)
  assert budget == 12_280_704
  for arm in arms:
    if arm.is_trained:
      ratio = count(arm.config) / budget
      assert 0.97 < ratio < 1.04, (arm.name, ratio)
  parse_pairs(config.ablation.compare, [arm.name for arm in arms])
  cached = (1, 8, 14, 20, 27, 29)
  for arm in arms:
    if arm.is_trained:
      network = design_drafter(arm.config, SMOLLM2)
      taps = getattr(network, "target_layer_ids", ())
      assert set(taps) <= set(cached), arm.name


@pytest.mark.parametrize(
  "name", ["dflash2", "dspark", "domino", "eagle3", "lm"]
)
def test_shipped_variants_can_be_trained_on_equal_budgets(name):
  config = config_file.read(ROOT / "configs" / f"smollm2_135m_{name}.py")
  assert config.drafter.name == name
  base = config_file.read(ROOT / "configs" / "smollm2_135m_cpu.py")
  assert 0.97 < count(config) / count(base) < 1.04
  same = {"corpus", "steps", "batch_size", "num_anchors", "learning_rate"}
  for field in same:
    assert getattr(config.train, field) == getattr(base.train, field)
