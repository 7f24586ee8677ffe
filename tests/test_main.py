"""python -m dflash_jax: output for people, output for scripts, mistakes."""

import io
import json
import pathlib

import pytest

from dflash_jax import config_file
from dflash_jax.__main__ import Options, answer_all
from dflash_jax.config import Config, ConfigError
from dflash_jax.generate import generate
from dflash_jax.prompts import Prompt
from tests.commands import TINY, run_each, run_module, save_tiny_drafter
from tests.testing import oracle_model, tiny_model

JSON_KEYS = ["text", "tokens", "rounds", "tau", "ttft_s", "tpot_s"]
JSON_KEYS += ["tokens_per_s"]


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture(scope="module")
def oracle():
  """A model whose drafter is right but for token 3 of its reply to Hello."""
  model = tiny_model(max_new_tokens=11)
  plain = generate(model.without_drafter(), "Hello", max_new_tokens=31)
  ids = model.tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
  return oracle_model(model, [ids], [plain.tokens], [[3]])


def printed(model, *texts, out=None, **options):
  """What answer_all prints."""
  out = io.StringIO() if out is None else out
  answer_all(
    model, [Prompt((text,)) for text in texts], Options(**options), out
  )
  return out.getvalue()


# --- Output -------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_prints_reply_and_statistics(oracle, stream):
  text = generate(oracle, "Hello").text
  shown = printed(oracle, "Hello", stream=stream)
  lines = [line for line in shown.splitlines() if line]
  assert lines[:2] == ["> Hello", text]
  assert "11 new tokens, 3 rounds, tau 3.33" in lines[2]
  assert lines[3] == ("acceptance by slot: 1: 100%  2: 100%  3: 67%  4: 67%")
  assert lines[4].startswith("TTFT ") and lines[4].endswith("tokens/s")
  assert len(lines) == 5


def test_compares_with_plain_decoding(oracle):
  shown = printed(oracle, "Hello", compare=True)
  assert "identical tokens: yes" in shown
  assert "speed-up" in shown


def test_json_lines_hold_the_promised_keys(oracle):
  (line,) = printed(oracle, "Hello", json=True).splitlines()
  record = json.loads(line)
  assert list(record) == JSON_KEYS
  assert record["tokens"] == generate(oracle, "Hello").tokens
  assert record["rounds"] == 3
  (line,) = printed(oracle, "Hello", json=True, compare=True).splitlines()
  compared = json.loads(line)
  assert list(compared) == JSON_KEYS + [
    "plain_tokens_per_s",
    "speedup",
    "identical",
    "guarantee",
  ]
  assert compared["identical"] is True


def test_replies_are_printed_in_the_order_of_prompts():
  model = tiny_model(batch_size=2, max_new_tokens=7)
  texts = ["Tell me more, please.", "?", "Hello"]
  expected = [c.tokens for c in generate(model, texts)]
  lines = printed(model, *texts, json=True).splitlines()
  assert [json.loads(line)["tokens"] for line in lines] == expected


def test_several_comparisons_are_summed_up():
  model = tiny_model(batch_size=2, max_new_tokens=7)
  shown = printed(model, "Hi", "Ho", compare=True)
  assert "2 replies: tau 1.00" in shown.splitlines()[-1]
  assert shown.rstrip().endswith("identical tokens: yes")


def test_blocks_are_marked_by_brackets_without_colours(oracle):
  # Slots 0 1 2 0 1 2 3 4 0 1 2: two drafts, four drafts, two drafts.
  t = generate(oracle, "Hello").text
  marked = f"{t[0]}[{t[1:3]}]{t[3]}[{t[4:8]}]{t[8]}[{t[9:]}]"
  shown = printed(oracle, "Hello", show_blocks=True)
  assert marked in shown
  assert "\x1b" not in shown
  assert shown.startswith("[drafted and accepted]")


