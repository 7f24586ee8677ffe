"""Prompt files: JSON lines with `prompt`, `question` or `turns`."""

import dataclasses
import json
import pathlib


class PromptError(ValueError):
  """A prompt file that cannot be used; the message names file and line."""


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What a user says: one turn, or several, answered turn after turn."""

  turns: tuple[str, ...]


def read_prompts(path: str, limit: int = 0) -> list[Prompt]:
  """The first `limit` prompts of a JSONL file; 0 reads all.

  Raises:
    PromptError: for a missing or empty file or a malformed line, by number.
  """
  file = pathlib.Path(path)
  if not file.is_file():
    raise PromptError(
      f"prompt file {path} does not exist; give a file of JSON lines with "
      "'prompt', 'question' or 'turns'"
    )
  prompts: list[Prompt] = []
  with file.open(encoding="utf-8") as lines:
    for number, line in enumerate(lines, start=1):
      if line.strip():
        prompts.append(_parse(line, f"{path}, line {number}"))
      if limit and len(prompts) == limit:
        break
  if not prompts:
    raise PromptError(
      f"prompt file {path} holds no prompts; add JSON lines with 'prompt', "
      "'question' or 'turns'"
    )
  return prompts


def _parse(line: str, where: str) -> Prompt:
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise PromptError(f"{where}: not JSON ({error.msg}); fix or drop it") from (
      error
    )
  if not isinstance(record, dict):
    raise PromptError(f"{where}: expected an object, found {line.strip()[:40]}")
  turns = record.get("turns")
  if turns is None:
    turns = [record.get("prompt", record.get("question"))]
  is_text = isinstance(turns, list) and all(isinstance(t, str) for t in turns)
  if not is_text or not turns or not all(t.strip() for t in turns):
    raise PromptError(
      f"{where}: needs text in 'prompt' or 'question', or a list of texts in "
      "'turns'"
    )
  return Prompt(tuple(turns))
