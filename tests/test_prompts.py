"""Prompt files: every accepted form, and every mistake by its line number."""

import json

import pytest

from dflash_jax.prompts import Prompt, PromptError, read_prompts


@pytest.fixture
def write(tmp_path):
  """Writes the lines of a prompt file and gives its path."""

  def write_lines(*lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)

  return write_lines


def test_reads_every_form(write):
  path = write(
    json.dumps({"prompt": "one", "answer": "unused"}),
    "",
    json.dumps({"question": "zwei ü"}),
    json.dumps({"turns": ["three", "and more"]}),
  )
  assert read_prompts(path) == [
    Prompt(("one",)),
    Prompt(("zwei ü",)),
    Prompt(("three", "and more")),
  ]


def test_limit_reads_no_further(write):
  path = write('{"prompt": "a"}', '{"prompt": "b"}', "broken")
  assert read_prompts(path, limit=2) == [Prompt(("a",)), Prompt(("b",))]


@pytest.mark.parametrize(
  ("line", "complaint"),
  [
    ('{"prompt": "a"', "not JSON"),
    ('["a"]', "expected an object"),
    ('{"text": "a"}', "needs text"),
    ('{"prompt": 3}', "needs text"),
    ('{"prompt": "  "}', "needs text"),
    ('{"turns": []}', "needs text"),
    ('{"turns": "a"}', "needs text"),
    ('{"turns": ["a", null]}', "needs text"),
  ],
)
def test_malformed_line_is_named_by_number(write, line, complaint):
  path = write('{"prompt": "good"}', "", line)
  with pytest.raises(PromptError, match=f"line 3: .*{complaint}"):
    read_prompts(path)


def test_missing_file_is_named():
  with pytest.raises(PromptError, match=r"nowhere\.jsonl does not exist"):
    read_prompts("nowhere.jsonl")


def test_file_without_prompts_is_an_error(write):
  with pytest.raises(PromptError, match="holds no prompts"):
    read_prompts(write("", "  "))
