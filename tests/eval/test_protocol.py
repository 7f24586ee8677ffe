"""The protocol: one text in code, in every record, and in the docs."""

import pathlib

from eval.protocol import CONVENTIONS, PROTOCOL
from tests.eval import reports

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "protocol.md"


def words(text):
  """The text with one space between words, and no marks of quotation."""
  return " ".join(word for word in text.split() if word != ">")


def test_docs_say_what_the_code_does():
  page = words(DOCS.read_text())
  missing = [name for name, text in PROTOCOL.items() if words(text) not in page]
  missing += [
    name for name, text in CONVENTIONS.items() if words(text) not in page
  ]
  assert missing == []


def test_every_record_carries_the_protocol():
  record = reports.make()
  assert record["protocol"] == PROTOCOL
  assert record["conventions"] == CONVENTIONS
  assert record["prompt_set"]["count"] == 2
  assert set(record["intervals"]) <= {*record, "speedup"}