def test_blocks_are_coloured_on_a_terminal(oracle, monkeypatch):
  monkeypatch.delenv("NO_COLOR", raising=False)
  text = generate(oracle, "Hello").text
  shown = printed(oracle, "Hello", show_blocks=True, out=Terminal())
  assert f"{text[0]}\x1b[38;5;39m{text[1]}\x1b[0m" in shown
  assert shown.count("\x1b[0m") == 4 + 8  # legend, drafted tokens
  monkeypatch.setenv("NO_COLOR", "1")
  plain = printed(oracle, "Hello", show_blocks=True, out=Terminal())
  assert "\x1b" not in plain


# --- Config files and overrides -----------------------------------------------


def test_unknown_field_is_named_with_the_known_ones():
  config_file.check_overrides(Config(), ["decode.batch_size", "name"])
  with pytest.raises(ConfigError, match="no field 'nonsense'; known: max_new"):
    config_file.check_overrides(Config(), ["decode.nonsense"])
  with pytest.raises(ConfigError, match="Config has no field 'dekode'"):
    config_file.check_overrides(Config(), ["dekode.batch_size"])
  with pytest.raises(ConfigError, match="int has no field 'x'; known: none"):
    config_file.check_overrides(Config(), ["decode.batch_size.x"])


def test_networks_cannot_be_overridden():
  config = config_file.read(TINY)
  with pytest.raises(ConfigError, match="TargetConfig is fixed"):
    config_file.check_overrides(config, ["target.random.width"])


def test_tuples_of_another_type_are_refused():
  config = Config()
  config.drafter.taps = (1, 3)
  config_file.check_values(config)
  config.drafter.taps = ("1", "3")
  with pytest.raises(ConfigError, match="--config.drafter.taps: '1' is not"):
    config_file.check_values(config)


@pytest.mark.parametrize(
  ("text", "complaint"),
  [
    ("x = 1", "no 'get_config'"),
    ("def get_config():\n  return 3", "returns a int"),
    ("def get_config(:", "invalid syntax"),
    ("from dflash_jax.config import Confg", "cannot import name 'Confg'"),
    (
      "from dflash_jax.config import DecodeConfig\n"
      "def get_config():\n  return DecodeConfig(nonsense=3)",
      "unexpected keyword argument 'nonsense'",
    ),
  ],
)
def test_broken_config_file_is_named(tmp_path, text, complaint):
  path = tmp_path / "broken.py"
  path.write_text(text)
  with pytest.raises(ConfigError, match=complaint) as error:
    config_file.read(path)
  assert str(path) in str(error.value)


def test_default_config_is_found_from_anywhere(tmp_path, monkeypatch):
  assert config_file.default_path() == config_file.DEFAULT
  monkeypatch.chdir(tmp_path)
  path = pathlib.Path(config_file.default_path())
  assert path.is_absolute() and path.is_file()


# --- The whole program --------------------------------------------------------


def test_scripts_get_json_and_nothing_else(tmp_path):
  drafter = save_tiny_drafter(tmp_path / "drafter")
  done = run_module(
    "dflash_jax",
    f"--config={TINY}",
    f"--drafter={drafter}",
    "--prompt=Hello",
    "--max_new_tokens=5",
    "--compare",
    "--json",
  )
  assert done.returncode == 0, done.stderr
  record = json.loads(done.stdout)
  assert len(record["tokens"]) == 5
  assert record["identical"] is True
  assert not done.stderr


def test_sampled_replies_are_those_of_plain_sampling_and_follow_the_seed(
  tmp_path,
):
  drafter = save_tiny_drafter(tmp_path / "drafter")
  settings = [
    f"--config={TINY}",
    f"--drafter={drafter}",
    "--prompt=Hello",
    "--max_new_tokens=9",
    "--compare",
    "--json",
    "--temperature=0.9",
    "--top_p=0.9",
    "--draft_temperature=1.2",
    "--tree_nodes=6",
  ]
  runs = run_each("dflash_jax", [[*settings, f"--seed={n}"] for n in (7, 8)])
  for done in runs:
    assert done.returncode == 0, done.stderr
  replies = [json.loads(done.stdout) for done in runs]
  for reply in replies:
    assert reply["identical"] is True
    assert reply["guarantee"] == "tokens"
  assert replies[0]["tokens"] != replies[1]["tokens"]


