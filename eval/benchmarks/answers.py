"""The answer in a reply about mathematics, and whether it is the right one.

Comparison is of normalised text or of numbers, not symbolic: an answer that is
equal only after algebra counts as wrong, both ways of decoding alike.
"""

import fractions
import re

_THOUGHT = "</think>"
_SIGNED = re.compile(r"(?:(?<![\w.)\]}])-)?(?:\d+(?:\.\d+)?|\.\d+)")
_RATIO = re.compile(r"(-?)\\frac\{(\d+)\}\{(\d+)\}|(-?)(\d+)/(\d+)")
# What LaTeX writes around a number and in place of plain characters.
_PLAIN = (
  (r"\\[$%]|\$|%", ""),
  (r"\\[!,;: ]", ""),
  (r"\{,\}", ","),
  (r"\u2212|\\minus", "-"),
  (r"\\[dt]frac", r"\\frac"),
  (r"(?<=\d),(?=\d{3}(?!\d))", ""),
)
# What may go from a formula without changing what it says.
_IDLE = (
  (r"\\left|\\right", ""),
  (r"\\(?:text|mathrm|mbox|textbf|mathbf)\{([^{}]*)\}", r"\1"),
  (r"\^\{?\\circ\}?|\\degrees?", ""),
  (r"\\frac(\d)(\d)", r"\\frac{\1}{\2}"),
  (r"\\sqrt(\d)", r"\\sqrt{\1}"),
  (r"\s+", ""),
  (r"\.$", ""),
)


def match_number(reply: str, reference: str) -> bool:
  """Whether a reply ends in this number, however it is written."""
  found, wanted = find_number(reply), _to_number(_simplify(reference))
  return found is not None and found == wanted


def match_formula(reply: str, reference: str) -> bool:
  """Whether a reply's last box holds this answer, as text or as a number."""
  found = find_boxed(reply)
  if found is None:
    return False
  ours, theirs = _normalize(found), _normalize(reference)
  if ours == theirs:
    return True
  numbers = [_to_exact(text) for text in (ours, theirs)]
  return numbers[0] is not None and numbers[0] == numbers[1]


def find_number(reply: str) -> fractions.Fraction | None:
  """The number in the last box, else after ####, else the last one.

  None if there is none, or the reply was cut off while it thought.
  """
  answer = _after_thought(reply)
  if answer is None:
    return None
  boxed = find_boxed(reply)
  if boxed is not None:
    # Units and powers of units are no part of the number.
    boxed = re.sub(r"\\(?:text|mathrm|mbox)\{[^{}]*\}|\^\{?\w+\}?", " ", boxed)
    return _to_number(_simplify(boxed))
  _, mark, after = answer.rpartition("####")
  if mark:
    first = _SIGNED.search(_simplify(after))
    return _parse(first[0]) if first else None
  return _to_number(_simplify(answer))


def find_boxed(reply: str) -> str | None:
  r"""What stands in the last \boxed{} whose braces close; None without one."""
  answer = _after_thought(reply)
  if answer is None:
    return None
  for match in reversed(list(re.finditer(r"\\f?boxed\s*\{", answer))):
    depth = 1
    for place in range(match.end(), len(answer)):
      depth += {"{": 1, "}": -1}.get(answer[place], 0)
      if depth == 0:
        return answer[match.end() : place].strip()
  return None


def _after_thought(reply: str) -> str | None:
  """The reply without its thinking; None if that never ends."""
  _, ended, after = reply.rpartition(_THOUGHT)
  if not ended and "<think>" in reply:
    return None
  return after


def _simplify(text: str) -> str:
  for pattern, plain in _PLAIN:
    text = re.sub(pattern, plain, text)
  return text


def _normalize(formula: str) -> str:
  formula = _simplify(formula)
  for pattern, rest in _IDLE:
    formula = re.sub(pattern, rest, formula)
  return re.sub(r"^[a-zA-Z]=", "", formula)


def _to_number(text: str) -> fractions.Fraction | None:
  """The text as a ratio if it is one, else the last number in it."""
  exact = _to_exact(text.strip())
  if exact is not None:
    return exact
  numbers = _SIGNED.findall(text)
  return _parse(numbers[-1]) if numbers else None


def _to_exact(text: str) -> fractions.Fraction | None:
  """The number that the whole text is; None if it is anything else."""
  if ratio := _RATIO.fullmatch(text):
    sign, over, under = ratio.groups()[:3] if ratio[2] else ratio.groups()[3:]
    return _parse(f"{sign}{over}/{under}")
  return _parse(text) if _SIGNED.fullmatch(text) else None


def _parse(digits: str) -> fractions.Fraction | None:
  try:
    return fractions.Fraction(digits)
  # Thousands of digits, as replies that repeat themselves have, or n/0.
  except (ValueError, ZeroDivisionError):
    return None
