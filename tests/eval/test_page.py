"""The page in a browser: figures drawn, nothing fetched, nothing cut off."""

import re

import pytest

from eval import page, runs
from tests.eval import browser, reports

pytestmark = pytest.mark.browser
HOSTILE = '"><img src=x onerror="throw 1"><script>throw 2</script>'


def make_page(directory, hostile=""):
  """The page of all kinds of records."""
  found = runs.read([reports.save(reports.full(hostile), directory / "runs")])
  return page.to_html(*found)


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("hostile", ["", HOSTILE], ids=["plain", "hostile"])
def test_page_shows_every_figure_at_any_width(width, hostile, tmp_path):
  text = make_page(tmp_path, hostile)
  assert len(text.encode()) < 3 * 2**20
  seen = browser.look(text, tmp_path, width=width)
  assert seen.faults == []
  # Of each temperature: tau, speed-up, acceptance of two prompt sets, both
  # against each other; then round time and the curve.
  assert len(seen.figures) == 2 * 5 + 2


def test_page_follows_the_readers_preference(tmp_path):
  text = make_page(tmp_path)
  inks = []
  for dark in (False, True):
    directory = tmp_path / str(dark)
    directory.mkdir()
    inks.append(browser.look(text, directory, dark=dark).ink)
  assert inks == ["rgb(27, 31, 36)", "rgb(230, 237, 243)"]


def first_figure(text, change):
  """The page, with its first figure changed."""
  figure = re.search("<svg.*?</svg>", text, re.DOTALL)[0]
  return text.replace(figure, change(figure), 1)


def without_policy(text):
  """The page, if no browser held it back."""
  return re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)


PLANTED = {
  "a figure without size": (
    "no room, 0 x 0 px",
    lambda text: first_figure(
      text, lambda svg: svg.replace("<svg", '<svg style="width:0;height:0"', 1)
    ),
  ),
  "a figure without marks": (
    "no marks",
    lambda text: first_figure(text, lambda svg: svg.replace('"mark', '"dot')),
  ),
  "a place that is no number": (
    "NaN",
    lambda text: first_figure(
      text, lambda svg: re.sub(r"translate\([\d.]+", "translate(NaN", svg)
    ),
  ),
  "a mark outside": (
    "1 marks outside",
    lambda text: first_figure(
      text,
      lambda svg: re.sub(r"translate\([\d.]+", "translate(400", svg, count=1),
    ),
  ),
  "letters too small": (
    "px high",
    lambda text: text.replace("svg text { font: 11px", "svg text { font: 6px"),
  ),
  "a name too long for its figure": (
    "is cut off",
    lambda text: first_figure(
      text, lambda svg: svg.replace(">mine</text>", f">{'mine' * 20}</text>")
    ),
  ),
  "a table that does not scroll": (
    "px wide, not 360",
    lambda text: text.replace(".scroll { overflow-x: auto;", ".scroll {"),
  ),
  "a script that throws": (
    "Uncaught",
    lambda text: without_policy(text).replace(
      "</main>", "</main><script>throw Error('planted')</script>"
    ),
  ),
  "a script": (
    "script",
    lambda text: text.replace("</main>", "</main><script>1</script>"),
  ),
  "an image from elsewhere": (
    "request: https://example.org/x.png",
    lambda text: without_policy(text).replace(
      "</main>", '</main><img src="https://example.org/x.png">'
    ),
  ),
  "an image that the policy stops": (
    "example.org",
    lambda text: text.replace(
      "</main>", '</main><img src="https://example.org/x.png">'
    ),
  ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault_is_seen(name, tmp_path):
  complaint, plant = PLANTED[name]
  text = make_page(tmp_path)
  planted = plant(text)
  assert planted != text
  seen = browser.look(planted, tmp_path)
  assert any(complaint in fault for fault in seen.faults), seen.faults