@pytest.mark.parametrize(
  ("rule", "draft_temperature", "caveat"),
  [("token", 1.0, "(the law of plain decoding"), ("typical", 0.0, "(LOSSY")],
)
def test_a_comparison_says_what_its_rule_promises(
  rule, draft_temperature, caveat
):
  model = tiny_model(
    max_new_tokens=7,
    rule=rule,
    temperature=1.0,
    draft_temperature=draft_temperature,
  )
  shown = printed(model, "Hello", compare=True)
  assert caveat in shown.splitlines()[-1]


def test_a_width_below_the_block_is_told():
  model = tiny_model(max_new_tokens=7, tree_nodes=9, width="fixed:6")
  assert "(6.0 drafts verified per round)" in printed(model, "Hello")


def test_a_block_can_be_shorter_than_it_was_trained_for(tmp_path):
  drafter = save_tiny_drafter(tmp_path / "drafter")  # of blocks of 4
  settings = [
    f"--config={TINY}",
    f"--drafter={drafter}",
    "--prompt=Hello",
    "--max_new_tokens=9",
    "--width=fixed:9",
  ]
  short, long = run_each(
    "dflash_jax", [[*settings, f"--block_size={size}"] for size in (2, 5)]
  )
  assert "acceptance by slot: 1: " in short.stdout
  assert "2: " not in short.stdout.split("acceptance by slot")[1][:12]
  complaint = "block_size=5 is impossible; this drafter was trained for 4"
  assert complaint in long.stderr


def test_chat_reads_piped_lines():
  done = run_module(
    "dflash_jax",
    f"--config={TINY}",
    "--chat",
    "--json",
    "--config.decode.max_new_tokens=4",
    text="Hello\n/reset\nHello\n",
  )
  assert done.returncode == 0, done.stderr
  first, second = (json.loads(line) for line in done.stdout.splitlines())
  assert first["tokens"] == second["tokens"]


MISTAKES = {
  "has no field 'nonsense'": ["--config.decode.nonsense=3", "--prompt=a"],
  "invalid literal for int": ["--config.decode.batch_size=x", "--prompt=a"],
  "Did you mean: prompt": ["--promt=a"],
  "nowhere/at/all": ["--prompt=a", "--drafter=nowhere/at/all"],
  "missing.jsonl does not exist": ["--prompts=missing.jsonl"],
  "give one of": ["--prompt=a", "--chat"],
  "rule='best' is unknown; choose one of": ["--prompt=a", "--rule=best"],
  "would not sample": ["--prompt=a", "--rule=greedy", "--temperature=1"],
  "top_p=0.0 is impossible; use more than 0": ["--prompt=a", "--top_p=0"],
  "draft_temperature=-1.0 is": ["--prompt=a", "--draft_temperature=-1"],
  "tree_nodes=-2 is impossible": ["--prompt=a", "--tree_nodes=-2"],
  "seed=-1 is impossible; use 0 or more": ["--prompt=a", "--seed=-1"],
}


def test_mistakes_end_with_one_line(tmp_path):
  drafter = save_tiny_drafter(tmp_path / "drafter", num_target_layers=7)
  mistakes = MISTAKES | {
    "target layers is 7 in the drafter and 5 in the target": [
      "--prompt=a",
      f"--drafter={drafter}",
    ]
  }
  lines = [[f"--config={TINY}", *mistake] for mistake in mistakes.values()]
  for complaint, done in zip(
    mistakes, run_each("dflash_jax", lines), strict=True
  ):
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout
