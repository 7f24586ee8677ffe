"""A headless Chromium that looks at a page and says what it sees."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
from typing import Any

# Debian's; the sandbox needs rights that containers do not give.
_FLAGS = (
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--no-first-run",
  "--hide-scrollbars",
  "--enable-logging=stderr",
  "--host-resolver-rules=MAP * ~NOTFOUND",
)
# The page is seen from outside, through a frame as wide as a window: it may run
# no script itself.
_HARNESS = """<!DOCTYPE html><meta charset="utf-8">
<body style="margin:0"><iframe style="border:0;width:{width}px;height:900px"
 srcdoc="{page}"></iframe><pre id="seen"></pre><script>
onload = () => {{
  const frame = document.querySelector("iframe");
  const page = frame.contentDocument;
  const box = (x) => {{
    const r = x.getBoundingClientRect();
    return [r.left, r.top, r.right, r.bottom];
  }};
  const text = (x) => getComputedStyle(x).fontSize;
  const figures = [...page.querySelectorAll("svg")].map((svg) => ({{
    title: svg.getAttribute("aria-label"),
    box: box(svg),
    units: svg.viewBox.baseVal ? svg.viewBox.baseVal.width : 0,
    marks: [...svg.querySelectorAll(".mark")].map(box),
    texts: [...svg.querySelectorAll("text")].map((x) => [...box(x),
      x.textContent, parseFloat(text(x))]),
  }}));
  document.getElementById("seen").textContent = JSON.stringify({{
    figures,
    width: page.documentElement.scrollWidth,
    requests: frame.contentWindow.performance.getEntriesByType("resource")
      .map((entry) => entry.name),
    tables: [...page.querySelectorAll("table")].map(box),
    ink: getComputedStyle(page.body).color,
  }});
}};
</script>"""


@dataclasses.dataclass(frozen=True)
class Seen:
  """What a browser made of a page.

  Attributes:
    faults: everything that is wrong, in words; none of a good page.
    figures: each with title, boxes and texts.
    ink: colour of the text.
  """

  faults: list[str]
  figures: list[dict[str, Any]]
  ink: str


def look(page: str, directory, *, width: int = 360, dark: bool = False) -> Seen:
  """Opens a page in a window so many pixels wide.

  Args:
    page: its HTML.
    directory: empty, for the browser's own files.
    width: of the window.
    dark: whether the reader prefers that.
  """
  browser = shutil.which("chromium")
  assert browser, "there is no chromium; apt-get install chromium"
  harness = directory / "harness.html"
  harness.write_text(
    _HARNESS.format(width=width, page=html.escape(page)), encoding="utf-8"
  )
  profile = directory / "profile"
  done = subprocess.run(
    [
      browser,
      *_FLAGS,
      *(["--blink-settings=preferredColorScheme=0"] if dark else []),
      f"--user-data-dir={profile}",
      "--dump-dom",
      harness.as_uri(),
    ],
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
  assert found and found[1], done.stderr
  seen = json.loads(html.unescape(found[1]))
  console = re.findall(r":CONSOLE[:(]\d+\)?\] (.*)", done.stderr)
  faults = [f"console: {line}" for line in console]
  faults += [f"request: {name}" for name in seen["requests"]]
  if seen["width"] > width:
    faults.append(f"the page is {seen['width']} px wide, not {width}")
  for figure in seen["figures"]:
    faults += [f"{figure['title']}: {each}" for each in _examine(figure)]
  return Seen(faults, seen["figures"], seen["ink"])


def _examine(figure: dict[str, Any]) -> list[str]:
  """What is wrong with a figure."""
  left, top, right, bottom = figure["box"]
  if right - left < 100 or bottom - top < 50:
    return [f"no room, {right - left:.0f} x {bottom - top:.0f} px"]
  faults = [] if figure["marks"] else ["no marks"]

  def is_inside(box) -> bool:
    a, b, c, d = box
    near = 1.0
    return (
      left - near <= a < c <= right + near
      and top - near <= b < d <= bottom + near
    )

  outside = [box for box in figure["marks"] if not is_inside(box)]
  if outside:
    faults.append(f"{len(outside)} marks outside or empty: {outside[0]}")
  scale = (right - left) / (figure["units"] or 1)
  for *box, text, size in figure["texts"]:
    if not is_inside(box):
      faults.append(f"text {text!r} is cut off")
    if size * scale < 8:
      faults.append(f"text {text!r} is {size * scale:.1f} px high")
  return faults
