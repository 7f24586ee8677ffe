"""Export: what was trained is what engines load and decode with."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import get_config
from dflash_jax import fp8, weights
from dflash_jax.config import Config, ConfigError, to_json
from dflash_jax.config_json import from_json
from dflash_jax.decode import Decoder
from dflash_jax.decode_state import ModelParams
from dflash_jax.drafters import DFlash
from dflash_jax.model import borrow
from dflash_jax.proposal import Drafting
from dflash_jax.session import Session
from dflash_jax.weights import WeightsError
from tests.train.programs import run
from train import export as export_module
from train.checkpoint import Checkpoints
from train.export import export
from train.files import FileError
from train.record import Run, write_run
from train.state import fold_tap_scale

TAUS = {7: 2.5, 9: 1.5}  # the best is not the latest


@pytest.fixture(scope="module")
def head_ids(corpus) -> np.ndarray:
  """A draft vocabulary that lacks some tokens of the answers."""
  return corpus.frequent_tokens(40, 263)


@pytest.fixture(scope="module")
def workdir(setup, trained, head_ids, tmp_path_factory) -> pathlib.Path:
  """A run with two checkpoints: a trained drafter, and a worse one."""
  path = tmp_path_factory.mktemp("run")
  network = setup.trainer.drafter.config
  ids = tuple(head_ids.tolist())
  config = dataclasses.replace(get_config(), train=setup.trainer.config)
  write_run(str(path), config, Run(setup.corpus.checksum, network, ids))
  checkpoints = Checkpoints(path, keep=2)
  state, _ = trained
  for step, tau in TAUS.items():
    params = jax.tree.map(lambda x, s=step: x * (1 + (s - 7) / 4), state.params)
    checkpoints.save(
      dataclasses.replace(state, step=jnp.int32(step), params=params), tau
    )
  checkpoints.close()
  return path


def decode(setup, drafter, params, head_ids):
  """Tokens and accepted lengths of four prompts of the corpus."""
  decoder = Decoder(setup.trainer.target, drafter, Drafting(4))
  everything = ModelParams(
    setup.target_params, params, borrow(setup.target_params, head_ids)
  )
  prompts = []
  for index in range(4):
    tokens, mask = setup.corpus.example(index)
    prompts.append(tokens[~mask].tolist())
  model = FakeModel(everything)
  session = Session(model, decoder, 4, capacity=64, max_new_tokens=24)
  replies = session.reply(prompts, [24] * 4)
  return [(reply.tokens, reply.accepted) for reply in replies]


@dataclasses.dataclass
class FakeModel:
  """What a Session asks of a Model."""

  params: ModelParams
  config: Config = dataclasses.field(default_factory=Config)
  tokenizer: None = None
  beliefs: dict = dataclasses.field(default_factory=dict)


def test_an_exported_drafter_decodes_as_the_one_in_memory(
  workdir, setup, trained, head_ids, tmp_path
):
  state, _ = trained
  exported = export(str(workdir), str(tmp_path / "drafter"), dtype="float32")
  assert (exported.step, exported.tau) == (7, 2.5)
  network, params, ids = weights.load_drafter(tmp_path / "drafter")
  drafter = setup.trainer.drafter
  assert network == drafter.config
  np.testing.assert_array_equal(ids, head_ids)
  folded = fold_tap_scale(state.params, state.tap_scale)
  expected = decode(setup, drafter, folded, head_ids)
  assert decode(setup, type(drafter)(network), params, ids) == expected
  accepted = np.sum([counts for _, counts in expected], axis=0)
  assert accepted[1:].sum() > 5  # it does draft


def test_an_exported_drafter_in_8_bits_drafts_as_well(
  workdir, setup, head_ids, tmp_path
):
  found = {}
  for quantize in ("", "fp8"):
    place = tmp_path / f"drafter{quantize}"
    export(str(workdir), str(place), dtype="float32", quantize=quantize)
    network, params, ids = weights.load_drafter(place)
    replies = decode(setup, DFlash(network), fp8.for_device(params), ids)
    accepted = np.sum([counts for _, counts in replies], axis=0)
    tau = 1 + accepted @ np.arange(len(accepted)) / accepted.sum()
    found[quantize] = [tokens for tokens, _ in replies], tau
  assert found["fp8"][0] == found[""][0]
  assert found["fp8"][1] > 0.9 * found[""][1]


def test_the_report_counts_parameters_and_bytes(workdir, tmp_path, setup):
  output = tmp_path / "drafter"
  exported = export(str(workdir), str(output))
  assert exported.parameters == setup.trainer.drafter.count_parameters()
  assert exported.bytes == sum(p.stat().st_size for p in output.iterdir())
  size = (output / "model.safetensors").stat().st_size
  assert 2 * exported.parameters < size < 2 * exported.parameters + 10_000
  extra = json.loads((output / "config.json").read_text())["dflash_jax"]
  assert extra["step"] == 7 and extra["held_out_tau"] == 2.5


@pytest.mark.parametrize(
  ("step", "number"), [("best", 7), ("latest", 9), ("9", 9)]
)
def test_the_checkpoint_is_chosen(workdir, tmp_path, step, number):
  exported = export(str(workdir), str(tmp_path / "drafter"), step)
  assert (exported.step, exported.tau) == (number, TAUS[number])


@pytest.mark.parametrize(
  ("step", "dtype", "message"),
  [
    ("8", "bfloat16", r"no checkpoint of step 8; it has \[7, 9\]"),
    ("worst", "bfloat16", "--step=worst is unknown"),
    ("best", "int8", "--dtype=int8 is unknown"),
  ],
)
def test_choices_that_cannot_be_are_named(
  workdir, tmp_path, step, dtype, message
):
  with pytest.raises((ConfigError, FileError), match=message):
    export(str(workdir), str(tmp_path / "drafter"), step, dtype)
  assert not (tmp_path / "drafter").exists()


def test_a_wrong_workdir_is_named_and_left_alone(tmp_path):
  with pytest.raises(FileError, match=r"config\.json is missing; .*--workdir"):
    export(str(tmp_path / "nowhere"), str(tmp_path / "drafter"))
  assert not list(tmp_path.iterdir())


def test_a_run_without_checkpoint_is_named(workdir, tmp_path):
  for name in ("config.json", "run.json"):
    (tmp_path / name).write_bytes((workdir / name).read_bytes())
  with pytest.raises(FileError, match="no checkpoint yet"):
    export(str(tmp_path), str(tmp_path / "drafter"))


def test_what_does_not_read_back_is_no_success(workdir, tmp_path, monkeypatch):
  save = weights.save_drafter

  def damaged(directory, config, params, **options):
    norm = {"scale": params["norm"]["scale"] * 1.5}
    save(directory, config, {**params, "norm": norm}, **options)

  monkeypatch.setattr(export_module.weights, "save_drafter", damaged)
  with pytest.raises(WeightsError, match="does not read back"):
    export(str(workdir), str(tmp_path / "drafter"))


def test_the_program_prints_one_line(workdir, compiled, tmp_path):
  output = tmp_path / "drafter"
  arguments = [f"--workdir={workdir}", f"--output={output}"]
  result = run("train.export", *arguments, cache=compiled)
  assert result.returncode == 0, result.stderr
  assert "step 7, held-out tau 2.500 (walked)" in result.stdout
  assert result.stdout.count("\n") == 1


# --- The run's config, read back ----------------------------------------------


def test_a_config_survives_its_record():
  config = get_config()
  config.drafter.layer_windows = (0, 7)
  config.train.corpus = ("a", "b")
  assert from_json(Config, to_json(config), "x") == config


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"train": {"stepz": 3}}, "train: TrainConfig has no field 'stepz'"),
    ({"train": {"steps": "3"}}, "train: steps: '3' is not"),
    ({"train": {"steps": True}}, "train: steps: True is not"),
    ({"train": {"corpus": [1]}}, "corpus: 1 is not"),
    ({"train": 3}, "train: 3 is not an object"),
    ({"target": {"random": {"width": 3}}}, "random: .* lacks its field"),
  ],
)
def test_a_record_that_is_no_config_is_refused(change, message):
  with pytest.raises(ConfigError, match=f"^run.json: .*{message}"):
    from_json(Config, json.dumps(change), "run.json")


def test_a_record_that_is_not_json_is_refused():
  with pytest.raises(ConfigError, match=r"run\.json is not JSON"):
    from_json(Config, "{", "run.json")
